"""What the layers of one cache share, and what one thread passes from the cache to the attention function."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from coldpress.errors import ModelError
from coldpress.rope import Rope, layer_type
from coldpress.rotation import Steps, given_rotation, rotates
from coldpress.versions import check_versions

if TYPE_CHECKING:
    from coldpress.cache import PressedCache
    from coldpress.layer import PressedLayer
    from coldpress.presses.base import BasePress
    from coldpress.quantised import KVBits
    from coldpress.view import LayerCall

__all__ = ["THREAD", "Session", "uncompiled"]


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """``function`` that torch.compile leaves as it is where it traces the caller: it breaks the graph there."""
    reason = (
        "a PressedCache is filled and read outside of graphs; compile without fullgraph=True, or decode inside 'with "
        "coldpress.compiled(model):'"
    )
    outside = torch.compiler.disable(function, reason=reason)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call  # type: ignore[return-value]


class _Thread(threading.local):
    """What one thread passes from the cache to the mask function and to the attention function."""

    def __init__(self) -> None:  # once in each thread; what torch.compile traces may rely on all of them being there
        self.updated: PressedLayer | None = None  # updated last, not yet claimed by an attention call
        self.masks_for: Session | None = None  # its cache was asked for mask sizes just now
        # what an attention module was given, where a press asks
        self.hidden_states: tuple[nn.Module, Tensor] | None = None
        self.leaves_masks_out = False  # the mask function served a PressedCache last, so layers make their masks


THREAD = _Thread()


class Session:
    """What the layers of one cache share: the press, and what the run has accumulated."""

    def __init__(self, press: BasePress | None = None, rerotates: bool = False, kv_bits: KVBits | None = None):
        check_versions()
        self.press = press
        self.earlier_press: BasePress | None = None  # of a block that has ended
        self.switch_at: int | None = None  # tokens after which the model changes its rotary frequencies
        self.was_asked = False  # the press has been shown pairs
        self.chunk_tokens: int | None = None  # that the prompt comes in at most at once
        self.prefill_end: int | None = None  # length of the prompt, while prefill() feeds it
        self.rerotates = rerotates  # keys that stay move up, so that no gaps are left between positions
        self.kv_bits = kv_bits  # how pairs are held, None: as they are
        self.branches: list[weakref.ref[PressedCache]] = []  # caches that this one's prefill fills too
        self.unclaimed: PressedLayer | None = None
        self.error: Exception | None = None  # what the press of a branch raised during the shared prefill
        self.seen: int | None = None  # logical length before the call that is under way
        # bool [B, seen], False for tokens that no call so far was shown (padding); None: all were shown
        self.shown: Tensor | None = None
        self.hides_shown = False  # whether the mask of the call under way hides tokens that an earlier call was shown
        self.hides_new = False  # whether it hides tokens of its own
        self._new: list[int] | None = None  # how many real tokens it brings, in each row
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
        self.shown, self.hides_shown, self.hides_new = None, False, False
        self.was_asked, self.token_ids, self.earlier_press = False, None, None
        self.forget_steps()
        self._ropes = {}  # of the next text's frequencies, should they depend on the text

    def follow(self, other: Session) -> None:
        """Take over what is known of the pairs of ``other``'s cache, which this session's cache holds too."""
        self.rerotates, self._seed = other.rerotates, other._seed
        self.earlier_press, self.was_asked, self.switch_at = other.earlier_press, other.was_asked, other.switch_at
        self.find_model, self._ropes = other.find_model, dict(other._ropes)
        self._steps = {kind: replace(steps) for kind, steps in other._steps.items()}

    def note_mask(self, mask: Tensor | None, n_new: int) -> Tensor | None:
        """Take note of the mask of a call that begins, and return it, or None if it hides nothing.

        Kept pairs are of tokens that were shown. So as long as masks hide what was never shown, no layer has to look up
        which of its kept pairs a mask hides.

        Args:
            mask: bool ``[B, seen]``, the ``n_new`` tokens of the call last; False where a token is hidden.
        """
        shown, self.shown, self.hides_shown, self.hides_new, self._new = self.shown, None, False, False, None
        if mask is None or bool(mask.all()):
            return None
        n = mask.shape[1] - n_new
        self.hides_new = not bool(mask[:, n:].all())
        if shown is not None and torch.equal(shown[:, :n], mask[:, :n]):
            self.shown = torch.cat([shown[:, :n], mask[:, n:]], dim=1)  # the mask itself may change later
            return mask
        before = mask.new_ones(mask.shape[0], n)
        if shown is not None:
            before[:, : shown.shape[1]] = shown[:, :n]
        self.hides_shown = bool((before & ~mask[:, :n]).any())
        self.shown = torch.cat([before | mask[:, :n], mask[:, n:]], dim=1)
        return mask

    def count_new(self, n_new: int) -> list[int]:
        """How many of the ``n_new`` tokens of the call under way are real, in each row; looked up once a call."""
        assert self.shown is not None
        if self._new is None:
            self._new = self.shown[:, self.shown.shape[1] - n_new :].sum(-1).tolist()
        return self._new

    def rope(self, module: nn.Module, device: torch.device) -> Rope | None:
        """The rotary embedding of ``module``, built once for each kind of layer; None if it does not rotate."""
        kind = type(module), layer_type(module), device
        if kind not in self._ropes:
            self._ropes[kind] = Rope.of(module, device, self.find_model())
        rope = self._ropes[kind]
        return rope if rotates(module, device, rope) else None

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

    def forget_rows(self) -> None:
        """Rows change places: nobody knows which token stood before the next one of each."""
        for steps in self._steps.values():
            steps.first = steps.last = steps.n_real = None

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
