"""Speed: what is fed in, how many ids come out, in which order, and the formulas. Never how long it took."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    AdaKVPress,
    DecodingPress,
    KnormPress,
    KVBits,
    LayerView,
    PressedCache,
    RandomPress,
    SnapKVPress,
    ThinKPress,
)
from coldpress.errors import SelfCheckError
from coldpress.eval import speed
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.memory import MemoryReading
from coldpress.eval.speed import WARMUP_TOKENS, Sample, SpeedPoint, SpeedRun

CONTEXT, NEW = 40, 12
KV_BYTES = 2 * 2 * CONTEXT * 32 * 4  # layers, keys and values, tokens, hidden size, float32


@dataclass(frozen=True)
class Broken(KnormPress):
    def score(self, view: LayerView) -> Tensor:
        raise RuntimeError("out of order")


class Fed:
    """Every tensor of ids that the model was given."""

    def __init__(self, model: PreTrainedModel):
        self.ids: list[list[int]] = []
        model.register_forward_pre_hook(lambda module, args: self.ids.append(args[0].flatten().tolist()))

    @property
    def prefills(self) -> list[list[int]]:
        return [ids for ids in self.ids if len(ids) > 1]

    @property
    def answers(self) -> list[list[int]]:
        """The ids generated after each prefill, without the last one, which is not fed in again."""
        answers: list[list[int]] = []
        for ids in self.ids:
            answers.append([]) if len(ids) > 1 else answers[-1].extend(ids)
        return answers


def run(model: PreTrainedModel, text: Tensor, presses: list[Any], **options: Any) -> SpeedRun:
    bits = options.pop("kv_bits", [None] * len(presses))
    settings = {"max_new_tokens": NEW, "repetitions": 2, "warmup": 0, **options}
    measured = SpeedRun(model, text[None, :CONTEXT], list(map(Point, presses, bits)), **settings)
    measured.run()
    return measured


def test_every_press_gets_the_same_ids_and_generates_exactly_as_many(model: PreTrainedModel, text: Tensor) -> None:
    fed = Fed(model)
    presses = [None, KnormPress(0.5), SnapKVPress(0.5)]
    measured = run(model, text, presses, warmup=1)
    assert all(ids == text[:CONTEXT].tolist() for ids in fed.prefills)
    lengths = Counter(len(answer) + 1 for answer in fed.answers)
    assert lengths == {NEW: 2 * 3, WARMUP_TOKENS: 2 * 3}  # timed; warm-up and memory
    for point in measured.points:
        assert [sample.n_tokens for sample in point.samples] == [NEW, NEW]
        assert point.error is None and point.memory is not None
    assert measured.point(presses[1]).kv_lengths == [CONTEXT // 2] * 2
    assert measured.point(presses[1]).achieved_ratio == 0.5


def test_what_is_generated_is_the_models_own_greedy_answer(
    model: PreTrainedModel, plain: PreTrainedModel, text: Tensor
) -> None:
    fed = Fed(model)
    run(model, text, [None], repetitions=1)
    ids = text[None, :CONTEXT]
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert fed.answers[0] == expected[0, CONTEXT:-1].tolist()


def test_the_end_of_text_is_suppressed_up_to_the_minimum_and_honoured_after_it(
    model: PreTrainedModel, text: Tensor
) -> None:
    ends = list(range(61))
    ends.remove(7)  # whatever the model says is an end of text, but for one id
    fed = Fed(model)
    measured = run(model, text, [None], eos_ids=ends, min_new_tokens=5)
    assert all(sample.n_tokens == 6 for sample in measured.points[0].samples)  # the sixth id is the end
    assert fed.answers[0] == [7] * 5
    fed.ids.clear()
    measured = run(model, text, [None], eos_ids=ends)
    assert all(sample.n_tokens == NEW for sample in measured.points[0].samples)
    assert fed.answers[0] == [7] * (NEW - 1)


@pytest.mark.slow
def test_rounds_are_interleaved_in_a_seeded_random_order(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    presses = [None, KnormPress(0.5), SnapKVPress(0.5), RandomPress(0.5, seed=0)]

    def order(seed: int) -> list[str]:
        log: list[str] = []

        def generate(self: SpeedRun, point: SpeedPoint, n_tokens: int) -> Sample:
            log.append(("w" if n_tokens == WARMUP_TOKENS else "t") + str(presses.index(point.press)))
            return Sample(1, 1, n_tokens)

        monkeypatch.setattr(SpeedRun, "_generate", generate)
        monkeypatch.setattr(
            SpeedRun, "_measure_memory", lambda self, point: log.append(f"m{presses.index(point.press)}")
        )
        run(model, text, presses, repetitions=6, warmup=2, seed=seed)
        return log

    log = order(0)
    assert log[:8] == ["w0", "w1", "w2", "w3"] * 2
    assert log[-4:] == ["m0", "m1", "m2", "m3"]
    rounds = [log[i : i + 4] for i in range(8, 32, 4)]
    assert all(sorted(one) == ["t0", "t1", "t2", "t3"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert order(0) == log != order(1)


@pytest.mark.slow
def test_compiled_decoding_generates_the_same_ids(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and not compiled, heads of different lengths and a press that goes on too; refusals fail alone."""
    goes_on = DecodingPress(KnormPress(), compression_interval=4, target_size=16)
    presses = [None, SnapKVPress(0.5), AdaKVPress(SnapKVPress(0.5, window_size=8)), goes_on, ThinKPress(0.5)]
    fed, own = Fed(model), torch.compile
    run(model, text, presses[:4], repetitions=1)
    expected, fed.ids = fed.answers, []
    monkeypatch.setattr(torch, "compile", lambda step, **options: own(step, backend="eager", fullgraph=True))
    measured = run(model, text, presses, repetitions=1, compile=True)
    answers, before = ({tuple(one) for one in each if len(one) == NEW - 1} for each in (fed.answers, expected))
    assert answers == before
    assert measured.compiled is not None and measured.compiled.steps > 4 * (NEW - 1)
    assert [point.error is None for point in measured.points] == [True, True, True, True, False]
    assert "keys in fewer channels" in str(measured.points[4].error)
    record = measured.result(measured.points[2])
    assert record["compiled_forms"] == measured.compiled.forms > 0 and record["compile_s"] > 0


