"""``coldpress benchmark``: rows of the hub's layout, one compressed context for all its questions, paired scores."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from transformers import pipeline

from coldpress import SnapKVPress
from coldpress.cli import main
from coldpress.errors import DataError, InputError
from coldpress.eval import load_results, task_run
from coldpress.eval.benchmarks import Share, find_benchmark
from coldpress.eval.benchmarks.others import hide
from coldpress.eval.benchmarks.rows import check_rows, choose, load_rows, make_contexts
from coldpress.eval.benchmarks.run import benchmark_protocol, bootstrap_interval, mcnemar, mean
from coldpress.eval.ledger import Answers, Ledger
from coldpress.eval.settings import BenchmarkSettings
from coldpress.loading.models import load_model
from coldpress.records.results import read_results
from coldpress.records.schema import check_record

DATA = Path(__file__).parent / "benchmark_data"
RULER = ("ruler", "--data", str(DATA / "ruler"), "--data_dir", "4096")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("demo", device="cpu")


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    monkeypatch.setattr("coldpress.eval.benchmarks.run.load_model", lambda *args, **options: loaded)


@pytest.fixture(autouse=True)
def own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty caches and offline mode: no test sees this machine's caches or its network."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "arrow")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def run(folder: Path, *options: str) -> int:
    return main(["benchmark", *options, "--model", "demo", "--device", "cpu", "--output_dir", str(folder)])


def rows(name: str, data_dir: str) -> list[dict[str, Any]]:
    text = (DATA / name / data_dir / "test-00000-of-00001.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def written(folder: Path, some: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "folder", "data_dir", "options", "tasks"),
    [
        ("ruler", "ruler", "4096", (), ["niah_single_1", "vt", "qa_1"]),
        ("loogle", "loogle", "shortdep_qa", (), ["shortdep_qa rouge-l"]),
        ("loogle", "loogle", "shortdep_cloze", (), ["shortdep_cloze exact_match"]),
        ("zero_scrolls", "zero_scrolls", None, (), ["qasper", "gov_report"]),
        ("infinitebench", "infinitebench", "passkey", (), ["passkey"]),
        ("infinitebench", "infinitebench", "math_find", (), ["math_find"]),
        ("longbench", "longbench", "qasper", (), ["qasper"]),
        ("longbench", "longbench", "trec", (), ["trec"]),
        ("longbench-e", "longbench", "qasper_e", (), ["qasper 0-4k", "qasper 4-8k"]),
        ("longbench-v2", "longbench-v2", "0shot", (), ["all", "easy", "short", "hard", "medium"]),
        ("aime25", "aime25", None, (), ["aime25 accuracy"]),
        ("math500", "math500", None, (), ["math500 accuracy"]),
        (
            *("needle_in_haystack", "needle_in_haystack", None),
            *(("--max_context_length", "300", "--needle_depth", "0,50", "100"), ["needle rouge-l-f"]),
        ),
    ],
)
def test_each_benchmark_runs_from_rows_of_the_hub_s_layout(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    folder: str,
    data_dir: str | None,
    options: tuple[str, ...],
    tasks: list[str],
) -> None:
    if any("rouge" in task for task in tasks):
        pytest.importorskip("rouge")
    part = () if data_dir is None else ("--data_dir", data_dir)
    given = ("--data", str(DATA / folder), *part, *options, "--press", "no_press", "knorm")
    assert run(tmp_path, name, *given) == 0
    printed = capsys.readouterr().out
    records = read_results(tmp_path, check_record)
    assert [(r["press"], r["compression_ratio"], r["status"]) for r in records] == [
        *(("knorm", 0.5, "ok"), ("no_press", 0.0, "ok")),
    ]
    for record in records:
        assert record["protocol"].startswith("-".join(["benchmark-v1", name, *part[1:]]))
        assert [task["task"] for task in record["tasks"]] == tasks
        assert record["n_questions"] == len(record["per_example"])
        assert all(len(row["answer"]) > 0 and row["length"] > 20 for row in record["per_example"])
    pressed, base = records
    assert 0.49 < pressed["effective_compression_ratio"] < 0.53 and base["effective_compression_ratio"] == 0
    assert pressed["kv_bytes"] < 0.53 * pressed["kv_bytes_baseline"] == 0.53 * base["kv_bytes"]
    for own, other in zip(pressed["tasks"], base["tasks"], strict=True):
        assert (own["n"], own["score_base"], own["length"]) == (other["n"], other["score"], other["length"])
        assert own["score"] is None if name == "zero_scrolls" else 0 <= own["score"] <= 1
        assert [cell["depth"] for cell in own["by_depth"]] == ([0, 0.5, 1] if name == "needle_in_haystack" else [])
    assert main(["report", str(tmp_path), "--table"]) == 0
    for text in (printed, capsys.readouterr().out):
        (head,) = (line for line in text.splitlines() if "same answers" in line)
        assert re.search(r"\| +task \|", head) and ("uncompressed |" in head) == (name != "zero_scrolls")
        lines = text.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
        assert [line.split("|")[3].strip() for line in lines] == [
            f"{task['task']} at {task['length']:,} tokens" for task in pressed["tasks"]
        ]


def test_a_report_shows_benchmarks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(tmp_path, *RULER, "--press", "no_press", "knorm", "--limit", "3") == 0
    few = ("zero_scrolls", "--data", str(DATA / "zero_scrolls"), "--press", "knorm", "--limit", "1")
    assert run(tmp_path, *few) == 0
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "bootstrapped over contexts" in page and "ruler/4096 with demo" in page and "% same answers" in page
    table = load_results(tmp_path, explode="per_example")
    assert len(table) == 7 and set(table["per_example_task"]) == {"niah_single_1", "vt", "qa_1", "qasper"}


def test_answers_are_the_pipeline_s_and_a_context_is_read_once(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled, n_read = task_run.prefilled, []
    monkeypatch.setattr(task_run, "prefilled", lambda *args: n_read.append(args[1].shape[1]) or prefilled(*args))
    assert run(tmp_path, *RULER, "--press", "no_press", "snapkv", "--compression_ratio", "0.6") == 0
    base, pressed = sorted(read_results(tmp_path), key=lambda record: record["press"])
    assert len(n_read) == 3 == base["n_contexts"] and base["n_questions"] == 4
    pipe = pipeline("kv-press-text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in rows("ruler", "4096"):
        asked.setdefault(row["context"], []).append(row)
    for record, press in ((base, None), (pressed, SnapKVPress(0.6))):
        answers = []
        for context, own in asked.items():
            options = {"answer_prefix": own[0]["answer_prefix"], "max_new_tokens": own[0]["max_new_tokens"]}
            answers += pipe(context, questions=[row["question"] for row in own], press=press, **options)["answers"]
        assert [row["answer"] for row in record["per_example"]] == answers
    assert [row["is_same_answer"] for row in base["per_example"]] == [True] * 4
    assert [row["context"] for row in pressed["per_example"]] == [0, 1, 2, 2]


def test_a_question_is_compressed_too_if_that_is_asked_for(tmp_path: Path, loaded: Any) -> None:
    assert run(tmp_path, *RULER, "--press", "snapkv", "finch", "--query_aware", "--limit", "2") == 0
    records = {record["press"]: record for record in read_results(tmp_path)}
    assert records["finch"]["protocol"] == "benchmark-v1-ruler-4096-query_aware"
    pipe = pipeline("kv-press-text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    for row, found in zip(rows("ruler", "4096"), records["snapkv"]["per_example"], strict=False):
        text, prefix = row["context"] + row["question"], row["answer_prefix"]
        answer = pipe(text, question="", answer_prefix=prefix, press=SnapKVPress(0.5), max_new_tokens=8)["answer"]
        assert found["answer"] == answer and found["question"] == row["question"]


def test_a_press_that_goes_on_while_decoding(tmp_path: Path) -> None:
    few = ("aime25", "--data", str(DATA / "aime25"), "--max_new_tokens", "40")
    interval = ("--press_args", '{"compression_interval": 8}')
    assert run(tmp_path, *few, "--press", "decoding_snapkv", *interval) == 0
    (record,) = read_results(tmp_path)
    assert record["effective_compression_ratio"] > 0.3  # after the first answer
    assert record["kv_len_before"] > record["tasks"][0]["length"] + 20
    assert run(tmp_path, *few[:-1], "4", "--press", "decoding_snapkv", *interval) == 2  # it would do nothing


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, done = task_run.ExampleWork.__call__, []

    def stopped(self: Any, model: Any, item: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item.index)
        return whole(self, model, item)

    options = (*RULER, "--press", "knorm", "random", "--kv_bits", "8")
    monkeypatch.setattr(task_run.ExampleWork, "__call__", stopped)
    assert run(tmp_path, *options) == 130
    assert {r["status"] for r in read_results(tmp_path)} == {"interrupted"}
    assert list((tmp_path / ".unfinished").iterdir())
    done.clear()
    assert run(tmp_path, *options) == 0
    assert done == [2] and not (tmp_path / ".unfinished").exists()
    resumed = {r["press"]: (r["tasks"], r["per_example"], r["kept_hash"]) for r in read_results(tmp_path)}
    monkeypatch.setattr(task_run.ExampleWork, "__call__", whole)
    assert run(tmp_path / "whole", *options) == 0
    records = read_results(tmp_path / "whole")
    assert {r["press"]: (r["tasks"], r["per_example"], r["kept_hash"]) for r in records} == resumed


def test_a_damaged_ledger_is_as_good_as_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run")
    found = {
        "key": Answers(answers=[[1, 2], [3]], seen_tokens=40, kv_bytes=1000, kv_lengths=[20, 20], achieved_ratio=0.5)
    }
    ledger.save(0, found, "print")
    assert ledger.load(Answers, 0, "print") == found
    assert ledger.load(Answers, 0, "other") == {} == ledger.load(Answers, 1, "print")
    (path,) = (tmp_path / "run").iterdir()
    path.write_text(path.read_text().replace("[3]", "[4]"))
    assert ledger.load(Answers, 0, "print") == {}


def test_scores_are_paired_with_the_uncompressed_cache_s(tmp_path: Path) -> None:
    """Rows whose right answers are those that the uncompressed cache gives."""
    given = ("--press", "no_press", "knorm", "--compression_ratio", "0.6")
    made = [
        {
            "task": "qa_1" if i % 2 else "vt",
            "context": f"The ferry number {i} crosses the sound with {3 * i} boats and a baker. " * 3,
            "question": f"What is number {i}?",
            "answer_prefix": "It is",
            "answer": ["x"],
            "max_new_tokens": 4,
        }
        for i in range(8)
    ]
    assert run(tmp_path / "first", "ruler", "--data", str(written(tmp_path / "unknown", made)), *given) == 0
    base = next(r for r in read_results(tmp_path / "first") if r["press"] == "no_press")
    said = ["".join(c for c in found["answer"] if c >= " ").strip() for found in base["per_example"]]
    right = [{**row, "answer": [answer]} for row, answer in zip(made, said, strict=True)]
    right[0]["answer"] = ["nowhere"]
    assert run(tmp_path / "then", "ruler", "--data", str(written(tmp_path / "known", right)), *given) == 0
    pressed, base = read_results(tmp_path / "then")
    assert [row["score"] for row in base["per_example"]] == [0, *[1] * 7]
    for task in pressed["tasks"]:
        own = [row for row in pressed["per_example"] if row["task"] == task["task"]]
        assert task["score"] == mean([Share(row["score"]) for row in own])
        lost = sum(row["score"] < row["score_base"] for row in own)
        assert (task["gained"], task["lost"]) == (0, lost)
        assert task["same_answers"] == sum(row["is_same_answer"] for row in own) / 4
        assert task["n_contexts"] == task["n"] == 4
        low, high = task["delta_score_ci95"]
        assert low <= task["score"] - task["score_base"] <= high
    assert sum(task["lost"] for task in pressed["tasks"]) > 0
    assert [task["delta_score_ci95"] for task in base["tasks"]] == [None, None]


def test_mcnemar_and_the_bootstrap() -> None:
    right, wrong = Share(1), Share(0)
    own = [right, *[wrong] * 9, right, wrong]
    base = [wrong, *[right] * 9, right, wrong]
    assert mcnemar(own, base) == (1, 9, 2 * 11 / 2**10)
    assert mcnemar(own, own) == (0, 0, 1.0)
    assert mcnemar([Share(0.5)], [right]) is None and mcnemar([Share(1, 2)], [right]) is None
    assert bootstrap_interval(own, base, [0] * 12) is None  # one context
    interval = bootstrap_interval(own, base, list(range(12)))
    assert interval is not None and interval == bootstrap_interval(own, base, list(range(12)))
    rng, drawn = random.Random(0), []
    for _ in range(4000):  # the same, slowly
        some = [rng.randrange(12) for _ in range(12)]
        drawn.append(sum(own[i].reached - base[i].reached for i in some) / 12)
    drawn.sort()
    assert interval == pytest.approx((drawn[100], drawn[3900]), abs=0.09)
    by_context = bootstrap_interval(own, base, [0] * 6 + [1] * 6)  # fewer independent parts, a wider interval
    assert by_context is not None and by_context[0] == pytest.approx(-4 / 6)
    parts = bootstrap_interval([Share(1, 4), Share(2, 2)], [Share(4, 4), Share(0, 1)], [0, 1])
    assert parts == pytest.approx((-0.75, 1.0))
    assert bootstrap_interval([Share(0, 0)] * 2, [Share(0, 0)] * 2, [0, 1]) is None
    assert mean([Share(1, 4), Share(2, 2)]) == 0.5 and mean([Share(0, 0)]) is None


def test_a_fraction_is_kvpress_s() -> None:
    pandas = pytest.importorskip("pandas")
    made: list[Any] = [{"i": i} for i in range(57)]
    frame = pandas.DataFrame(made)
    for fraction, seed in ((0.1, 42), (0.5, 42), (0.3, 7)):
        theirs = frame.sample(frac=fraction, random_state=seed)["i"].tolist()
        assert [row["i"] for row in choose(made, fraction, None, seed)] == theirs
    assert choose(made, 1.0, 3, 0) == made[:3]


def test_a_folder_is_read_as_the_hub_is_where_no_part_is_named(tmp_path: Path) -> None:
    benchmark, folder = find_benchmark("longbench-v2"), str(DATA / "longbench-v2")
    named = load_rows(benchmark, folder, "0shot")
    assert load_rows(benchmark, folder, None) == named and named.data_dir == "0shot"
    with pytest.raises(DataError, match="is divided: say which part"):
        load_rows(find_benchmark("ruler"), str(DATA / "ruler"), None)


def test_a_file_of_a_folder_is_not_mixed_with_those_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some, ruler = rows("ruler", "4096"), find_benchmark("ruler")
    written(tmp_path / "256", some[2:])
    with pytest.raises(DataError, match="is divided: say which part is read with --data_dir: 256"):
        load_rows(ruler, str(tmp_path), None)
    (tmp_path / "rows.jsonl").write_text("{}")  # of no split: the part is not read in its place
    with pytest.raises(DataError, match="is divided: say which part is read with --data_dir: 256"):
        load_rows(ruler, str(tmp_path), None)
    written(tmp_path, some[:2])
    found = load_rows(ruler, str(tmp_path), None)
    assert found.rows == some[:2] and found.place == f"{tmp_path}/test.jsonl"
    assert "only test.jsonl is read; name a folder in it with --data_dir (256)." in capsys.readouterr().err
    assert load_rows(ruler, str(tmp_path), "256").rows == some[2:]
    (tmp_path / "256" / "test-00001-of-00002.jsonl").write_text(json.dumps(some[0]) + "\n")
    assert len(load_rows(ruler, str(tmp_path), "256").rows) == len(some[2:]) + 1
    (tmp_path / "test.csv").write_text("context\n")
    with pytest.raises(DataError, match=r"holds test\.csv and test\.jsonl: leave those of one kind there"):
        load_rows(ruler, str(tmp_path), None)


def test_contexts_are_cut_and_a_question_is_not(loaded: Any) -> None:
    tokenizer, row = loaded.tokenizer, rows("ruler", "4096")[0]
    (whole,) = make_contexts([row], tokenizer, max_positions=1024)
    ids = tuple(tokenizer(tokenizer.bos_token + row["context"])["input_ids"])
    assert whole.context_ids == ids and whole.n_whole == len(ids)
    asked = f"{row['question']}\n{row['answer_prefix']}"
    assert whole.questions[0].ids == tuple(tokenizer(asked)["input_ids"])
    assert whole.questions[0].limit == 8
    (cut,) = make_contexts([row], tokenizer, max_positions=1024, max_context_length=50, max_new_tokens=3)
    assert cut.context_ids == ids[:50] and cut.questions[0].limit == 3
    (tight,) = make_contexts([row], tokenizer, max_positions=100)
    assert len(tight.context_ids) + len(tight.questions[0].ids) + 8 == 100
    (aware,) = make_contexts([row], tokenizer, max_positions=1024, max_context_length=60, is_query_aware=True)
    question = tuple(tokenizer(row["question"])["input_ids"])
    assert aware.context_ids[-len(question) :] == question and aware.length == 60
    (pinned,) = make_contexts([row], tokenizer, max_positions=1024, system="Be brief.")
    assert tokenizer.decode(pinned.context_ids[: pinned.n_pinned]).endswith("Be brief.\n\n")
    for options in ({"max_positions": 30}, {"max_positions": 60, "max_context_length": 59}):
        with pytest.raises(InputError, match="need more than the"):
            make_contexts([row], tokenizer, **options)


def test_a_context_is_read_whole_where_extrapolation_is_allowed(tmp_path: Path) -> None:
    row = rows("ruler", "4096")[0]
    long = row | {"context": row["context"] * 14, "max_new_tokens": 2}
    given = ("ruler", "--data", str(written(tmp_path / "4096", [long]).parent), "--data_dir", "4096")
    for option, n_cut in ((), 1), (("--allow_extrapolation",), 0):
        assert run(tmp_path / "results", *given, *option, "--press", "no_press") == 0
        (record,) = [
            each for each in read_results(tmp_path / "results", check_record) if each["n_contexts_cut"] == n_cut
        ]
    assert record["total_tokens"] > 2048


def test_a_chat_template_goes_around_context_and_question(loaded: Any) -> None:
    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
            assert options["add_generation_prompt"] and not options["tokenize"]
            return f"<user>{turns[0]['content']}<assistant>"

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [ord(character) for character in text]}

    row = rows("ruler", "4096")[1]
    (context,) = make_contexts([row], Chat(), max_positions=10_000)
    assert "".join(map(chr, context.context_ids)) == f"<user>{row['context']}"
    assert "".join(map(chr, context.questions[0].ids)) == f"{row['question']}<assistant>{row['answer_prefix']}"


def test_a_needle_stands_at_its_depth(loaded: Any) -> None:
    (row,) = rows("needle_in_haystack", "data")
    hidden = hide([row], loaded.tokenizer, 400, [0, 50, 100])
    places = []
    for found in hidden:
        text = found["context"]
        assert text.startswith("This is a very long story book: <book> ") and text.endswith(" </book>.")
        assert text.count(row["needle"]) == 1 and len(loaded.tokenizer(text)["input_ids"]) < 400
        places.append(text.index(row["needle"]) / len(text))
    assert places == pytest.approx([0.04, 0.5, 0.9], abs=0.07)
    assert [found["needle_depth"] for found in hidden] == [0, 50, 100]
    with pytest.raises(InputError, match="give at least"):
        hide([row], loaded.tokenizer, 160, [0])


README = """---
configs:
- config_name: '4096'
  data_files:
  - split: test
    path: 4096/test-*
