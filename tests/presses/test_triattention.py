"""TriAttention: its score against complex numbers in loops, its statistics, and what holds of expected logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.oracles.triattention import pairs_of, triattention
from tests.presses.views import MODELS, unrotated, view_of, views_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BoundaryPress,
    CompressionRatioDecodingPress,
    CriticalKVPress,
    DecodingPress,
    KnormPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    TriAttentionPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact
from coldpress.learned.calibration import calibrate

SAMPLES = [tokens(1, n, seed=n)[0] for n in (10, 7)]
N, OFFSETS = 20, [1, 2, 4, 8, 16, 32, 64]
WIDTHS = {"gpt_neox": 4, "gpt_neox_full_rotary": 8, "llama": 8, "qwen3": 16, "gptj": 4}
MORE = [name for name in ("qwen3", "gptj") if name in BY_NAME]


def raw(name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[Hq, T, D]`` and keys ``[Hkv, T, D]`` of layer 1, final but for the rotation."""
    if name in MODELS:
        queries, keys = unrotated(name, ids, 1)
        return queries[0].double(), keys[0].double()
    path = {"qwen3": "model.layers.1.self_attn.{}_norm", "gptj": "transformer.h.1.attn.{}_proj"}[name]
    model, seen = tiny(name), {}
    modules = dict(model.named_modules())
    handles = [
        modules[path.format(x)].register_forward_hook(lambda m, a, out, x=x: seen.update({x: out})) for x in "qk"
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    dim = {"qwen3": 16, "gptj": 8}[name]
    queries, keys = (seen[x].view(ids.shape[1], -1, dim).transpose(0, 1).double() for x in "qk")
    return queries, keys


def saved(name: str, folder: Path, samples: list[Tensor] = SAMPLES) -> str:
    """The file of a tiny model's statistics of samples."""
    path = folder / f"{name}.safetensors"
    Artefact("triattention", calibrate(TriAttentionPress(), tiny(name), samples)).save(path)
    return str(path)


def calibrated(name: str, folder: Path, **options: object) -> TriAttentionPress:
    return TriAttentionPress(stats=saved(name, folder), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [*MODELS, *MORE])
@pytest.mark.parametrize("window", [0, 3])
def test_triattention(model: str, window: int, tmp_path: Path) -> None:
    """Statistics and scores: of halves and neighbours, rotated in part and whole, and normalised queries."""
    press = TriAttentionPress(window_size=window, max_offset=64, stats=saved(model, tmp_path))
    ids = tokens(1, N, seed=3)
    scores = press.score(views_of(model, ids)[1])
    queries, keys = torch.cat([raw(model, sample[None])[0] for sample in SAMPLES], dim=1), raw(model, ids)[1]
    at = torch.arange(N).expand(len(keys), -1)
    expected = triattention(queries, keys, at, N, WIDTHS[model], window, OFFSETS, neighbours=model == "gptj")
    torch.testing.assert_close(scores[0].double(), torch.tensor(expected).double(), atol=2e-4, rtol=0)
    half = replace(press, group_reduction="mean").score(views_of(model, ids)[1])
    assert torch.equal(half, scores) == (len(queries) == len(keys))


def at_places(model: str, view: LayerView, at: Tensor, end: int) -> LayerView:
    """The tokens of ``view`` as they would be at positions ``at`` ``[Hkv, T]`` of a text of ``end`` tokens."""
    rope = view.find_rope()
    assert rope is not None
    keys = rope.rotate_each(view.unrotated_keys(), *rope.cos_sin(torch.arange(end)), at[None])
    return replace(view, keys=keys, positions=at[None], first_position=end - view.n_tokens, _memo={})


@pytest.mark.parametrize("model", MODELS)
def test_a_text_with_gaps(model: str, tmp_path: Path) -> None:
    """As while decoding: heads hold other tokens, and the newest go by position."""
    press, ids = calibrated(model, tmp_path, window_size=5, max_offset=64), tokens(1, N, seed=3)
    view = views_of(model, ids)[1]
    n_heads = view.keys.shape[1]
    at = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(h))[:N] for h in range(n_heads)])
    at = torch.cat([at.sort().values[:, : N - 3], torch.tensor([40, 42, 43]).expand(n_heads, -1)], 1)
    scores = press.score(at_places(model, view, at, 44))
    queries = torch.cat([raw(model, sample[None])[0] for sample in SAMPLES], dim=1)
    expected = triattention(queries, raw(model, ids)[1], at, 44, WIDTHS[model], 5, OFFSETS, neighbours=False)
    torch.testing.assert_close(scores[0].double(), torch.tensor(expected).double(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("model", [*MODELS, "llama_yarn", *MORE])
def test_a_shift_of_all_positions_changes_nothing(model: str, tmp_path: Path) -> None:
    press, view = calibrated(model, tmp_path, window_size=4), views_of(model, tokens(1, N))[1]
    at = torch.arange(N).expand(view.keys.shape[1], -1)
    scores = press.score(view)
    for shift in (1, 17, 300):
        moved = press.score(at_places(model, view, at + shift, N + shift))
        torch.testing.assert_close(moved, scores, atol=1e-3, rtol=0)
    assert (press.score(at_places(model, view, at, N + 17)) - scores).abs().max() > 1e-2  # distances count


IDENTICAL = ("llama", "gpt_neox", "gpt_neox_full_rotary", "gptj", "codegen", "cohere", "qwen3", "llama_yarn", "glm")


@pytest.mark.parametrize("model", [name for name in IDENTICAL if name in BY_NAME])
@pytest.mark.parametrize("offset", [0, 1, 6])
def test_the_expected_logit_of_a_constant_query_is_its_logit(model: str, offset: int, tmp_path: Path) -> None:
    """In layer 0 the queries of one token are the same at all positions, but for the rotation."""
    token = 11
    press = TriAttentionPress(stats=saved(model, tmp_path, [torch.full((5,), token)]))
    ids = tokens(1, N + offset)
    ids[0, -1] = token
    longer, view = views_of(model, ids)[0], views_of(model, ids[:, :N])[0]
    group = view.group_size
    logits = longer.queries[:, :, -1:] @ view.keys.repeat_interleave(group, dim=1).mT  # [1, Hq, 1, N]
    found = press.expected(view, [offset]).flatten(1, 2)
    torch.testing.assert_close(found, logits[:, :, 0], atol=1e-4, rtol=1e-4)
    assert press.spread(view).abs().max() < 1e-4 * float(found.abs().max())  # no length beside that of the mean


@pytest.mark.parametrize("model", [*MODELS, *MORE])
def test_the_expected_logit_is_the_mean_of_logits(model: str, tmp_path: Path) -> None:
    """Of queries that do not depend on their position, one distance after the other and all together."""
    view = views_of(model, tokens(1, N))[1]
    rope, (_, n_heads, _, dim) = view.find_rope(), view.queries.shape
    queries = torch.randn(50, n_heads, 1, dim) + torch.randn(1, n_heads, 1, dim)
    stats = {"mean": queries.mean(0)[None, :, 0].expand(2, -1, -1), "length": torch.ones(2, n_heads, dim)}
    Artefact("triattention", stats).save(tmp_path / "model.safetensors")
    press, logits = TriAttentionPress(stats=str(tmp_path)), {}
    assert rope is not None
    for offset in (0, 1, 5, 100):
        ahead = rope.rotate(queries, *rope.cos_sin(torch.tensor([N - 1 + offset])))
        logits[offset] = (ahead @ view.keys.repeat_interleave(view.group_size, dim=1).mT).mean(0)[:, 0]
        torch.testing.assert_close(
            press.expected(view, [offset])[0].flatten(0, 1), logits[offset], atol=1e-4, rtol=1e-4
        )
    mean = torch.stack([*logits.values()]).mean(0)
    torch.testing.assert_close(press.expected(view, [*logits])[0].flatten(0, 1), mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", [*MODELS, *MORE])
def test_statistics(model: str) -> None:
    """Of final queries before rotation, all samples together; a pair's length stands in both of its channels."""
    found = calibrate(TriAttentionPress(), tiny(model), SAMPLES)
    queries = torch.cat([raw(model, sample[None])[0] for sample in SAMPLES], dim=1)
    torch.testing.assert_close(found["mean"][1].double(), queries.mean(1), atol=1e-5, rtol=0)
    expected = torch.zeros_like(queries[:, 0])
    for a, b in pairs_of(WIDTHS[model], neighbours=model == "gptj"):
        expected[:, a] = expected[:, b] = torch.complex(queries[..., a], queries[..., b]).abs().mean(1)
    torch.testing.assert_close(found["length"][1].double(), expected, atol=1e-5, rtol=0)


def test_what_attends_is_kept(tmp_path: Path) -> None:
    """A key that the mean query points at, near and far, is kept, and one that it points away from goes first."""
    press, view = (
        calibrated("gpt_neox", tmp_path, compression_ratio=0.5, window_size=0),
        views_of("gpt_neox", tokens(1, N))[1],
    )
    own = press.of_layer(view)["mean"].clone()
    own[:, :4] = 0  # channels that turn
    keys = view.keys.clone()
    keys[0, :, 7], keys[0, :, 8] = 9 * own, -9 * own
    scores = press.score(replace(view, keys=keys, _memo={}))
    assert (scores.argmax(-1) == 7).all() and (scores.argmin(-1) == 8).all()


def test_a_model_that_rotates_nothing(tmp_path: Path) -> None:
    press, view = calibrated("gpt2", tmp_path, window_size=0), views_of("gpt2", tokens(1, N))[1]
    logits = (press.of_layer(view)["mean"][None, :, None] @ view.keys.mT)[:, :, 0]
    expected = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(press.score(view), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama_dynamic", "phi3_longrope"])
def test_frequencies_are_those_of_the_text(model: str, tmp_path: Path) -> None:
    """Positions far ahead make no longer text, whose frequencies the keys do not have."""
    press, view = calibrated(model, tmp_path), views_of(model, tokens(1, N))[1]
    rope = view.find_rope()
    assert rope is not None
    cos, sin = rope.mean_ahead(N - 1, [0], torch.device("cpu"))
    for own, there in zip((cos, sin), rope.cos_sin(torch.tensor([N - 1])), strict=True):
        torch.testing.assert_close(own, there, atol=1e-5, rtol=0)
    far, near = press.expected(view, [1 << 16]), press.expected(view, [1])
    assert far.isfinite().all() and not torch.allclose(far, near)


def test_one_head_alone_has_its_own_statistics(tmp_path: Path) -> None:
    press, view = calibrated("llama", tmp_path, window_size=4), view_of("llama")
    scores = press.score(view)
    for row, head in ((0, 0), (1, 1)):
        alone = press.score(view.of_head(row, head))[0, 0]
        torch.testing.assert_close(alone, scores[row, head], atol=1e-4, rtol=1e-4)


def test_what_stays_does_not_count_in_the_mean(tmp_path: Path) -> None:
    press, view = calibrated("llama", tmp_path, window_size=6), view_of("llama")
    pins = torch.zeros(view.keys.shape[:3], dtype=torch.bool)
    pins[..., :9] = True
    scores = press.score(replace(view, columns={"pinned": pins}, _memo={}))
    one = replace(press, group_reduction="mean").score(replace(view, columns={"pinned": pins}, _memo={}))
    torch.testing.assert_close(one[..., 9:-6].mean(-1), torch.zeros(2, 2), atol=1e-5, rtol=0)
    assert not torch.allclose(scores, press.score(view))
    everything = press.score(replace(view, columns={"pinned": torch.ones_like(pins)}, _memo={}))
    assert everything.isfinite().all()


@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
def test_while_decoding(model: str, tmp_path: Path) -> None:
    press, ids = calibrated(model, tmp_path, window_size=5), tokens(1, 45)
    past = PressedCache(DecodingPress(press, compression_interval=4, target_size=16))
    with torch.no_grad():
        tiny(model)(ids[:, :25], **cache_argument(past))
        for i in range(25, 45):
            tiny(model)(ids[:, i : i + 1], **cache_argument(past))
    assert past.stored_lengths() == [16, 16]
    assert all({40, 41, 42, 43, 44} <= {*head.tolist()} for head in past.positions(1)[0])
    assert any(int(head.min()) < 25 for head in past.positions(1)[0])


def test_names() -> None:
    assert make_press("triattention", 0.5) == TriAttentionPress(0.5)
    expected = CompressionRatioDecodingPress(BoundaryPress(TriAttentionPress()), 64, target_compression_ratio=0.7)
    assert make_press("decoding_triattention", 0.7) == expected


@pytest.mark.parametrize(
    "press", [TriAttentionPress(0.5), DecodingPress(TriAttentionPress())], ids=["once", "decoding"]
)
def test_missing_statistics_name_the_command(press: TriAttentionPress) -> None:
    with pytest.raises(
        PressError, match=r"TriAttentionPress needs query statistics .*coldpress calibrate triattention "
    ):
        press.prepared(tiny("llama"))


def test_parameters() -> None:
    for wrong in ({"window_size": -1}, {"max_offset": 0}, {"max_offset": 2.0}, {"group_reduction": "sum"}):
        with pytest.raises(PressError, match=next(iter(wrong))):
            TriAttentionPress(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PressError, match="CriticalKVPress needs attention weights"):
        CriticalKVPress(TriAttentionPress(0.5))


OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
PINS = [[(0, 4), (20, 22)], [(3, 5)], []]
small = partial(TriAttentionPress, window_size=4)
CASES = {
    "prompt": Case(small(0.5), n_most=25, lacks=("ragged",)),
    "neox": Case(small(0.5), model="gpt_neox", n_most=25, lacks=("ragged",)),
    "adakv": Case(AdaKVPress(small(0.5)), n_most=25),
    "decoding": Case(DecodingPress(small(), **OFTEN), lacks=("chunks", "ragged")),
    "adakv decoding": Case(
        CompressionRatioDecodingPress(AdaKVPress(small()), compression_interval=3, target_compression_ratio=0.6),
        lacks=("chunks",),
    ),
    "both": Case(PrefillDecodingPress(KnormPress(0.3), DecodingPress(small(), **OFTEN)), n_most=35, lacks=("ragged",)),
    "pins": Case(small(0.5), rows=lambda rows: {"pin": [PINS[row] for row in rows]}, n_most=25, lacks=("ragged",)),
}


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts")
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
