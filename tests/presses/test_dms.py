"""DMS against a slow version of what it promises."""

from __future__ import annotations

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import MODELS, view_of

from coldpress import (
    AdaKVPress,
    DMSPress,
    ExpectedAttentionPress,
    KnormPress,
    PressedCache,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
)
from coldpress.errors import PressError

N_TOKENS = 37


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("inner", "n_sink", "n_window"),
    [(KnormPress(), 0, 1), (KnormPress(), 0, 10), (SnapKVPress(window_size=6), 0, 3), (ExpectedAttentionPress(), 4, 5)],
    ids=repr,
)
def test_every_head_keeps_what_reaches_the_threshold(
    model: str, inner: ScorerPress, n_sink: int, n_window: int
) -> None:
    view = view_of(model)
    scores = inner.score(view)
    recent = max(n_window, 6 if isinstance(inner, SnapKVPress) else 0)
    differ = False
    for threshold in scores.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist():
        kept = DMSPress(inner, threshold, n_window).compress(view)
        assert kept is not None
        lengths = set()
        for row in range(view.keys.shape[0]):
            for head in range(view.keys.shape[1]):
                expected = [
                    t
                    for t in range(N_TOKENS)
                    if t < n_sink or t >= N_TOKENS - recent or float(scores[row, head, t]) >= threshold
                ]
                slots = kept.positions[row, head].tolist()
                assert slots == expected + [-1] * (len(slots) - len(expected))
                assert torch.equal(kept.keys[row, head, : len(expected)], view.keys[row, head, expected])
                assert torch.equal(kept.values[row, head, : len(expected)], view.values[row, head, expected])
                lengths.add(len(expected))
        assert kept.positions.shape[-1] == max(lengths)
        differ |= len(lengths) > 1
    assert differ  # else this tests nothing


def test_what_is_evicted_is_freed_and_unseen() -> None:
    """The next tokens' logits are those of the full cache with every evicted pair masked in every head."""
    model, ids = tiny("llama"), tokens(2, 205)
    threshold = float(KnormPress().score(view_of("llama", 200)).quantile(0.7))
    past, full = PressedCache(DMSPress(KnormPress(), threshold, 16)), PressedCache()
    for each in (past, full):
        model(ids[:, :200], past_key_values=each)
    assert past.kv_bytes() < 0.7 * full.kv_bytes()
    for i, layer in enumerate(full.pressed_layers()):
        kept = torch.full((2, 2, 200), -1, dtype=torch.int32)  # every slot stays, evicted ones are empty
        for b, h in ((b, h) for b in range(2) for h in range(2)):
            head = past.positions(i)[b, h]
            kept[b, h, head[head >= 0]] = head[head >= 0].int()
        layer._kept, layer._has_gaps, layer._tail_start = kept, True, 200
    n_kept = sum(int((past.positions(i) >= 0).sum()) for i in range(2))
    assert past.achieved_ratio() == pytest.approx(1 - n_kept / (2 * 2 * 2 * 200))
    actual, expected = (model(ids[:, 200:], past_key_values=each).logits for each in (past, full))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_both_ends_of_the_scale() -> None:
    view = view_of("gpt_neox")
    assert DMSPress(KnormPress(), float("-inf"), 1).compress(view) is None
    assert DMSPress(KnormPress(), 0.0, N_TOKENS).compress(view) is None
    nothing = DMSPress(KnormPress(), float("inf"), 2).compress(view)
    assert nothing is not None and nothing.positions[0, 0].tolist() == [N_TOKENS - 2, N_TOKENS - 1]


def test_one_more_pair_at_each_score() -> None:
    """A pair at the threshold itself is kept."""
    view = view_of("gpt_neox", rows=1)
    scores = KnormPress().score(view)[0, 0, :-1].sort().values.tolist()
    for i in (0, 5, 20):
        kept = DMSPress(KnormPress(), scores[i], 1).compress(view)
        n_kept = N_TOKENS if kept is None else int((kept.positions[0, 0] >= 0).sum())
        assert n_kept == N_TOKENS - i


def test_decoding_is_remembered() -> None:
    assert DMSPress(KnormPress(), -1.0, decoding=True).decoding and not DMSPress(KnormPress(), -1.0).decoding


@pytest.mark.parametrize(
    ("press", "parameters", "message"),
    [
        (KnormPress(), {}, "needs a threshold: the lowest score of KnormPress"),
        (KnormPress(), {"threshold": "0.5"}, "threshold must be a number"),
        (KnormPress(), {"threshold": float("nan")}, "threshold must be a number"),
        (KnormPress(), {"threshold": 0.0, "sliding_window_size": 0}, "sliding_window_size must be an integer >= 1"),
        (KnormPress(), {"threshold": 0.0, "decoding": 1}, "decoding must be True or False"),
        (KnormPress(0.5), {"threshold": 0.0}, r"give it KnormPress\(compression_ratio=0.5.* without a budget"),
        (KnormPress(budget_tokens=9), {"threshold": 0.0}, "without a budget"),
        (PyramidKVPress(), {"threshold": 0.0}, "so does PyramidKVPress"),
        (AdaKVPress(SnapKVPress()), {"threshold": 0.0}, "makes that choice in its own way"),
        (None, {"threshold": 0.0}, "wraps a press"),
    ],
)
def test_what_makes_no_sense_is_refused(press: ScorerPress, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PressError, match=message):
        DMSPress(press, **parameters)
