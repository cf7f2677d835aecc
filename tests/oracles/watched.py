"""Presses that watch attention, token by token in loops over layer 0: what each head holds, and its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coldpress import LayerView
from coldpress.bases.observer import ObserverPress

State = dict[int, Any]  # of what a head holds, by position
Shift = Callable[[float, int, int, int], float]  # another logit, given query head, query and key


@dataclass(frozen=True)
class Rule:
    """A method: its state of a new token, what a query does to the states, and which states are worth most.

    Attributes:
        see: given the states, the query's position, what it gives to each token and whether it is of the prompt.
        worth: given the states, a token, and the length of the text.
    """

    new: Callable[[int], Any]
    see: Callable[[State, int, dict[int, float], bool], None]
    worth: Callable[[State, int, int], Any]
    shift: Shift = lambda logit, head, query, key: logit


def weights(view: LayerView, head: int, q: int, held: list[int], shift: Shift) -> dict[int, float]:
    """What query ``q`` gives to each token that KV head ``head`` holds, mean over the group's heads."""
    total, group = dict.fromkeys(held, 0.0), view.group_size
    for own in range(head * group, (head + 1) * group):
        query = view.queries[0, own, q].double()
        logits = {t: float(query @ view.keys[0, head, t].double()) * view.scaling for t in held}
        powers = {t: math.exp(shift(logit, own, q, t)) for t, logit in logits.items()}
        for t, power in powers.items():
            total[t] += power / sum(powers.values()) / group
    return total


def follow(
    view: LayerView, head: int, rule: Rule, n_prompt: int, interval: int, n_keep: int, ends: tuple[int, int]
) -> Iterator[State]:
    """The states of what a head holds after each token of the answer, cut back to ``n_keep`` every few of them."""
    states: State = {}
    for q in range(view.n_tokens):
        states[q] = rule.new(q)
        rule.see(states, q, weights(view, head, q, list(states), rule.shift), q < n_prompt)
        if q >= n_prompt and (q + 1 - n_prompt) % interval == 0 and len(states) > n_keep:
            stays = [t for t in states if t < ends[0] or t > q - ends[1]]
            others = sorted(states.keys() - set(stays), key=lambda t: (rule.worth(states, t, q + 1), -t), reverse=True)
            states = {t: states[t] for t in sorted([*stays, *others[: n_keep - len(stays)]])}
        if q >= n_prompt:
            yield dict(states)


def stream(press: ObserverPress, whole: LayerView, n_prompt: int) -> Tensor:
    """Positions that a layer holds at the end, cut back by ``press`` after each token that follows the prompt.

    No model runs: queries and keys are those of the whole text.
    """
    columns = {kind.name: kind.new(whole.keys) for kind in press.columns}
    chosen = torch.arange(n_prompt).expand(*whole.keys.shape[:2], -1)
    for end in range(n_prompt, whole.n_tokens + 1):
        view = replace(whole, columns=columns, _memo={})
        view = view.part(0, n_prompt) if end == n_prompt else view.among(chosen, end, 1)
        view = replace(view, columns={**view.columns, **press.observe(view)}, _memo={})
        for name, own in view.columns.items():
            at = chosen.view(*chosen.shape, *(1 for _ in own.shape[3:])).expand_as(own)
            columns[name] = columns[name].scatter(2, at, own)
        kept = press.compress(view) if end > n_prompt else None
        if kept is not None:
            chosen = chosen.gather(2, kept.positions)
        if end < whole.n_tokens:
            chosen = torch.cat([chosen, torch.full_like(chosen[..., :1], end)], dim=2)
    return chosen
