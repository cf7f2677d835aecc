"""What the layers of one cache share, and what one thread passes from the cache to the attention function."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coldpress.architecture.generating import refuse_guesses, refuse_pieces, warn_of_padding
from coldpress.architecture.rope import Rope, layer_type
from coldpress.architecture.rotation import Steps, given_rotation, rotates
from coldpress.architecture.versions import check_versions
from coldpress.cache.masks import ModelCall
from coldpress.cache.pins import Pins, warn_of_pins
from coldpress.cache.roles import Roles
from coldpress.core.call import LayerCall
from coldpress.core.press import Press, parts
from coldpress.errors import CacheError, InputError, ModelError
from coldpress.stores.codec import Codec

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
        self.updated: Any = None  # the PressedLayer that was updated last, not yet claimed by an attention call
        self.masks_for: Any = None  # the PressedLayer that was asked for mask sizes just now
        # what an attention module was given, where a press asks
        self.hidden_states: tuple[nn.Module, Tensor] | None = None
        self.leaves_masks_out = False  # the mask function served a PressedCache last, so layers make their masks


THREAD = _Thread()


class Session:
    """What the layers of one cache share: the press, and what the run has accumulated."""

    def __init__(
        self, press: Press | None = None, rerotates: bool = False, storage: Codec | None = None, pins: Pins = ()
    ):
        check_versions()
        self.press = press
        self.earlier_press: Press | None = None  # of a block that has ended
        self.switch_at: int | None = None  # tokens after which the model changes its rotary frequencies
        self.was_asked = False  # the press has been shown pairs
        self.chunk_tokens: int | None = None  # that the prompt comes in at most at once
        self.prefill_end: int | None = None  # length of the prompt, while prefill() feeds it
        self.rerotates = rerotates  # kept keys move up, so that no gaps are left between positions
        self.storage = storage  # how older pairs are stored, None: as they are
        self.pins = self.given_pins = pins  # spans of tokens that nothing may evict; of this text, and of any
        self.branches: list[weakref.ref[Any]] = []  # caches that this one's prefill fills too
        self.unclaimed: Any = None  # the PressedLayer that was updated and has not attended yet
        self.error: Exception | None = None  # what the press of a branch raised during the shared prefill
        self.call: ModelCall | None = None  # of the model, the latest
        self.token_ids: Tensor | None = None  # int64 [B, T] of the prefill, where they are known
        self.cut_tokens = 0  # of the text that there was no room for, and that nothing has read
        self.is_to_finish = False  # a block has the press choose after this prefill; until then all is stored whole
        self.find_model: Callable[[], nn.Module | None] = lambda: None  # what runs, inside 'with press(model):'
        self.on_attention: Callable[[Any, LayerCall], None] | None = None  # shown every call, before anything goes
        self.n_layers = 0  # that were made
        self._seed: int | None = None
        self._roles = Roles.of(press)
        self._ropes: dict[Any, Rope | None] = {}
        self._steps: dict[str, Steps] = {}  # from token to token, by kind of layer

    @property
    def seed(self) -> int:
        """Drawn once per cache from torch's default generator."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, (1,)).item())
        return self._seed

    def settle_seed(self) -> None:
        """Draw the seed now if the press draws numbers later, so that a copy goes on as its original does."""
        draws = self.press is not None and any(part.draws for part in parts(self.press))
        if self._seed is None and self.was_asked and self.joins_calls and draws:
            self._seed = self.seed

    @property
    def roles(self) -> Roles:
        """What the parts of the press do at each call."""
        if self._roles.press is not self.press:
            self._roles = Roles.of(self.press)
        return self._roles

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy or a file: what belongs to a run or a model is left out, and found again."""
        self.settle_seed()
        of_a_run = ("branches", "is_to_finish", "find_model", "on_attention", "_ropes")
        return {name: value for name, value in vars(self).items() if name not in of_a_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(Session()) | state)

    def live_branches(self) -> list[Any]:
        """The caches that branch off and are still referred to; none once the prefill is over."""
        return [branch for ref in self.branches if (branch := ref()) is not None]

    def reset(self) -> None:
        self.branches = []
        self.unclaimed = self.error = self.call = self.prefill_end = self._seed = None
        self.was_asked, self.token_ids, self.earlier_press, self.cut_tokens = False, None, None, 0
        self.pins = self.given_pins
        self.forget_steps()
        self._ropes = {}  # of the next text's frequencies, should they depend on the text

    def follow(self, other: Session) -> None:
        """Take over what is known of the pairs of ``other``'s cache, which this session's cache stores too."""
        other.settle_seed()
        self.rerotates, self._seed, self.cut_tokens = other.rerotates, other._seed, other.cut_tokens
        self.earlier_press, self.was_asked, self.switch_at = other.earlier_press, other.was_asked, other.switch_at
        self.find_model, self._ropes = other.find_model, dict(other._ropes)
        self._steps = {kind: replace(steps) for kind, steps in other._steps.items()}

    def begin(self, seen: int, n_new: int, mask: Tensor | None, shown: Tensor | None) -> Tensor | None:
        """A call of the model begins, with the arguments of :meth:`ModelCall.of`; returns the mask if it hides any."""
        if n_new < 1:
            raise InputError("A call of the model with a PressedCache needs at least one token for each row; got none.")
        if seen:
            self.branches = []  # the prefill is over
        call = ModelCall.of(seen, n_new, mask, shown)
        mask = mask if call.hidden_end else None
        filled = (self, *(branch.session for branch in self.live_branches()))
        for own in filled:
            if not seen:
                own._check_prompt(mask)
        if mask is not None and n_new > 1:
            warn_of_padding(mask)
        self.call = call
        if (not seen and self.chunk_tokens is None) or seen + n_new == self.prefill_end:
            n_real = seen + n_new if self.call.shown is None else self.call.shown.sum(-1).tolist()
            for own in filled:
                if own.press is not None and not own.press.evicts_while_decoding:
                    warn_of_pins(own.pins, n_real, type(own.press).__name__)
        return mask

    def _check_prompt(self, mask: Tensor | None) -> None:
        """Raise :class:`CacheError` if what comes is no prompt that the press could compress."""
        press = self.press
        if press is None and self.storage is not None and self.storage.chooses:
            raise CacheError(
                "storage=Mixed() spends the budget of a press, and this cache has none: give it one, such as "
                "SnapKVPress(budget_bytes=2**20), or say the bits, storage=RotatedBits(4, 4)."
            )
        if press is None:
            return
        if mask is not None and self.chunk_tokens is None and not bool(mask.any()):
            raise CacheError(
                "attention_mask hides all tokens of the prompt, so there is nothing to compress: give 1 where a token "
                "is one of the text, and 0 for padding."
            )
        refuse_guesses()
        if press.at_prefill and not press.evicts_while_decoding:  # else later pieces are compressed as well
            refuse_pieces(type(press).__name__, self.chunk_tokens, press.chooses_again)

    def check_layer(self, index: int, seen: int, n_new: int) -> None:
        """Raise :class:`CacheError` if a layer that has seen ``seen`` tokens has no part in the call that is under way.

        A layer that is the first in a call begins another one, where the model asks for no mask.
        """
        if self.call is None or (self.call.seen != seen and index == self.call.first):
            self.begin(seen, n_new, None, None)
        assert self.call is not None
        if self.call.first is None:
            self.call.first = index
        if self.call.seen != seen:
            raise CacheError(
                "The layers of this cache have seen different numbers of tokens: an earlier call failed half-way, then "
                "reset() this cache; or the model runs a layer more than once in a call, or without its cache, which "
                "coldpress does not support."
            )

    def n_real(self, n_rows: int, n_new: int) -> list[int]:
        """How many of the ``n_new`` tokens of the call under way are none of padding, in each row."""
        return [n_new] * n_rows if self.call is None or self.call.shown is None else self.call.n_real

    def rope(self, module: nn.Module, device: torch.device) -> Rope | None:
        """The rotary embedding of ``module``, built once for each kind of layer; None if it does not rotate."""
        kind = type(module), layer_type(module), device
        if kind not in self._ropes:
            self._ropes[kind] = Rope.of(module, device, self.find_model())
        rope = self._ropes[kind]
        return rope if rotates(module, device, rope) else None

    @property
    def joins_calls(self) -> bool:
        """Whether pairs of several calls may be unrotated or moved together."""
        press = self.press
        return self.rerotates or self.chunk_tokens is not None or (press is not None and press.evicts_while_decoding)

    def steps(self, module: nn.Module) -> Steps:
        """How tokens follow each other in the layers of ``module``'s kind, as far as it was noted."""
        return self._steps.setdefault(layer_type(module), Steps())

    def note_steps(self, call: LayerCall, seen: int, padding: Tensor | None) -> None:
        """Note how the module of ``call`` was told to rotate; once for each call of the model and kind of layer.

        The other arguments are those of :meth:`Steps.note`.
        """
        steps = self.steps(call.module)
        if steps.seen != seen:
            rotation = given_rotation(call.module) if call.rotation is None else call.rotation
            steps.note(rotation, call.query.shape[2], seen, padding)

    def forget_rows(self) -> None:
        """Forget which token stood before the next one of each row, as rows change places."""
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
