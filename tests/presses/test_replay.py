"""KVzip, KVzip+, KVgrad and KVCompose against models that run one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.oracles.models import oracle_logits
from tests.oracles.replays import Twin, best_of_all, kvzip_scores
from tests.presses.words import BREAK, FIRST, LATER, Words
from torch import Tensor

from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    BasePress,
    BlockPress,
    ChunkPress,
    ComposedPress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzipPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
)
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.bases.replay import ReplayPress
from coldpress.errors import PressError

MODELS = ["gpt_neox", "gpt_neox_full_rotary", "llama"]
N = 21
IDS = tokens(1, N)
SMALL: dict[str, Any] = {"chunk_size": 9, "n_sink": 2, "tokenizer": Words()}
KVZIP = KVzipPress(0.5, **SMALL)
KINDS = {
    "attention": KVZIP,
    "plus": replace(KVZIP, kvzip_plus_normalization=True),
    "gradient": KVgradPress(0.5, **SMALL),
}


def compressed(name: str, press: ReplayPress, ids: Tensor = IDS, **options: Any) -> tuple[PressedCache, list[Tensor]]:
    """A cache that ``press`` compressed, and the scores by layer that it went by."""
    seen: list[Tensor] = []

    class Spied(type(press)):  # type: ignore[misc]
        def scores(self, *args: Any) -> list[Tensor]:
            seen.extend(super().scores(*args))
            return seen

    spied = Spied.__new__(Spied)
    spied.__dict__.update(vars(press))
    past = PressedCache()
    with torch.no_grad(), spied(tiny(name)):
        tiny(name)(ids, **cache_argument(past), **options)
    return past, seen


def kept(past: PressedCache) -> list[list[list[int]]]:
    layers = [layer.positions()[0].tolist() for layer in past.pressed_layers()]
    return [[[t for t in head if t >= 0] for head in layer] for layer in layers]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "press"),
    [
        ("attention", KVzipPress(0.5, **SMALL)),
        ("plus", KVzipPress(0.5, kvzip_plus_normalization=True, **SMALL)),
        ("gradient", KVgradPress(0.5, **SMALL)),
    ],
    ids=["kvzip", "kvzip_plus", "kvgrad"],
)
@pytest.mark.thinned(3)
def test_kvzip(name: str, kind: str, press: KVzipPress) -> None:
    past, scores = compressed(name, press)
    expected = kvzip_scores(name, IDS[0].tolist(), chunk_size=9, n_sink=2, kind=kind)
    for own, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(own[0], torch.tensor(theirs), atol=1e-4, rtol=1e-3)
    protected = [[[math.inf] * 2 + head[2:] for head in layer] for layer in expected]
    assert kept(past) == best_of_all(protected, 10, 2)
    assert past.achieved_ratio() == 1 - 10 / N


@pytest.mark.parametrize("name", MODELS)
def test_what_is_evicted_is_gone_and_nothing_else_changes(name: str) -> None:
    question = tokens(1, 6, seed=4)
    for press in (KVZIP, KVComposePress(0.7), KVComposePress(0.6, structured=False)):
        past, _ = compressed(name, press)
        full = PressedCache()
        tiny(name)(IDS, **cache_argument(full))
        n_kept, n_all = (sum(int((c.positions(i) >= 0).sum()) for i in range(2)) for c in (past, full))
        assert past.kv_bytes() == full.kv_bytes() * n_kept // n_all
        expected = oracle_logits(name, question[0], full, kept(past))
        logits = tiny(name)(question, **cache_argument(past)).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_layerwise_gives_every_layer_the_same() -> None:
    past, scores = compressed("llama", replace(KVZIP, layerwise=True))
    protected = [part[0].tolist() for part in scores]
    for layer in protected:
        for head in layer:
            head[:2] = [math.inf] * 2
    assert kept(past) == [best_of_all([layer], 10, 2)[0] for layer in protected]
    other, _ = compressed("llama", KVZIP)
    assert kept(other) != kept(past)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("n_tokens", "ratio"), [(1, 0.5), (2, 0.9), (3, 0.5), (30, 0.99), (30, 0.0)])
def test_short_texts_and_high_ratios(kind: str, n_tokens: int, ratio: float) -> None:
    past, _ = compressed("llama", replace(KINDS[kind], compression_ratio=ratio), tokens(1, n_tokens))
    n_keep = max(1, n_tokens - math.ceil(round(ratio * n_tokens, 9)))
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * n_keep
    assert min(len(head) for layer in kept(past) for head in layer) >= 1


def test_budgets_are_those_of_all_layers_together() -> None:
    past, _ = compressed("gpt_neox", KVzipPress(budget_tokens=5, chunk_size=9, tokenizer=Words()))
    assert sum(len(head) for layer in kept(past) for head in layer) == 2 * 4 * 5
    token_bytes = 2 * 4 * 2 * 16 * 4  # layers, heads, keys and values, dimensions, float32
    past, _ = compressed("gpt_neox", KVComposePress(budget_bytes=7 * token_bytes + 3))
    assert sum(len(head) for layer in kept(past) for head in layer) == 2 * 4 * 7


def test_inference_mode_changes_nothing() -> None:
    for press in KINDS.values():
        model = BY_NAME["llama"].build()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        found = []
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            past = PressedCache()
            with mode(), press(model):
                model(IDS, **cache_argument(past))
                logits = model(tokens(1, 3), **cache_argument(past)).logits
            found.append((kept(past), logits.detach().clone()))
        assert found[0][0] == found[1][0] == found[2][0]
        torch.testing.assert_close(found[0][1], found[1][1])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -- what is replayed ------------------------------------------------------------------------------------------------


def replayed(press: KVzipPress, ids: Tensor) -> list[tuple[int, int, list[int]]]:
    found = press.chunks(ids, tiny("llama").base_model)
    return [(start, stop, replay[0].tolist()) for start, stop, replay in found]


def test_each_chunk_is_asked_for_by_the_end_of_the_one_before() -> None:
    ids = IDS[0].tolist()
    assert replayed(KVZIP, IDS) == [
        (0, 9, FIRST + BREAK + ids[:9]),
        (9, 18, LATER + ids[1:9] + BREAK + ids[9:18]),
        (18, 21, LATER + ids[10:18] + BREAK + ids[18:]),
    ]


class Chat(Words):
    chat_template = "of some kind"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return f"system prompt user says {messages[0]['content']} end assistant says"


def test_a_chat_template_is_looked_for_in_the_text() -> None:
    chat = Chat()
    before = chat.encode("system prompt user says", add_special_tokens=False)
    after = chat.encode("end assistant says", add_special_tokens=False)
    press, ids = replace(KVZIP, tokenizer=chat, chunk_size=100), IDS[0].tolist()
    inside = torch.tensor([before + ids])
    assert replayed(press, inside) == [(4, 4 + N, FIRST + after + ids)]
    assert press.n_first(inside) == 4
    merged = torch.tensor([before[:3] + ids])  # the last token of the template has become one with the text
    assert replayed(press, merged) == [(3, 3 + N, FIRST + after + ids)]
    assert replayed(press, IDS) == [(0, N, FIRST + BREAK + ids)]
    assert press.n_first(IDS) == 2
    past, _ = compressed("llama", replace(press, compression_ratio=0.8), inside)
    assert all(head[:4] == [0, 1, 2, 3] for layer in kept(past) for head in layer)


def test_ids_that_the_model_does_not_have() -> None:
    class Foreign(Words):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [50_000]

    with pytest.raises(PressError, match="knows 97 tokens"):
        compressed("llama", replace(KVZIP, tokenizer=Foreign()))


# -- KVCompose -------------------------------------------------------------------------------------------------------


def kvcompose_scores(name: str, press: KVComposePress, ids: list[int]) -> list[list[list[float]]]:
    with torch.no_grad():
        twin, n = Twin(name, ids + ids), len(ids)
    scores = []
    for layer in twin.layers:
        rows = []  # of each query head
        for head in range(twin.net.n_heads):
            weights = [layer.weights(p, head, twin.group, list(range(p + 1)))[:n] for p in range(n, 2 * n)]
            rows.append([combine([w[t] for w in weights], press.agg_task) for t in range(n)])
        heads = [
            [
                combine([row[t] for row in rows[j * twin.group : (j + 1) * twin.group]], press.agg_group)
                for t in range(n)
            ]
            for j in range(twin.net.n_kv_heads)
        ]
        if press.add_v_norm:
            heads = [[s * float(layer.values[t][j].norm()) for t, s in enumerate(head)] for j, head in enumerate(heads)]
        if press.add_mean_across_heads:
            means = [sum(head[t] for head in heads) / len(heads) for t in range(n)]
            heads = [[s + mean for s, mean in zip(head, means, strict=True)] for head in heads]
        scores.append(heads)
    return scores


def combine(numbers: list[float], how: str) -> float:
    return max(numbers) if how == "max" else sum(numbers) / len(numbers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "press",
    [
        KVComposePress(0.5),
        KVComposePress(0.7, agg_task="mean", agg_group="max", add_v_norm=True),
        KVComposePress(0.8, agg_head="max", add_mean_across_heads=False, keep_token_lower_bound=1),
    ],
    ids=repr,
)
def test_kvcompose(name: str, press: KVComposePress) -> None:
    past, scores = compressed(name, press)
    expected = kvcompose_scores(name, press, IDS[0].tolist())
    for own, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(own[0], torch.tensor(theirs), atol=1e-4, rtol=1e-3)
    composites = []
    for layer in expected:
        ordered = [sorted(head, reverse=True) for head in layer]
        composites.append([combine([head[j] for head in ordered], press.agg_head) for j in range(N)])
    n_keep = N - math.ceil(round(press.compression_ratio * N, 9))
    counts = [len(layer[0]) for layer in best_of_all([[c] for c in composites], n_keep, 1)]
    assert sum(counts) == len(counts) * n_keep
    for layer, found, count in zip(expected, kept(past), counts, strict=True):
        assert found == [sorted(sorted(range(N), key=lambda t, h=head: -h[t])[:count]) for head in layer]


@pytest.mark.parametrize("name", MODELS)
def test_kvcompose_without_structure(name: str) -> None:
    """A: all pairs of the text stayed in the cache, and those of the second pass too, where they were attended to."""
    press = KVComposePress(0.6, structured=False)
    past, _ = compressed(name, press)
    assert kept(past) == best_of_all(kvcompose_scores(name, press, IDS[0].tolist()), 8, 1)
    layer = past.pressed_layers()[0]
    assert layer.stored_length == max(len(head) for head in kept(past)[0]) < N


def test_the_first_layer_may_be_the_smallest() -> None:
    """C: the first layer was made the largest, by the best scores of any layer, as its length made the mask of all."""
    low, high = torch.rand(1, 2, 20) * 0.1, torch.rand(1, 2, 20) + 1
    counts = KVComposePress(0.5).counts([low, high], 10, 1)
    assert [count.tolist() for count in counts] == [[[1, 1]], [[19, 19]]]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("bound", [3, 50])
def test_what_kvcompose_keeps_at_least(structured: bool, bound: int) -> None:
    past, _ = compressed("llama", KVComposePress(0.7, structured=structured, keep_token_lower_bound=bound))
    lengths = [len(head) for layer in kept(past) for head in layer]
    assert min(lengths) >= min(bound, 6) and sum(lengths) == 4 * 6


# -- what cannot work ------------------------------------------------------------------------------------------------

ALL = [*KINDS.values(), KVComposePress(0.5)]


@pytest.mark.parametrize("press", ALL, ids=lambda press: type(press).__name__)
def test_batches_and_padding_are_refused_before_anything_is_computed(press: ReplayPress) -> None:
    model, past, ran = BY_NAME["llama"].build(), PressedCache(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with press(model):
        with pytest.raises(PressError, match=r"one text.*a batch of 2.*batch_size 1"):
            model(tokens(2, N), **cache_argument(past))
        with pytest.raises(PressError, match="a padded text"):
            model(IDS, attention_mask=mask, **cache_argument(past))
        assert not ran and past.seen_tokens == 0
        model(IDS, **cache_argument(past))  # the cache was not touched
    assert past.achieved_ratio() > 0.5
    with press.with_ratio(0.0)(model):
        assert cache_of(model(tokens(2, N))).seen_tokens == N


@pytest.mark.parametrize(
    "press", [*ALL, AttentionMatchingPress(KVZIP, queries="repeat")], ids=lambda press: type(press).__name__
)
@pytest.mark.parametrize("n_rows", [1, 2])
def test_generate_with_padded_rows_is_told_of_its_rows(press: BasePress, n_rows: int) -> None:
    """It gives positions that padding does not count in, as an image has positions of its own."""
    mask = torch.ones(n_rows, N, dtype=torch.long)
    mask[-1, :3] = 0
    what = "a padded text" if n_rows == 1 else "a batch of 2"
    with press(tiny("llama")), pytest.raises(PressError, match=rf"shows the model one text.*{what}"):
        tiny("llama").generate(tokens(n_rows, N), attention_mask=mask, max_new_tokens=3)


def test_what_removes_nothing_takes_padded_rows() -> None:
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    expected = tiny("llama").generate(tokens(2, N), **options)
    with KVZIP.with_ratio(0.0)(tiny("llama")):
        assert torch.equal(tiny("llama").generate(tokens(2, N), **options), expected)


@pytest.mark.parametrize("press", ALL, ids=lambda press: type(press).__name__)
def test_outside_the_block(press: ReplayPress) -> None:
    with pytest.raises(PressError, match=r"inside 'with press\(model\):', with input_ids"):
        tiny("llama")(IDS, **cache_argument(PressedCache(press)))
    with press(tiny("llama")), pytest.raises(PressError, match="with input_ids"):
        tiny("llama")(inputs_embeds=tiny("llama").get_input_embeddings()(IDS), **cache_argument(PressedCache()))
    past = PressedCache(press.with_ratio(0.0))
    tiny("llama")(IDS, **cache_argument(past))
    assert past.stored_lengths() == [N, N]


def test_a_model_without_a_tokenizer() -> None:
    press = KVzipPress(0.5)
    message = r"not loaded from anywhere.*pass it: KVzipPress\(..., tokenizer=tokenizer\)"
    with pytest.raises(PressError, match=message), press(tiny("llama")):
        pass
    with press.with_ratio(0.0)(tiny("llama")):  # nothing to ask
        pass
    model = BY_NAME["llama"].build()
    model.config._name_or_path = "tests/presses"
    with pytest.raises(PressError, match=r"found no tokenizer in tests/presses.*pass it"), press(model):
        pass


def test_the_tokenizer_is_no_part_of_what_a_press_is() -> None:
    assert replace(KVZIP, tokenizer=None) == KVZIP and hash(replace(KVZIP, tokenizer=None)) == hash(KVZIP)
    assert "okenizer" not in repr(KVZIP)
    assert KVzipPress(0.5).prepared(tiny("llama"), tokenizer=Words()).tokenizer is not None
    assert KVZIP.prepared(tiny("llama"), tokenizer=None) is KVZIP


def test_windows_that_do_not_reach_the_text() -> None:
    for press in ALL:
        with press(tiny("mistral")), pytest.raises(PressError, match="see only 24 tokens back"):
            tiny("mistral")(tokens(1, 20))


def test_learned_positions_that_are_used_up() -> None:
    model = BY_NAME["gpt2"].build(n_positions=30)
    with KVComposePress(0.5)(model), pytest.raises(PressError, match="30 positions"):
        model(IDS)


@pytest.mark.parametrize("press", [KVzipPress(0.5), KVgradPress(0.5), KVComposePress(0.5)], ids=repr)
def test_wrappers_refuse(press: ReplayPress) -> None:
    makers = [
        lambda: AdaKVPress(press),
        lambda: BlockPress(press),
        lambda: ChunkPress(press),
        lambda: ComposedPress([KnormPress(0.5), press]),
        lambda: DecodingPress(press),
        lambda: KeyRerotationPress(press),
        lambda: PerLayerCompressionPress(press, [0.5, 0.5]),
    ]
    for make in makers:
        with pytest.raises(
            PressError, match=rf"one layer at a time, and {type(press).__name__} chooses among the pairs"
        ):
            make()


def test_a_schedule_goes_on_after_a_replay() -> None:
    model = tiny("llama")
    press = PrefillDecodingPress(
        replace(KVZIP, tokenizer=None), DecodingPress(KnormPress(), compression_interval=4, target_size=8)
    )
    press = press.prepared(model, tokenizer=Words())
    past, (alone, _) = PressedCache(), compressed("llama", KVZIP)
    with press(model):
        with pytest.raises(PressError, match="a batch of 2"):
            model(tokens(2, N))
        model(IDS, **cache_argument(past))
        assert kept(past) == kept(alone)
        model(tokens(1, 4), **cache_argument(past))
    assert past.stored_lengths() == [8, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVzipPress(1.0), r"in \[0, 1\)"),
        (lambda: KVzipPress(n_sink=-1), "n_sink must be an integer >= 0"),
        (lambda: KVzipPress(chunk_size=0), "chunk_size must be an integer >= 1"),
        (lambda: KVgradPress(chunk_size=True), "chunk_size must be an integer >= 1"),
        (lambda: KVComposePress(agg_task="sum"), "agg_task must be 'max' or 'mean'"),
        (lambda: KVComposePress(keep_token_lower_bound=-1), "keep_token_lower_bound"),
        (lambda: KVzipPress(0.5, budget_tokens=3), "both say how much"),
    ],
)
def test_impossible_parameters(make: Any, message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()