def test_a_press_that_fails_stops_no_other(model: PreTrainedModel, text: Tensor) -> None:
    presses = [None, Broken(0.5), KnormPress(0.5)]
    measured = run(model, text, presses, warmup=1)
    assert str(measured.point(presses[1]).error) == "out of order"
    assert measured.point(presses[1]).samples == []
    for press in (presses[0], presses[2]):
        point = measured.point(press)
        assert point.error is None and len(point.samples) == 2
    assert measured.result(measured.point(presses[2]))["decode_speedup"] > 0


def test_a_press_that_stores_everything_is_an_error(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnormPress, "compress", lambda self, view: None)
    measured = run(model, text, [None, KnormPress(0.5)])
    assert isinstance(measured.points[1].error, SelfCheckError)
    assert measured.points[0].error is None


def test_the_clock_is_read_before_the_prefill_after_the_first_id_and_at_the_end(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0, 2_000, 13_000, 50_000, 53_000, 75_000])
    fed = Fed(model)
    seen: list[int] = []

    def now(device: torch.device) -> int:
        seen.append(len(fed.ids))
        return next(times) * 1_000_000

    monkeypatch.setattr(speed, "now_ns", now)
    measured = run(model, text, [None])
    assert seen == [0, 1, NEW, NEW, NEW + 1, 2 * NEW]
    record = measured.result(measured.points[0])
    assert record["samples"] == [
        {"prefill_ns": 2 * 10**9, "decode_ns": 11 * 10**9, "n_tokens": NEW},
        {"prefill_ns": 3 * 10**9, "decode_ns": 22 * 10**9, "n_tokens": NEW},
    ]
    assert record["ttft_s"] == 2.5 and record["total_s"] == 19
    assert record["ttft_s_spread"] == {"min": 2.0, "max": 3.0, "sd": pytest.approx(0.5**0.5)}
    # (total - TTFT) / (n - 1): 1 s a token in the first round, 2 s in the other
    assert record["tpot_ms"] == pytest.approx(1500)
    assert record["tpot_ms_spread"] == {"min": 1000, "max": 2000, "sd": pytest.approx(1000 * 0.5**0.5)}
    assert record["decode_tokens_per_s"] == pytest.approx(1 / 1.5)
    assert record["speed_tokens_per_s"] == record["decode_tokens_per_s"]
    assert record["prefill_tokens_per_s"] == pytest.approx(CONTEXT / 2.5)
    assert record["generation_tokens_per_s"] == pytest.approx(12 / 19)
    assert record["context_tokens"] == CONTEXT
    assert record["generated_tokens"] == NEW
    assert record["kv_bytes"] == record["kv_bytes_baseline"] == KV_BYTES


def test_decode_only_leaves_the_prefill_out(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0, 2_000, 13_000])
    monkeypatch.setattr(speed, "now_ns", lambda device: next(times) * 1_000_000)
    measured = run(model, text, [None], repetitions=1, decode_only=True)
    record = measured.result(measured.points[0])
    assert record["ttft_s"] is record["prefill_tokens_per_s"] is None
    assert record["tpot_ms"] == pytest.approx(1000)
    assert record["generation_tokens_per_s"] == pytest.approx(1)  # eleven ids in eleven seconds
    assert record["samples"] == [{"prefill_ns": None, "decode_ns": 11 * 10**9, "n_tokens": NEW}]


