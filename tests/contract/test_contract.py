"""Every press on every architecture: what a PressedCache promises, whatever the model."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, WINDOW, Architecture, Look, tiny, tokens
from tests.contract.pairs import every_pair, fast_pairs, kind_of
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, block, other_press, press_of
from tests.presses.weights import N_RESTORED
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coldpress import BasePress, DMSPress, LayerView, PressedCache, RestoreKVPress, ScorerPress, make_press, press_names
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import parameters_of
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.counts import keep_count
from coldpress.core.press import parts
from coldpress.errors import PressError

CONTEXT, QUESTION, ANSWER = 45, 7, 5

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
pytestmark = pytest.mark.usefixtures("given_artefacts", "given_weights")
SCHEDULES = press_names(at_prefill=False)


@cache
def views_of(architecture: Architecture, dtype: torch.dtype) -> dict[int, LayerView]:
    """What a press sees after a prefill, by layer of the cache; a layer that is not compressed has none."""
    past = PressedCache(look := Look())
    tiny(architecture.name, "coldpress", dtype)(tokens(1, CONTEXT), **cache_argument(past))
    return {view.module.layer_idx: view for view in look.views}  # type: ignore[union-attr,misc]


def number(press: BasePress, *words: str) -> int:
    """The largest of the press's numbers whose names have one of the words, and of those of the presses inside it."""
    found = [
        value
        for part in parts(press)
        for name, value in vars(part).items()
        if any(word in name for word in words) and not name.endswith("_end") and type(value) is int
    ]
    return max(found, default=0)


def ends_of(press: BasePress, view: LayerView) -> tuple[int, int]:
    """How many of the first and of the last tokens a press declares that it keeps, whatever else it does.

    The first by its own parameters (n_sink and the like); the last by what a scorer protects, else by parameters too.
    """
    n_first = number(press, "sink", "initial")
    if isinstance(press, DMSPress):
        return n_first, press.sliding_window_size
    n_last = press.protected(view)[1] if isinstance(press, ScorerPress) else number(press, "recent")
    return n_first, n_last


def cannot_replay(architecture: Architecture, name: str) -> bool:
    """Whether a press says that it cannot run this model a second time on the text."""
    if not press_of(name, 0.5).needs_model:
        return False
    return architecture.name == "mistral" or (name == "kvgrad" and architecture.name in ("lfm2", "qwen3_next"))


def in_pieces(model: PreTrainedModel, ids: Tensor, past: object) -> Tensor:
    """Logits of all tokens: a context, a question of several tokens, then token by token."""
    cuts = (CONTEXT, CONTEXT + QUESTION, *range(CONTEXT + QUESTION + 1, ids.shape[1] + 1))
    starts = (0, *cuts)
    return torch.cat(
        [model(ids[:, a:b], **cache_argument(past)).logits for a, b in zip(starts, cuts, strict=False)], dim=1
    )


@cache
def own_logits(architecture: Architecture, attention: str, dtype: torch.dtype) -> Tensor:
    """What the model computes by itself for the tests' tokens, in one forward."""
    return tiny(architecture.name, attention, dtype)(tokens(1, CONTEXT + QUESTION + ANSWER), use_cache=False).logits


def check_close(actual: Tensor, expected: Tensor) -> None:
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    else:  # rounding may send a token to another expert, so look at the mean
        assert (actual - expected).abs().mean() < 0.03 * expected.abs().mean() + 0.01


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["coldpress", "coldpress_eager"])
@pytest.mark.thinned(5)
def test_computes_what_the_model_computes(architecture: Architecture, dtype: torch.dtype, backend: str) -> None:
    model = tiny(architecture.name, backend, dtype)
    expected = own_logits(architecture, "eager" if backend == "coldpress_eager" else architecture.own, dtype)
    ids = tokens(1, CONTEXT + QUESTION + ANSWER)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    check_close(in_pieces(model, ids, DynamicCache(config=model.config)), expected)
    pressed = PressedCache()
    check_close(in_pieces(model, ids, pressed), expected)
    assert pressed.seen_tokens == ids.shape[1]


@pytest.mark.thinned(3)
@every_pair(press_names(at_prefill=True))
def test_ratio_0_changes_nothing(architecture: Architecture, name: str) -> None:
    model, past = tiny(architecture.name), PressedCache(press_of(name, 0.0))
    with block(model, past.press):
        logits = in_pieces(model, tokens(1, CONTEXT + QUESTION + ANSWER), past)
    check_close(logits, own_logits(architecture, architecture.own, torch.float32))
    assert past.achieved_ratio() == 0


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute:FutureWarning")  # cohere2 of 4.56 itself
@every_architecture
def test_generate_gives_the_models_own_tokens(architecture: Architecture) -> None:
    model, own = tiny(architecture.name), tiny(architecture.name, architecture.own)
    ids = tokens(1, 30)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = own.generate(ids, **options)
    for press in (None, press_of("snapkv", 0.0)):
        assert torch.equal(model.generate(ids, **cache_argument(PressedCache(press)), **options), expected)


