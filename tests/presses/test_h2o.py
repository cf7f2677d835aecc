"""H2O: column sums of the attention, what decay and lifetimes do to them, and a kept set that does not freeze."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import Look, tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check, later, no_new_names, read, seen_by
from tests.oracles.watched import Rule, State, follow, stream
from tests.presses.views import MODELS
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BlockPress,
    BoundaryPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    H2OPress,
    KnormPress,
    LayerView,
    ObservedAttentionPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.loading.models import load_model

with no_new_names():
    from examples.extend import h2o as example

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = {"n_sink": 1, "grace": 4}
PUBLISHED = {"n_sink": 0, "grace": 0, "recent_ratio": 0.5, "decay": 1.0}
Watching = partial(Case, exact_crop=False)
CASES = {
    "prompt": Case(H2OPress(0.5, **SMALL), n_most=25, lacks=("ragged",)),
    "published neox": Case(H2OPress(0.5, **PUBLISHED), model="gpt_neox", n_most=25, lacks=("ragged",)),
    "lifetime adakv": Case(AdaKVPress(H2OPress(0.5, **SMALL, decay=1.0, by_lifetime=True)), n_most=25),
    "critical adakv": Case(CriticalAdaKVPress(H2OPress(0.5, **SMALL)), n_most=25),
    "decoding": Watching(DecodingPress(H2OPress(**SMALL), **OFTEN), lacks=("chunks", "ragged")),
    "every token": Watching(
        DecodingPress(H2OPress(**SMALL), compression_interval=1, target_size=24), lacks=("chunks", "crop", "ragged")
    ),
    "adakv decoding": Watching(
        CompressionRatioDecodingPress(AdaKVPress(H2OPress(**SMALL)), compression_interval=3), lacks=("chunks",)
    ),
    "after snapkv": Watching(
        PrefillDecodingPress(SnapKVPress(0.5, 4), DecodingPress(H2OPress(**SMALL), **OFTEN)),
        n_most=25,
        lacks=("ragged",),
    ),
    "after adakv": Watching(
        PrefillDecodingPress(AdaKVPress(KnormPress(0.5)), DecodingPress(H2OPress(**SMALL), **OFTEN)),
        n_most=25,
        lacks=("ragged",),  # until it is cut back
    ),
    "pinned": Watching(
        DecodingPress(H2OPress(**SMALL), **OFTEN), {"pin": [(0, 6), (20, 23)]}, lacks=("chunks", "ragged")
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def sums(past: PressedCache) -> list[Tensor]:
    return [layer.columns()["received"] for layer in past.pressed_layers()]


def full_weights(ids: Tensor, layer: int, model: str = "llama") -> Tensor:
    """The attention matrix of a layer in one forward, mean over the group's heads: float64 ``[Hkv, T, T]``."""
    view = seen_by(model, ids)[layer]
    keys = view.keys[0].double().repeat_interleave(view.group_size, dim=0)
    logits = view.queries[0].double() @ keys.mT * view.scaling
    future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1).unflatten(0, (-1, view.group_size)).mean(1)


@pytest.mark.parametrize("model", ["llama", "gpt_neox"])
@pytest.mark.parametrize("cuts", [[30], [12, 1, 1, 1, 15], [1] * 30], ids=["at once", "and a turn", "one by one"])
def test_without_eviction_and_decay_it_is_the_column_sums(cuts: list[int], model: str) -> None:
    ids, past = tokens(1, 30), PressedCache(H2OPress(decay=1.0))
    read(Case(None, model=model), past, *ids.split(cuts, dim=1))
    for i, own in enumerate(sums(past)):
        torch.testing.assert_close(own[0].double(), full_weights(ids, i, model).sum(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(own.sum(-1), torch.full(own.shape[:2], 30.0))  # one for each query


def test_queries_of_the_prompt_count_alike_and_later_ones_fade() -> None:
    ids, decay = tokens(1, 30), 0.9
    pieces = PressedCache(H2OPress(decay=decay), chunk_tokens=5)
    read(Case(None), pieces, *ids[:, :17].split(5, dim=1), *ids[:, 17:].split(1, dim=1))
    caches = [pieces]
    for cuts in ([17] + [1] * 13, [17, 6, 1, 6], [17, 13]):
        caches.append(PressedCache(H2OPress(decay=decay)))
        read(Case(None), caches[-1], *ids.split(cuts, dim=1))
    fading = decay ** torch.tensor([13.0] * 17 + [*range(12, -1, -1)]).double()
    for i in range(2):
        expected = (full_weights(ids, i) * fading[:, None]).sum(1)
        for past in caches:
            torch.testing.assert_close(sums(past)[i][0].double(), expected, atol=1e-4, rtol=0)


def rule(press: H2OPress) -> Rule:
    def see(states: State, q: int, weights: dict[int, float], is_prompt: bool) -> None:
        for t, weight in weights.items():
            states[t] = states[t] * (1.0 if is_prompt else press.decay) + weight

    def worth(states: State, t: int, end: int) -> float:
        return float(states[t]) / (end - t if press.by_lifetime else 1)

    return Rule(lambda t: 0.0, see, worth)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("press", "ends"),
    [
        (H2OPress(n_sink=1, grace=3, decay=0.8), (1, 3)),
        (H2OPress(n_sink=0, grace=2, decay=1.0, by_lifetime=True), (0, 2)),
        (H2OPress(**PUBLISHED), (0, 4)),
        (H2OPress(n_sink=0, grace=1, recent_ratio=0.3, decay=0.9), (0, 2)),
    ],
    ids=["decay", "lifetime", "published", "share"],
)
def test_h2o_step_by_step(press: H2OPress, ends: tuple[int, int], interval: int, model: str) -> None:
    """In layer 0, whose queries and keys no eviction changes."""
    ids, n_prompt, n_keep = tokens(1, 24), 12, 9
    view = seen_by(model, ids)[0]
    past = PressedCache(DecodingPress(press, compression_interval=interval, target_size=n_keep))
    read(Case(None, model=model), past, ids[:, :n_prompt])
    slow = [follow(view, head, rule(press), n_prompt, interval, n_keep, ends) for head in range(view.keys.shape[1])]
    for t in range(n_prompt, 24):
        read(Case(None, model=model), past, ids[:, t : t + 1])
        for head, states in enumerate(map(next, slow)):
            assert past.positions(0)[0, head].tolist() == list(states)
            own = torch.tensor([*states.values()])
            torch.testing.assert_close(sums(past)[0][0, head], own, atol=1e-5, rtol=0)
    assert past.stored_lengths()[0] == n_keep + (12 % interval)


@cache
def trained() -> LayerView:
    """Layer 2 of the demo model, which was trained: a text of 400 tokens."""
    model, look = load_model("demo"), Look()
    text = (Path(load_model.__code__.co_filename).parents[1] / "assets/demo/text/theophrastus.txt").read_text()[:4000]
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :400]
    model.model.set_attn_implementation("coldpress")
    with torch.no_grad():
        model.model(ids, **cache_argument(PressedCache(look)))
    return look.views[2]


