"""Perplexity under a compressed context: equal to an independent computation, paired, and alarmed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.presses.others import WITH_RATIO
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    Kept,
    KnormPress,
    KVBits,
    KVComposePress,
    LayerView,
    PressedCache,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import make_press
from coldpress.errors import PressError, SelfCheckError
from coldpress.eval.jobs import Point
from coldpress.eval.ledger import Ledger
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.windows import plan_prefix

CONTEXT, TARGET = 60, 24
Result = dict[str, Any]


def measure(
    model: PreTrainedModel,
    presses: list[BasePress],
    documents: list[Tensor],
    batch_size: int = 1,
    chunk_tokens: int | None = None,
) -> tuple[PrefixRun, list[Result | Exception]]:
    plans = [(ids, plan_prefix(len(ids), CONTEXT, TARGET)) for ids in documents]
    run = PrefixRun(model, list(map(Point, presses)), plans, batch_size, chunk_tokens)
    run.run()
    return run, [result for _, result in run.results()]


def only(result: Result | Exception) -> Result:
    """The record, where there has to be one."""
    if isinstance(result, Exception):
        raise result
    return result


def nlls(result: Result | Exception) -> list[float]:
    return [window["nll"] for window in only(result)["per_window"]]


def token_nll(logits: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())


# What the numbers are


def test_the_baseline_is_one_forward_of_the_uncompressed_model(
    model: PreTrainedModel, plain: PreTrainedModel, text: Tensor
) -> None:
    _, (baseline,) = measure(model, [], [text])
    width = CONTEXT + TARGET
    expected = []
    for start in range(0, 500 - width + 1, width):
        window = text[start : start + width]
        with torch.no_grad():
            logits = plain(window[None]).logits[0]
        expected.append(token_nll(logits[CONTEXT:-1], window[CONTEXT + 1 :]))  # the first target is not scored
    assert nlls(baseline) == pytest.approx(expected, rel=1e-5)
    record = only(baseline)
    assert record["scored_tokens"] == len(expected) * (TARGET - 1)
    assert record["loss"] == record["baseline_loss"] == pytest.approx(sum(expected) / record["scored_tokens"], rel=1e-5)
    assert "delta_nll" not in record


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize("name", [*WITH_RATIO, "kvcompose"])
def test_a_press_is_scored_like_a_prefill_and_a_forward_of_its_own(
    model: PreTrainedModel, text: Tensor, name: str
) -> None:
    parameters = {"random": {"seed": 3}, "snap_think": {"window_size": 8}}.get(name, {})
    press = make_press(name, 0.5, **parameters)
    assert press is not None
    _, (baseline, result) = measure(model, [press], [text[:200]])
    width, expected, same, right, kept = CONTEXT + TARGET, [], [], [], []
    for start in range(0, 200 - width + 1, width):
        window = text[None, start : start + width]
        cache, whole = PressedCache(press), PressedCache()
        with torch.no_grad():
            with press(model):
                model(window[:, :CONTEXT], **cache_argument(cache))
            model(window[:, :CONTEXT], **cache_argument(whole))
            kept.append([layer.positions() for layer in cache.pressed_layers()])
            logits = model(window[:, CONTEXT:-1], **cache_argument(cache)).logits[0]
            base = model(window[:, CONTEXT:-1], **cache_argument(whole)).logits[0]
        expected.append(token_nll(logits, window[0, CONTEXT + 1 :]))
        same += (logits.argmax(-1) == base.argmax(-1)).tolist()
        right += (logits.argmax(-1) == window[0, CONTEXT + 1 :]).tolist()
    record = only(result)
    assert nlls(record) == pytest.approx(expected, rel=1e-5)
    n_tokens = 2 * (TARGET - 1)
    assert record["delta_nll"] == pytest.approx((sum(expected) - sum(nlls(baseline))) / n_tokens, abs=1e-6)
    assert record["same_top1"] == pytest.approx(sum(same) / n_tokens)
    assert record["top1_acc"] == pytest.approx(sum(right) / n_tokens)
    assert record["effective_compression_ratio"] == 0.5
    assert sum(int((layer >= 0).sum()) for layer in kept[0]) == 2 * 4 * CONTEXT // 2  # pairs of 2 layers of 4 heads
    lengths = [layer.shape[-1] for layer in kept[0]]  # a layer is as long as its longest head
    assert record["kv_len_after"] == lengths
    assert press.per_head or sum(lengths) == 2 * CONTEXT // 2
    assert record["kv_bytes_baseline"] == 2 * 2 * 32 * 4 * CONTEXT
    if name == "snap_think":  # the other half of the pairs loses 0.4 of the key channels, but for the last 8
        assert record["kv_bytes"] < record["kv_bytes_baseline"] // 2
    else:  # even if heads or layers differ
        bias = (
            4 * 2 * 4 * CONTEXT // 2 if name.startswith(("attention_matching", "momentkv", "mass_merging")) else 0
        )  # float32, of each pair
        assert record["kv_bytes"] == record["kv_bytes_baseline"] // 2 + bias


def test_comparisons_with_the_baseline(model: PreTrainedModel, text: Tensor) -> None:
    _, (_, result) = measure(model, [KnormPress(0.7)], [text[: CONTEXT + TARGET]])
    window = text[None, : CONTEXT + TARGET]
    log_probs = []
    for press in (None, KnormPress(0.7)):
        cache = PressedCache(press)
        with torch.no_grad():
            model(window[:, :CONTEXT], **cache_argument(cache))
            log_probs.append(model(window[:, CONTEXT:-1], **cache_argument(cache)).logits[0].double().log_softmax(-1))
    base, pressed = log_probs
    kld = (base.exp() * (base - pressed)).sum(-1)
    target = window[0, CONTEXT + 1 :, None]
    delta_p = (pressed.exp().gather(1, target) - base.exp().gather(1, target))[:, 0]
    record = only(result)
    assert record["kld"]["mean"] == pytest.approx(float(kld.mean()), rel=1e-4)
    assert record["kld"]["median"] == pytest.approx(float(kld.quantile(0.5)), rel=1e-4)
    assert record["kld"]["max"] == pytest.approx(float(kld.max()), rel=1e-4)
    assert record["delta_p"]["mean"] == pytest.approx(float(delta_p.mean()), abs=1e-6)
    assert record["delta_p"]["rms"] == pytest.approx(float(delta_p.square().mean().sqrt()), rel=1e-4)
    losses = -pressed.gather(1, target)[:, 0]
    assert record["nll_by_distance"] == pytest.approx(
        {"1-16": float(losses[:16].mean()), "17-23": float(losses[16:].mean())}, rel=1e-4
    )
    assert record["delta_nll_ci95"] is None  # one window has no error bar


def test_ratio_zero_is_the_baseline(model: PreTrainedModel, text: Tensor) -> None:
    _, (baseline, result) = measure(model, [KnormPress(0.0)], [text])
    assert nlls(result) == nlls(baseline)
    assert only(result)["delta_nll"] == 0
    assert only(result)["effective_compression_ratio"] == 0


@pytest.mark.parametrize("batch_size", [4, 100])
def test_batches_change_nothing(model: PreTrainedModel, text: Tensor, batch_size: int) -> None:
    presses: list[BasePress] = [KnormPress(0.5), SnapKVPress(0.75, window_size=8), RandomPress(0.5, seed=1)]
    _, one = measure(model, presses, [text, text[:100]])
    _, many = measure(model, presses, [text, text[:100]], batch_size)
    for a, b in zip(one, many, strict=True):
        assert nlls(b) == pytest.approx(nlls(a), rel=1e-5)
        for key in ("scored_tokens", "windows", "kv_bytes", "kv_len_after", "kept_hash", "effective_compression_ratio"):
            assert only(a)[key] == only(b)[key], key


def test_documents_do_not_mix(model: PreTrainedModel, text: Tensor) -> None:
    first, second = text[:200], text[200:450]
    press = [KnormPress(0.5)]
    _, apart_1 = measure(model, press, [first])
    _, apart_2 = measure(model, press, [second])
    _, together = measure(model, press, [first, second])
    for i in range(2):
        assert nlls(together[i]) == pytest.approx(nlls(apart_1[i]) + nlls(apart_2[i]), rel=1e-5)


def test_channels_that_are_gone_show_in_bytes_and_losses(model: PreTrainedModel, text: Tensor) -> None:
    """A press that thins keys is not the uncompressed cache at ratio 0, and is not held against it."""
    _, (_, result) = measure(model, [ThinKPress(0.5)], [text[:200]])
    record = only(result)
    assert record["effective_compression_ratio"] == 0 and record["delta_nll"] != 0
    assert record["kv_bytes"] < record["kv_bytes_baseline"]


def test_presses_in_few_bits(model: PreTrainedModel, text: Tensor) -> None:
    """Also no press at all, which is no baseline then; and ratio 0, whose check is about pairs as they are."""
    presses: list[Any] = [None, None, KnormPress(0.5), KnormPress(0.5), KnormPress(0.0)]
    bits = [KVBits(8, 8, 8), KVBits(2, 8, 8), None, KVBits(4, 8, 8), KVBits(4, 8, 8)]
    run = PrefixRun(model, list(map(Point, presses, bits)), [(text, plan_prefix(len(text), CONTEXT, TARGET))])
    run.run()
    points, found = zip(*run.results(), strict=True)
    assert [(point.press, point.kv_bits) for point in points] == [(None, None), *zip(presses, bits, strict=True)]
    baseline, in_8, in_2, half, half_in_4, zero = (only(result) for result in found)
    assert "delta_nll" not in baseline and baseline["kv_bytes"] == baseline["kv_bytes_baseline"]
    assert abs(in_8["delta_nll"]) < 0.05 and in_8["kld"]["mean"] < in_2["kld"]["mean"]
    assert half["kept_hash"] == half_in_4["kept_hash"] != zero["kept_hash"] == in_8["kept_hash"]
    assert half_in_4["effective_compression_ratio"] == 0.5 and zero["effective_compression_ratio"] == 0
    assert half_in_4["kv_bytes"] < half["kv_bytes"] and half_in_4["kv_bytes"] < zero["kv_bytes"] < in_8["kv_bytes"]
    assert zero["kv_bytes"] < baseline["kv_bytes"]


def test_bits_that_nothing_is_held_in_are_no_error_and_change_nothing(model: PreTrainedModel, text: Tensor) -> None:
    """A context of no more than the newest tokens; and bits that change nothing are one, where bytes were saved."""
    run = PrefixRun(model, [Point(None, KVBits(4))], [(text, plan_prefix(len(text), CONTEXT, TARGET))])
    run.run()
    baseline, same = (only(result) for _, result in run.results())
    assert nlls(same) == nlls(baseline) and same["kv_bytes"] == baseline["kv_bytes"]
    for done in run.done:
        done[run.points[0].key] = dataclasses.replace(done[run.points[0].key], kv_bytes=1)
    _, (_, wrong) = run.results()
    assert isinstance(wrong, SelfCheckError) and "None in 4 bits: all" in str(wrong)


@pytest.mark.usefixtures("given_artefacts")
def test_all_presses_share_one_prefill_of_each_window(model: PreTrainedModel, text: Tensor) -> None:
    lengths: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    presses: list[BasePress] = [make_press(name, ratio) for name in WITH_RATIO for ratio in (0.25, 0.5)]  # type: ignore[misc]
    _, results = measure(model, presses, [text])
    n_windows = only(results[0])["windows"]
    assert lengths.count(CONTEXT) == n_windows == 5
    # at ratio 0 the presses share one cache and are scored once, but for those whose pairs carry what they observe; in
    # the first window only
    n_zeros = 1 + len({press.with_ratio(0.0) for press in presses if press.observes})  # type: ignore[attr-defined]
    assert lengths.count(TARGET - 1) == n_windows * (1 + len(presses)) + n_zeros
    assert len(lengths) == lengths.count(CONTEXT) + lengths.count(TARGET - 1) + 1


def test_presses_that_run_the_model_again_beside_others(model: PreTrainedModel, text: Tensor) -> None:
    presses: list[BasePress] = [KVComposePress(0.5), KnormPress(0.5), KVComposePress(0.7, structured=False)]
    run, together = measure(model, presses, [text[:200]])
    for press, result in zip(presses, together[1:], strict=True):
        _, (_, alone) = measure(model, [press], [text[:200]])
        assert only(result)["kept_hash"] == only(alone)["kept_hash"]
        assert nlls(result) == pytest.approx(nlls(alone), rel=1e-6)
    assert run.is_complete


def test_a_batch_is_an_error_of_the_presses_that_need_the_model(model: PreTrainedModel, text: Tensor) -> None:
    presses: list[BasePress] = [KVComposePress(0.5), KnormPress(0.5)]
    _, (baseline, failed, record) = measure(model, presses, [text], batch_size=2)
    assert isinstance(failed, PressError) and "a batch of 2" in str(failed) and "batch_size 1" in str(failed)
    _, (alone, other) = measure(model, [KnormPress(0.5)], [text], batch_size=2)
    assert nlls(record) == nlls(other) and nlls(baseline) == nlls(alone)


# Alarms


@dataclass(frozen=True)
class Idle(BasePress):
    """Says that it removes, and keeps everything."""

    compression_ratio: float = 0.5

    def compress(self, view: LayerView) -> Kept | None:
        return None


@dataclass(frozen=True)
class OneMore(KnormPress):
    def keep(self, view: LayerView) -> int:
        return super().keep(view) + 1


@dataclass(frozen=True)
class Meddling(KnormPress):
    """Changes values where nothing is removed."""

    def compress(self, view: LayerView) -> Kept | None:
        if self.compression_ratio > 0:
            return super().compress(view)
        positions = torch.arange(view.n_tokens).expand(*view.keys.shape[:2], -1)
        return Kept(view.keys, view.values * 1.01, positions)


@dataclass(frozen=True)
class Breaking(ScorerPress):
    """Fails from its call number ``after`` on, with the exception named."""

    after: int = 0
    kind: type[BaseException] = RuntimeError
    calls: ClassVar[list[int]] = []

    def score(self, view: LayerView) -> Tensor:
        self.calls.append(view.layer_idx)
        if len(self.calls) > self.after:
            raise self.kind("out of order")
        return view.keys.float().norm(dim=-1)


@pytest.fixture(autouse=True)
def no_calls_yet() -> Iterator[None]:
    Breaking.calls.clear()
    yield


def test_losses_bit_for_bit_those_of_the_baseline_are_an_error(model: PreTrainedModel, text: Tensor) -> None:
    _, (baseline, idle, knorm) = measure(model, [Idle(), KnormPress(0.5)], [text])
    assert isinstance(idle, SelfCheckError)
    assert "nothing was compressed" in str(idle)
    assert only(baseline) and only(knorm)


def test_a_press_that_stores_something_else_than_asked_is_an_error(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, more, knorm) = measure(model, [OneMore(0.5), KnormPress(0.5)], [text])
    assert isinstance(more, SelfCheckError)
    assert "240 pairs should have been stored, 248 were" in str(more)
    assert only(knorm)
    monkeypatch.setattr(KnormPress, "compress", lambda self, view: None)
    _, (_, knorm) = measure(model, [KnormPress(0.5)], [text])
    assert isinstance(knorm, SelfCheckError)


def test_ratio_zero_that_changes_a_loss_is_an_error_for_every_ratio(model: PreTrainedModel, text: Tensor) -> None:
    _, results = measure(model, [Meddling(0.5), KnormPress(0.5), Meddling(0.25)], [text])
    for result in (results[1], results[3]):
        assert isinstance(result, SelfCheckError)
        assert "removes nothing and yet changes a loss" in str(result)
    assert only(results[2])


def test_a_baseline_that_contradicts_a_direct_forward_ends_the_run(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import coldpress.eval.point_run as module

    monkeypatch.setattr(module, "token_losses", lambda logits, targets: torch.zeros(targets.shape))
    with pytest.raises(SelfCheckError, match="without a cache differ"):
        measure(model, [KnormPress(0.5)], [text])


def test_losses_that_are_not_finite_end_the_run(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(SelfCheckError, match="not finite"):
        measure(model, [KnormPress(0.5)], [text])


def test_the_number_of_scored_tokens_is_checked(model: PreTrainedModel, text: Tensor) -> None:
    run, _ = measure(model, [], [text])
    run.plan = dataclasses.replace(run.plan, target=TARGET + 1)
    (result,) = (result for _, result in run.results())
    assert isinstance(result, SelfCheckError)
    assert "115 tokens were scored, the windows' formula says 120" in str(result)


# Failures and interruptions


@dataclass(frozen=True)
class Hoarding(ScorerPress):
    """Fails while it holds a tensor."""

    held: ClassVar[list[weakref.ref[Tensor]]] = []

    def score(self, view: LayerView) -> Tensor:
        hoard = torch.zeros(1000)
        self.held.append(weakref.ref(hoard))
        raise RuntimeError("out of memory")


def test_a_press_that_failed_holds_no_memory(model: PreTrainedModel, text: Tensor) -> None:
    _, (_, failed) = measure(model, [Hoarding(0.5)], [text])
    assert isinstance(failed, RuntimeError) and failed.__traceback__ is not None  # it can still be told
    assert len(Hoarding.held) == 1 and Hoarding.held[0]() is None


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_press_that_fails_half_way_stops_no_other(model: PreTrainedModel, text: Tensor, after: int) -> None:
    _, (_, alone) = measure(model, [KnormPress(0.5)], [text])
    _, (_, broken, knorm) = measure(model, [Breaking(0.5, after), KnormPress(0.5)], [text])
    assert isinstance(broken, RuntimeError) and str(broken) == "out of order"
    assert nlls(knorm) == nlls(alone)
    assert len(Breaking.calls) <= after + 2  # once it has failed it is not asked again


def test_an_interruption_between_windows_leaves_whole_windows(model: PreTrainedModel, text: Tensor) -> None:
    _, whole = measure(model, [KnormPress(0.5)], [text])
    plan = plan_prefix(500, CONTEXT, TARGET)
    run = PrefixRun(model, [Point(KnormPress(0.5))], [(text, plan)])

    def interrupted(batches: Iterator[Any]) -> Iterator[Any]:
        yield from itertools.islice(batches, 2)
        raise KeyboardInterrupt

    assert list(run.results()) == []
    with pytest.raises(KeyboardInterrupt):
        run.run(interrupted)
    assert not run.is_complete
    for (_, partial), complete in zip(run.results(), whole, strict=True):
        assert only(partial)["windows"] == 2
        assert nlls(partial) == nlls(complete)[:2]


def test_an_interruption_within_a_window_leaves_the_windows_before_it(model: PreTrainedModel, text: Tensor) -> None:
    plan = plan_prefix(500, CONTEXT, TARGET)
    presses = [KnormPress(0.5), Breaking(0.5, 5, KeyboardInterrupt), KnormPress(0.25)]
    run = PrefixRun(model, list(map(Point, presses)), [(text, plan)])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [only(result)["windows"] for _, result in run.results()] == [2, 2, 2, 2]


def test_windows_with_a_bos_token_are_measured_with_it(model: PreTrainedModel, text: Tensor) -> None:
    width, bos = CONTEXT + TARGET, 5
    replaced = text.clone()
    replaced[::width] = bos
    expected = measure(model, [KnormPress(0.5)], [replaced])[1]
    run = PrefixRun(model, [Point(KnormPress(0.5))], [(text, plan_prefix(len(text), CONTEXT, TARGET, bos=bos))])
    run.run()
    assert [result for _, result in run.results()] == expected
    assert expected != measure(model, [KnormPress(0.5)], [text])[1]


# A context in pieces


@torch.no_grad()
def in_pieces(model: PreTrainedModel, press: BasePress | None, window: Tensor, chunk: int) -> float:
    """The loss of a window's targets, with a prefill written out piece by piece."""
    cache = PressedCache(press, chunk_tokens=chunk)
    cache.session.prefill_end = CONTEXT
    for stop in range(CONTEXT % chunk or chunk, CONTEXT + 1, chunk):
        model(window[None, max(0, stop - chunk) : stop], **cache_argument(cache))
    cache.session.prefill_end = None
    logits = model(window[None, CONTEXT:-1], **cache_argument(cache)).logits[0]
    return token_nll(logits, window[CONTEXT + 1 :])


