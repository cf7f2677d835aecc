"""GKVPress: the window against loops, how scores are carried from one eviction to the next, and the contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.oracles.windows import by_head, gkv
from tests.presses.test_decoding import Text, decode, decoded, held
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BoundaryPress,
    DecodingPress,
    GKVPress,
    LayerView,
    PrefillDecodingPress,
    SnapKVPress,
    make_press,
)
from coldpress.errors import PressError
from coldpress.presses.rkv import redundancy

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = GKVPress(window_size=4)
CASES = {
    "prompt": Case(SMALL.with_ratio(0.5), n_most=25, lacks=("ragged",)),
    "adakv decoding": Case(DecodingPress(AdaKVPress(replace(SMALL, lam=0.5)), **OFTEN), lacks=("chunks",)),
    "after snapkv": Case(
        PrefillDecodingPress(SnapKVPress(0.3, 4), DecodingPress(AdaKVPress(SMALL), **OFTEN)), n_most=35
    ),
    "pins": Case(DecodingPress(SMALL, **OFTEN), {"pin": [(0, 3), (20, 23)]}, lacks=("chunks", "ragged")),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [1, 5])
def test_gkv(model: str, window: int) -> None:
    view = view_of(model, 21)
    scores = GKVPress(window_size=window).score(view)
    expected = torch.tensor(by_head(view, lambda own: gkv(own, window)))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert (scores[..., : 21 - window].amax(-1) == 1).all()


def carrying(view: LayerView, before: Tensor) -> LayerView:
    return replace(view, columns={"global_score": before.expand(view.keys.shape[:3])}, _memo={})


@pytest.mark.parametrize("model", MODELS)
def test_scores_of_before_and_now(model: str) -> None:
    """A token that came since, -1, has what the window gives it, whatever the fusion."""
    view, press = view_of(model), GKVPress(window_size=6)
    before = torch.rand(37, generator=torch.Generator().manual_seed(0))
    before[[3, 8, 30]] = -1.0
    now, later = press.score(view), carrying(view, before)
    old, is_new = before.expand_as(now), (before < 0).expand_as(now)
    for fusion, expected in {
        "max": torch.maximum(0.8 * old, now),
        "mean": 0.8 * old + 0.2 * now,
        "sum": 0.8 * old + now,
    }.items():
        scores = replace(press, fusion=fusion).score(later)
        torch.testing.assert_close(scores, torch.where(is_new, now, expected))
    assert (press.score(later) > now).any()


@pytest.mark.parametrize("model", MODELS)
def test_without_history_the_window_alone_counts(model: str) -> None:
    view, press = view_of(model), GKVPress(0.5, window_size=6, decay=0.0)
    later = carrying(view, torch.rand(37))
    assert torch.equal(press.score(later), press.score(view)) and torch.equal(press.choose(later), press.choose(view))


def test_without_history_nothing_depends_on_what_was_carried() -> None:
    ids, plain = tokens(1, 50), DecodingPress(GKVPress(window_size=6, decay=0.0), 5, 20, 8)

    class Forgets(GKVPress):
        def renew(self, view: LayerView) -> dict[str, Tensor]:
            return {"global_score": torch.full(view.keys.shape[:3], -1.0)}

    forgetful = DecodingPress(Forgets(window_size=6), 5, 20, 8)
    assert held(decoded(plain, 50, ids=ids)) == held(decoded(forgetful, 50, ids=ids))
    remembers = DecodingPress(GKVPress(window_size=6), 5, 20, 8)
    assert held(decoded(remembers, 50, ids=ids)) != held(decoded(forgetful, 50, ids=ids))


def test_what_is_never_hit_again_decays() -> None:
    """A token that no query of the window sees keeps 0.8 of its score from one eviction to the next."""
    view = view_of("llama", 21, rows=1)
    keys, queries = torch.zeros_like(view.keys), torch.zeros_like(view.queries)
    queries[..., 0], keys[:, :, 5, 0] = 1.0, -1e4
    view = replace(view, keys=keys, queries=queries, _memo={})
    press = GKVPress(window_size=4)
    assert (press.score(view)[..., 5] == 0).all() and (press.score(view)[..., 4] == 1).all()
    scores = torch.full((1, 2, 21), 0.7)
    for k in range(1, 9):
        scores = press.renew(carrying(view, scores))["global_score"]
        torch.testing.assert_close(scores[..., 5], torch.full((1, 2), 0.7 * 0.8**k))
        assert (scores[..., 4] == 1).all() and (scores[..., -4:] == -1).all()  # the window starts anew


@pytest.mark.parametrize("wrapped", [False, True])
def test_while_decoding_against_loops(wrapped: bool) -> None:
    """Pairs that layer 0 holds, and the scores they carry, after every token."""
    ids, n_keep, window = torch.randperm(90, generator=torch.Generator().manual_seed(1))[None, :61] + 3, 14, 3
    text, n_decayed = Text("gpt_neox", ids), 0
    kept = [dict.fromkeys(range(16), -1.0) for _ in range(4)]
    press = GKVPress(window_size=window)
    schedule = DecodingPress(AdaKVPress(press, 1.0) if wrapped else press, 5, n_keep, 7)
    for past, _ in decode(schedule, 61, 16, "gpt_neox", ids):
        n_seen = past.seen_tokens
        for h, head in enumerate(kept) if n_seen > 16 else ():
            head[n_seen - 1] = -1.0
            if (n_seen - 16) % 5 == 0:
                rows = [text.attention(h, q, [*head]) for q in range(n_seen - window, n_seen)]
                now = {t: sum(row[i] for row in rows) / window for i, t in enumerate(head)}
                older = [t for t in head if t < n_seen - window]
                most = max(now[t] for t in older)
                n_decayed += sum(0.8 * head[t] > now[t] / most for t in older)
                score = {t: max(0.8 * head[t], now[t] / most) for t in older}
                best = sorted(sorted(older, key=lambda t, score=score: -score[t])[: n_keep - window])
                kept[h] = {t: score[t] for t in best} | dict.fromkeys(range(n_seen - window, n_seen), -1.0)
        assert held(past) == [[*head] for head in kept], n_seen
        if n_seen > 20:
            column = past.layer(0).columns()["global_score"][0]
            expected = torch.tensor([[*head.values()] for head in kept])
            torch.testing.assert_close(column, expected, atol=1e-5, rtol=1e-5)
    assert n_decayed > 20


def test_nothing_is_carried_where_nothing_is_evicted() -> None:
    assert "global_score" not in decoded(DecodingPress(SMALL, 5, 200, 8), 60).layer(0).columns()
    assert "global_score" not in decoded(SMALL, 20).layer(0).columns()
    assert (decoded(SMALL.with_ratio(0.5), 20).layer(0).columns()["global_score"][..., :4] >= 0).all()


def test_redundancy_is_part_of_the_score_and_not_of_what_is_carried() -> None:
    view, press = view_of("llama"), GKVPress(0.5, window_size=4, lam=0.5, threshold=0.3)
    alike = redundancy(view.keys, 0.3)
    plain = replace(press, lam=1.0)
    expected = 0.5 * plain.score(view) - 0.5 * alike / alike.amax(-1, keepdim=True)
    torch.testing.assert_close(press.score(view), expected)
    assert torch.equal(press.renew(view)["global_score"], plain.renew(view)["global_score"])


def test_bad_arguments_are_refused() -> None:
    for name, value, said in [
        ("window_size", 0, "must be an integer >= 1, got 0"),
        ("decay", 1.5, r"must be a number in \[0, 1\], got 1.5"),
        ("lam", -0.5, r"must be a number in \[0, 1\], got -0.5"),
        ("threshold", 2, r"must be a number in \[-1, 1\], got 2"),
        ("fusion", "min", "must be 'max', 'mean' or 'sum', got 'min'"),
    ]:
        with pytest.raises(PressError, match=rf"^GKVPress: {name} {said}\.$"):
            GKVPress(**{name: value})  # type: ignore[arg-type]
    press = make_press("decoding_gkv", 0.5)
    assert isinstance(press, DecodingPress) and press.base_press == BoundaryPress(GKVPress())
