"""``with coldpress.compiled(model):`` decode by a step that torch.compile has made, over buffers of fixed shape.

The step is one forward of the model for one token of each row. It writes the new pairs into the cache's own buffers, at
a slot that is a tensor, and hides the slots that are empty; so no shape changes from token to token, and the cache is
at all times what it would be without the block: it can be cropped, forked, saved and used by other calls.

One row on the CPU is a product of each weight matrix with a vector, which takes as long as the weights are read. A
matrix whose columns are contiguous is read faster than one whose rows are: so inside the block the weights of linear
layers lie in memory by columns. Their values and shapes are what they were.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import NAMES, argument_name, cache_argument, given_cache
from coldpress.architecture.wrapped import transformers_model
from coldpress.cache.layer import PressedLayer
from coldpress.cache.pressed import PressedCache
from coldpress.cache.slots import BIAS
from coldpress.errors import CacheError, ModelError
from coldpress.models.block import is_inside
from coldpress.models.scope import Scope
from coldpress.models.supported import use_coldpress
from coldpress.stores.dense import DenseStore

__all__ = ["OneRow", "by_columns", "compiled"]

_CAPACITY_TOKENS = 64  # buffers are whole multiples of this, so that texts of similar lengths share a compiled step
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SUFFICES = {"use_cache": (None, True), "return_dict": (None, True), "output_attentions": (None, False),
             "output_hidden_states": (None, False), "logits_to_keep": (0, 1)}  # fmt: skip
_TAKEN = {"input_ids", "attention_mask", "position_ids", "cache_position", *NAMES, *_SUFFICES}


@contextmanager
def compiled(model: nn.Module, new_tokens: int = 256) -> Iterator[None]:
    """Inside the block, calls of ``model`` with one new token a row and a filled PressedCache are compiled.

    That is what ``generate(..., cache=cache)`` does for each token after the first; the prompt and questions
    of several tokens run as they do outside. The first such token waits for torch.compile (many seconds, and a C++
    compiler on the CPU); another block, and caches of other lengths, use what is there. On CUDA the step is a graph.
    The block holds for the thread that opens it and for threads that are started while it is open; calls from others
    are left alone. A block in which the model runs and nothing is compiled warns when it ends.

    Args:
        model: a causal language model, or a wrapper that runs one; it is put on coldpress's backend.
        new_tokens: room in each buffer for so many tokens after those that are stored; when it is used up, the buffers
            move to larger ones, and the step may have to be compiled again.

    Raises:
        ModelError: sliding windows, soft caps, attention sinks, rotary frequencies that depend on the length of the
            text, weights that are spread over devices, or something that torch.compile cannot compile.
        CacheError: at the call, a cache whose heads store different numbers of pairs, in few bits or fewer channels,
            one with padding, with a press that goes on while decoding, or one that is no PressedCache.
    """
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise CacheError(f"new_tokens must be a whole number from 1 on, got {new_tokens!r}.")
    inner = transformers_model(model)
    use_coldpress(inner)
    _check_model(inner)
    if "forward" in vars(inner):
        raise ModelError(
            "This model's forward has been replaced already, by another compiled() block perhaps; leave that first."
        )
    decoder = _Decoder(inner, new_tokens)
    with ExitStack() as stack:
        if inner.device.type == "cpu":
            stack.enter_context(by_columns(inner))
        inner.forward = decoder.forward
        stack.callback(delattr, inner, "forward")
        yield
        if decoder.n_eager and not decoder.n_steps:
            warnings.warn(
                f"{type(inner).__name__} ran inside this compiled() block, and nothing was compiled: only calls with "
                "input_ids of one new token a row and a filled PressedCache are.",
                stacklevel=3,
            )


def _check_model(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ModelError(f"{name} has layers of {', '.join(sorted(kinds))}; a compiled step knows full attention only.")
    rotary = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", rotary.get("type"))
    if kind in ("dynamic", "longrope"):
        raise ModelError(f"{name} has rotary frequencies that depend on the text ({kind}), which cannot be compiled.")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError(f"{name} is spread over several devices; a compiled step needs all weights on one.")


class _Decoder:
    """The forward of one model in the threads of one block, instead of its own."""

    def __init__(self, model: PreTrainedModel, new_tokens: int):
        self.model, self.new_tokens, self.scope = model, new_tokens, Scope()
        self.eager = model.forward
        self.n_steps = self.n_eager = 0  # calls inside the block, for the step (it may refuse them) and others
        self.buffers: WeakKeyDictionary[DenseStore, int] = WeakKeyDictionary()  # that are prepared, by their addresses
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self.step = torch.compile(_step, fullgraph=True, mode=mode)

        @functools.wraps(self.eager)  # generate() looks at the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(self.eager).bind_partial(*args, **kwargs).arguments
            given = {**{k: v for k, v in call.items() if k != "kwargs"}, **call.get("kwargs", {})}
            if not self.scope.holds():
                return self.eager(*args, **kwargs)
            if self._is_step(given):
                self.n_steps += 1
                return self._decode(given)
            self.n_eager += 1
            return self.eager(*args, **kwargs)

        self.forward = forward

    def _is_step(self, given: dict[str, Any]) -> bool:
        ids, cache = given.get("input_ids"), given_cache(given)
        if not isinstance(ids, Tensor) or ids.shape[1] != 1 or not isinstance(cache, Cache):
            return False
        if not isinstance(cache, PressedCache):
            return bool(cache.get_seq_length())  # and is refused
        is_whole = cache.chunk_tokens is None or all(layer.phase.is_whole for layer in cache.pressed_layers())
        return (
            cache.seen_tokens > 0 and is_whole and cache.session.on_attention is None
        )  # a press that watches sees eager calls

    def _decode(self, given: dict[str, Any]) -> CausalLMOutputWithPast:
        ids, cache, mask = given["input_ids"], given_cache(given), given.get("attention_mask")
        if not isinstance(cache, PressedCache):
            raise CacheError(f"compiled() decodes from a PressedCache, not from a {type(cache).__name__}.")
        for name, value in given.items():
            if name not in _TAKEN and value is not None:
                raise ModelError(f"A compiled step does not take {name}; leave it out, or leave the compiled() block.")
            if name in _SUFFICES and not any(value is allowed or value == allowed for allowed in _SUFFICES[name]):
                raise ModelError(f"A compiled step does not take {name}={value!r}; leave the compiled() block for it.")
        if is_inside(self.model):
            raise CacheError(
                "Inside 'with press(model):' each call is watched, which cannot be compiled. Give the press to the "
                "cache, PressedCache(press), or leave its block before decoding."
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise ModelError("A compiled step has no gradients; call it under torch.no_grad() or inference_mode().")
        if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
            raise CacheError("compiled() decodes without padding and other masks; leave the block for such a batch.")
        layers = self._static_layers(cache, ids.shape[0])
        seen = cache.seen_tokens
        position = given.get("position_ids")
        if position is None:
            position = torch.full_like(ids, seen)
        at = torch.tensor([layer.slots.n for layer in layers], device=ids.device)
        keys, values = zip(*(layer.slots.filled.tensors() for layer in layers), strict=True)
        name = argument_name(self.eager)
        n_parts = torch.get_num_threads() if ids.device.type == "cpu" else 0
        try:
            logits = self.step(self.model, self.eager, ids, position, at, list(keys), list(values), n_parts, name)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"torch.compile cannot compile a step of {type(self.model).__name__}; leave compiled() out. ({reason})"
            ) from error
        for layer in layers:  # nothing has been counted before, so a step that fails has not been
            layer.commit(1)
        return CausalLMOutputWithPast(logits=logits.clone(), **cache_argument(cache))

    def _static_layers(self, cache: PressedCache, n_rows: int) -> list[PressedLayer]:
        """The layers, each with room for one token at least in buffers that are its own."""
        cache.session.check_claimed()
        cache.session.branches = []  # the prefill is over
        if cache.press is not None and cache.press.evicts_while_decoding:
            raise CacheError(f"{cache.press!r} goes on while decoding, which cannot be compiled; leave compiled() out.")
        if cache.session.roles.readers or cache.session.roles.observers:
            raise CacheError(f"{cache.press!r} is asked in each call, which cannot be compiled; leave compiled() out.")
        layers = cache.pressed_layers()
        if len(layers) != len(cache.layers):
            raise CacheError("Layers that keep a state beside their pairs cannot be compiled; leave compiled() out.")
        for layer in layers:
            store = layer.slots.store
            if not isinstance(store, DenseStore) or not store.is_plain or layer.slots.has_gaps:
                raise CacheError(
                    "compiled() needs heads that store equally many pairs, as they are: not AdaKV and its kind, padded "
                    "batches, kv_bits or ThinK. Leave compiled() out, or take a press that keeps as many in each head."
                )
            if layer.slots.has(BIAS.name):
                raise CacheError("Pairs that stand for several tokens cannot be compiled; leave compiled() out.")
            if layer.window is not None:
                raise ModelError(f"{type(self.model).__name__} has sliding windows; leave compiled() out.")
            if store.n_rows != n_rows:
                raise CacheError(f"The cache holds {store.n_rows} rows and the call has {n_rows}.")
            if store.room < 1 or self.buffers.get(store) != store.tensors()[1].data_ptr():
                store.own(-(-(store.n + self.new_tokens) // _CAPACITY_TOKENS) * _CAPACITY_TOKENS)
                _prepare(store)
                self.buffers[store] = store.tensors()[1].data_ptr()
        return layers


def _prepare(store: DenseStore) -> None:
    """Fill empty slots with zeros: they are hidden, but multiplied by zero, so they have to be finite."""
    for buffer in store.tensors():
        buffer[:, :, store.n :] = 0
        if buffer.device.type == "cuda":
            torch._dynamo.mark_static_address(buffer)  # a graph then writes to it in place


def _step(
    model: PreTrainedModel,
    forward: Any,
    ids: Tensor,
    position: Tensor,
    at: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    n_parts: int,
    cache_name: str,
) -> Tensor:
    """Logits ``[B, 1, V]`` of one token a row; its pairs are in slot ``at[layer]`` of every layer's buffers afterwards.

    Which slots each layer hides goes through the model as a mask of its own kind, which the attention function knows.
    """
    capacity = max(buffer.shape[2] for buffer in keys)
    hidden = torch.arange(capacity, device=ids.device) > at[:, None]  # [L, capacity]
    cache = _StepCache(keys, values, at)
    with OneRow(n_parts):
        output = forward(
            input_ids=ids,
            attention_mask=hidden[:, None, None].to(torch.uint8),
            position_ids=position,
            use_cache=True,
            **{cache_name: cache},
        )
    logits: Tensor = output.logits
    return logits


class _StepCache(Cache):
    """A cache to the model: it writes one pair per head and returns whole buffers."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], at: Tensor):
        self.layers: list[Any] = []
        self.all_keys, self.all_values, self.at = keys, values, at

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values, at = self.all_keys[layer_idx], self.all_values[layer_idx], self.at[layer_idx : layer_idx + 1]
        keys.index_copy_(2, at, key_states)
        values.index_copy_(2, at, value_states)
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return 0  # not needed: positions and mask are given

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.all_keys[0].shape[2], 0