- config_name: '8192'
  data_files:
  - split: test
    path: 8192/test-*
---
"""


def test_a_data_set_is_read_as_the_hub_has_it(tmp_path: Path, own_caches: Path) -> None:
    """From a folder that was downloaded, and from the hub's cache."""
    some, benchmark = rows("ruler", "4096"), find_benchmark("ruler")
    snapshot = own_caches / "hub" / "datasets--simonjegou--ruler" / "snapshots" / ("b" * 40)
    for folder in (tmp_path, snapshot):
        for length, own in (("4096", some), ("8192", some[:2])):
            (folder / length).mkdir(parents=True)
            datasets.Dataset.from_list(own).to_parquet(folder / length / "test-00000-of-00001.parquet")
        (folder / "README.md").write_text(README)
    found = load_rows(benchmark, str(tmp_path), "4096")
    assert found.rows == some and (found.name, found.data_dir) == (f"{tmp_path}/4096", "4096")
    assert load_rows(benchmark, str(tmp_path), "8192").rows == some[:2]
    refs = own_caches / "hub" / "datasets--simonjegou--ruler" / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    cached = load_rows(benchmark, None, "8192")
    assert (cached.name, cached.rows) == ("simonjegou/ruler/8192", some[:2])


def bad(change: dict[str, Any], name: str = "ruler", data_dir: str = "4096") -> dict[str, Any]:
    row = {**rows(name.removesuffix("-e"), data_dir)[0], **change}
    return {name: value for name, value in row.items() if value != "gone"}


