"""What the layers of one cache share, and what one thread passes from the cache to the attention function."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coldpress.errors import ModelError
from coldpress.rope import Rope, layer_type
from coldpress.rotation import Steps, given_rotation

if TYPE_CHECKING:
    from coldpress.cache import PressedCache
    from coldpress.layer import PressedLayer
    from coldpress.presses.base import BasePress
    from coldpress.quantised import KVBits
    from coldpress.view import LayerCall

__all__ = ["THREAD", "Session"]


class _Thread(threading.local):
    """What one thread passes from the cache to the mask function and to the attention function."""

    updated: PressedLayer | None = None  # updated last, not yet claimed by an attention call
    masks_for: Session | None = None  # its cache was asked for mask sizes just now
    leaves_masks_out: bool = False  # the mask function served a PressedCache last, so layers make their masks
    hidden_states: tuple[nn.Module, Tensor] | None = None  # what an attention module was given, where a press asks


THREAD = _Thread()


class Session:
    """What the layers of one cache share: the press, and what the run has accumulated."""

    def __init__(self, press: BasePress | None = None, rerotates: bool = False, kv_bits: KVBits | None = None):
        self.press = press
        self.chunk_tokens: int | None = None  # that the prompt comes in at most at once
        self.prefill_end: int | None = None  # length of the prompt, while prefill() feeds it
        self.rerotates = rerotates  # keys that stay move up, so that no gaps are left between positions
        self.kv_bits = kv_bits  # how pairs are held, None: as they are
        self.branches: list[weakref.ref[PressedCache]] = []  # caches that this one's prefill fills too
        self.unclaimed: PressedLayer | None = None
        self.error: Exception | None = None  # what the press of a branch raised during the shared prefill
        self.seen: int | None = None  # logical length before the call that is under way
        self.has_padding = False  # of the prompt, by its attention mask
        self.token_ids: Tensor | None = None  # int64 [B, T] of the prefill, where somebody told them
        self.find_model: Callable[[], nn.Module | None] = lambda: None  # what runs, inside 'with press(model):'
        self.look: Callable[[PressedLayer, LayerCall], None] | None = None  # shown every call, before anything goes
        self._n_layers = 0
        self._seed: int | None = None
        self._ropes: dict[Any, Rope | None] = {}
        self._steps: dict[str, Steps] = {}  # from token to token, by kind of layer

    @property
    def seed(self) -> int:
        """Drawn once per cache from torch's default generator."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, (1,)).item())
        return self._seed

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file can hold: what belongs to a run or a model is left out, and found again."""
        of_a_run = ("branches", "find_model", "look", "_ropes")
        return {name: value for name, value in vars(self).items() if name not in of_a_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(Session()) | state)

    def new_layer(self) -> PressedLayer:
        """The next layer of the cache, in order."""
        from coldpress.layer import PressedLayer

        self._n_layers += 1
        return PressedLayer(self, self._n_layers - 1)

    def live_branches(self) -> list[PressedCache]:
        """The branches that somebody still wants; none once the prefill is over."""
        return [branch for ref in self.branches if (branch := ref()) is not None]

    def reset(self) -> None:
        self.branches = []
        self.unclaimed = self.error = self.seen = self.prefill_end = self._seed = None
        self.has_padding = False
        self.token_ids = None
        self.forget_steps()
        self._ropes = {}  # of the next text's frequencies, should they depend on the text

    def follow(self, other: Session) -> None:
        """Take over what is known of the pairs of ``other``'s cache, which this session's cache holds too."""
        self.rerotates, self.has_padding, self._seed = other.rerotates, other.has_padding, other._seed
        self.find_model, self._ropes = other.find_model, dict(other._ropes)
        self._steps = {kind: replace(steps) for kind, steps in other._steps.items()}

    def rope(self, module: nn.Module, device: torch.device) -> Rope | None:
        """The rotary embedding of ``module``; built once for each kind of layer."""
        kind = (*Rope.kind(module), device)
        if kind not in self._ropes:
            self._ropes[kind] = Rope.of(module, device, self.find_model())
        return self._ropes[kind]

    @property
    def goes_on(self) -> bool:
        """Whether pairs of several calls may be unrotated or moved together."""
        press = self.press
        return self.rerotates or self.chunk_tokens is not None or (press is not None and press.goes_on)

    def steps(self, module: nn.Module) -> Steps:
        """How tokens follow each other in the layers of ``module``'s kind, as far as somebody has noted it."""
        return self._steps.setdefault(layer_type(module), Steps())

    def note_steps(self, module: nn.Module, n_new: int, seen: int, padding: Tensor | None) -> None:
        """Note how ``module``, whose forward is under way, was told to rotate; once for each call and kind of layer.

        The other arguments are those of :meth:`Steps.note`.
        """
        steps = self.steps(module)
        if steps.seen != seen:
            steps.note(given_rotation(module), n_new, seen, padding)

    def forget_steps(self) -> None:
        """Another text comes."""
        self._steps = {}

    def check_claimed(self) -> None:
        if self.error is not None:
            raise self.error
        if self.unclaimed is not None:
            raise ModelError(
                "This PressedCache was updated but coldpress's attention never ran on its keys and values: the model "
                "uses another attention backend, attends with something else than it caches (latent and differential "
                "attention do), or an earlier call failed half-way. Run the model on coldpress, with "
                "from_pretrained(..., attn_implementation='coldpress'), model.set_attn_implementation('coldpress') or "
                "'with press(model):', and start with a new or reset cache."
            )