class OneRow(TorchFunctionMode):
    """A linear layer of one row, whose weights lie by columns, is a sum of these columns with weights.

    ``embedding_bag`` is the operation of torch that reads them fastest: it fetches ahead.
    """

    def __init__(self, n_parts: int):
        super().__init__()
        self.n_parts = n_parts  # each bag is added up by one thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear and self.n_parts and not kwargs:
            return self.linear(*args)
        return func(*args, **kwargs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = weight.shape[1]
        if x.numel() != n or x.dtype != weight.dtype or weight.dtype not in _DTYPES or weight.stride(0) != 1:
            return linear(x, weight, bias)
        starts = torch.arange(self.n_parts) * (n // self.n_parts)
        sums = embedding_bag(torch.arange(n), weight.t(), starts, mode="sum", per_sample_weights=x.reshape(n))
        output = sums.sum(0) if self.n_parts > 1 else sums[0]
        output = output if bias is None else output + bias
        return output.reshape(*x.shape[:-1], weight.shape[0])


@contextmanager
def by_columns(model: PreTrainedModel) -> Iterator[None]:
    """Store the weights of linear layers by columns inside the block; afterwards as before."""
    weights = {id(m.weight): m.weight for m in model.modules() if type(m) is nn.Linear and m.weight.dtype in _DTYPES}
    moved = []
    try:
        for weight in weights.values():
            if weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()
                moved.append(weight)
        yield
    finally:
        for weight in moved:
            weight.data = weight.data.contiguous()