@pytest.mark.parametrize("chunk", [8, 25])
def test_in_pieces_every_press_has_a_prefill_of_its_own(model: PreTrainedModel, text: Tensor, chunk: int) -> None:
    presses: list[BasePress] = [KnormPress(0.5), KnormPress(0.8), SnapKVPress(budget_tokens=20, window_size=4)]
    presses += [AdaKVPress(SnapKVPress(0.5, window_size=4))]
    n_prefills = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal n_prefills
        n_prefills += args[0].shape[1] if args else kwargs["input_ids"].shape[1]

    with torch.no_grad():
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        run, results = measure(model, presses, [text], 1, chunk)
        handle.remove()
    width = CONTEXT + TARGET
    windows = [text[start : start + width] for start in range(0, 500 - width + 1, width)]
    zeros = 3  # Knorm, SnapKV and AdaKV at ratio 0, in the first window only
    per_cache, n = CONTEXT + TARGET - 1, len(windows)
    assert n_prefills == per_cache * (n * (1 + len(presses)) + zeros) + width - 1  # and the check of the baseline
    for press, result in zip([None, *presses], results, strict=True):
        expected = [in_pieces(model, press, window, chunk) for window in windows]
        assert nlls(result) == pytest.approx(expected, abs=1e-4)
    assert [only(result)["kv_len_after"] for result in results[:4]] == [[60, 60], [30, 30], [12, 12], [20, 20]]
    _, whole = measure(model, presses, [text])
    assert nlls(whole[0]) == pytest.approx(nlls(results[0]), abs=1e-4)  # the baseline's text is seen whole
    assert nlls(whole[2]) != pytest.approx(nlls(results[2]), abs=1e-3)
    assert run.is_complete


