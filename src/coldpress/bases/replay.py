"""ReplayPress: show the model the text a second time, and choose among the pairs of all layers together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.places import place_of
from coldpress.architecture.projection import weight_of_heads
from coldpress.architecture.rope import stand_at
from coldpress.bases.scorer import BUDGETS, BudgetPress
from coldpress.cache.place import place_of_layer
from coldpress.core.call import LayerCall
from coldpress.core.choice import protect, select_counts
from coldpress.core.column import PINNED
from coldpress.core.counts import counts_together
from coldpress.core.forced import must_keep
from coldpress.core.kept import Kept
from coldpress.core.requirements import require_block
from coldpress.core.view import LayerView
from coldpress.errors import ModelError, PressError

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache

__all__ = ["ReplayPress", "check_one_text", "chunk_view", "projected_norms"]

_OnAttention = Callable[["PressedLayer", LayerCall], None]
_BLOCK_ELEMENTS = 1 << 22  # projected values in memory at once while their norms are computed (16 MiB)


@dataclass(frozen=True)
class ReplayPress(BudgetPress):
    """A press whose scores come from running the model again after the prefill; subclasses define :meth:`scores`.

    The replay runs on a fork of the cache, which costs the keys and values once more while it lasts, and time that
    counts as prefill. One text at a time: batches are refused before anything is computed. Every head keeps at least
    one pair.

    Args:
        compression_ratio, budget_tokens, budget_bytes: as in :class:`BudgetPress`; over all layers and heads together.
    """

    per_head = True
    per_layer = True
    needs_model = True

    def scores(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer]
    ) -> list[Tensor]:
        """Scores of every pair of ``layers``: float32 ``[1, Hkv, T]`` each; larger = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define scores(cache, model, token_ids, layers)")

    def n_first(self, token_ids: Tensor) -> int:
        """How many of the first tokens are kept whatever their score."""
        return 0

    def counts(self, scores: Sequence[Tensor], n_keep: int, n_safe: int) -> list[Tensor]:
        """How many pairs each head keeps, int64 ``[1, Hkv]`` by layer: the best of all layers and heads.

        Args:
            scores: as :meth:`scores`, infinite where protected.
            n_keep: mean over layers and heads.
            n_safe: least number of any head.
        """
        return counts_together(scores, n_keep, n_safe)

    @property
    def compresses(self) -> bool:
        """Whether there is a ratio or budget at all."""
        return any(getattr(self, name) for name in ("compression_ratio", *BUDGETS))

    def compress(self, view: LayerView) -> Kept | None:
        if self.keep(view) < view.n_tokens:
            require_block(self, view.token_ids)
        return None

    def check_prefill(self, token_ids: Tensor, has_padding: bool) -> None:
        if self.compresses:
            check_one_text(self, token_ids, has_padding)

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        layers, n_keep = self.budget(cache, model, token_ids)
        if n_keep < token_ids.shape[1]:
            self.evict(cache, model, token_ids, layers, n_keep)

    def budget(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> tuple[list[PressedLayer], int]:
        """The layers that are compressed, and how many pairs a head of them keeps, mean over layers and heads."""
        n_tokens, layers, n_keep = token_ids.shape[1], [], token_ids.shape[1]
        for layer in cache.pressed_layers():
            rank, n_layers, is_local = place_of(_config(model), layer.index)
            if not is_local and layer.keys is not None and layer.values is not None:
                n_keep = min(n_keep, self.keep_of(n_tokens, place_of_layer(layer, rank, n_layers)))
                layers.append(layer)
        return layers, n_keep

    def evict(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer], n_keep: int
    ) -> None:
        """Have each head of ``layers`` keep ``n_keep`` pairs, mean over layers and heads."""
        protected = min(self.n_first(token_ids), token_ids.shape[1]), 0
        musts = [
            must_keep(layer.positions(), token_ids.shape[1], protected, n_keep, layer.columns().get(PINNED))
            for layer in layers
        ]
        found = self.scores(cache, model, token_ids, layers)
        scores = [protect(part, must) for part, must in zip(found, musts, strict=True)]
        counts = self.counts(scores, n_keep, max(1, *(int(must.sum(-1).max()) for must in musts)))
        for layer, part, count in zip(layers, scores, counts, strict=True):
            layer.keep(select_counts(part, count))

    def run(self, cache: PressedCache, model: nn.Module, on_attention: _OnAttention, n_new: int, **inputs: Any) -> None:
        """Run ``model`` on ``n_new`` more tokens after those in ``cache``, which does not notice.

        Args:
            on_attention: shown each attention call, with the layer that stores the pairs of both; what watches the
                attention of ``cache`` is shown it too.
            inputs: ``input_ids`` or ``inputs_embeds``.

        Raises:
            PressError: the new tokens cannot see all of the text, or the model has no position for them.
        """
        end = cache.seen_tokens + n_new
        windows = [
            layer.window
            for layer in cache.pressed_layers()
            if layer.window is not None and not place_of(_config(model), layer.index)[2]
        ]
        if windows and min(windows) < end:
            raise PressError(
                f"{type(self).__name__} shows the model the text a second time, and layers of this model see only "
                f"{min(windows)} tokens back, of {end} then."
            )
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        positions = getattr(_config(model), "max_position_embeddings", None)
        if len(embeddings) > 1 and positions is not None and end > positions:  # learned: there is nothing beyond them
            raise PressError(
                f"{type(self).__name__} shows the model the text a second time, up to position {end}, and the model "
                f"has {positions} positions; give it a shorter text."
            )
        fork = cache.fork()
        fork.session.press, fork.session.storage = None, None
        watching = [on_attention, *([cache.session.on_attention] if cache.session.on_attention else [])]

        def on_every_attention(layer: PressedLayer, call: LayerCall) -> None:
            for watch in watching:
                watch(layer, call)

        fork.session.on_attention = on_every_attention
        takes = inspect.signature(model.forward).parameters
        if "logits_to_keep" in takes:  # attention is all that is looked at
            inputs["logits_to_keep"] = 1
        if "position_ids" in takes:  # some models that see images count otherwise
            at = torch.arange(cache.seen_tokens, end, device=next(iter(inputs.values())).device)
            inputs["position_ids"] = at[None]
        model(**cache_argument(fork, model), use_cache=True, **inputs)
        stand_at(model, cache.seen_tokens)  # as if it had not been run


