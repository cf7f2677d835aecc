"""The goals of presses that kvpress does not have: their KL as a part of that of the best press that it has."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from benchmarks.leaderboard.rank import N_RESAMPLES

# presses of this board that kvpress 0.5.5 has no like of
OWN = (
    "attention_matching_defensive",
    "attention_matching_kvzip",
    "attention_matching_sampled_defensive",
    "attention_matching_snapkv",
    "defensive",
    "gkv",
    "h2o",
    "layer_defensive",
    "mass_merging_snapkv",
    "momentkv_snapkv",
    "morphkv",
    "rkv",
    "sampled_defensive",
)
READS_TWICE = ("attention_matching_kvzip", "kvcompose", "kvgrad", "kvzip", "kvzip_plus")


class Goal(NamedTuple):
    """At a ratio, the smallest KL of OWN as a part of the smallest of ``of`` (none named: of all others)."""

    said: str
    ratio: float
    reads_twice: bool
    of: tuple[str, ...]
    most: float


GOALS = (
    Goal("a quarter kept, a second pass allowed", 0.75, True, ("kvzip",), 0.35),
    Goal("a quarter kept, one pass", 0.75, False, ("snapkv", "adakv_snapkv", "expected_attention"), 0.6),
    Goal("a tenth kept, a second pass allowed", 0.9, True, ("kvzip",), 0.5),
    Goal("a tenth kept, one pass", 0.9, False, (), 0.7),
)


def goals(by_press_of: dict[float, dict[str, dict[Any, float]]]) -> list[list[str]]:
    """A row for each goal that was measured: what, of whose KL, whose, measured with its 95 % interval, goal.

    Args:
        by_press_of: by ratio and press the KL of each window, by the window's text and place.
    """
    rows = []
    for goal in GOALS:
        by_press = {
            press: windows
            for press, windows in by_press_of.get(goal.ratio, {}).items()
            if goal.reads_twice or press not in READS_TWICE
        }
        theirs = [press for press in goal.of or by_press if press in by_press and press not in OWN]
        mine = [press for press in by_press if press in OWN]
        if theirs and mine:
            their, my = best(by_press, theirs), best(by_press, mine)
            part, low, high = part_of(by_press[my], by_press[their])
            shared = len(by_press[my].keys() & by_press[their].keys())
            measured = f"{part:.3f} [{low:.2f}, {high:.2f}], {shared} windows"
            reached = "met" if part <= goal.most else "missed"
            rows.append([goal.said, f"`{their}`", f"`{my}`", measured, f"{goal.most:g} at most: {reached}"])
    return rows


def best(by_press: dict[str, dict[Any, float]], names: list[str]) -> str:
    """The press of the smallest mean KL, on the windows that all of ``names`` were measured on."""
    shared = set.intersection(*(set(by_press[name]) for name in names))
    return min(names, key=lambda name: sum(by_press[name][place] for place in sorted(shared)))


def part_of(mine: dict[Any, float], theirs: dict[Any, float]) -> tuple[float, float, float]:
    """Mean KL as a part of another press's on the windows of both, and its 95 % interval over resampled windows."""
    shared = sorted(mine.keys() & theirs.keys())
    values = np.array([[mine[place], theirs[place]] for place in shared])
    drawn = np.random.default_rng(0).integers(len(shared), size=(N_RESAMPLES, len(shared)))
    parts = values[drawn, 0].mean(axis=1) / values[drawn, 1].mean(axis=1)
    low, high = np.quantile(parts, [0.025, 0.975])
    return float(values[:, 0].mean() / values[:, 1].mean()), float(low), float(high)
