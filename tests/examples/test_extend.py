"""The six files of examples/extend: a method is one file, and whatever a cache promises holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, close, every_check, later, no_new_names, read, seen_by
from torch import Tensor

from coldpress import (
    AdaKVPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    Kept,
    KnormPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
)
from coldpress.architecture.cache_argument import cache_argument

with no_new_names():
    from examples.extend import pins
    from examples.extend.codec import Int8Codec
    from examples.extend.h2o import H2OPress
    from examples.extend.merging import MassMergingPress
    from examples.extend.quest import QuestPress
    from examples.extend.scorer import DistinctPress

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "extend"
OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
PINS = [[(0, 4), (20, 22)], [(3, 5)], []]
NOT_MOVED = ("rerotated",)  # its keys are means, which have no position
CODEC = Int8Codec(block_tokens=4, exact_tokens=8)


class PagedAdaKVPress(AdaKVPress):
    """AdaKV, and of what is left queries read pages: heads of different length have different numbers of them."""

    def select(self, view: LayerView) -> Tensor | None:
        return QuestPress(4, 3, 0).select(view)


def pinned(rows: object) -> dict[str, object]:
    return {"pin": [PINS[row] for row in rows]}  # type: ignore[attr-defined]


Watching = partial(Case, exact_crop=False)  # what it has seen of cropped tokens stays
CASES = {
    "scorer": Case(DistinctPress(0.5), n_most=25, lacks=("ragged",)),
    "scorer neox": Case(DistinctPress(0.5), model="gpt_neox", n_most=25, lacks=("ragged",)),
    "scorer adakv": Case(AdaKVPress(DistinctPress(0.5), 0.0), n_most=25),
    "scorer decoding": Case(DecodingPress(DistinctPress(), **OFTEN), lacks=("chunks", "ragged")),
    "h2o": Case(H2OPress(0.5, grace=4), n_most=25, lacks=("ragged",)),
    "h2o adakv": Case(AdaKVPress(H2OPress(0.5, grace=4)), n_most=25),
    "h2o critical": Case(CriticalKVPress(H2OPress(0.5, grace=4)), n_most=25, lacks=("ragged",)),
    "h2o critical adakv": Case(CriticalAdaKVPress(H2OPress(0.5, grace=4)), n_most=25),
    "h2o decoding": Watching(DecodingPress(H2OPress(grace=4), **OFTEN), lacks=("chunks", "ragged")),
    "h2o adakv decoding": Watching(
        CompressionRatioDecodingPress(AdaKVPress(H2OPress(grace=4)), compression_interval=3), lacks=("chunks",)
    ),
    "h2o both": Watching(
        PrefillDecodingPress(SnapKVPress(0.3, 4), DecodingPress(H2OPress(grace=4), **OFTEN)),
        n_most=35,
        lacks=("ragged",),
    ),
    "merging": Case(MassMergingPress(DistinctPress(0.5), 0.0), n_most=25, lacks=("ragged", *NOT_MOVED)),
    "merging adakv": Case(MassMergingPress(AdaKVPress(H2OPress(0.5, grace=4)), 0.2), n_most=25, lacks=NOT_MOVED),
    "merging decoding": Watching(
        DecodingPress(MassMergingPress(AdaKVPress(H2OPress(grace=4)), 0.2), **OFTEN), lacks=("chunks", *NOT_MOVED)
    ),
    "quest": Case(QuestPress(4, 5, 0), evicts=False, lacks=("chunks", "ragged")),
    "quest adakv": Case(PagedAdaKVPress(H2OPress(0.5, grace=4)), n_most=25),
    "codec": Case(SnapKVPress(0.5, 4), {"storage": CODEC}, rounding=0.05, n_most=25, lacks=("ragged",)),
    "codec alone": Case(None, {"storage": CODEC}, rounding=0.05, lacks=("data", "ragged")),
    "codec adakv": Case(AdaKVPress(H2OPress(0.5, grace=4)), {"storage": CODEC}, rounding=0.05, n_most=25),
    "pins": Case(SnapKVPress(0.5, 4), rows=pinned, n_most=25, lacks=("ragged",)),
    "pins adakv": Case(AdaKVPress(KnormPress(0.5)), rows=pinned, n_most=25),
    "pins decoding": Case(DecodingPress(AdaKVPress(KnormPress()), **OFTEN), rows=pinned, lacks=("chunks",)),
    "pins h2o decoding": Watching(
        DecodingPress(H2OPress(grace=4), **OFTEN), {"pin": [(0, 6), (20, 23)]}, lacks=("chunks", "ragged")
    ),
}


@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_a_method_is_a_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


# -- what each does, against the same thing done slowly ---------------------------------------------------------------


def test_scorer() -> None:
    for view in seen_by("llama", tokens(1, 20)):
        scores = DistinctPress().score(view)
        for head in range(2):
            keys, values = view.keys[0, head].double(), view.values[0, head].double()
            mean = sum((key / key.norm() for key in keys), torch.zeros_like(keys[0])) / 20
            for t in range(20):
                cosine = keys[t] @ mean / keys[t].norm() / mean.norm()
                close(scores[0, head, t].double(), values[t].norm() * (1 - cosine))


def test_h2o_adds_up_what_every_query_gave() -> None:
    """In layer 0, whose queries and keys no eviction changes: token by token, in loops."""
    ids, n_prompt, n_keep, grace = tokens(1, 40), 25, 16, 3
    view = seen_by("llama", ids)[0]
    past = PressedCache(DecodingPress(H2OPress(grace=grace), compression_interval=2, target_size=n_keep))
    read(CASES["h2o"], past, ids[:, :n_prompt])
    held: list[dict[int, float]] = [dict.fromkeys(range(n_prompt), 0.0) for _ in range(2)]  # of each head: sums

    def look(t: int, head: int) -> None:
        sees = [s for s in held[head] if s <= t]
        for query in view.queries[0, 2 * head : 2 * head + 2, t]:
            weights = (view.keys[0, head, sees] @ query * view.scaling).softmax(-1)
            for s, weight in zip(sees, weights.tolist(), strict=True):
                held[head][s] += weight / 2

    for head in range(2):
        for t in range(n_prompt):
            look(t, head)
    for t in range(n_prompt, 40):
        read(CASES["h2o"], past, ids[:, t : t + 1])
        for head in range(2):
            held[head][t] = 0.0
            look(t, head)
            if (t - n_prompt) % 2:  # every two tokens
                older = sorted((s for s in held[head] if s <= t - grace), key=lambda s: -held[head][s])
                stays = {*older[: n_keep - grace], *range(t - grace + 1, t + 1)}
                held[head] = {s: total for s, total in held[head].items() if s in stays}
            assert past.positions(0)[0, head].tolist() == list(held[head])
        sums = torch.tensor([list(own.values()) for own in held])
        torch.testing.assert_close(past.layer(0).columns()["received"][0], sums, atol=1e-5, rtol=0)


def test_h2o_compresses_a_prompt_once_and_generates() -> None:
    past, ids = PressedCache(H2OPress(0.5, grace=4)), tokens(1, 40)
    tiny("llama").generate(ids, max_new_tokens=9, do_sample=False, **cache_argument(past))
    assert past.stored_lengths() == [20 + 8] * 2
    past, ids = PressedCache(DecodingPress(H2OPress(grace=4), compression_interval=4, target_size=20)), tokens(1, 40)
    tiny("llama").generate(ids, max_new_tokens=9, do_sample=False, **cache_argument(past))
    assert past.stored_lengths() == [20] * 2


def merged_slowly(view: LayerView, positions: Tensor, least: float) -> list[tuple[Tensor, Tensor, float]]:
    """Of the kept pairs of head 0: key, value and for how many they stand."""
    keys, values, kept = view.keys[0, 0].double(), view.values[0, 0].double(), positions[0, 0].tolist()
    groups: dict[int, list[int]] = {t: [t] for t in kept}
    for t in range(view.n_tokens):
        cosines = {s: float(keys[t] @ keys[s] / keys[t].norm() / keys[s].norm()) for s in kept}
        nearest = max(cosines, key=cosines.__getitem__)
        if t not in groups and cosines[nearest] >= least:
            groups[nearest].append(t)
    return [(keys[own].mean(0), values[own].mean(0), len(own)) for own in groups.values()]


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_merging_against_loops(least: float) -> None:
    for view in seen_by("llama", tokens(1, 30)):
        kept = MassMergingPress(KnormPress(0.7), least).compress(view)
        assert kept is not None and kept.bias is not None
        expected = merged_slowly(view, kept.positions, least)
        assert max(m for *_, m in expected) > 1
        for i, (key, value, m) in enumerate(expected):
            torch.testing.assert_close(kept.keys[0, 0, i].double(), key, atol=1e-5, rtol=0)
            torch.testing.assert_close(kept.values[0, 0, i].double(), value, atol=1e-5, rtol=0)
            torch.testing.assert_close(kept.bias[0, 0, i].exp(), torch.tensor(float(m)), atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Four(KnormPress):
    """Keeps tokens 0 .. 3."""

    def score(self, view: LayerView) -> Tensor:
        return -torch.arange(view.n_tokens).float().expand(view.keys.shape[:3])


def test_equal_pairs_in_one_give_the_attention_of_all() -> None:
    """Tokens t, t + 4, t + 8 and so on have the pairs of token t: then nothing is lost, in the model either."""

    class Repeats(MassMergingPress):
        def compress(self, view: LayerView) -> Kept | None:
            at = (torch.arange(view.n_tokens) % 4).expand(view.keys.shape[:3])
            same = replace(view, keys=view.take(at).keys, values=view.take(at).values, _memo={})
            everything = torch.arange(view.n_tokens).expand(view.keys.shape[:3])
            return super().compress(same) if self.least else same.take(everything)

    whole, merged = (PressedCache(Repeats(Four(0.9), least)) for least in (0.0, 0.999))
    logits = [read(CASES["merging"], past, tokens(1, 40), *later()) for past in (whole, merged)]
    assert whole.stored_lengths() == [50] * 2 and merged.stored_lengths() == [14] * 2
    close(*logits)
    close(merged.layer(0).columns()["bias"][..., :4].exp(), torch.full((1, 2, 4), 10.0))


def test_merging_what_was_merged_counts_all_of_it() -> None:
    past = PressedCache(DecodingPress(MassMergingPress(KnormPress(), -1.0), compression_interval=1, target_size=6))
    read(CASES["merging"], past, tokens(1, 20), *later())
    for layer in past.pressed_layers():
        assert layer.stored_length == 6
        close(layer.columns()["bias"].exp().sum(-1), torch.full((1, 2), 30.0), 1e-3)


def newest_view(view: LayerView) -> LayerView:
    """As a decoding step sees it."""
    at = torch.arange(view.n_tokens).expand(view.keys.shape[:3])
    return replace(view, queries=view.queries[:, :, -1:], positions=at, _memo={})


@pytest.mark.parametrize("page_tokens", [1, 4, 7])
def test_no_key_of_a_page_is_beyond_its_bound(page_tokens: int) -> None:
    for view in map(newest_view, seen_by("llama", tokens(1, 30))):
        press = QuestPress(page_tokens, 2, dense_layers=0)
        bounds, read_slots = press.bounds(view)[0], press.select(view)
        assert bounds.shape == (2, -(-30 // page_tokens)) and read_slots is not None
        for head in range(2):
            products = view.queries[0, 2 * head : 2 * head + 2, 0] @ view.keys[0, head].T  # [G, T]
            best = [float(page.max()) for page in products.split(page_tokens, dim=1)]
            assert all(bound >= most - 1e-5 for bound, most in zip(bounds[head].tolist(), best, strict=True))
            pages = {int(slot) // page_tokens for slot in read_slots[0, head] if slot >= 0}
            others = bounds[head, :-1].argmax().item()
            assert pages == {others, len(best) - 1}
            if page_tokens == 1:  # then bounds are the products, and the page is the best key
                assert others == max(range(29), key=best.__getitem__)
            # whoever has a page bound below the best product found cannot hold a better key
            certain = {page for page, bound in enumerate(bounds[head].tolist()) if bound >= max(best) - 1e-5}
            assert max(range(len(best)), key=best.__getitem__) in certain


def test_all_pages_are_the_whole_cache() -> None:
    whole, paged, dense = PressedCache(), PressedCache(QuestPress(4, 15, 0)), PressedCache(QuestPress(4, 2, 2))
    logits = [read(CASES["quest"], past, tokens(1, 50), *later()) for past in (whole, paged, dense)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert paged.read_ratio() == dense.read_ratio() == 1


def test_codec_is_off_by_half_a_step_at_most() -> None:
    past, whole = PressedCache(storage=Int8Codec(block_tokens=4, exact_tokens=6)), PressedCache()
    for cache in (past, whole):
        read(CASES["codec"], cache, tokens(1, 40))
    for ours, theirs in zip(past.pressed_layers(), whole.pressed_layers(), strict=True):
        for own, exact in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert own is not None and exact is not None
            step = exact.abs().amax(-1, keepdim=True) / 127
            off = (own - exact).abs()
            assert (off <= step / 2 + 1e-6).all() and (off[:, :, :32] > 0).any() and not off[:, :, 32:].any()


def test_pins_of_a_system_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    pins.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("pin=None") and "100%" not in first and "80% of all is gone" in first
    assert "100% of the system prompt is kept" in second and "80% of all is gone" in second


def test_a_span_is_of_the_tokens_that_hold_a_text() -> None:
    class Words:
        """Every letter is a token, and so is every two of them in capitals."""

        def __call__(self, text: str, **options: object) -> dict[str, list[tuple[int, int]]]:
            assert options == {"add_special_tokens": False, "return_offsets_mapping": True}
            return {"offset_mapping": [(0, 1), (1, 2), (2, 4), (4, 6), (6, 7)]}

    assert pins.span_of("abCDEFg", "bCDE", Words()) == (1, 4)
    assert pins.span_of("abCDEFg", "a", Words()) == (0, 1)
