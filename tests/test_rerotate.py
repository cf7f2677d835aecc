"""positions="rerotate": what is computed is what a model computes whose cache holds nothing but the kept tokens."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, BY_NAME, ROTARY_VARIANTS, tiny, tokens
from tests.oracles.scores import leverage, rotation
from tests.presses.views import MODELS, rotary_width
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    FinchPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVzipPress,
    LeverageScorePress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer
from coldpress.core.call import LayerCall
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView
from coldpress.errors import ModelError, PressError

every_model = pytest.mark.parametrize("model", MODELS)
TARGET, INTERVAL = 20, 4
LEARNED, CHANGING = ("gpt2", "opt", "gpt_bigcode"), ("llama_dynamic", "phi3_longrope")


def turned(model: str, states: Tensor, places: Tensor) -> Tensor:
    """States ``[..., n, D]`` rotated by ``places [..., n]``, written out in float64; negative places rotate back."""
    width = rotary_width(model, states.shape[-1])
    theta = 10_000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    angle = places[..., None].double() * theta
    a, b, rest = states.double().split([width // 2, width // 2, states.shape[-1] - width], dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


class Twin:
    """Holds all keys as they were before rotation, and reads each step with those that are kept, at 0 .. n - 1."""

    def __init__(self, name: str, model: PreTrainedModel | None = None):
        self.name, self.model = name, model or tiny(name)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def read(self, ids: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Logits of ``ids`` after the tokens at ``kept``, int64 ``[B, Hkv, n]`` for each layer."""
        cache, n = DynamicCache(), 0
        for i, (keys, values) in enumerate(self.pairs):
            assert kept is not None
            at = kept[i][..., None].expand(-1, -1, -1, keys.shape[-1])
            n = at.shape[2]
            placed = turned(self.name, keys.gather(2, at), torch.arange(n))
            cache.update(placed.to(values.dtype), values.gather(2, at), i)
        with torch.no_grad():
            logits: Tensor = self.model(ids, **cache_argument(cache)).logits
        new = []
        for i, layer in enumerate(cache.layers):
            keys = turned(self.name, layer.keys[:, :, n:], -torch.arange(n, n + ids.shape[1]))
            before = self.pairs[i] if self.pairs else (keys[:, :, :0], layer.values[:, :, :0])
            new.append((torch.cat([before[0], keys], 2), torch.cat([before[1], layer.values[:, :, n:]], 2)))
        self.pairs = new
        return logits