OF_ONE_KIND = [
    ("ruler", "4096", {"answer": "the a"}, "answer must be a list of texts, at least one and none of them empty, got "),
    ("ruler", "4096", {"answer": []}, "answer must be a list of texts, at least one"),
    ("ruler", "4096", {"answer": ["a", ""]}, "answer must be a list of texts, at least one and none of them empty"),
    ("ruler", "4096", {"task": "niah_singel_1"}, "got 'niah_singel_1'. Did you mean 'niah_single_1'"),
    ("longbench", "qasper", {"answers": "Osric"}, "answers must be a list of texts, at least one, got 'Osric'."),
    ("longbench", "qasper", {"answers": []}, "answers must be a list of texts, at least one, got []."),
    ("longbench", "qasper", {"task": "zzz"}, "task must be one of narrativeqa, "),
    ("longbench", "trec", {"all_classes": "City"}, "all_classes must be a list of texts"),
    ("longbench", "trec", {"all_classes": None}, "all_classes must be a list of texts"),
    ("longbench-e", "qasper_e", {"answers": "Osric"}, "answers must be a list of texts"),
    ("longbench-e", "qasper_e", {"length": "short"}, "length must be a number, got 'short'."),
    ("longbench-v2", "0shot", {"answer": ["B"]}, "answer must be a text that is not empty, got ['B']."),
    ("longbench-v2", "0shot", {"length": 5}, "length must be a text that is not empty, got 5."),
    ("loogle", "shortdep_qa", {"answer": ["Mabel"]}, "answer must be a text that is not empty, got ['Mabel']."),
    ("loogle", "shortdep_qa", {"task": "shortdepqa"}, "Did you mean 'shortdep_qa'"),
    ("infinitebench", "passkey", {"answer": []}, "answer must be a list of texts, none of them empty"),
    ("infinitebench", "passkey", {"task": "pass"}, "Did you mean 'passkey'"),
    ("infinitebench", "math_find", {"answer": ["many"]}, "of numbers where the task has numbers, got ['many']."),
    ("needle_in_haystack", "data", {"needle": ["a"]}, "needle must be a text that is not empty, got ['a']."),
    ("zero_scrolls", "data", {"task": ["qasper"]}, "task must be a text that is not empty, got ['qasper']."),
    ("aime25", "data", {"answer": ["135"]}, "answer must be a text that is not empty, or a number, got ['135']."),
    ("math500", "data", {"answer": ""}, "answer must be a text that is not empty, or a number, got ''."),
]


