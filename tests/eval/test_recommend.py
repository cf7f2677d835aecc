"""``coldpress recommend``: the rule that names two presses, a run from end to end, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import random
import types
from pathlib import Path
from typing import Any

import pytest

from coldpress.cli import main
from coldpress.errors import DataError
from coldpress.eval import advice as advice_module
from coldpress.eval import pace, prefix, recommend, task_run
from coldpress.eval.advice import Row, Scored, advise, rule_of, table_of, words_of
from coldpress.eval.pace import Pace
from coldpress.loading.datasets import Corpus, Document, excerpts
from coldpress.loading.models import load_model
from coldpress.records.results import read_results
from coldpress.records.schema import check_record

MARGIN = 0.05
N = 12


def row(label: str, delta: float, kl: float, n_right: int = N, n: int = N, **costs: Any) -> Row:
    """A press whose loss is ``delta`` nats a token higher, more or less so from window to window."""
    noise = random.Random(label)
    windows = []
    for i in range(n):
        own = delta + noise.gauss(0, 0.002)
        windows.append(Scored(100, 100 * (3 + own), 300.0, kl * (1 + 0.1 * (i % 3))))
    costs = {"kv_bytes": 500, "ttft_s": 2.0, "tpot_ms": 10.0} | costs
    return Row(label, tuple(windows), tuple(i < n_right for i in range(N)), **costs)


BASE = Row("no_press", (), (True,) * N, kv_bytes=1000, ttft_s=1.0, tpot_ms=12.0)


def test_the_best_and_the_cheapest_are_named() -> None:
    slow, quick = row("slow", 0.001, 0.004, ttft_s=4.0), row("quick", 0.02, 0.02, ttft_s=1.1)
    blind, poor = row("blind", 0.01, 0.01, n_right=2, ttft_s=1.0), row("poor", 0.3, 0.4)
    advice = advise(BASE, [blind, quick, poor, slow], MARGIN)
    assert (advice.fits, advice.best, advice.cheap) == ((slow, quick), (slow,), quick)
    assert advice.lost == (blind,) and not advice.open
    best, cheap, lost = words_of(BASE, [blind, quick, poor, slow], advice)
    assert best.startswith(
        "Best in quality: slow, the best of the 2 that fit: 12/12 questions right (uncompressed 12/12), a loss "
        "difference of +0.0"
    )
    assert cheap.startswith(
        "Cheapest that fits: quick, with 500 B (of 1000 B), 0.10 s to compress and 10.0 ms a token, against 500 B"
    )
    assert lost.startswith("Perplexity hides what is lost: blind (+1.") and "2/12 right, the uncompressed" in lost
    assert "(here 11 of 12)" in rule_of(BASE, MARGIN)
    lines = table_of(BASE, [blind, quick, poor, slow], advice).splitlines()
    assert [line.split()[0] for line in lines] == ["press", "no_press", "slow", "quick", "poor", "blind"]
    assert [line.split()[-1] for line in lines[2:]] == ["yes", "yes", "no", "no"]


def test_what_saves_memory_and_no_time_is_called_that() -> None:
    slower, faster = row("slower", 0.001, 0.004, tpot_ms=12.5), row("faster", 0.001, 0.004, tpot_ms=11.5)
    said = words_of(BASE, [slower], advise(BASE, [slower], MARGIN))
    assert "slower saves memory here and no time: the uncompressed cache takes 12.0 ms a token." in said
    assert not any("no time" in line for line in words_of(BASE, [faster], advise(BASE, [faster], MARGIN)))


def test_one_answer_in_ten_may_be_lost() -> None:
    rows = [row("eleven", 0.0, 0.01, n_right=11), row("ten", 0.0, 0.001, n_right=10)]
    assert [found.label for found in advise(BASE, rows, MARGIN).fits] == ["eleven"]


def test_two_that_are_not_told_apart_are_both_named() -> None:
    one, other = row("one", 0.001, 0.0040), row("other", 0.001, 0.0041)
    windows = tuple(w._replace(kld=w.kld + 0.001 * (-1) ** i) for i, w in enumerate(other.windows))
    other = dataclasses.replace(other, windows=windows, ttft_s=1.5)
    advice = advise(BASE, [one, other], MARGIN)
    assert advice.best == (one, other) and advice.cheap is other
    assert "do not tell one and other apart" in words_of(BASE, [one, other], advice)[0]


def test_bytes_are_the_first_cost_or_time_is() -> None:
    small, quick = row("small", 0.0, 0.01, kv_bytes=400), row("quick", 0.0, 0.01, ttft_s=1.0, tpot_ms=5.0)
    assert advise(BASE, [small, quick], MARGIN).cheap is small
    assert advise(BASE, [small, quick], MARGIN, by_time=True).cheap is quick
    slower = [dataclasses.replace(small, tpot_ms=99.0)]
    said = words_of(BASE, slower, advise(BASE, slower, MARGIN, by_time=True), by_time=True)
    assert said[2].startswith("None that fits is faster here than the uncompressed cache (12.0 ms a token)")
    near = row("near", 0.0, 0.001, ttft_s=1.01, tpot_ms=5.0)  # costs within 5 % are one: quality decides
    assert advise(BASE, [small, quick, near], MARGIN, by_time=True).cheap is near


def test_none_is_named_where_none_fits() -> None:
    rows = [row("poor", 0.3, 0.4), row("blind", 0.0, 0.01, n_right=0)]
    advice = advise(BASE, rows, MARGIN)
    assert advice.cheap is None and advice.best == ()
    none, lost = words_of(BASE, rows, advice)
    assert none == "None of these 2 fits: keep the uncompressed cache, or ask for a smaller --compression_ratio."
    assert "0/12" in lost


@pytest.mark.parametrize("n", [1, 7])
def test_too_few_windows_name_nothing(n: int) -> None:
    rows = [row("good", 0.0, 0.001, n=n), row("other", 0.0, 0.01, n=n)]
    advice = advise(BASE, rows, MARGIN)
    assert advice.cheap is None and advice.open == tuple(rows)
    said = words_of(BASE, rows, advice)[0]
    assert said.startswith("Nothing is named:") and "too few to say whether good and other fit" in said
    assert table_of(BASE, rows, advice).count("?") == 2


def test_no_questions_name_nothing_and_a_model_without_answers_is_told() -> None:
    rows = [dataclasses.replace(row("good", 0.0, 0.001), right=())]
    unasked = dataclasses.replace(BASE, right=())
    assert advise(unasked, rows, MARGIN).open == tuple(rows)
    rows = [dataclasses.replace(row("good", 0.0, 0.001), right=(True,) * 3)]
    few = dataclasses.replace(BASE, right=(True,) * 3)
    advice = advise(few, rows, MARGIN)
    assert advice.cheap is None and "12 windows and 3 questions are too few" in words_of(few, rows, advice)[0]
    blind = dataclasses.replace(BASE, right=(False,) * N)
    rows = [row("good", 0.0, 0.001, n_right=0)]
    advice = advise(blind, rows, MARGIN)
    assert advice.cheap is rows[0]
    assert "decide nothing here" in rule_of(blind, MARGIN)
    assert "say little about presses" in words_of(blind, rows, advice)[0]


# From the command line


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("demo", device="cpu")


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    monkeypatch.setattr(recommend, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(recommend, "ROUNDS", 1)
    monkeypatch.setattr(recommend, "NEW_TOKENS", 2)


def run(folder: Path, *options: str) -> int:
    few = ("--context_tokens", "64", "--max_windows", "8", "--press", "snapkv", "knorm")
    given = ("--model", "demo", "--device", "cpu", "--data", "demo", "--output_dir", str(folder))
    return main(["recommend", *given, *few, *options])


@pytest.mark.usefixtures("one_model")
def test_a_use_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--margin", "2") == 0
    out, said = capsys.readouterr()
    assert "8 windows of 64 + 24 tokens, 8 questions and 1 timed round, ratio 0.5" in out
    assert max(map(len, out.split("To use")[0].splitlines())) <= 100
    assert "Best in quality: " in out and "Cheapest that fits: " in out
    assert "coldpress compress --model demo --press snapkv --compression_ratio 0.5 --text_file TEXT.txt" in out
    assert "min for 8 windows and 8 questions of 64 tokens" in said and "2 presses take about" in said
    records = read_results(tmp_path, check_record)
    assert sorted((r["press"], r["protocol"].partition("-")[0]) for r in records) == [
        (press, kind) for press in ("knorm", "no_press", "snapkv") for kind in ("prefix", "tasks")
    ]
    assert {r["status"] for r in records} == {"ok"}
    assert {len(r["per_window"]) for r in records if r["per_window"]} == {8}
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_model")
@pytest.mark.parametrize(
    ("use", "line"),
    [
        ("chat", "coldpress chat --model demo --press snapkv --compression_ratio 0.5 --chunk_tokens 128"),
        ("streaming", "DecodingPress(SnapKVPress("),
        ("throughput", "coldpress serve --model demo --press snapkv --compression_ratio 0.5"),
    ],
)
def test_other_uses(
    use: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEWEST_WINDOWS", "FEWEST_QUESTIONS"):
        monkeypatch.setattr(advice_module, name, 2)
    assert run(tmp_path, "--use", use, "--press", "snapkv", "--margin", "10", "--max_windows", "2") == 0
    out = capsys.readouterr().out
    assert line in out
    assert ("loss at 1-255" in out) == (use == "streaming")


@pytest.mark.slow
@pytest.mark.usefixtures("one_model")
def test_few_bits_are_measured_beside_presses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEWEST_WINDOWS", "FEWEST_QUESTIONS"):
        monkeypatch.setattr(advice_module, name, 2)
    given = ("--model", "demo", "--data", "demo", "--output_dir", str(tmp_path), "--context_tokens", "160")
    assert main(["recommend", *given, "--use", "throughput", "--max_windows", "2"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert abs(float(lines["k8v4"][2])) < 0.02  # next to nothing is lost
    assert "coldpress serve --model demo --press no_press --kv_bits k8v4" in out


@pytest.mark.slow
@pytest.mark.usefixtures("one_model")
def test_the_time_ends_a_run_that_the_same_command_goes_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "--budget_minutes", "1e-6", "--max_windows", "4") == 0
    out, said = capsys.readouterr()
    assert "2 windows of 64 + 24 tokens, 2 questions and no timed round" in out and "Nothing was timed" in out
    assert "Nothing is named" in out
    assert "too little to name a press" not in said  # no time is enough for 4 windows
    assert "The time was up. To measure the rest, go on from here with:\n  coldpress recommend --model demo" in out
    asked: list[int] = []
    whole = task_run.ExampleWork.__call__

    def counted(self: Any, model: Any, item: Any) -> Any:
        asked.append(item.index)
        return whole(self, model, item)

    monkeypatch.setattr(task_run.ExampleWork, "__call__", counted)
    assert run(tmp_path, "--max_windows", "4") == 0
    assert "4 windows of 64 + 24 tokens, 4 questions and 1 timed round" in capsys.readouterr().out
    assert asked == [2, 3]
    assert {r["status"] for r in read_results(tmp_path)} == {"ok"}


@pytest.mark.usefixtures("one_model")
def test_too_little_time_for_a_verdict_is_told_before_and_the_command_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "of", lambda loaded: Pace(0.02, 0.02))  # seconds a token: a slow machine
    monkeypatch.setattr(Pace, "context", lambda *args: 64)
    given = ["recommend", "--model", "demo", "--device", "cpu", "--data", "demo", "--output_dir", str(tmp_path)]
    assert main([*given, "--budget_minutes", "1e-6", "--press", "knorm"]) == 0
    out, said = capsys.readouterr()
    assert "too little to name a press, which takes 8 windows and 8 questions, in about 2 min: give --budg" in said
    command = f"coldpress {' '.join(given)} --press knorm --context_tokens 64 --budget_minutes 1"
    assert f"The time was up. To have enough to name a press, go on from here with:\n  {command}\n" in out
    assert "adds more" not in out


class Ticking:
    """A clock that goes on by a second with each item."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget_s: float):
        self.now = 0.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        self.clock, self.run = pace.Clock(budget_s), types.SimpleNamespace(is_cut=False)

    def measured(self, name: str, n: int, ends: float) -> int:
        """How many of so many items are measured."""
        done = 0
        for _ in self.clock.hook(self.run, {name: ends})([None] * n, name):  # type: ignore[arg-type]
            self.now += 1
            done += 1
        return done