def read(model: str | PreTrainedModel, past: PressedCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = (tiny(model) if isinstance(model, str) else model)(ids, **cache_argument(past)).logits
    return logits


def positions_of(past: PressedCache) -> list[Tensor]:
    return [layer.positions() for layer in past.pressed_layers()]


@every_model
@pytest.mark.parametrize("inner", [StreamingLLMPress(), KnormPress(), SnapKVPress(window_size=4)], ids=repr)
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.thinned(5)
def test_a_stream_is_read_as_from_a_compact_cache(model: str, inner: BasePress, chunk: int) -> None:
    ids, twin = tokens(2, 100), Twin(model)
    past = PressedCache(DecodingPress(inner, INTERVAL, TARGET), positions="rerotate")
    torch.testing.assert_close(read(model, past, ids[:, :16]), twin.read(ids[:, :16]), atol=1e-4, rtol=0)
    for start in range(16, 100, chunk):
        new = ids[:, start : start + chunk]
        expected = twin.read(new, positions_of(past))
        torch.testing.assert_close(read(model, past, new), expected, atol=2e-4, rtol=0)
        assert past.seen_tokens == start + new.shape[1]
    assert max(past.stored_lengths()) < TARGET + INTERVAL + chunk


@pytest.mark.parametrize(
    "model", [name if name == "gpt_neox" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.slow
def test_a_thousand_steps_far_beyond_the_positions(model: str) -> None:
    """Past the trained 512; by hand: what is kept is sinks and the newest; bytes stay what they were."""
    own = BY_NAME[model].build(num_hidden_layers=1)
    ids, twin = tokens(1, 1_040), Twin(model, own)
    past = PressedCache(DecodingPress(StreamingLLMPress(), INTERVAL, TARGET, 0), positions="rerotate")
    read(own, past, ids[:, :16]), twin.read(ids[:, :16])
    sizes, worst = set(), 0.0
    for i in range(16, 1_040):
        expected = twin.read(ids[:, i : i + 1], positions_of(past))
        worst = max(worst, float((read(own, past, ids[:, i : i + 1]) - expected).abs().max()))
        if i > 200:
            sizes.add(past.kv_bytes())
            at = past.positions(0)[0, 0].tolist()
            assert at == [0, 1, 2, 3, *range(i - len(at) + 5, i + 1)] and TARGET <= len(at) < TARGET + INTERVAL
    assert worst < 2e-3
    assert len(sizes) == 1


@pytest.mark.parametrize("positions", ["original", "rerotate"])
def test_at_true_positions_it_would_be_something_else(positions: str) -> None:
    ids, twin, difference = tokens(1, 60), Twin("llama"), 0.0
    past = PressedCache(DecodingPress(KnormPress(), INTERVAL, TARGET), positions=positions)  # type: ignore[arg-type]
    read("llama", past, ids[:, :16]), twin.read(ids[:, :16])
    for i in range(16, 60):
        expected = twin.read(ids[:, i : i + 1], positions_of(past))
        difference = max(difference, float((read("llama", past, ids[:, i : i + 1]) - expected).abs().max()))
    assert difference > 1e-2 if positions == "original" else difference < 2e-4


def places_of(past: PressedCache, layer: int) -> Tensor:
    """Where the keys of a layer belong, ``[B, Hkv, T]``: side by side before the next token, head by head."""
    held = past.positions(layer) >= 0
    return past.seen_tokens - held.flip(-1).cumsum(-1).flip(-1)


@every_model
def test_heads_of_different_length_each_stand_side_by_side(model: str) -> None:
    """Keys of layer 0, which depend on nothing but the token, against the projections rotated to their places."""
    ids, press = tokens(2, 90), AdaKVPress(KnormPress(), alpha_safeguard=0.0)
    past, twin = PressedCache(DecodingPress(press, INTERVAL, TARGET), positions="rerotate"), Twin(model)
    read(model, past, ids[:, :16]), twin.read(ids[:, :16])
    n_ragged = 0
    for i in range(16, 90):
        read(model, past, ids[:, i : i + 1])
        twin.read(ids[:, i : i + 1], [torch.arange(i).expand(*keys.shape[:3]) for keys, _ in twin.pairs])
        own = past.positions(0)
        at = own.clamp(min=0)[..., None].expand(-1, -1, -1, twin.pairs[0][0].shape[-1])
        expected = turned(model, twin.pairs[0][0].gather(2, at), places_of(past, 0)).float()
        is_held = own >= 0
        torch.testing.assert_close(past.layer(0).keys[is_held], expected[is_held], atol=2e-4, rtol=0)
        n_ragged += int(is_held.sum(-1).max() > is_held.sum(-1).min())
    assert n_ragged > 10


class Spy(DecodingPress):
    """A schedule that remembers the views it was shown."""

    views: list[LayerView] = []  # noqa: RUF012

    def compress_again(self, view: LayerView) -> Kept | None:
        self.views.append(view)
        return super().compress_again(view)


@pytest.mark.parametrize("inner", [KnormPress(), SnapKVPress(window_size=8), AdaKVPress(KnormPress())], ids=repr)
@pytest.mark.parametrize(("before", "chunk"), [(None, None), (KnormPress(0.5), None), (KnormPress(0.5), 5)])
@pytest.mark.thinned(5)
def test_a_padded_row_reads_what_it_reads_alone(inner: BasePress, before: BasePress | None, chunk: int | None) -> None:
    random = torch.Generator().manual_seed(0)  # no token twice: two of one norm would be a tie
    ids, pad = torch.stack([3 + torch.randperm(90, generator=random)[:80] for _ in range(2)]), 7
    press = PrefillDecodingPress(before, Spy(inner, INTERVAL, TARGET if before is None else 10))  # type: ignore[arg-type]
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    ranks = (mask.cumsum(-1) - 1).clamp(min=0)
    both, alone = (PressedCache(press, positions="rerotate", chunk_tokens=chunk) for _ in range(2))
    prefill(tiny("gpt_neox"), ids[:, :16], both, attention_mask=mask[:, :16])
    prefill(tiny("gpt_neox"), ids[1:, pad:16], alone)
    n_compared = 0
    with torch.no_grad():
        for start, stop in ((i, i + 1) for i in range(16, 80)):
            Spy.views = []
            logits = tiny("gpt_neox")(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=ranks[:, start:stop],
                **cache_argument(both),
            ).logits[1]
            shown = [view for view in Spy.views if view.end == stop - pad]  # of the second row, in both layers
            Spy.views = []
            own = tiny("gpt_neox")(ids[1:, start:stop], **cache_argument(alone)).logits[0]
            torch.testing.assert_close(logits[-len(own) :], own, atol=2e-4, rtol=0)
            assert len(shown) == len(Spy.views)
            for view, other in zip(shown, Spy.views, strict=True):  # some are of the prompt
                torch.testing.assert_close(view.queries, other.queries, atol=2e-4, rtol=0)
                n_compared += 1
    Spy.views = []
    assert n_compared == 2 * (80 - 16) // INTERVAL


def watched(model: str, past: PressedCache, ids: Tensor, n: int) -> tuple[list[LayerView], Tensor, Tensor]:
    """Reads ``n`` tokens of ``ids``, then one by one: what a Spy was shown of the first layer, and what its projections
    gave for each token, queries and keys before rotation."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def look(layer: PressedLayer, call: LayerCall) -> None:
        n_seen = int(layer.positions().max()) + 1
        at = torch.arange(n_seen - call.query.shape[2], n_seen)
        if layer.index == 0:
            made[n_seen] = turned(model, call.query, -at), turned(model, layer.keys[:, :, -len(at) :], -at)

    Spy.views = []
    past.session.on_attention = look
    with torch.no_grad():
        prefill(tiny(model), ids[:, :n], past)
    for start, stop in [(i, i + 1) for i in range(n, ids.shape[1])]:
        read(model, past, ids[:, start:stop])
    queries, keys = (torch.cat([made[seen][i] for seen in sorted(made)], dim=2) for i in (0, 1))
    views, Spy.views = Spy.views[::2], []
    return views, queries, keys


@every_model
@pytest.mark.parametrize("inner", [TOVAPress(), AdaKVPress(KeyDiffPress(), 0.0)], ids=repr)
@pytest.mark.parametrize(
    ("before", "chunk"), [(None, None), (KnormPress(0.5), None), (AdaKVPress(KnormPress(0.5)), 5)], ids=repr
)
@pytest.mark.thinned(2)
def test_scorers_see_keys_and_queries_where_they_stand(
    model: str, inner: BasePress, before: BasePress | None, chunk: int | None
) -> None:
    """Queries of tokens long before the last cut too; unrotating gives back what the projections gave."""
    ids = tokens(1, 70)
    press = PrefillDecodingPress(before, Spy(inner, INTERVAL, TARGET, 12))  # type: ignore[arg-type]
    views, queries, keys = watched(model, PressedCache(press, positions="rerotate", chunk_tokens=chunk), ids, 16)
    assert len(views) > 8
    for view in views:
        assert view.positions is not None and view.n_queries == min(12, view.end)
        first = view.end - view.n_queries
        torch.testing.assert_close(view.unrotated_queries(), queries[:, :, first : view.end].float(), atol=2e-4, rtol=0)
        own = view.positions
        at = own.clamp(min=0)[..., None].expand(-1, -1, -1, keys.shape[-1])
        is_held = own >= 0
        expected = keys.gather(2, at).float()
        torch.testing.assert_close(view.unrotated_keys()[is_held], expected[is_held], atol=2e-4, rtol=0)


@pytest.mark.parametrize("inner", [ExpectedAttentionPress(n_sink=2), LeverageScorePress()], ids=repr)
def test_scorers_that_undo_the_rotation_score_what_stands_there(inner: ScorerPress) -> None:
    """Formulas over the projections' queries and keys, these rotated to where they stand side by side."""
    ids = tokens(1, 60)
    press = Spy(AdaKVPress(inner, 0.0), INTERVAL, TARGET, 12)  # type: ignore[arg-type]
    views, queries, keys = watched("llama", PressedCache(press, positions="rerotate"), ids, 30)
    assert len(views) > 6
    for view in views:
        assert view.positions is not None
        scores = inner.scores(view)
        for head in range(2):
            at = view.positions[0, head][view.positions[0, head] >= 0]
            own, first = keys[0, head, at], view.end - view.n_queries
            if isinstance(inner, ExpectedAttentionPress):
                places = torch.arange(view.end - len(at), view.end)
                asked = queries[0, 2 * head : 2 * head + 2, first : view.end]
                values = view.values[0, head, : len(at)].double()
                expected = expected_of(turned("llama", own, places), values, asked, view.end, inner)
            else:
                expected = torch.tensor(leverage(own, None), dtype=torch.float64)
            torch.testing.assert_close(scores[0, head, : len(at)].double(), expected, atol=2e-3, rtol=2e-3)


def expected_of(keys: Tensor, values: Tensor, queries: Tensor, end: int, press: ExpectedAttentionPress) -> Tensor:
    """Scores of keys ``[n, D]`` by queries before rotation ``[G, Q, D]``, for the tokens from ``end`` on."""
    dim = keys.shape[1]
    ahead = sum(rotation(p, dim, dim) for p in range(end, end + press.n_future_positions)) / press.n_future_positions
    weights = []
    for own in queries.double():
        mean, covariance = ahead @ own.mean(0), ahead @ own.T.cov(correction=0) @ ahead.T
        logits = keys @ mean / dim**0.5 + ((keys @ covariance) * keys).sum(-1) / (2 * dim)
        weights.append(logits.softmax(0))
    return (torch.stack(weights).mean(0) + press.epsilon) * values.norm(dim=-1)


ROTARY = [a.name for a in ARCHITECTURES + ROTARY_VARIANTS if a.name not in (*LEARNED, *CHANGING)]


@pytest.mark.parametrize("name", ROTARY)
def test_the_prompt_is_closed_up_too(name: str) -> None:
    """As KeyRerotationPress does it, with every layout and scaling."""
    ids = tokens(2, 40)
    own = PressedCache(KnormPress(0.6), positions="rerotate")
    wrapped = PressedCache(KeyRerotationPress(KnormPress(0.6)))
    read(name, own, ids), read(name, wrapped, ids)
    for a, b in zip(own.pressed_layers(), wrapped.pressed_layers(), strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=0)
        assert torch.equal(a.positions(), b.positions())


@pytest.mark.slow
def test_keys_of_two_bytes_do_not_drift() -> None:
    """Sinks are moved a thousand times, and are then as near to the truth as keys that were moved once."""
    ids, model = tokens(1, 1_040), BY_NAME["llama"].build(dtype=torch.bfloat16, num_hidden_layers=1)
    past = PressedCache(DecodingPress(StreamingLLMPress(), 1, TARGET, 0), positions="rerotate")
    with torch.no_grad():
        model(ids[:, :16], **cache_argument(past))
        start = past.layer(0).keys[:, :, :4].clone()
        for i in range(16, 1_040):
            model(ids[:, i : i + 1], **cache_argument(past))
    expected = turned("llama", start, torch.tensor([1_020] * 4))  # from 0 .. 3 to 1020 .. 1023
    error = (past.layer(0).keys[:, :, :4].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    rounding = torch.finfo(torch.bfloat16).eps
    residual = past.layer(0).columns()["rounding_residual"]
    assert not residual[:, :, 4:].any()  # what comes later is not moved yet
    assert float(error.max()) < rounding  # 0.1 without what is remembered beside them


def test_forks_rows_and_copies_go_on_alike() -> None:
    ids, press = tokens(2, 60), DecodingPress(KnormPress(), INTERVAL, TARGET)
    model = tiny("llama", "coldpress", torch.bfloat16)
    past = PressedCache(press, positions="rerotate")

    def go_on(cache: PressedCache, rows: list[int]) -> Tensor:
        with torch.no_grad():
            parts = [model(ids[rows, i : i + 1], **cache_argument(cache)).logits for i in range(50, 60)]
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        model(ids[:, :30], **cache_argument(past))
        for i in range(30, 50):
            model(ids[:, i : i + 1], **cache_argument(past))
    fork, loaded, swapped = past.fork(), pickle.loads(pickle.dumps(past)), past.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    expected = go_on(past, [0, 1])
    assert torch.equal(go_on(fork, [0, 1]), expected)
    assert torch.equal(go_on(loaded, [0, 1]), expected)
    assert torch.equal(go_on(swapped, [1, 0])[[1, 0]], expected)


def test_inside_a_block_and_in_generate() -> None:
    ids, press = tokens(1, 30), DecodingPress(StreamingLLMPress(), INTERVAL, TARGET)
    inside, own = PressedCache(positions="rerotate"), PressedCache(press, positions="rerotate")
    model = BY_NAME["gpt_neox"].build()
    with press(model):
        a = model.generate(ids, **cache_argument(inside), max_new_tokens=40, do_sample=False)
    b = model.generate(ids, **cache_argument(own), max_new_tokens=40, do_sample=False)
    assert torch.equal(a, b)
    assert torch.equal(inside.positions(0), own.positions(0))


REFUSED: list[Callable[[], BasePress]] = [
    lambda: KeyRerotationPress(KnormPress(0.5)),
    lambda: ThinKPress(0.5),
    lambda: PrefillDecodingPress(ThinKPress(0.5)),
    lambda: FinchPress(0.5, window_size=4),
    lambda: KVzipPress(0.5),
    lambda: DMSPress(KnormPress(), -1.0, decoding=True),
]


@pytest.mark.parametrize("make", REFUSED)
def test_presses_that_cannot_are_refused_with_a_reason(make: Callable[[], BasePress]) -> None:
    with pytest.raises(PressError, match="moves keys up"):
        PressedCache(make(), positions="rerotate")
    press = make()
    if press.needs_model:  # which asks for more before anything else
        return
    with pytest.raises(PressError, match="moves keys up"), press(BY_NAME["llama"].build()) as model:
        model(tokens(1, 8), **cache_argument(PressedCache(positions="rerotate")))


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(PressError, match="'original' or 'rerotate'"):
        PressedCache(positions="compact")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in (*LEARNED, *CHANGING) if name in BY_NAME])
def test_models_that_cannot_are_refused_at_the_first_call(name: str) -> None:
    why = "has no rotary embedding" if name in LEARNED else "change with the length of a text"
    past = PressedCache(DecodingPress(StreamingLLMPress(), INTERVAL, TARGET), positions="rerotate")
    with pytest.raises(ModelError, match=why):
        read(name, past, tokens(1, 8))
