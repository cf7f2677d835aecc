"""Reading a text to its end: equal to an independent computation, document by document, and in constant memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from torch import Tensor
from transformers import DynamicCache

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    LayerView,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cli import main
from coldpress.errors import InputError, PressError, SelfCheckError
from coldpress.eval import stream as stream_module
from coldpress.eval.jobs import BASELINE, Point, make_jobs
from coldpress.eval.settings import Settings
from coldpress.eval.stream import StreamRun, by_position
from coldpress.report.terminal import table

CHUNK, BUDGET = 8, 24
SCHEDULE = DecodingPress(StreamingLLMPress(), CHUNK, BUDGET)


def measure(
    presses: list[BasePress | None], documents: list[Tensor], **options: Any
) -> list[dict[str, Any] | Exception]:
    run = StreamRun(
        tiny("gpt_neox"), list(map(Point, presses)), documents, **{"chunk": CHUNK, "positions": "rerotate"} | options
    )
    run.run()
    return [result for _, result in run.results()]


def by_hand(ids: Tensor) -> list[float]:
    """Sinks and the newest of ``SCHEDULE`` at the true positions, with masks over the whole text, written out.

    A token of a chunk sees the chunk so far, the first four tokens and the newest of those before the chunk.
    """
    n = len(ids) - 1
    seen = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        start = t - t % CHUNK
        recent = max(0, start - (BUDGET - 4)) if start > BUDGET else 0
        seen[t, :4] = True
        seen[t, recent : t + 1] = True
    seen &= torch.ones(n, n, dtype=torch.bool).tril()
    model = BY_NAME["gpt_neox"].build("sdpa")
    with torch.no_grad():
        logits = model(ids[None, :-1], attention_mask=seen[None, None], **cache_argument(DynamicCache())).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()


def test_losses_at_true_positions_are_those_of_a_mask() -> None:
    ids = tokens(1, 150)[0]
    run = StreamRun(tiny("gpt_neox"), [Point(SCHEDULE)], [ids], chunk=CHUNK, positions="original")
    run.run()
    torch.testing.assert_close(run.losses(Point(SCHEDULE))[0], torch.tensor(by_hand(ids)), atol=2e-4, rtol=0)


def test_nothing_is_cut_before_the_budget_is_full_and_then_positions_matter() -> None:
    ids = tokens(1, 150)[0]
    losses = {}
    for positions in ("original", "rerotate"):
        run = StreamRun(tiny("gpt_neox"), [Point(SCHEDULE), BASELINE], [ids], chunk=CHUNK, positions=positions)  # type: ignore[arg-type]
        run.run()
        losses[positions] = run.losses(Point(SCHEDULE))[0]
        torch.testing.assert_close(run.losses(Point(SCHEDULE))[0][:BUDGET], run.losses(BASELINE)[0][:BUDGET])
    difference = (losses["original"] - losses["rerotate"]).abs()
    assert float(difference[: BUDGET + CHUNK].max()) < 1e-4 < 1e-2 < float(difference[BUDGET + CHUNK :].max())


@pytest.mark.parametrize("chunk", [1, 5, 8, 64, 1_000])
def test_the_whole_cache_gives_a_forward_pass_whatever_the_chunk(chunk: int) -> None:
    documents = [tokens(1, 70)[0], tokens(1, 33, seed=1)[0]]
    (result,) = measure([None], documents, chunk=chunk)
    assert not isinstance(result, Exception)
    nll = 0.0
    for ids in documents:
        with torch.no_grad():
            logits = BY_NAME["gpt_neox"].build("sdpa")(ids[None, :-1]).logits[0]
        nll += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    assert result["scored_tokens"] == 69 + 32
    assert result["loss"] == pytest.approx(nll / (69 + 32), abs=1e-4)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"]))


def test_each_document_begins_with_an_empty_cache() -> None:
    a, b = tokens(1, 60)[0], tokens(1, 90, seed=1)[0]
    for press in (SCHEDULE, DecodingPress(AdaKVPress(KnormPress()), CHUNK, BUDGET)):
        (both,), (one,), (other,) = (measure([press], documents) for documents in ([a, b], [a], [b]))
        assert not isinstance(both, Exception) and not isinstance(one, Exception) and not isinstance(other, Exception)
        own = [part["per_document"][0]["nll"] for part in (one, other)]
        assert [part["nll"] for part in both["per_document"]] == pytest.approx(own, abs=1e-3)


def test_memory_does_not_depend_on_the_length_of_the_text() -> None:
    sizes = []
    for n in (200, 800):
        (result,) = measure([SCHEDULE], [tokens(1, n)[0]])
        assert not isinstance(result, Exception)
        assert max(result["kv_len_after"]) < BUDGET + CHUNK
        sizes.append(result["kv_bytes_max"])
    assert sizes[0] == sizes[1]


def test_true_positions_are_read_within_the_limit_only() -> None:
    ids = tokens(1, 100)[0]
    own, pressed = measure([None, SCHEDULE], [ids], limit=40)
    assert not isinstance(own, Exception) and not isinstance(pressed, Exception)
    assert (own["scored_tokens"], own["position_mode"]) == (39, "original")
    assert (pressed["scored_tokens"], pressed["position_mode"]) == (99, "rerotate")
    (pressed,) = measure([SCHEDULE], [ids], limit=40, positions="original")
    assert not isinstance(pressed, Exception) and pressed["scored_tokens"] == 39


def test_buckets_double_and_hold_each_token_once() -> None:
    losses = torch.arange(1.0, 1_001.0)
    means = by_position([losses, losses[:100]])
    assert list(means) == ["1-255", "256-511", "512-1023"]
    assert means["1-255"] == pytest.approx((sum(range(1, 256)) + sum(range(1, 101))) / 355)
    assert means["512-1023"] == pytest.approx(sum(range(512, 1_001)) / 489)


class Broken(ScorerPress):
    def score(self, view: LayerView) -> Tensor:
        raise RuntimeError("broken")


def test_a_press_that_fails_leaves_the_others_alone() -> None:
    broken, fine = measure([DecodingPress(Broken(), CHUNK, BUDGET), SCHEDULE], [tokens(1, 60)[0]])
    assert isinstance(broken, RuntimeError) and not isinstance(fine, Exception)


def test_an_infinite_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "token_losses", lambda logits, wanted: torch.full(wanted.shape, torch.nan))
    (result,) = measure([SCHEDULE], [tokens(1, 60)[0]])
    assert isinstance(result, SelfCheckError) and "not finite" in str(result)


def test_presses_become_schedules() -> None:
    jobs = make_jobs(
        Settings(ppl_mode="streaming", press=("no_press", "snapkv"), budget_tokens=(8, 16), stream_chunk=4)
    )
    assert [job.press for job in jobs] == [None, *(DecodingPress(SnapKVPress(), 4, n) for n in (8, 16))]
    names = {job.name for job in make_jobs(Settings(ppl_mode="streaming", press=("all",), budget_tokens=(8,)))}
    assert {"no_press", "streaming_llm", "knorm", "snapkv", "tova", "adakv_snapkv", "expected_attention"} <= names
    assert not {"all", "think", "rerotated_streaming_llm", "kvzip", "compactor", "decoding_knorm"} & names


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"press": ("snapkv",)}, PressError, "--budget_tokens"),
        ({"press": ("compactor",), "budget_tokens": (8,)}, PressError, "chooses once"),
        ({"press": ("decoding_knorm",), "budget_tokens": (8,)}, PressError, "needs a press that says which pairs stay"),
        ({"press": ("think",), "budget_tokens": (8,)}, PressError, "ThinKPress chooses once"),
        ({"speed_only": True}, InputError, "measures no speed"),
        ({"ppl_apply_press": True}, InputError, "measures no speed"),
        ({"stride": 4}, InputError, "has no windows; leave --stride out"),
        ({"batch_size": 2}, InputError, "leave --batch_size out"),
        ({"positions": "compact"}, InputError, "must be original or rerotate"),
        ({"ppl_mode": "prefix", "stream_chunk": 4}, InputError, "--stream_chunk belongs to"),
        ({"ppl_mode": None, "positions": "rerotate"}, InputError, "--positions belongs to"),
        ({"ppl_mode": "chunks"}, InputError, "must be prefix or streaming"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        make_jobs(Settings(**{"ppl_mode": "streaming"} | options))


def test_from_the_command_line_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", "demo", "--dataset", "demo", "--output_dir", str(tmp_path), "--limit_tokens", "1100"]
    stream = ["--ppl_mode", "streaming", "--stream_chunk", "128", "--press", "no_press", "streaming_llm"]
    assert main(["ppl", *where, *stream, "--budget_tokens", "256"]) == 0
    prefix = ["--ppl_mode", "prefix", "--ppl_only", "--press", "streaming_llm", "--context_tokens", "64"]
    assert main(["ppl", *where, *prefix, "--target_tokens", "32", "--limit_tokens", "200"]) == 0
    assert "no more than these are read" in capsys.readouterr().err
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    modes = {(r["press"], r["ppl_mode"]): r for r in records}
    own, pressed = modes["no_press", "streaming"], modes["streaming_llm", "streaming"]
    assert (own["position_mode"], own["scored_tokens"]) == ("original", 1_023)
    assert (pressed["position_mode"], pressed["scored_tokens"], pressed["chunk_size"]) == ("rerotate", 1_099, 128)
    assert pressed["protocol"] == "stream-K128" and pressed["kv_bytes_max"] < own["kv_bytes_max"]
    assert list(pressed["nll_by_position"]) == ["1-255", "256-511", "512-1023", "1024-2047"]
    assert modes["streaming_llm", "prefix"]["nll_by_position"] is None
    assert main(["report", str(tmp_path), "--table"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("protocol prefix-") == shown.count("protocol stream-") == 1
    assert "| loss at 1024-2047 |" in shown and "1,023" in shown
    assert "loss at" not in table([modes["streaming_llm", "prefix"]])


def test_more_than_the_trained_positions_at_once_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    stream = ["--ppl_mode", "streaming", "--press", "streaming_llm", "--budget_tokens", "1000"]
    assert main(["ppl", "--model", "demo", "--dataset", "demo", *stream]) == 2
    assert "1064 tokens together" in capsys.readouterr().err