def test_rounds_are_timed_only_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = Ticking(monkeypatch, 10)
    assert ticking.measured("perplexity", 30, 0.45) == 5 and ticking.run.is_cut and ticking.clock.is_up
    assert ticking.measured("tasks", 30, 0.85) == 4
    assert ticking.measured("speed", 45, 1.0) == 2
    assert ticking.measured("speed", 45, 1.0) == 0  # the time is over
    assert ticking.measured("tasks", 30, 0.85) == 2  # so few in any case
    assert ticking.clock.took == {"perplexity": 1.0, "tasks": 1.0, "speed": 1.0}
    whole = Ticking(monkeypatch, 10)
    assert whole.measured("perplexity", 3, 0.45) == 3 and not whole.run.is_cut and not whole.clock.is_up


def test_a_budget_leaves_room_for_what_it_is_said_to_be_enough_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for use in pace.USES.values():
        minutes = pace.limit_for(use, 8, 8, (1.0, 1.0))
        ticking = Ticking(monkeypatch, 60 * minutes)
        assert ticking.measured("perplexity", 30, use.shares[0]) >= 8
        assert ticking.measured("tasks", 30, use.shares[1]) >= 8


@pytest.mark.slow
@pytest.mark.usefixtures("one_model")
def test_an_interrupted_run_keeps_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Any, model: Any, item: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(task_run.ExampleWork, "__call__", stopped)
    assert run(tmp_path) == 130
    out, said = capsys.readouterr()
    assert "interrupted; 3 result(s) kept, unfinished; the same command goes on from here" in said  # not timed yet
    assert "Best" not in out
    assert {r["protocol"].partition("-")[0] for r in read_results(tmp_path)} == {"prefix"}