def test_in_pieces_batches_change_nothing(model: PreTrainedModel, text: Tensor) -> None:
    presses: list[BasePress] = [SnapKVPress(0.5, window_size=4)]  # norms of a token that comes twice tie
    (_, one), (_, four) = (measure(model, presses, [text], size, 8) for size in (1, 4))
    assert nlls(one[1]) == pytest.approx(nlls(four[1]), abs=1e-4)


class FailsLate(KnormPress):
    def score(self, view: LayerView) -> Tensor:
        if view.end == CONTEXT:
            raise RuntimeError("not the last one")
        return super().score(view)


def test_in_pieces_a_press_that_fails_stops_no_other(model: PreTrainedModel, text: Tensor) -> None:
    _, results = measure(model, [FailsLate(0.5), KnormPress(0.5)], [text], 1, 8)
    assert isinstance(results[1], RuntimeError) and "not the last one" in str(results[1])
    assert only(results[2])["kv_len_after"] == [30, 30]


# A run that was killed


def counting(model: PreTrainedModel) -> list[int]:
    """Tokens of every forward pass from now on."""
    lengths: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


def test_a_run_goes_on_from_its_ledger(model: PreTrainedModel, text: Tensor, tmp_path: Path) -> None:
    presses: list[BasePress] = [KnormPress(0.5), SnapKVPress(0.5, window_size=8)]
    documents = [(text, plan_prefix(len(text), CONTEXT, TARGET))]
    _, whole = measure(model, presses, [text])
    ledger = Ledger(tmp_path / "ledger")
    first = PrefixRun(model, list(map(Point, presses)), documents, ledger=ledger)

    def killed(batches: Iterator[Any]) -> Iterator[Any]:
        yield from itertools.islice(batches, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(killed)
    lengths = counting(model)
    again = PrefixRun(model, list(map(Point, presses)), documents, ledger=ledger)
    again.run()
    assert lengths.count(CONTEXT) == 2 and again.is_complete  # of five windows
    assert [result for _, result in again.results()] == whole
    lengths.clear()
    more = PrefixRun(model, list(map(Point, [*presses, KnormPress(0.25)])), documents, ledger=ledger)
    more.run()
    assert lengths.count(TARGET - 1) == 5 * 2 + 1  # the baseline and the new one, and that at ratio 0
    assert [result for _, result in more.results()][:3] == whole
    ledger.clear()
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_a_damaged_ledger_is_measured_again(
    model: PreTrainedModel, text: Tensor, tmp_path: Path, damage: bytes | None
) -> None:
    documents = [(text[:200], plan_prefix(200, CONTEXT, TARGET))]
    run = PrefixRun(model, [Point(KnormPress(0.5))], documents, ledger=Ledger(tmp_path))
    run.run()
    file = sorted(tmp_path.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    lengths = counting(model)
    again = PrefixRun(model, [Point(KnormPress(0.5))], documents, ledger=Ledger(tmp_path))
    again.run()
    assert lengths.count(CONTEXT) == 1
    assert list(map(str, again.results())) == list(map(str, run.results()))


# Beside the losses


def test_greedy_agreement_counts_the_tokens_before_the_first_that_differs(
    model: PreTrainedModel, plain: PreTrainedModel, text: Tensor
) -> None:
    press, n_tokens = KnormPress(0.05), 12
    run = PrefixRun(model, [Point(press)], [(text, plan_prefix(500, CONTEXT, TARGET))], greedy_tokens=n_tokens)
    run.run()
    (_, baseline), (_, result) = run.results()
    assert "greedy_agreement" not in only(baseline)
    expected = []
    for start in range(0, 500 - CONTEXT - TARGET + 1, CONTEXT + TARGET):
        ids = text[None, start : start + CONTEXT + 1]  # the first target is given
        whole, past, token, n_same = ids, PressedCache(press), ids[:, -1:], 0
        with torch.no_grad():
            model(ids[:, :-1], **cache_argument(past))
            for _ in range(n_tokens):
                token = model(token, **cache_argument(past)).logits[:, -1:].argmax(-1)
                whole = torch.cat([whole, plain(whole).logits[:, -1:].argmax(-1)], dim=1)
                if token != whole[:, -1:]:
                    break
                n_same += 1
        expected.append(n_same)
    agreement = only(result)["greedy_agreement"]
    assert agreement["lengths"] == expected and len(set(expected)) > 1
    assert agreement["mean"] == pytest.approx(sum(expected) / 5) and agreement["windows"] == 5
    _, without = measure(model, [press], [text])
    assert nlls(without[1]) == nlls(result)


def test_differences_by_distance_add_up_to_the_whole(model: PreTrainedModel, text: Tensor) -> None:
    _, (baseline, result) = measure(model, [KnormPress(0.5)], [text])
    record = only(result)
    deltas = record["delta_by_distance"]
    assert list(deltas) == list(record["nll_by_distance"]) == ["1-16", "17-23"]
    for name, part in deltas.items():
        assert part["delta"] == pytest.approx(record["nll_by_distance"][name] - only(baseline)["nll_by_distance"][name])
        assert part["ci95"][0] < part["delta"] < part["ci95"][1]
    assert (16 * deltas["1-16"]["delta"] + 7 * deltas["17-23"]["delta"]) / 23 == pytest.approx(record["delta_nll"])


def test_bits_per_byte_count_the_scored_tokens(model: PreTrainedModel, text: Tensor) -> None:
    n_bytes = text % 5  # a token that shares a character with the one before stands for none
    documents = [(text[:200], plan_prefix(200, CONTEXT, TARGET)), (text[200:], plan_prefix(300, CONTEXT, TARGET))]
    run = PrefixRun(model, [Point(KnormPress(0.5))], documents, 2, token_bytes=[n_bytes[:200], n_bytes[200:]])
    run.run()
    starts = [0, 84, 200, 284, 368]
    expected = sum(int(n_bytes[start + CONTEXT + 1 : start + CONTEXT + TARGET].sum()) for start in starts)
    for _, result in run.results():
        record = only(result)
        assert record["scored_bytes"] == expected
        assert record["bits_per_byte"] == pytest.approx(sum(nlls(result)) / math.log(2) / expected)
        low, high = record["ppl_ci95"]
        assert low < record["ppl"] < high
    unknown = PrefixRun(model, [], documents, token_bytes=[None, n_bytes[200:]])
    unknown.run()
    ((_, result),) = unknown.results()
    assert only(result)["bits_per_byte"] is None