def expected_lengths(architecture: Architecture, model: PreTrainedModel, name: str) -> list[int]:
    """Stored length of each attention layer after a prefill of CONTEXT tokens at ratio 0.5."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    types = [kind for kind in types if kind not in ("conv", "linear_attention")]
    if "full_attention" not in types or architecture.name == "mistral":  # out of the window's reach counts as gone
        return [keep_count(WINDOW - 1, 0.5)] * len(types)
    return [keep_count(CONTEXT, 0.5) if kind == "full_attention" else CONTEXT for kind in types]


@pytest.mark.thinned(3)
@every_pair([*WITH_RATIO, *IN_BLOCK])
def test_half_of_the_context(architecture: Architecture, name: str) -> None:
    check_half(architecture, name, torch.float32)


@pytest.mark.thinned(3)
@every_architecture
@pytest.mark.parametrize("name", ["expected_attention", "snapkv"])
def test_half_of_the_context_in_bfloat16(architecture: Architecture, name: str) -> None:
    check_half(architecture, name, torch.bfloat16)


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize("name", sorted({*WITH_RATIO, *IN_BLOCK} - {"expected_attention", "snapkv"}))
def test_half_of_the_context_in_bfloat16_for_the_other_presses(architecture: Architecture, name: str) -> None:
    check_half(architecture, name, torch.bfloat16)


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize("name", OTHERS)
def test_without_a_ratio_in_bfloat16(architecture: Architecture, name: str) -> None:
    past, _ = check_compressed(architecture, name, other_press(name, architecture.name), torch.bfloat16)
    assert 0.1 < past.achieved_ratio() < 1


@pytest.mark.thinned(3)
@every_pair(SCHEDULES)
def test_schedules_compress_what_is_generated(architecture: Architecture, name: str) -> None:
    model, ids = tiny(architecture.name), tokens(1, CONTEXT + 4 * QUESTION)
    own = {"window_size": 4} if "window_size" in parameters_of(name) else {}
    past = PressedCache(make_press(name, 0.5, compression_interval=2 * QUESTION, **own))
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    types = [kind for kind in types if kind not in ("conv", "linear_attention")]
    for end in range(CONTEXT, ids.shape[1] + 1, QUESTION):
        start = 0 if end == CONTEXT else end - QUESTION
        assert torch.isfinite(model(ids[:, start:end], **cache_argument(past)).logits).all()
    for kind, layer in zip(types, past.pressed_layers(), strict=True):
        if kind == "full_attention" and architecture.name != "mistral":
            assert layer.stored_length == keep_count(ids.shape[1], 0.5)
            assert layer.positions()[0, 0, -1] < ids.shape[1] == past.seen_tokens


def test_every_name_is_tested_here() -> None:
    assert {*WITH_RATIO, *IN_BLOCK, *OTHERS, *SCHEDULES} >= {*press_names()}


@pytest.mark.thinned(3)
@every_pair([*OTHERS])
def test_without_a_ratio(architecture: Architecture, name: str) -> None:
    past, _ = check_compressed(architecture, name, other_press(name, architecture.name), torch.float32)
    assert 0.1 < past.achieved_ratio() < 1


def check_half(architecture: Architecture, name: str, dtype: torch.dtype) -> None:
    model = tiny(architecture.name, "coldpress", dtype)
    if cannot_replay(architecture, name):
        with pytest.raises(PressError, match=r"see only 24 tokens back|keep a state"):
            check_compressed(architecture, name, press_of(name, 0.5), dtype)
        return
    past, counts = check_compressed(architecture, name, press_of(name, 0.5), dtype)
    expected = expected_lengths(architecture, model, name)
    inside = [*parts(press_of(name, 0.5))]
    if any(part.per_layer for part in inside):
        assert sum(int(n.sum()) for n in counts) == sum(expected) * counts[0].numel()  # layers may differ
    elif any(part.per_head for part in inside):  # the heads of a layer share its budget
        assert [int(n.sum()) for n in counts] == [length * counts[0].numel() for length in expected]
    else:
        assert [n.unique().tolist() for n in counts] == [[length] for length in expected]
    assert 0 < past.achieved_ratio() <= 0.53  # keep_count rounds the removed ones up


def check_compressed(
    architecture: Architecture, name: str, press: BasePress, dtype: torch.dtype
) -> tuple[PressedCache, list[Tensor]]:
    """A context, a question and an answer under ``press``: the cache, and what each layer kept ``[B, Hkv]``."""
    model = tiny(architecture.name, "coldpress", dtype)
    ids = tokens(1, CONTEXT + QUESTION + ANSWER)

    def run() -> tuple[PressedCache, list[Tensor], Tensor]:
        past = PressedCache(press)
        with block(model, press):
            model(ids[:, :CONTEXT], **cache_argument(past))
        lengths = past.stored_lengths()
        counts = [(past.positions(layer.index) >= 0).sum(-1) for layer in past.pressed_layers()]  # [B, Hkv]
        check_positions(architecture, press, past, dtype)
        logits = [model(ids[:, CONTEXT : CONTEXT + QUESTION], **cache_argument(past)).logits]
        for i in range(ANSWER):
            logits.append(model(ids[:, CONTEXT + QUESTION + i][:, None], **cache_argument(past)).logits)
            assert past.stored_lengths() == [n + QUESTION + i + 1 for n in lengths]
        assert past.seen_tokens == past.get_seq_length() == ids.shape[1]
        return past, counts, torch.cat(logits, dim=1)

    past, counts, logits = run()
    assert torch.isfinite(logits).all()
    again, _, same = run()
    assert torch.equal(logits, same)
    for i, layer in enumerate(past.layers):
        if layer in past.pressed_layers():
            assert torch.equal(past.positions(i), again.positions(i))
    return past, counts


def check_positions(architecture: Architecture, press: BasePress, past: PressedCache, dtype: torch.dtype) -> None:
    for layer in past.pressed_layers():
        view = views_of(architecture, dtype).get(layer.index)
        n_first, n_last = (CONTEXT, CONTEXT) if view is None else ends_of(press, view)
        positions = layer.positions()
        assert positions.shape == layer.keys.shape[:3]
        assert positions.max() < CONTEXT
        for head in positions.flatten(0, 1):
            kept = head[head >= 0]
            assert torch.equal(head[: len(kept)], kept)  # empty slots come last
            if isinstance(press, RestoreKVPress) and layer.was_compressed:  # with pairs that belong to no token
                assert (kept[-N_RESTORED:] == CONTEXT - 1).all()
                kept = kept[:-N_RESTORED]
            assert (kept.diff() > 0).all()  # ascending, so unique
            if view is None:
                continue
            if view.first_position == 0:  # where a window has moved on, the first tokens are out of reach
                assert torch.equal(kept[:n_first], torch.arange(n_first))
            assert torch.equal(kept[len(kept) - n_last :], torch.arange(CONTEXT - n_last, CONTEXT))


SCORERS = [
    name
    for name in [*WITH_RATIO, *IN_BLOCK]
    if isinstance(press := press_of(name, 0.5), ScorerPress) and not press.needs_model
]


@pytest.mark.parametrize("name", SCORERS)
def test_declared_ends_stay_whatever_the_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are the worst at both ends, and fall from the middle on: only what is protected stays there."""
    past = PressedCache(look := Look())  # a view of its own, which remembers scores
    tiny("llama")(tokens(1, CONTEXT), **cache_argument(past))
    press, view = press_of(name, 0.5), look.views[0]
    assert isinstance(press, ScorerPress)

    def score(self: ScorerPress, view: LayerView) -> Tensor:
        at = torch.arange(view.n_tokens, dtype=torch.float32)
        return (-(at - view.n_tokens / 2).abs()).expand(view.keys.shape[:3])

    for part in parts(press):
        if isinstance(part, ScorerPress) and not isinstance(part, WrapperPress):
            monkeypatch.setattr(type(part), "score", score)
    positions = press.choose(view)
    assert positions is not None
    n_first, n_last = ends_of(press, view)
    for head in positions.flatten(0, 1):
        kept = head[head >= 0].tolist()
        assert kept[:n_first] == [*range(n_first)] and kept[len(kept) - n_last :] == [*range(CONTEXT - n_last, CONTEXT)]


def test_every_kind_of_press_meets_every_architecture_often() -> None:
    """What ``make test`` runs of the product: a press of each kind everywhere, every press in two places."""
    names = [*WITH_RATIO, *IN_BLOCK, *OTHERS]
    fast = fast_pairs(names)
    for architecture in ARCHITECTURES:
        for own in {kind_of(name) for name in names}:
            mine = [name for name in names if kind_of(name) == own]
            met = [name for name in mine if (architecture.name, name) in fast]
            assert met, (architecture, own)
    for name in names:
        assert sum((architecture.name, name) in fast for architecture in ARCHITECTURES) >= 2, name
    assert len(fast) < len(names) * len(ARCHITECTURES) / 2