def older_half(press: H2OPress) -> Tensor:
    """Positions that are held at the end of 400 tokens with a budget of 64, but for the newest 32."""
    held = stream(press.with_budget(budget_tokens=64), trained(), 40)
    return held[held < 400 - 32].float()


def test_the_published_rule_freezes_and_decay_with_grace_does_not() -> None:
    frozen, cured = older_half(H2OPress(**PUBLISHED)), older_half(H2OPress())
    assert frozen.quantile(0.5) < 200 < 300 < cured.quantile(0.5)
    assert (frozen < 104).float().mean() > 0.25 > 0.15 > (cured < 104).float().mean()


@pytest.mark.parametrize("decodes", [False, True])
def test_the_example_is_this_one_without_decay(decodes: bool) -> None:
    presses = H2OPress(0.5, n_sink=0, grace=4, decay=1.0), example.H2OPress(0.5, grace=4)
    caches = [
        PressedCache(DecodingPress(press.with_ratio(0.0), **OFTEN) if decodes else press)  # type: ignore[arg-type]
        for press in presses
    ]
    for past in caches:
        read(Case(None), past, tokens(1, 40), *later())
    assert torch.equal(caches[0].positions(1), caches[1].positions(1))


def test_a_prompt_by_lifetime_is_observed_attention() -> None:
    view = seen_by("llama", tokens(1, 30))[1]
    press = H2OPress(0.5, n_sink=0, grace=0, decay=1.0, by_lifetime=True)
    torch.testing.assert_close(press.score(view), ObservedAttentionPress().score(view))
    torch.testing.assert_close(press.state(view)["received"], view.attention_column_sums())


def test_both_schedules_keep_what_they_say() -> None:
    press = PrefillDecodingPress(H2OPress(0.5), DecodingPress(H2OPress(), target_size=30, compression_interval=2))
    past = PressedCache(press)
    read(Case(None), past, tokens(1, 80), *tokens(1, 4, seed=2).split(1, dim=1))
    assert past.stored_lengths() == [30] * 2
    for head in past.positions(0)[0].tolist():
        assert head[:4] == [0, 1, 2, 3] and head[-16:] == [*range(68, 84)]
    past = PressedCache(ComposedPress([KnormPress(0.2), H2OPress(0.3)]))
    read(Case(None), past, tokens(1, 100))
    assert past.stored_lengths() == [56] * 2


def test_blocks_of_a_cache_have_the_sums_of_all_queries() -> None:
    caches = [PressedCache(press) for press in (H2OPress(0.4), BlockPress(H2OPress(0.4), block_size=60))]
    for past in caches:
        read(Case(None), past, tokens(1, 60))
    assert torch.equal(caches[0].positions(1), caches[1].positions(1))
    assert torch.equal(sums(caches[0])[1], sums(caches[1])[1])


def test_a_critical_press_takes_its_sums() -> None:
    past = PressedCache(DecodingPress(CriticalKVPress(H2OPress(**SMALL)), **OFTEN))
    read(Case(None), past, tokens(1, 40), *later())
    assert past.stored_lengths() == [25] * 2


def test_names() -> None:
    assert make_press("h2o", 0.5, grace=3) == H2OPress(0.5, grace=3)
    expected = CompressionRatioDecodingPress(BoundaryPress(H2OPress(decay=1.0)), 64, target_compression_ratio=0.4)
    assert make_press("decoding_h2o", 0.4, decay=1.0) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"grace": -1}, "grace must be an integer >= 0, got -1"),
        ({"n_sink": 1.5}, "n_sink must be an integer >= 0, got 1.5"),
        ({"decay": 1.1}, "decay must be a number above 0 and at most 1, got 1.1"),
        ({"decay": 0}, "decay must be a number above 0 and at most 1, got 0"),
        ({"recent_ratio": -0.1}, r"recent_ratio must be a number in \[0, 1\]"),
        ({"by_lifetime": True}, "by_lifetime and decay=0.98 both make up for age; give by_lifetime decay=1.0"),
    ],
)
def test_what_is_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(PressError, match=f"H2OPress: {sentence}"):
        H2OPress(**given)  # type: ignore[arg-type]


def test_tiny_models_have_the_heads_that_the_oracle_wants() -> None:
    config = tiny("llama").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