def check_one_text(press: object, token_ids: Tensor, has_padding: bool) -> None:
    """Raise :class:`PressError` if a prefill has several texts, or padding, so that it cannot be shown again."""
    if token_ids.shape[0] > 1 or has_padding:
        what = "a padded text" if token_ids.shape[0] == 1 else f"a batch of {token_ids.shape[0]}"
        raise PressError(
            f"{type(press).__name__} shows the model one text a second time, and this prefill is {what}: run texts "
            "one by one and without padding (batch_size 1, no beams before the prefill)."
        )


def _config(model: nn.Module) -> Any:
    """That of the decoder, where a model sees images too."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def chunk_view(layer: PressedLayer, call: LayerCall, slots: Tensor) -> LayerView:
    """The queries of a replay, and of the pairs before them those in ``slots``, as if there were no others.

    Args:
        layer, call: what :attr:`Session.on_attention` was shown.
        slots: int64 ``[n]``, ascending.
    """
    assert layer.keys is not None and layer.values is not None
    n_queries, seen = call.query.shape[2], layer.stored_length
    slots = torch.cat([slots, torch.arange(seen - n_queries, seen, device=slots.device)])
    keys = layer.keys[:, :, slots]
    return LayerView(
        keys,
        layer.values[:, :, slots],
        call.query,
        module=call.module,
        scaling=call.scaling,
        layer_idx=call.layer_idx,
        n_layers=call.n_layers,
        first_position=seen - slots.shape[0],
        positions=slots.expand(keys.shape[:3]),
        softcap=call.softcap,
        sinks=call.sinks,
    )


def projected_norms(module: nn.Module, values: Tensor, n_heads: int) -> Tensor:
    """``||W_O v||_2`` of every value behind each query head: float32 ``[B, Hkv, G, T]``.

    Args:
        module: the attention layer.
        values: ``[B, Hkv, T, Dv]``.
        n_heads: its query heads, Hkv * G.
    """
    heads = weight_of_heads(module, n_heads, values)
    block = max(1, _BLOCK_ELEMENTS // (len(values) * n_heads * heads.shape[3]))
    parts = [(part.float()[:, :, None] @ heads).norm(dim=-1) for part in values.split(block, dim=2)]
    return torch.cat(parts, dim=-1)


def last_block(model: nn.Module) -> nn.Module:
    """The last decoder layer of ``model``, whose output has not been through the final norm."""
    return decoder_layers(model)[-1]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of ``model``, from the first to the last.

    Raises:
        ModelError: the model has no list of as many layers as its configuration says.
    """
    n_layers = getattr(_config(model), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {n_layers} decoder layers that coldpress can find.")