@pytest.mark.parametrize(("name", "data_dir", "change", "said"), OF_ONE_KIND)
def test_a_column_of_another_kind_is_refused(
    tmp_path: Path, name: str, data_dir: str, change: dict[str, Any], said: str
) -> None:
    """A text where a list is wanted was scored letter by letter, and a list where a text is wanted by its brackets."""
    written(tmp_path / "rows", [bad(change, name, data_dir)])
    (column,) = change
    loaded = load_rows(find_benchmark(name), str(tmp_path / "rows"), None)
    with pytest.raises(DataError) as caught:
        check_rows(find_benchmark(name), loaded, has_limit=False)
    message = str(caught.value)
    assert message.startswith(f"Row 0 of {tmp_path / 'rows'}/test.jsonl: {column} must be ") and said in message
    assert "\n" not in message and "Error" not in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "gone"}, "has no column 'question'"),
        ({"answer": "gone"}, "ruler needs context, question, answer_prefix, max_new_tokens, answer, task"),
        ({"answer": []}, "rows/test.jsonl: answer must be a list of texts"),
        ({"answer": "the a"}, "rows/test.jsonl: answer must be a list of texts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"context": ""}, "the context not empty"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    written(tmp_path / "rows", [bad(change)])
    assert run(tmp_path / "new", "ruler", "--data", str(tmp_path / "rows")) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("rulr",), "Did you mean 'ruler'?"),
        (("ruler",), "ruler is divided: say which part is read with --data_dir, such as 4096"),
        (("aime25", "--data_dir", "x"), "aime25 is not divided; leave --data_dir out"),
        (("ruler", "--data", str(DATA / "ruler")), "with --data_dir: 4096"),
        (("ruler", "--data", str(DATA / "ruler"), "--data_dir", "409"), "there are 4096. Did you mean '4096'?"),
        (("ruler", "--data", "nowhere"), "--data 'nowhere' is not a folder"),
        ((*RULER, "--fraction", "0"), "--fraction must be more than 0"),
        ((*RULER, "--fraction", "0.1"), "--fraction 0.1 of 4 questions is none"),
        ((*RULER, "--needle_depth", "5"), "--needle_depth belongs to needle_in_haystack"),
        ((*RULER, "--press", "finch"), "add --query_aware"),
        ((*RULER, "--press", "knrm"), "knrm"),
        ((*RULER, "--pin_system", " "), "--pin_system is empty"),
        ((*RULER, "--max_new_tokens", "2000"), "need more than the 1,024 tokens"),
        ((*RULER, "--kv_group_size", "32"), "add --kv_bits"),
        (("needle_in_haystack",), "needs --max_context_length and --needle_depth"),
        (
            ("needle_in_haystack", "--max_context_length", "300", "--needle_depth", "101"),
            "must be per cents from 0 to 100",
        ),
        (
            ("needle_in_haystack", "--max_context_length", "300", "--needle_depth", "1", "--fraction", "0.5"),
            "leave --fraction out",
        ),
    ],
)
def test_what_cannot_work_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert run(tmp_path / "new", *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("new/*.json"))


