"""Rotation of queries and keys by position: observed in attention calls, not read off the configuration.

What undoes a rotation or moves keys (``rope.py``) goes by three things: which layers rotate, that the rotation is the
last that happens to queries and keys and the one that coldpress knows, and that tokens stand at consecutive positions.
The first two are found out once for each module, by running it on one token that is repeated (:func:`rotates`). If its
queries are all the same, and so are its keys, it does not rotate; if they are once the rotation is undone, it does;
anything else is refused. The third is read off the cosines and sines that the layer was given (:class:`Steps`).
``position_ids`` would not do: they do not reach every layer, and multimodal models hand on others than those that they
rotate by.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coldpress.architecture.rope import INSTEAD, Rope
from coldpress.errors import ModelError

__all__ = ["Steps", "given_rotation", "rotates", "watched"]

_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21)  # at which the one token is looked at
_NOTHING = (
    "attention_mask", "past_key_values", "past_key_value", "layer_past", "cache", "output_attentions", "head_mask"
)  # fmt: skip
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Watch(threading.local):
    calls: list[tuple[Tensor, Tensor]] | None = None  # queries and keys of attention calls, while recorded


_WATCH = _Watch()
_OBSERVED: WeakKeyDictionary[nn.Module, bool | str] = WeakKeyDictionary()  # whether it rotates, or what is wrong


def watched(query: Tensor, key: Tensor) -> None:
    """Record the query and key of an attention call, while :func:`rotates` asks for them."""
    if _WATCH.calls is not None:
        _WATCH.calls.append((query, key))


def rotates(module: nn.Module, device: torch.device, rope: Rope | None) -> bool:
    """Whether ``module``, an attention layer, rotates its queries and keys; observed once.

    It is run on one token at eight positions, with the flags and the None's of the call that is under way, if one is:
    some models tell each layer by them. What it does to other tokens is taken to be the same.

    Args:
        rope: the rotation, should it rotate; None if its model has none.

    Raises:
        ModelError: it does something else by position, or what it does cannot be seen.
    """
    if module not in _OBSERVED:
        _OBSERVED[module] = _observed(module, device, rope)
    seen = _OBSERVED[module]
    if isinstance(seen, str):
        raise ModelError(f"{type(module).__name__} {seen}. {INSTEAD}")
    return seen


@torch.no_grad()
def _observed(module: nn.Module, device: torch.device, rope: Rope | None) -> bool | str:
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if weight is None else weight.dtype
    positions = torch.tensor(_POSITIONS, device=device)
    config: Any = module.config
    token = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    given: dict[str, Any] = dict.fromkeys(_NOTHING)
    given |= {"hidden_states": token.expand(1, len(positions), -1), "position_ids": positions[None]}
    given |= {"cache_position": positions, "use_cache": False}
    if rope is not None:
        given["position_embeddings"] = tuple(part.to(dtype) for part in rope.as_given(positions))
    parameters = inspect.signature(type(module).forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {
        name: value for name, value in given.items() if name in parameters or (takes_all and name == "position_ids")
    }
    call: dict[str, Any] = {}
    for names in _under_way(module):
        call.update(names)  # the outermost one's win, should a class call its parent's forward
    call = {name: call[name] for name, p in parameters.items() if name in call and p.kind in _NAMED}
    for name, value in call.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            given[name] = value
        elif value is not module and name not in given:
            return f"is given {name!r}, and whether it rotates may depend on that, which cannot be seen from outside"
    before, _WATCH.calls = _WATCH.calls, []
    try:
        module.forward(**given)
        calls = _WATCH.calls
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        return f"cannot be run on one token, which would show how it rotates ({error})"
    finally:
        _WATCH.calls = before
    if len(calls) != 1:
        return "does not hand its queries and keys to coldpress, so how it rotates cannot be seen"
    as_it_is = max(_spread(states.float()) for states in calls[0])
    undone = as_it_is if rope is None else max(_spread(rope.unrotate(states, positions)) for states in calls[0])
    if not min(as_it_is, undone) <= (1e-3 if dtype == torch.float32 else 0.03):
        return (
            "changes queries or keys by position in another way than by a rotation at the end (normalising them "
            "after it, for instance), which coldpress cannot undo"
        )
    return undone < as_it_is


def _spread(states: Tensor) -> float:
    """How far tokens of ``[1, H, T, D]`` are from the first one, relative to its norm; 0 where all are the same."""
    return float((states - states[:, :, :1]).norm(dim=-1).max() / states[:, :, :1].norm(dim=-1).max().clamp(min=1e-30))


def _under_way(module: nn.Module) -> Iterator[Mapping[str, Any]]:
    """The local names of each forward of ``module`` that is under way in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module:
            yield frame.f_locals
        frame = frame.f_back


