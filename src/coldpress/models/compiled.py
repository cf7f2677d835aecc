"""``with coldpress.compiled(model):`` decode by a step that torch.compile has made, over buffers of fixed shape.

The step is one forward of the model for one token of each row. It writes the new pairs into the cache's own buffers, at
slots that are a tensor, and hides the slots that are empty; so no shape changes from token to token, and the cache is
at all times what it would be without the block: it can be cropped, forked, saved and used by other calls. What a press
does between tokens, and the encoding of pairs that are no longer the newest, is done outside of the step, as ever.

Inside the block, on the CPU, the weights of linear layers lie in memory as they are read fastest (``columns.py``).
Their values and shapes are what they were.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import NAMES, argument_name, cache_argument, given_cache
from coldpress.architecture.places import place_of
from coldpress.architecture.wrapped import transformers_model
from coldpress.cache.layer import PressedLayer
from coldpress.cache.masks import ModelCall
from coldpress.cache.phase import Phase
from coldpress.cache.pressed import PressedCache
from coldpress.cache.sight import Sights, commit
from coldpress.core.call import LayerCall
from coldpress.errors import CacheError, ModelError
from coldpress.models.backend import STEP_WATCHERS
from coldpress.models.block import is_inside
from coldpress.models.columns import by_columns
from coldpress.models.compilable import check_model, check_press, goes_on, unfit
from coldpress.models.compiling import Compiled, Watch, say
from coldpress.models.scope import Scope
from coldpress.models.step import Seen, Steps
from coldpress.models.supported import use_coldpress
from coldpress.stores.parts import Part, Sight

__all__ = ["Compiled", "compiled"]

_SUFFICES = {"use_cache": (None, True), "return_dict": (None, True), "output_attentions": (None, False),
             "output_hidden_states": (None, False), "logits_to_keep": (0, 1)}  # fmt: skip
_TAKEN = {"input_ids", "attention_mask", "position_ids", "cache_position", *NAMES, *_SUFFICES}
_STEPS: WeakKeyDictionary[nn.Module, dict[Any, Steps]] = WeakKeyDictionary()  # what torch has compiled


@contextmanager
def compiled(model: nn.Module, new_tokens: int = 256, tell: Callable[[str], None] | None = say) -> Iterator[Compiled]:
    """Inside the block, calls of ``model`` with one new token a row and a filled PressedCache are compiled.

    That is what ``generate(..., cache=cache)`` does for each token after the first; the prompt and questions
    of several tokens run as they do outside. The first such token waits for torch.compile (many seconds, and a C++
    compiler on the CPU); another block, and caches of other lengths, use what is there. On CUDA the step is a graph,
    recorded again for the buffers of each cache. The block holds for the thread that opens it and for threads that are
    started while it is open; calls from others are left alone. Of a token that is decoded inside the block and not
    compiled a block warns, once; and when it ends, if the model ran and nothing was compiled.

    Args:
        model: a causal language model, or a wrapper that runs one; it is put on coldpress's backend.
        new_tokens: room in each buffer for so many tokens after those that are stored; when it is used up, the buffers
            move to larger ones, and the step may have to be compiled again.
        tell: is given a line when torch.compile begins and when it has ended; None: nobody is told.

    Returns:
        What was compiled so far, and how long that took.

    Raises:
        ModelError: rotary frequencies that depend on the length of the text, weights that are spread over devices, or
            something that torch.compile cannot compile.
        CacheError: at the call, a cache in groups of few bits (``kv_bits=4``) or fewer channels, one with a press that
            chooses what each query reads or looks at hidden states while decoding, a mask that hides the new token or
            one that an earlier call was shown, or a cache that is no PressedCache.
    """
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise CacheError(f"new_tokens must be a whole number from 1 on, got {new_tokens!r}.")
    inner = transformers_model(model)
    use_coldpress(inner)
    check_model(inner)
    if "forward" in vars(inner):
        raise ModelError(
            "This model's forward has been replaced already, by another compiled() block perhaps; leave that first."
        )
    decoder = _Decoder(inner, new_tokens, tell)
    with ExitStack() as stack:
        if inner.device.type == "cpu":
            stack.enter_context(by_columns(inner))
        inner.forward = decoder.forward
        stack.callback(delattr, inner, "forward")
        STEP_WATCHERS.append(decoder.watch)
        stack.callback(STEP_WATCHERS.remove, decoder.watch)
        yield decoder.done
        if decoder.n_eager and not decoder.n_steps and not decoder.has_warned:
            warnings.warn(
                f"{type(inner).__name__} ran inside this compiled() block, and nothing was compiled: only calls with "
                "input_ids of one new token a row and a filled PressedCache are.",
                stacklevel=3,
            )


class _Decoder:
    """The forward of one model in the threads of one block, instead of its own."""

    def __init__(self, model: PreTrainedModel, new_tokens: int, tell: Callable[[str], None] | None):
        self.model, self.scope, self.tell, self.done = model, Scope(), tell, Compiled()
        self.eager = model.forward
        self.n_steps = self.n_eager = 0  # calls inside the block, for the step (it may refuse them) and others
        self.here = threading.local()  # has is_called while the model itself runs as outside of the block
        self.has_warned = False
        self.sights = Sights(new_tokens)
        self.modules: dict[int, nn.Module] = {
            m.layer_idx: m
            for m in model.modules()
            if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")
        }

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
            self.here.is_called = True
            try:
                return self.eager(*args, **kwargs)
            finally:
                self.here.is_called = False

        self.forward = forward

    def watch(self, module: nn.Module, layer: object) -> None:
        """Warn, once, of a token that ``module`` decodes as it would outside of the block."""
        if self.has_warned or not isinstance(layer, PressedLayer) or layer.phase is not Phase.LATER:
            return
        if (
            not self.scope.holds()
            or self.modules.get(layer.index) is not module
            or layer.session.on_attention is not None
        ):
            return
        self.has_warned, name = True, type(self.model).__name__
        is_called = getattr(self.here, "is_called", False)
        reason = "this call has no input_ids" if is_called else f"a part of {name} was called, not the model itself"
        warnings.warn(
            f"A token is decoded inside this compiled() block and not compiled: {reason}. Call the model with "
            "input_ids, as generate() does.",
            stacklevel=2,
        )

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
        if self.model.training and _drops(self.model):
            raise ModelError("A compiled step does not drop numbers at random, as in training; call model.eval().")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise ModelError("A compiled step has no gradients; call it under torch.no_grad() or inference_mode().")
        layers = self._checked_layers(cache, ids.shape[0])
        found = self.sights.of(layers, self._begin(cache, layers, mask))
        if found is None:
            raise CacheError(unfit(cache.storage))
        position = given.get("position_ids")
        if position is None:
            position = torch.full_like(ids, cache.seen_tokens)
        is_watched = goes_on(cache.press)
        logits, seen = self._run(ids, position, *found, is_watched)
        rotation = self._rotation(position) if is_watched else None
        for layer in layers:  # nothing has been counted before, so a step that fails has not been
            commit(layer, self._call(layer, seen[layer.index], rotation) if is_watched else None)
        return CausalLMOutputWithPast(logits=logits.clone(), **cache_argument(cache))

    def _checked_layers(self, cache: PressedCache, n_rows: int) -> list[PressedLayer]:
        """The layers, of a cache whose press leaves attention itself alone."""
        cache.session.check_claimed()
        check_press(cache.press)
        layers = cache.pressed_layers()
        if len(layers) != len(cache.layers):
            raise CacheError("Layers that keep a state beside their pairs cannot be compiled; leave compiled() out.")
        for layer in layers:
            if layer.slots.filled.n_rows != n_rows:
                raise CacheError(f"The cache holds {layer.slots.filled.n_rows} rows and the call has {n_rows}.")
        return layers

    def _begin(self, cache: PressedCache, layers: list[PressedLayer], mask: Tensor | None) -> ModelCall:
        """Note the call and its mask."""
        session, seen = cache.session, cache.seen_tokens
        if mask is not None:
            if mask.dim() != 2 or mask.shape[1] != seen + 1 or mask.shape[0] != layers[0].slots.filled.n_rows:
                raise CacheError(
                    f"A compiled step takes a mask of all {seen + 1} tokens of each row, [rows, tokens], or none; "
                    f"this one has the shape {tuple(mask.shape)}."
                )
            mask = mask.bool()
        session.begin(seen, 1, mask, layers[0].shown)
        call = session.call
        assert call is not None
        if call.hides_new or call.hides_shown:
            raise CacheError(
                "This mask hides the new token, or one that an earlier call was shown; compiled() decodes with the "
                "padding of the prompt alone. Leave the block for such a call."
            )
        if call.shown is not None and cache.press is not None and cache.press.n_waiting:
            raise CacheError(f"{cache.press!r} frees tokens of padded rows one by one; leave compiled() out.")
        return call

    def _run(
        self, ids: Tensor, position: Tensor, parts: list[Part], sights: list[Sight], is_watched: bool
    ) -> tuple[Tensor, dict[int, Seen]]:
        """A step, by what torch has compiled for such layers, or compiles now."""
        kinds = tuple((type(p), *(part is None for part in s)) for p, s in zip(parts, sights, strict=True))
        n_parts = torch.get_num_threads() if ids.device.type == "cpu" else 0
        steps = _STEPS.setdefault(self.model, {}).setdefault((kinds, is_watched), Steps())
        way, name = _way(self.model, parts), argument_name(self.eager)
        try:
            with Watch(self.done, type(self.model).__name__, self.tell, not steps.has(way)):
                output = steps.run(way, self.model, self.eager, ids, position, parts, sights, is_watched, n_parts, name)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"torch.compile cannot compile a step of {type(self.model).__name__}; leave compiled() out. ({reason})"
            ) from error
        self.done.steps += 1
        return output

    def _rotation(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """The cosines and sines of a step, as the model's own embedding makes them; None where it has none of its own.

        A press that has to know how the tokens were rotated then refuses.
        """
        embedding = getattr(self.model.base_model, "rotary_emb", None)
        if embedding is None or len(inspect.signature(embedding.forward).parameters) != 2:
            return None
        cos, sin = embedding(torch.empty(1, 1, 1, dtype=self.model.dtype, device=position.device), position)
        return cos, sin

    def _call(self, layer: PressedLayer, seen: Seen, rotation: tuple[Tensor, Tensor] | None) -> LayerCall:
        """A call of a layer's attention, as the press is told of it."""
        module = self.modules[layer.index]
        config: Any = module.config
        rank, n_layers, is_local = place_of(config, layer.index)
        return LayerCall(
            module=module,
            query=seen.query.clone() if seen.query.device.type == "cuda" else seen.query,  # a graph's are its own
            scaling=seen.scaling,
            softcap=seen.softcap,
            sinks=seen.sinks,
            sliding_window=seen.sliding_window,
            layer_idx=rank,
            n_layers=n_layers,
            is_local=is_local and seen.sliding_window is not None,
            rotation=rotation,
        )


def _drops(model: PreTrainedModel) -> bool:
    """Whether the model drops numbers at random while it is trained."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or bool(getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0))


def _way(model: PreTrainedModel, parts: list[Part]) -> tuple[Any, ...]:
    """What is a constant of a compiled step, so that torch compiles it again where it is another."""
    keys, device = parts[0].keys, parts[0].keys.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), keys.is_inference(), torch.get_num_threads()
    return *modes, autocast, device, model.dtype, keys.dtype