@pytest.mark.usefixtures("one_model")
def test_what_was_finished_before_an_interrupted_part_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--max_windows", "2", "--press", "knorm")
    whole = task_run.ExampleWork.__call__

    def stopped(self: Any, model: Any, item: Any) -> Any:
        if item.index:
            raise KeyboardInterrupt
        return whole(self, model, item)

    def measured(self: Any, model: Any, item: Any) -> Any:
        raise AssertionError("windows are there")

    with monkeypatch.context() as patch:
        patch.setattr(task_run.ExampleWork, "__call__", stopped)
        assert run(tmp_path, *few) == 130
    said = capsys.readouterr().err
    assert "interrupted; 4 result(s) kept, unfinished; the same command goes on from here" in said
    monkeypatch.setattr(prefix.WindowWork, "__call__", measured)
    assert run(tmp_path, *few) == 0
    assert "2 windows of 64 + 24 tokens, 2 questions and 1 timed round" in capsys.readouterr().out
    assert {r["status"] for r in read_results(tmp_path)} == {"ok"}
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.usefixtures("one_model")
def test_the_time_is_told_of_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of windows as long as the model can read, and as many as the text has."""
    assert run(tmp_path, "--context_tokens", "1024", "--max_windows", "40", "--budget_minutes", "0.001") == 0
    out, said = capsys.readouterr()
    assert "contexts have 911 tokens, not 1024" in said
    assert "min for 17 windows and 40 questions of 911 tokens" in said
    assert "windows of 911 + 113 tokens" in out


@pytest.mark.usefixtures("one_model")
def test_what_to_do_after_an_interruption_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context that was chosen depends on how fast the machine is; the same windows need it to be named."""
    monkeypatch.setattr(Pace, "context", lambda *args: 64)
    given = ["recommend", "--model", "demo", "--data", "demo", "--output_dir", str(tmp_path), "--press", "knorm"]
    whole, seen = prefix.WindowWork.__call__, []

    def stopped(self: Any, model: Any, item: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(item.index)
        return whole(self, model, item)

    monkeypatch.setattr(prefix.WindowWork, "__call__", stopped)
    assert main([*given, "--max_windows", "2"]) == 130
    said = capsys.readouterr().err
    more = "the same command with --context_tokens 64 goes on from here"
    assert f"interrupted; 2 result(s) kept, unfinished; {more}\n" in said
    assert said.count("--context_tokens") == 1
    assert main([*given, "--max_windows", "3"]) == 130  # other windows: nothing is there
    said = capsys.readouterr().err
    assert said.endswith("\ninterrupted before anything was measured\n") and "goes on" not in said


@pytest.mark.usefixtures("one_model")
def test_an_interruption_while_the_result_is_reckoned_keeps_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> str:
        raise KeyboardInterrupt

    few = ("--max_windows", "2", "--press", "knorm")
    with monkeypatch.context() as patch:
        patch.setattr(recommend, "_recommendation", stopped)
        assert run(tmp_path, *few) == 130
    assert "interrupted; 4 result(s) kept; the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(task_run.ExampleWork, "__call__", stopped)
    assert run(tmp_path, *few) == 0 and not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--use", "qa"], "--data is missing; name the text that you work with"),
        (["--data", "demo", "--use", "poetry"], "invalid choice"),
        (["--data", "demo", "--compression_ratio", "1"], "--compression_ratio must be more than 0 and less than 1"),
        (["--data", "demo", "--budget_minutes", "0"], "--budget_minutes must be more than 0"),
        (["--data", "demo", "--margin", "-1"], "--margin must be more than 0"),
        (["--data", "demo", "--press", "no_press"], "the uncompressed cache is always measured beside them"),
        (["--data", "demo", "--press", "snapvk"], "Did you mean 'snapkv'"),
        (
            ["--data", "demo", "--use", "chat", "--press", "kvzip"],
            "kvzip chooses once, from a whole text, and --use chat",
        ),
        (["--data", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["recommend", "--model", "demo", *options])
    except SystemExit as error:
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1, err


# The text


class Words:
    """A tokenizer: a token for each four characters."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text) // 4))}


def corpus(*lengths: int) -> Corpus:
    documents = tuple(Document(f"text {i}", "word" * (n // 4)) for i, n in enumerate(lengths))
    return Corpus("made up", "made up", None, "test", None, documents)


def test_excerpts_do_not_overlap_and_come_from_all_texts() -> None:
    found, n = excerpts(corpus(40_000, 40_000), Words(), 100, most=30, seed=0)
    assert n == 100 and len(found.documents) == 30
    places = [(d.doc_id.split(" at ")[0], int(d.doc_id.split(" at ")[1])) for d in found.documents]
    assert len({text for text, _ in places}) == 2 and len(set(places)) == 30
    assert all(len(d.text) >= 4 * 100 for d in found.documents)
    starts = sorted(start for text, start in places if text == "text 0")
    assert min(b - a for a, b in itertools.pairwise(starts)) >= len(found.documents[0].text)
    assert excerpts(corpus(40_000, 40_000), Words(), 100, most=30, seed=0)[0] == found


def test_a_short_text_gives_shorter_excerpts_or_none() -> None:
    found, n = excerpts(corpus(10_000), Words(), 1024, most=30, seed=0)
    assert 96 <= n < 1024 and len(found.documents) >= 8
    with pytest.raises(DataError, match=r"at least .* are needed for two excerpts"):
        excerpts(corpus(600), Words(), 1024, most=30, seed=0)