def given_rotation(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines that the forward of ``module``, under way in this thread, was given; None if it was not.

    They are looked up among the arguments of that call: transformers hands them to an attention layer, but neither to
    the attention function nor to the cache.
    """
    given = next(_under_way(module), {}).get("position_embeddings")
    if isinstance(given, tuple) and all(isinstance(x, Tensor) and x.dim() == 3 for x in given):
        return given[0], given[1]
    return None


@dataclass
class Steps:
    """The rotation from each token of a text to the next, in all rows, as far as it has been seen.

    Attributes:
        seen: tokens of the text so far, padding included.
        low, high: least and largest cosine and sine of a step, float32 ``[2, Drot or Drot / 2]``; None before any.
        first, last: cosine and sine of each row's first and last token, ``[B or 1, 2, Drot or Drot / 2]``, NaN if there
            is none; None if they are not known.
        n_real: int64 ``[B or 1]``, tokens of each row.
        error: largest error of an angle, in radians, that the type of the cosines explains.
        is_blind: some call did not say how it rotates.
        is_right: has been checked since the last call, so that a device is waited for once, and not in every layer.
    """

    seen: int = 0
    low: Tensor | None = None
    high: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    n_real: Tensor | None = None
    error: float = 0.0
    is_blind: bool = False
    is_right: bool = False

    def note(self, rotation: tuple[Tensor, Tensor] | None, n_new: int, seen: int, padding: Tensor | None) -> None:
        """Note the rotation of a call of ``n_new`` tokens, the last of ``seen``.

        Args:
            rotation: cosines and sines of the call, ``[B or 1, n_new, Drot or Drot / 2]``, if they are known.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
        """
        is_next, self.seen, self.is_right = self.seen == seen - n_new, seen, False
        if n_new == seen:  # another text
            self.low = self.high = self.first = self.last = self.n_real = None
            self.is_blind = False
        if rotation is None:
            self.is_blind = True
            return
        self.error = max(self.error, 4 * torch.finfo(rotation[0].dtype).eps + seen * 2.0**-23)
        turns = torch.stack([part.float() for part in rotation], 2)  # [B or 1, n, 2, Drot]
        last = self.last if is_next else None  # after a crop the last one's position is unknown
        if padding is not None:
            turns = turns.expand(len(padding), -1, -1, -1)
            turns = turns.masked_fill(~padding[:, seen - n_new :, None, None], torch.nan)
        self._count(turns, is_known=n_new == seen or last is not None)
        if last is not None and len(last) in (1, len(turns)):
            turns = torch.cat([last.expand(len(turns), -1, -1)[:, None], turns], 1)
        elif last is not None and len(turns) == 1:
            turns = torch.cat([last[:, None], turns.expand(len(last), -1, -1, -1)], 1)
        at = torch.arange(turns.shape[1], device=turns.device)
        at = at.where(turns[:, :, 0, 0].isfinite(), 0).cummax(1).values  # [B or 1, n], the last real token up to each
        turns = turns.gather(1, at[:, :, None, None].expand_as(turns))
        self.last = turns[:, -1].clone()
        (c0, s0), (c1, s1) = turns[:, :-1].unbind(2), turns[:, 1:].unbind(2)
        steps = torch.stack([c1 * c0 + s1 * s0, s1 * c0 - c1 * s0], 2)
        is_step = (at[:, 1:] > at[:, :-1])[..., None, None] & steps.isfinite()
        low = steps.where(is_step, torch.inf).flatten(0, 1).amin(0) if steps.shape[1] else None
        if low is not None:
            high = steps.where(is_step, -torch.inf).flatten(0, 1).amax(0)
            self.low = low if self.low is None else torch.minimum(low, self.low)
            self.high = high if self.high is None else torch.maximum(high, self.high)

    def _count(self, turns: Tensor, is_known: bool) -> None:
        """Note which of the new tokens is each row's first, and how many it has now."""
        is_real = turns[:, :, 0, 0].isfinite()
        n_real, first = is_real.sum(1), turns[torch.arange(len(turns)), is_real.int().argmax(1)]
        if (
            self.first is not None
            and self.n_real is not None
            and (len(first) == 1 or len(self.first) in (1, len(first)))
        ):
            first = self.first.where(self.first.isfinite(), first)
            n_real = self.n_real + n_real
        elif self.first is not None:
            is_known = False  # other rows
        self.first, self.n_real = (first, n_real) if is_known else (None, None)

    def check(self, name: str, turn: Callable[[Tensor], Tensor]) -> None:
        """Raise ModelError unless every step was of one position, and so are all of them together.

        Args:
            turn: the rotation by so many positions ``[n]``: ``[n, 2, Drot or Drot / 2]``.
        """
        if self.is_blind:
            raise ModelError(f"How {name} was rotated in each call cannot be seen from outside it. {INSTEAD}")
        if self.is_right or self.low is None or self.high is None:
            return
        step = turn(torch.ones(1, dtype=torch.long, device=self.low.device))[0]
        tolerance = self.error * step.abs().amax().clamp(min=1.0)
        is_wrong = (self.low < step - tolerance).any() | (self.high > step + tolerance).any()
        if self.first is not None and self.last is not None and self.n_real is not None:
            (c0, s0), (c1, s1) = self.first.unbind(1), self.last.unbind(1)
            whole = torch.stack([c1 * c0 + s1 * s0, s1 * c0 - c1 * s0], 1)
            off = (whole - turn((self.n_real - 1).clamp(min=0))).abs()
            is_wrong = is_wrong | (off.masked_fill(~whole.isfinite(), 0.0) > 2 * tolerance).any()
        if bool(is_wrong):
            raise ModelError(
                f"{name} was given tokens that are not at consecutive positions (images, or position_ids with gaps), "
                "or rotates by other frequencies than its configuration says (changed within the text, or rounded by "
                f".to() instead of dtype=; then run the prefill inside 'with press(model):'). {INSTEAD}"
            )
        self.is_right = True
