"""ThinK against zeroed channels, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.oracles.all_pairs import AllPairs
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    ComposedPress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    MergingPress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    ThinKPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.stores.thin import ThinKeys

N = 45
INNER = [
    KnormPress(),
    SnapKVPress(0.5, window_size=4),
    AdaKVPress(SnapKVPress(0.6, window_size=4), 0.0),
    KeyRerotationPress(KnormPress(0.5)),
    MergingPress(KnormPress(0.5)),
]


def held_channels(view: LayerView, keys: Tensor, row: int, head: int, n_held: int, window: int) -> list[int]:
    """The channels of the keys ``[n, D]`` that one head holds, in loops."""
    group = view.queries.shape[1] // view.keys.shape[1]
    scores = []
    for d in range(keys.shape[1]):
        queries = [
            float(view.queries[row, head * group + g, t, d]) ** 2
            for g in range(group)
            for t in range(max(0, view.n_tokens - window), view.n_tokens)
        ]
        scores.append(sum(queries) / len(queries) * sum(float(key[d]) ** 2 for key in keys) / len(keys))
    return sorted(sorted(range(keys.shape[1]), key=lambda d: -scores[d])[:n_held])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize(("ratio", "window"), [(0.5, 8), (0.3, 1), (0.75, 100), (0.95, 4)])
def test_attention_is_that_of_zeroed_channels(model: str, inner: ScorerPress, ratio: float, window: int) -> None:
    """The next tokens' logits are those of the inner press with the channels zeroed in its full-width keys."""
    ids = torch.cat([tokens(2, N), tokens(2, 6, seed=1)], dim=1)
    thin, whole, zeroed = PressedCache(ThinKPress(ratio, window, press=inner)), PressedCache(inner), AllPairs(model)
    for past in (thin, whole):
        tiny(model)(ids[:, :N], **cache_argument(past))
    zeroed.read(ids[:, :N])
    zeroed.keep(whole)
    for i, layer in enumerate(whole.pressed_layers()):
        view = view_of(model, N, layer=i)
        dim = view.keys.shape[3]
        n_held = max(1, int(dim * (1 - ratio) + 1e-9))
        keys, values, positions = layer.keys.clone(), layer.values, layer.positions()
        narrow = thin.layer(i).keys
        for row in range(2):
            for head in range(keys.shape[1]):
                n = int((positions[row, head] >= 0).sum())
                held = held_channels(view, keys[row, head, :n], row, head, n_held, window)
                lost = [d for d in range(dim) if d not in held]
                keys[row, head, : max(0, n - window), lost] = 0
                assert torch.equal(narrow[row, head, :n], keys[row, head, :n])
                at = positions[row, head, :n]
                zeroed.keys[i][row, head, at], zeroed.values[i][row, head, at] = (
                    keys[row, head, :n],
                    values[row, head, :n],
                )
        assert torch.equal(thin.positions(i), positions)
    for piece in (ids[:, N : N + 4], ids[:, N + 4 : N + 5], ids[:, N + 5 :]):
        actual = tiny(model)(piece, **cache_argument(thin)).logits
        torch.testing.assert_close(actual, zeroed.read(piece), atol=2e-5, rtol=0)


def test_channels_are_freed() -> None:
    model, ids = tiny("gpt_neox"), tokens(2, 200)  # 2 layers, 4 heads of 16 channels
    past = PressedCache(ThinKPress(0.75, 32, press=KnormPress(0.5)))
    model(ids, **cache_argument(past))
    narrow, wide, index = 100 * 4, 32 * 12, 32 * 4 + 16 * 2  # numbers of a head, then bytes
    assert past.kv_bytes() == 2 * 2 * 4 * ((narrow + wide + 100 * 16) * 4 + index)
    full, plain = PressedCache(), PressedCache(ThinKPress(press=KnormPress(0.5)))
    for each in (full, plain):
        model(ids, **cache_argument(each))
    assert past.kv_bytes() < 0.4 * full.kv_bytes() and plain.kv_bytes() == full.kv_bytes() // 2
    assert past.achieved_ratio() == 0.5  # pairs: channels are not counted
    model(tokens(2, 1), **cache_argument(past))
    assert all(layer.tensors()[0].shape[2] < 100 for layer in past.pressed_layers())  # room for new keys only


def test_a_fork_a_crop_and_other_rows() -> None:
    model, ids = tiny("llama"), tokens(2, N)
    question, again = tokens(2, 4, seed=1), tokens(2, 4, seed=2)
    past = PressedCache(ThinKPress(0.5, 8, press=KnormPress(0.3)))
    model(ids, **cache_argument(past))
    expected = model(question, **cache_argument(past.fork())).logits
    other = past.fork()
    model(again, **cache_argument(other))
    other.crop(N)
    torch.testing.assert_close(model(question, **cache_argument(other)).logits, expected, atol=1e-6, rtol=0)
    rows = torch.tensor([1, 0, 1])
    past.batch_select_indices(rows)
    torch.testing.assert_close(model(question[rows], **cache_argument(past)).logits, expected[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_wide", [0, 1, 3, 9])
def test_thin_keys_give_back_what_they_hold(n_wide: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, tail = torch.randn(2, 3, 7, 6, generator=generator), torch.randn(2, 3, 2, 6, generator=generator)
    counts = torch.tensor([[7, 5, 1], [2, 7, 3]])
    channels = torch.stack([torch.randperm(6, generator=generator)[:2].sort().values for _ in range(6)]).view(2, 3, 2)
    wide = ThinKeys.of(keys, counts, channels, n_wide).before(tail)
    assert torch.equal(wide[:, :, 7:], tail)
    for row in range(2):
        for head in range(3):
            n = int(counts[row, head])
            for t in range(n):
                expected = keys[row, head, t].clone()
                if t < n - n_wide:
                    expected[[d for d in range(6) if d not in channels[row, head].tolist()]] = 0
                assert torch.equal(wide[row, head, t], expected)


def test_names() -> None:
    assert make_press("think", 0.0) == ThinKPress(0.4)
    assert make_press("think", 0.0, key_channel_compression_ratio=0.3) == ThinKPress(0.3)
    assert make_press("snap_think", 0.5, window_size=8) == ThinKPress(0.4, window_size=8, press=SnapKVPress(0.5))
    assert make_press("snap_think", 0.5).with_ratio(0.25).press == SnapKVPress(0.25)
    with pytest.raises(PressError, match="think has no compression ratio"):
        make_press("think", 0.5)
    assert ThinKPress().compress(view_of("llama")) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThinKPress(1.0), "key_channel_compression_ratio is the fraction"),
        (lambda: ThinKPress(window_size=0), "window_size must be an integer >= 1"),
        (lambda: ThinKPress(press=ThinKPress(0.5)), "all their channels, and ThinKPress holds keys in fewer"),
        (lambda: ThinKPress(press=None), "wraps a press"),
        (lambda: AdaKVPress(ThinKPress(0.5)), r"changes the pairs it keeps.*outside: ThinKPress\(press=AdaKVPress"),
        (lambda: ComposedPress([SnapKVPress(0.5), ThinKPress(0.5)]), r"outside: ThinKPress\(press=ComposedPress"),
        (lambda: KeyRerotationPress(ThinKPress(0.5)), r"outside: ThinKPress\(press=KeyRerotationPress"),
        (lambda: DecodingPress(ThinKPress(0.5)), "ThinKPress chooses once, from a whole prompt"),
        (lambda: PrefillDecodingPress(ThinKPress(0.5), DecodingPress(KnormPress())), "ThinKPress holds keys in fewer"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()