def test_the_speed_up_is_that_of_a_token_in_the_same_round(model: PreTrainedModel, text: Tensor) -> None:
    measured = SpeedRun(model, text[None, :CONTEXT], [BASELINE, Point(KnormPress(0.5))], max_new_tokens=NEW)
    base, press = measured.points
    base.samples = [Sample(1, 100, 11), Sample(1, 300, 11)]
    press.samples = [Sample(1, 40, 5), Sample(1, 100, 11)]  # an early end of text is not a speed-up
    found = measured.result(press)
    assert found["decode_speedup"] == pytest.approx(2.0)
    assert found["decode_speedup_spread"] == {"min": 1.0, "max": pytest.approx(3.0), "sd": pytest.approx(2**0.5)}
    base.samples.append(Sample(1, 200, 11))
    press.samples.append(Sample(1, 250, 11))
    found = measured.result(press)
    assert found["decode_speedup"] == pytest.approx(1.0)  # in the first round, and not that of the medians, 2.0
    assert found["tpot_ms_baseline"] / found["tpot_ms"] == pytest.approx(2.0)
    assert "decode_speedup" not in measured.result(base)


def test_rounds_are_paired_though_one_ended_at_its_first_token(model: PreTrainedModel, text: Tensor) -> None:
    measured = SpeedRun(model, text[None, :CONTEXT], [BASELINE, Point(KnormPress(0.5))], max_new_tokens=NEW)
    base, press = measured.points
    base.samples = [Sample(1, 100, 1), Sample(1, 300, 11)]
    press.samples = [Sample(1, 100, 11), Sample(1, 100, 11)]
    base.memory = MemoryReading("vmhwm", 5, 2, 3)
    row = measured.result(press)
    assert row["decode_speedup"] == pytest.approx(3.0) and row["peak_mem_bytes_uncompressed"] == 5
    base.samples = base.samples[:1]
    alone = measured.result(press)
    assert alone["decode_speedup"] is alone["tpot_ms_baseline"] is None and alone["tpot_ms"] is not None


NS = st.integers(1, 10**12)
ROUND = st.tuples(NS, NS, NS, NS)


@given(rounds=st.lists(ROUND, min_size=1, max_size=9), decode_only=st.booleans(), n=st.integers(2, 300))
def test_the_numbers_of_a_row_agree(rounds: list[tuple[int, int, int, int]], decode_only: bool, n: int) -> None:
    """TTFT, TPOT and speed-up are medians of the rounds, and total and throughput follow from these by arithmetic."""
    measured = SpeedRun(None, torch.zeros(1, CONTEXT), [BASELINE, Point(KnormPress(0.5))], max_new_tokens=NEW)  # type: ignore[arg-type]
    base, press = measured.points
    base.samples = [Sample(None if decode_only else a, b, n) for a, b, _, _ in rounds]
    press.samples = [Sample(None if decode_only else c, d, n) for _, _, c, d in rounds]
    for point in (base, press):
        row = measured.result(point)
        ttft_s = row["ttft_s"] or 0.0
        assert row["generated_tokens"] == n
        assert row["total_s"] == pytest.approx(ttft_s + row["tpot_ms"] * (n - 1) / 1e3)
        n_timed = n - 1 if decode_only else n
        assert row["generation_tokens_per_s"] == pytest.approx(n_timed / row["total_s"])
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 / row["tpot_ms"])
        assert row["tpot_ms"] == pytest.approx(statistics.median(s.decode_ns / 1e6 / (n - 1) for s in point.samples))
        if not decode_only:
            assert row["ttft_s"] == pytest.approx(statistics.median(s.prefill_ns / 1e9 for s in point.samples))  # type: ignore[operator]
    assert row["tpot_ms_baseline"] == measured.result(base)["tpot_ms"]
    assert row["tpot_ms_baseline_spread"] == measured.result(base)["tpot_ms_spread"]
    ratios = sorted(b.decode_ns / own.decode_ns for b, own in zip(base.samples, press.samples, strict=True))
    assert row["decode_speedup"] == pytest.approx(statistics.median(ratios))
    spread = row["decode_speedup_spread"]
    assert (spread["min"], spread["max"]) == pytest.approx((ratios[0], ratios[-1]))


def test_the_cache_of_one_press_is_gone_when_the_next_one_runs(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    caches: list[weakref.ref[PressedCache]] = []

    class Watched(PressedCache):
        def __init__(self, *given: Any, **options: Any):
            gc.collect()
            assert all(ref() is None for ref in caches)
            super().__init__(*given, **options)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(speed, "PressedCache", Watched)
    run(model, text, [None, KnormPress(0.5)])
    assert len(caches) == 6


def test_presses_in_few_bits_are_timed_beside_the_baseline(model: PreTrainedModel, text: Tensor) -> None:
    press, bits = KnormPress(0.5), KVBits(4, 8, 8)
    measured = run(model, text, [None, press, press, None], kv_bits=[None, None, bits, bits])
    base, half, half_in_4, in_4 = measured.points
    assert [point.error for point in measured.points] == [None] * 4
    assert measured.point(press, bits) is half_in_4 and measured.point(None, bits) is in_4
    assert base.kv_bytes and half.kv_bytes and half_in_4.kv_bytes and in_4.kv_bytes
    assert half_in_4.kv_bytes < half.kv_bytes and half_in_4.kv_bytes < in_4.kv_bytes < base.kv_bytes
    for point in (half, half_in_4, in_4):
        result = measured.result(point)
        assert result["kv_bytes_baseline"] == base.kv_bytes and result["decode_speedup"] > 0