def test_without_a_hub_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "ruler", "--data_dir", "4096") == 2
    error = capsys.readouterr().err
    assert "dataset simonjegou/ruler, data_dir '4096', is neither" in error and "HF_HUB_OFFLINE" in error
    assert "give a local folder of the same layout (--data FOLDER), fill the cache" in error


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldpress.eval.benchmarks import benchmark as texts

    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None if name == "rouge" else object())
    assert run(tmp_path, "loogle", "--data", str(DATA / "loogle"), "--data_dir", "shortdep_qa") == 2
    assert 'Scoring loogle needs rouge: pip install "coldpress[benchmarks]".' in capsys.readouterr().err


def test_what_is_not_measured_alike_has_another_protocol() -> None:
    settings = BenchmarkSettings("ruler", query_aware=True, max_context_length=100, chunk_tokens=64, pin_system="Hi")
    assert benchmark_protocol(settings, "8192") == "benchmark-v1-ruler-8192-query_aware-pinned-cut100-chunk64"


def test_nothing_warns_while_scoring() -> None:
    pytest.importorskip("nltk")
    pytest.importorskip("rouge")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for answer in ("", "word", "{'a': '\\d'}"):
            for task in ("shortdep_qa", "shortdep_cloze"):
                find_benchmark("loogle").score(answer, {"task": task, "answer": '{"a": "b"}'})
