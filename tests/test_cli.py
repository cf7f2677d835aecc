"""The command lines: what they compute and save, and the one clear line for what cannot work."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
)

import coldpress
from coldpress import BasePress, KnormPress, LayerView, PressedCache, SnapKVPress
from coldpress.bases import registry
from coldpress.bases.registry import press_names
from coldpress.cli import main
from coldpress.errors import OutputError, SelfCheckError
from coldpress.eval import run as run_module
from coldpress.eval import speed
from coldpress.eval.ledger import Ledger
from coldpress.eval.speed import SpeedRun
from coldpress.records.reading import groups
from coldpress.records.schema import METRICS, check_record
from coldpress.report.terminal import show

ROOT = Path(__file__).parents[1]
DEMO = Path(coldpress.__file__).parent / "assets" / "demo" / "model"
SHORT = ["--limit_tokens", "400"]
SMALL = [*SHORT, "--context_limit", "40", "--max_new_tokens", "4", "--repetitions", "2"]
QUALITY = ["--ppl_apply_press", "--ppl_only", *SHORT]


def save_tiny(folder: Path, seed: int) -> Path:
    """A tiny random GPT-NeoX with the demo's tokenizer and 128 positions."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, rotary_pct=0.25, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", 0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WikiText and PG-19 in the hub's layout, and texts of all kinds."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    line = "The miller weighed the olives and the children dipped their bread in the oil . "

    def parquet(path: str, **columns: list[str]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(columns).to_parquet(folder / path)

    for subset, word in (("wikitext-2-raw-v1", "green"), ("wikitext-103-v1", "<unk>")):
        rows = ["", f" = {word} = \n", "", *(f" {line}{word} {i} \n" for i in range(60))]
        parquet(f"wikitext/{subset}/test-00000-of-00001.parquet", text=rows)
    names = "\n".join(
        f"- config_name: {s}\n  data_files:\n  - split: test\n    path: {s}/test-*"
        for s in ("wikitext-103-v1", "wikitext-2-raw-v1")
    )
    (folder / "wikitext" / "README.md").write_text(f"---\nconfigs:\n{names}\n---\n")
    parquet(
        "pg19/data/test-00000-of-00001.parquet",
        short_book_title=["First", "Second"],
        text=[line * 60, "Another book begins here . " * 100],
    )
    parquet("columns/test-00000-of-00001.parquet", words=["no text here"])
    (folder / "empty.txt").write_text(" \n")
    (folder / "one.txt").write_text("a")
    (folder / "latin1.txt").write_bytes(b"caf\xe9 olives")
    (folder / "text.txt").write_text(line * 40)
    return folder


@dataclass
class Done:
    code: int
    out: str
    err: str
    records: list[dict[str, Any]]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        (record,) = self.records
        return record


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command line in this process; unless it says otherwise on the tiny model and the demo text."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, folder: str = "results") -> Done:
        given = [str(a) for a in arguments]
        for option, default in (("--model", tiny), ("--dataset", "demo"), ("--output_dir", tmp_path / folder)):
            if option not in given and not (option == "--dataset" and "--text_file" in given):
                given += [option, str(default)]
        capsys.readouterr()
        try:
            code = main(["ppl", *given], prog="python evaluation/perplexity.py")
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        where = Path(given[given.index("--output_dir") + 1])
        records = [json.loads(path.read_text()) for path in sorted(where.glob("*.json"))] if where.is_dir() else []
        return Done(code, out, err, records, where)

    return call


# The user's command lines


@pytest.mark.slow
def test_all_leaves_out_what_takes_one_text_at_a_time_where_there_are_batches(run: Run) -> None:
    batches = ("--batch_size", "2", "--max_length", "40")
    done = run("--press", "all", *batches, *QUALITY)
    assert done.code == 0, done.err
    notes = [line for line in done.err.splitlines() if line.startswith("note: all leaves out")]
    alone = notes[0].rpartition(": ")[2].rstrip(".").split(", ")
    assert len(notes) == 1 and alone == ["attention_matching_kvzip", "kvcompose", "kvgrad", "kvzip", "kvzip_plus"]
    assert {r["press"] for r in done.records} == {"no_press", *press_names(kind="training-free", at_prefill=True)} - {
        *alone
    }
    assert all(record["status"] == "ok" for record in done.records)
    done = run("--press", "all", "kvzip", *batches, *QUALITY, folder="named")
    assert done.code == 2 and done.out == "" and done.records == []
    assert done.err == (
        "error: kvzip takes one text at a time, and --batch_size is 2: leave --batch_size out, or kvzip.\n"
    )
    done = run("--press", "kvzip", "--batch_size", "2", "--ppl_only", "--limit_tokens", "400", folder="plain")
    assert done.code == 0, done.err  # the uncompressed model's perplexity
    done = run("--press", "kvzip", "--batch_size", "2", "--speed_only", *SMALL, folder="timed")
    assert done.code == 2 and "--batch_size is for perplexity, and --speed_only measures none" in done.err


def test_a_press_with_a_tokenizer_is_recorded_without_it(run: Run) -> None:
    done = run("--press", "kvzip_plus", "--speed_only", *SMALL)
    assert done.code == 0, done.err
    assert done.record["press_config"] == {
        "compression_ratio": 0.5,
        "layerwise": False,
        "n_sink": 4,
        "kvzip_plus_normalization": True,
        "chunk_size": 2048,
    }


def test_a_decoding_schedule_is_timed(run: Run) -> None:
    own = ["--press_args", '{"compression_interval": 3}', "--speed_only"]
    done = run("--press", "no_press", "decoding_knorm", *own, *SMALL)
    assert done.code == 0, done.err
    by_press = {record["press"]: record for record in done.records}
    baseline, record = by_press["no_press"], by_press["decoding_knorm"]
    assert "of what goes on while decoding (decoding_knorm) those at the end of generation" in done.out
    assert (record["status"], record["compression_ratio"]) == ("ok", 0.5)
    assert 0.4 < record["effective_compression_ratio"] < 0.6
    n_seen = record["kv_len_before"]
    assert n_seen == record["context_tokens"] + record["generated_tokens"] - 1
    assert all(n_seen // 2 - 3 <= n <= n_seen // 2 + 3 for n in record["kv_len_after"])
    assert baseline["kv_len_before"] == record["context_tokens"]
    assert record["kv_bytes_baseline"] > baseline["kv_bytes_baseline"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("arguments", "presses"),
    [
        ("--dataset {data}/wikitext --subset wikitext-103-v1 --press no_press --attn_implementation eager", 1),
        (
            "--dataset {data}/wikitext --subset wikitext-103-v1 --press snapkv --compression_ratio 0.5 "
            "--attn_implementation eager",
            1,
        ),
        pytest.param(
            "--dataset {data}/wikitext --press all --speed_only",
            1 + len(press_names(kind="training-free", at_prefill=True)),
            marks=pytest.mark.slow,
        ),
        ("--dataset {data}/wikitext --press snapkv --compression_ratio 0.5 --speed_only", 1),
        ("--dataset {data}/wikitext --press snapkv --compression_ratio 0.5 --ppl_apply_press", 1),
        (
            "--dataset {data}/wikitext --press all --ppl_apply_press",
            1 + len(press_names(kind="training-free", at_prefill=True)),
        ),
        (
            "--dataset {data}/wikitext --press snapkv --compression_ratio 0.5 --speed_only --speed_decode_only "
            "--min_new_tokens 3",
            1,
        ),
        ("--dataset {data}/pg19 --sample_idx 0 --press no_press", 1),
        ("--dataset {data}/pg19 --sample_idx 1 --press knorm --compression_ratio 0.5", 1),
    ],
)
def test_the_users_command_lines(run: Run, data: Path, arguments: str, presses: int) -> None:
    done = run(*arguments.format(data=data).split(), *SMALL)
    assert done.code == 0, done.err
    assert len(done.records) == presses
    for record in done.records:
        assert record["status"] == "ok" and record["error"] is None
        has_none = record["press"] in press_names(has_ratio=False)  # and by default removes nothing
        asked = None if has_none else 0 if record["press"] == "no_press" else 0.5
        assert record["compression_ratio"] == asked
        assert record["effective_compression_ratio"] == (asked or 0)
        assert (record["ppl"] is None) == ("--speed_only" in arguments)
        assert (record["ttft_s"] is None) == ("--speed_decode_only" in arguments)
        assert (record["delta_nll"] is None) == ("--ppl_apply_press" not in arguments or record["press"] == "no_press")
        assert record["tpot_ms"] > 0
        assert f"| {record['press']} " in done.out


def test_presses_in_few_bits(run: Run) -> None:
    kept = ("--kv_group_size", "16", "--kv_residual_tokens", "16", *QUALITY)
    done = run("--press", "no_press", "knorm", "--kv_bits", "8", "2", *kept)
    assert done.code == 0, done.err
    assert run("--press", "no_press", "knorm", *QUALITY).code == 0
    done = run("--press", "knorm", "--kv_bits", "4", *QUALITY)  # another setting of the same name
    found = {(r["press"], r["kv_bits"]): r for r in done.records}
    assert set(found) == {(press, bits) for press in ("no_press", "knorm") for bits in (None, 8, 2)} | {("knorm", 4)}
    for (press, bits), record in found.items():
        assert record["status"] == "ok" and "kv_bits" not in record["settings"]
        assert record["baseline_loss"] == found["no_press", None]["loss"]
        if bits in (8, 2):
            assert record["kv_bits_config"] == {"bits": bits, "group_size": 16, "residual_tokens": 16}
            assert record["kv_bytes"] < found[press, None]["kv_bytes"]
    assert found["knorm", 4]["kv_bytes"] == found["knorm", None]["kv_bytes"]  # 48 pairs are among the newest 128
    assert run("--kv_bits", "3").code == 2


@pytest.mark.slow
def test_budgets_stand_in_the_place_of_a_ratio(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    token = 2 * 2 * 32 * 4  # bytes: 2 layers, keys and values, 32 channels, float32
    done = run("--press", "no_press", "knorm", "--budget_tokens", "30", "20", *QUALITY)
    assert done.code == 0, done.err
    assert run("--press", "no_press", "knorm", "--budget_bytes", 24 * token + 5, *QUALITY).code == 0
    assert run("--press", "knorm", "--compression_ratio", "0.75", *QUALITY).code == 0
    done = run("--press", "all", "--budget_tokens", "96", *QUALITY)
    assert done.code == 0, done.err
    assert "Nothing to remove, as their parameters or budgets say: adakv_expected_attention_e2, " in done.out
    found = {
        (r["press"], r["compression_ratio"], r["budget_tokens"], r["budget_bytes"]): r["kv_len_after"]
        for r in done.records
        if r["press"] in ("no_press", "knorm", "simlayerkv")
    }
    assert found == {
        ("no_press", 0, None, None): [96, 96],
        ("simlayerkv", None, None, None): [96, 96],
        ("knorm", None, 20, None): [20, 20],
        ("knorm", None, 30, None): [30, 30],
        ("knorm", None, 96, None): [96, 96],
        ("knorm", None, None, 24 * token + 5): [24, 24],
        ("knorm", 0.75, None, None): [24, 24],
    }
    assert main(["report", str(done.folder), "--table"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if "|" in line]
    assert rows[0][:2] == ["press", "ratio or budget"]
    sizes = [row[1] for row in rows if row[0] == "knorm"]
    assert sorted(sizes) == ["0.75", "12.00 KiB", "20 tokens", "30 tokens", "96 tokens"]


@pytest.mark.slow
def test_prompts_in_pieces(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ("--chunk_tokens", "20")
    done = run("--press", "no_press", "knorm", "--budget_tokens", "24", *pieces, *QUALITY)
    assert done.code == 0, done.err
    assert run("--press", "knorm", "--budget_tokens", "24", *QUALITY).code == 0
    done = run("--press", "all", *pieces, *QUALITY)
    assert done.code == 0, done.err
    names = {r["press"] for r in done.records}
    assert "keydiff" in names and not {"compactor", "chunkkv", "simlayerkv"} & names
    found = {(r["protocol"][-8:], r["kv_len_after"][0]): r for r in done.records if r["budget_tokens"] == 24}
    assert set(found) == {("-chunk20", 24), ("T32-S128", 24)}
    in_pieces, whole = (found[key] for key in sorted(found, key=lambda key: key[0]))
    assert in_pieces["settings"]["chunk_tokens"] == 20 and whole["settings"]["chunk_tokens"] is None
    assert in_pieces["ppl"] != whole["ppl"] and in_pieces["baseline_ppl"] == pytest.approx(whole["baseline_ppl"])
    assert main(["report", str(done.folder), "--table"]) == 0
    assert capsys.readouterr().out.count("press ") >= 2  # a table for each way of reading prompts


def test_prompts_in_pieces_are_timed(run: Run) -> None:
    done = run(
        *("--press", "no_press", "knorm", "--speed_only", "--chunk_tokens", "20", "--context_limit", "64"),
        *("--max_new_tokens", "4", "--repetitions", "1"),
    )
    assert done.code == 0, done.err
    knorm = next(r for r in done.records if r["press"] == "knorm")
    assert knorm["protocol"] == "speed-chunk20" and knorm["status"] == "ok"
    assert knorm["kv_len_before"] == 64 and knorm["kv_len_after"] == [32, 32] and knorm["ttft_s"] > 0


def test_the_embedded_default_needs_nothing(run: Run) -> None:
    done = run("--model", "demo", "--dataset", "demo", "--press", "knorm", *SMALL, "--max_length", "256")
    assert done.code == 0, done.err
    assert done.record["ppl"] < 100  # it is trained
    assert done.record["dataset"] == done.record["model"] == "demo"


def test_a_record_says_everything(run: Run) -> None:
    done = run("--press", "snapkv", "--press_args", '{"window_size": 8}', "--ppl_apply_press", *SMALL, "--seed", "7")
    record = done.record
    sizes = {"total_tokens": 400, "scored_tokens": 3 * 31, "windows": 3, "context_tokens": 96, "target_tokens": 32}
    asked = {
        "press": "snapkv",
        "compression_ratio": 0.5,
        "seed": 7,
        "dataset": "demo",
        "protocol": "prefix-C96-T32-S128",
    }
    kept = {"effective_compression_ratio": 0.5, "kv_len_before": 96, "kv_len_after": [48, 48]}
    kept |= {"kv_bytes_baseline": 2 * 2 * 96 * 32 * 4, "kv_bytes": 2 * 2 * 48 * 32 * 4}
    for key, value in (sizes | asked | kept).items():
        assert record[key] == value, key
    assert record["press_config"] == {"compression_ratio": 0.5, "window_size": 8, "kernel_size": 5}
    assert record["ppl"] == pytest.approx(math.exp(record["loss"]))
    for key in ("generation_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "tpot_ms", "peak_mem_bytes"):
        assert record[key] > 0, key
    assert record["speed_tokens_per_s"] == record["decode_tokens_per_s"] > 0
    assert record["peak_mem_kind"] in ("vmhwm", "rss_polled", "maxrss_process", "cuda_allocated")
    assert record["peak_mem_baseline_bytes"] > 0
    assert (record["speed_context_tokens"], record["generated_tokens"], len(record["samples"])) == (40, 4, 2)
    assert len(record["text_sha256"]) == len(record["tokens_sha256"]) == 64
    assert record["command"].startswith('python evaluation/perplexity.py --press snapkv --press_args \'{"window_size"')
    assert record["model_type"] == "gpt_neox" and record["dtype"] == "float32"
    assert {"python", "torch", "transformers", "coldpress", "cpu", "threads"} <= record["env"].keys()
    assert set(METRICS) <= record.keys()
    unmeasured = {key for key in METRICS if record[key] is None}
    of_a_stream = {"nll_by_position", "per_document", "kv_bytes_max", "greedy_agreement"}
    assert unmeasured - of_a_stream <= {"peak_reserved_bytes", "peak_mem_delta_bytes", "timed_round"}
    for text in (
        "400 tokens",
        "93 scored tokens",
        "40 tokens of context and 4 generated",
        "snapkv",
        "48.00 KiB",
        "24.00 KiB",
    ):
        assert text in done.out


def test_a_preset_is_in_the_record(run: Run, data: Path) -> None:
    done = run("--dataset", data / "wikitext", "--ppl_preset", "lm-eval", "--max_length", "100")
    record = done.record
    assert (done.code, record["protocol"], record["ppl_preset"]) == (0, "lm-eval-L100-v1", "lm-eval")
    assert record["join"] == "articles, detokenised" and record["doc_ids"] == ["0 green"]
    assert record["scored_tokens"] == record["total_tokens"] and record["add_bos"] is False
    assert record["byte_perplexity"] == pytest.approx(2 ** record["bits_per_byte"])
    done = run("--dataset", data / "wikitext", "--ppl_preset", "llamacpp", "--max_length", "64", folder="other")
    assert done.record["protocol"] == "llamacpp-n64-v1" and done.record["ppl_se"] > 0
    assert done.record["bits_per_byte"] > 0 and len(done.record["ppl_ci95"]) == 2


def test_lists_take_commas(run: Run) -> None:
    options = ("--limit_tokens", "200", "--ppl_mode", "prefix", "--ppl_only")
    done = run("--press", "knorm,snapkv", "--compression_ratio", "0.25,0.5,", "0.75", *options)
    assert [(r["press"], r["compression_ratio"]) for r in done.records] == [
        (press, ratio) for press in ("knorm", "snapkv") for ratio in (0.25, 0.5, 0.75)
    ]
    done = run("--press", "knorm", "--budget_tokens", "8, 16", "--kv_bits", "8,4", *options, folder="other")
    assert sorted((r["budget_tokens"], r["kv_bits"]) for r in done.records) == [(8, 4), (8, 8), (16, 4), (16, 8)]


def test_without_ppl_apply_press_it_is_a_direct_computation(run: Run, data: Path, tiny: Path) -> None:
    done = run(
        "--dataset", data / "wikitext", "--press", "knorm", "--ppl_only", "--stride", "32", "--limit_tokens", "500"
    )
    assert "note: this perplexity is the uncompressed model's" in done.err
    line = " The miller weighed the olives and the children dipped their bread in the oil . green"
    text = "\n\n".join(["", " = green = \n", "", *(f"{line} {i} \n" for i in range(60))])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa").eval()
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:500]])
    losses: list[Tensor] = []
    previous_end = 0
    for begin in range(0, ids.shape[1], 32):
        end = min(begin + 128, ids.shape[1])
        n = end - max(previous_end, 1)
        with torch.no_grad():
            logits = model(ids[:, begin:end]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, begin + 1 : end], reduction="none")[-n:])
        previous_end = end
        if end == ids.shape[1]:
            break
    expected = torch.cat(losses).double()
    assert done.record["scored_tokens"] == len(expected) == 499
    assert done.record["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert done.record["ppl"] == pytest.approx(float(expected.mean().exp()), rel=1e-4)


def test_results_that_are_there_already_are_said_to_be_replaced(run: Run) -> None:
    given = ("--ppl_only", *SHORT, "--press", "no_press", "knorm", "--ppl_apply_press")
    assert "already" not in run(*given).err
    again = run(*given)
    said = "measured anew and replaced; coldpress sweep leaves finished ones.\n"
    assert "note: 2 results are in " in again.err and again.err.count(said) == 1


def test_attention_implementations_agree(run: Run) -> None:
    ppl = [
        run("--ppl_only", *SHORT, "--attn_implementation", name, folder=name).record["ppl"]
        for name in ("sdpa", "eager")
    ]
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-4)


def test_dashes_and_underscores_are_the_same(run: Run) -> None:
    spellings = (
        ("--ppl_apply_press", "--ppl_only", "--compression_ratio=0.25", "--limit_tokens", "300"),
        ("--ppl-apply-press", "--ppl-only", "--compression-ratio=0.25", "--limit-tokens", "300"),
    )
    records = []
    for spelling in spellings:
        done = run(*spelling, "--press", "knorm", folder="same")
        assert done.code == 0, done.err
        records.append(done.record)  # one file: the second run replaces the first one's
    assert records[0]["ppl"] == records[1]["ppl"]
    assert records[1]["settings"]["limit_tokens"] == 300


def test_runs_repeat_bit_for_bit(run: Run) -> None:
    first, second = (run("--press", "random", "snapkv", *QUALITY, folder=name).records for name in ("a", "b"))
    for a, b in zip(first, second, strict=True):
        assert a["per_window"] == b["per_window"] and a["kept_hash"] == b["kept_hash"]
    other = run("--press", "random", *QUALITY, "--seed", "1", folder="c").record
    assert other["kept_hash"] not in [record["kept_hash"] for record in first]


@pytest.mark.slow
def test_names_of_files_do_not_collide(run: Run, tiny: Path, data: Path, tmp_path: Path) -> None:
    twin = save_tiny(tmp_path / "elsewhere" / "tiny", 1)  # another model in a folder of the same name
    (tmp_path / "text.txt").write_text("Another text. " * 300)
    shutil.copytree(twin, tmp_path / "tiny")
    lines: list[list[object]] = [
        ["--press", "knorm", "snapkv", "--compression_ratio", "0.25", "0.5", "0.505"],
        ["--press", "knorm", "--model", twin],
        ["--press", "knorm", "--text_file", data / "text.txt"],
        ["--press", "knorm", "--text_file", tmp_path / "text.txt"],
        ["--press", "knorm", "--dataset", data / "wikitext"],
        ["--press", "knorm", "--dataset", data / "wikitext", "--subset", "wikitext-103-v1"],
        ["--press", "knorm", "--dataset", data / "pg19", "--sample_idx", 0],
        ["--press", "knorm", "--dataset", data / "pg19", "--sample_idx", 1],
        ["--press", "snapkv", "--press_args", '{"window_size": 8}'],
        ["--press", "knorm", "--context_tokens", 64],
        ["--press", "knorm", "--dtype", "bfloat16"],
        ["--press", "knorm", "--attn_implementation", "eager"],
    ]
    for line in lines:
        assert run(*line, *QUALITY).code == 0
    for line in (["--ppl_only"], ["--ppl_only", "--stride", 32]):
        assert run("--press", "knorm", "--limit_tokens", 400, *line).code == 0
    files = os.listdir(tmp_path / "results")
    assert len(files) == 6 + 11 + 2
    for model in ("tiny", tmp_path / "elsewhere" / "tiny"):  # the same relative name, seen from another folder
        os.chdir(tmp_path if model == "tiny" else tmp_path / "elsewhere")
        assert run("--press", "knorm", "--model", "tiny", *QUALITY).code == 0
        if model == "tiny":
            shutil.rmtree(tmp_path / "tiny")
            save_tiny(tmp_path / "elsewhere" / "tiny", 2)
    assert len(os.listdir(tmp_path / "results")) == len(files) + 2


def test_windows_with_and_without_a_bos_token_are_two_results(run: Run) -> None:
    for how in (["--add_bos"], ["--add_bos", "no"], [], ["--add_bos", "auto"], ["--add_bos", "yes"]):
        done = run("--press", "knorm", *QUALITY, *how)
        assert done.code == 0, done.err
    with_bos, without = sorted(done.records, key=lambda record: not record["add_bos"])
    assert with_bos["protocol"] == f"{without['protocol']}-bos" and with_bos["loss"] != without["loss"]
    assert with_bos["scored_tokens"] == without["scored_tokens"]
    assert with_bos["scored_bytes"] == without["scored_bytes"]
    assert "add_bos" not in with_bos["settings"]
    done = run("--add_bos", "perhaps", *QUALITY)
    assert done.code == 2 and "must be auto, yes or no, got 'perhaps'" in done.err


def test_progress_and_notes_are_lines_where_there_is_no_terminal(run: Run) -> None:
    done = run("--press", "knorm", "--ppl_apply_press", *SMALL, "--context_limit", "4096")
    assert "\r" not in done.err
    lines = done.err.splitlines()
    assert lines[0].startswith("note: a timed context with --max_new_tokens of 404 is past the 128 positions")
    assert lines[1].startswith("perplexity: 3/3") and lines[-1].startswith("speed: 8/8")


def test_a_window_past_the_positions_is_cut_unless_extrapolation_is_allowed(run: Run) -> None:
    arguments = ("--max_length", "256", "--ppl_only", "--limit_tokens", "600")
    done = run(*arguments)
    assert done.err.splitlines()[0].startswith("note: --max_length 256 is past the 128 positions")
    assert done.record["max_length"] == 128 and done.record["protocol"] == "strided-L128-S128"
    done = run(*arguments, "--allow_extrapolation", folder="whole")
    assert "they are used because of --allow_extrapolation" in done.err
    assert done.record["max_length"] == 256 and done.record["protocol"] == "strided-L256-S256"


# Failures


@dataclass(frozen=True)
class Breaks(KnormPress):
    def score(self, view: LayerView) -> Tensor:
        raise RuntimeError("out of\norder")


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered press that fails."""
    monkeypatch.setitem(registry._BY_NAME, "breaks", registry._Entry(Breaks))


@pytest.mark.usefixtures("breaks")
@pytest.mark.parametrize(
    "how", [QUALITY, pytest.param(["--speed_only", *SMALL], marks=pytest.mark.slow)], ids=["windows", "speed"]
)
def test_a_press_that_fails_is_recorded_as_failed_and_the_others_go_on(run: Run, how: list[str]) -> None:
    done = run("--press", "all", *how)
    assert done.code == 1
    assert "error: breaks at 0.5 failed: RuntimeError: out of order" in done.err
    by_press = {record["press"]: record for record in done.records}
    assert set(by_press) == {"no_press", "breaks", *press_names(kind="training-free", at_prefill=True)} and len(
        done.records
    ) == len(by_press)
    failed = by_press.pop("breaks")
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: out of order")
    assert "test_cli.py" in failed["traceback"]
    planned = {"context_tokens", "target_tokens"}
    assert all(failed[key] is None for key in METRICS if key not in planned)
    assert all(record["status"] == "ok" for record in by_press.values())
    assert [path.name for path in done.folder.glob("*.failed.json")]


def test_a_press_that_keeps_everything_is_not_a_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnormPress, "compress", lambda self, view: None)
    for how in (QUALITY, ["--speed_only", *SMALL]):
        done = run("--press", "knorm", *how, folder=how[0])
        assert done.code == 1
        assert done.record["status"] == "failed" and done.record["ppl"] is None
        assert "SelfCheckError" in done.record["error"]


def test_a_model_that_is_not_finite_fails_every_press(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    shutil.copytree(tiny, tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    for how in (QUALITY, ["--ppl_only", "--limit_tokens", "400"]):
        done = run("--model", tmp_path / "nan", "--press", "knorm", "snapkv", *how, folder=how[0])
        assert done.code == 1
        assert [record["status"] for record in done.records] == ["failed", "failed"]
        assert all("not finite" in record["error"] and record["ppl"] is None for record in done.records)


@dataclass(frozen=True)
class BreaksLater(KnormPress):
    """Fails at the second window of a model with two layers."""

    calls: ClassVar[list[int]] = []

    def score(self, view: LayerView) -> Tensor:
        self.calls.append(1)
        if len(self.calls) > 2:
            raise RuntimeError("out of order")
        return super().score(view)


def test_what_was_measured_before_a_failure_is_in_the_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._BY_NAME, "breaks", registry._Entry(BreaksLater))
    BreaksLater.calls.clear()
    done = run("--press", "breaks", "snapkv", *QUALITY)
    failed, fine = sorted(done.records, key=lambda record: record["press"])
    assert done.code == 1 and failed["status"] == "failed" and failed["ppl"] is None
    assert failed["before_failure"]["windows"] == 1 and failed["before_failure"]["ppl"] > 0
    assert fine["status"] == "ok" and fine["windows"] == 3 and "before_failure" not in fine


def test_what_fails_its_self_check_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(press: BasePress, *losses: Tensor) -> None:
        if isinstance(press, KnormPress):
            raise SelfCheckError("removes nothing and yet changes a loss")

    timed = []
    prefilling = speed.prefilling

    def noted(model: Any, cache: PressedCache) -> Any:
        timed.append(cache.press)
        return prefilling(model, cache)

    monkeypatch.setattr("coldpress.eval.prefix.check_unchanged", check)
    monkeypatch.setattr(speed, "prefilling", noted)
    done = run("--press", "knorm", "snapkv", "--ppl_apply_press", *SMALL)
    assert done.code == 1
    assert {r["press"]: r["status"] for r in done.records} == {"knorm": "failed", "snapkv": "ok"}
    assert {type(press) for press in timed} == {type(None), SnapKVPress}
    timed.clear()
    done = run("--press", "knorm", "--ppl_apply_press", *SMALL, folder="alone")
    assert done.code == 1 and not timed and done.record["status"] == "failed"


def test_what_fails_while_timed_keeps_its_perplexity_and_its_rounds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(speed, "MemoryMeter", broken)
    done = run("--press", "knorm", "--ppl_apply_press", *SMALL)
    kept = done.record["before_failure"]
    assert done.code == 1 and done.record["error"] == "RuntimeError: no room" and done.record["ppl"] is None
    assert kept["windows"] == 3 and kept["ppl"] > 0 and kept["tpot_ms"] > 0
    assert len(kept["samples"]) == done.record["settings"]["repetitions"]


def test_what_stops_a_run_leaves_what_was_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SpeedRun, *args: object, **options: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(SpeedRun, "run", full)
    done = run("--press", "knorm", "snapkv", "--ppl_apply_press", *SMALL)
    assert done.code == 2 and done.err.splitlines()[-1] == "error: the disk is full"
    assert [record["status"] for record in done.records] == ["failed", "failed"]
    assert all(record["before_failure"]["windows"] == 3 for record in done.records)
    done = run("--press", "knorm", "--speed_only", *SMALL, folder="nothing")
    assert done.code == 2 and done.records == []


@pytest.mark.parametrize("options", [("--ppl_only", *SHORT), SMALL], ids=["ppl", "with speed"])
def test_a_full_disk_costs_no_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: Sequence[str]
) -> None:
    """What was measured is printed, though no result can be written."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = run("--press", "knorm", "snapkv", "--ppl_apply_press", *options)
    assert done.code == 2 and done.records == []
    last = done.err.splitlines()[-1]
    assert last.startswith("error: cannot write ") and "No space left on device" in last and "Traceback" not in done.err
    for press in ("knorm", "snapkv"):
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"| {press} ")]
        assert len(re.findall(r"\d+\.\d+", line)) >= 2 and "failed" not in line


# Bad input: one line, exit code 2, nothing written


@pytest.fixture(scope="session")
def odd_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that coldpress cannot run."""
    folder = tmp_path_factory.mktemp("odd")
    T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16).save_pretrained(folder / "t5")
    bloom = BloomConfig(vocab_size=4096, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(folder / "bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / "bloom")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "gpt_neox", "hidden')
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "no_such_model"}')
    (folder / "file.bin").write_text("")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--press snapvk", r"Unknown press 'snapvk'. Did you mean 'snapkv'"),
        ("--press SnapKVPress", r"Unknown press 'SnapKVPress'. SnapKVPress is called 'snapkv' here. 'coldpress pres"),
        ("--press AdaKV", r"AdaKVPress is called 'adakv_expected_attention_e2' or 'adakv_snapkv' here"),
        ("--press DMSPress", r"DMSPress has no name and is made in Python"),
        ("--press snapkv,knor", r"Unknown press 'knor'. Did you mean"),
        ("--press xyz", r"Unknown press 'xyz'. 'coldpress presses' lists the names\.$"),
        *(
            (f"--press {p} --compression_ratio {r}", r"number in \[0, 1\)")
            for p in ("knorm", "no_press")
            for r in (1, -0.1)
        ),
        ("--press knorm --compression_ratio nan", r"number in \[0, 1\)"),
        ("--press knorm --compression_ratio 0.5 1.5", r"number in \[0, 1\)"),
        ("--press knorm --compression_ratio half", "invalid float value: 'half'"),
        ("--text_file {data}/empty.txt", "holds no text"),
        ("--text_file {data}/one.txt", "fewer than 2 tokens"),
        ("--limit_tokens 1", "fewer than 2 tokens"),
        ("--text_file {data}/missing.txt", "No such file"),
        ("--text_file {data}", "Is a directory"),
        ("--text_file {data}/text.txt --dataset demo", "--dataset and --text_file both say which text is read; give"),
        ("--text_file {data}/latin1.txt", "not UTF-8"),
        ("--dataset {data}/missing", "no file or folder"),
        ("--dataset wikitxt", "unknown dataset 'wikitxt'.*Did you mean 'wikitext'"),
        ("--dataset {data}/columns", "no column 'text'"),
        ("--dataset {data}/pg19 --sample_idx 2", "sample_idx 2 is out of range.*0 to 1"),
        ("--sample_idx 1", "out of range"),
        ("--sample_idx -1", "at least 0"),
        ("--dataset {data}/wikitext --subset wikitext-3", "unknown subset 'wikitext-3'.*wikitext-103-v1"),
        (
            "--dataset {data}/wikitext --split valid",
            r"unknown split 'valid' of .*: allowed are \['test'\]. Name one: --s",
        ),
        ("--split nonsense", r"unknown split 'nonsense' of 'demo', which is a single text: .* leave --split out"),
        ("--split tests", "Did you mean 'test'"),
        ("--context_tokens 16", "--context_tokens is for perplexity under presses; add --ppl_apply_press"),
        ("--speed_only --stride 16", "--stride is for perplexity, and --speed_only measures none"),
        ("--kv_group_size 32", "add --kv_bits, or leave it out"),
        ("--ppl_only --ppl_preset gptq --add_bos", "--ppl_preset gptq says how texts begin; leave --add_bos out"),
        ("--model {odd}/t5", "encoder-decoder"),
        ("--model {odd}/bloom", "attention interface"),
        ("--model {odd}/empty", "no config.json"),
        ("--model {odd}/broken", "cannot be loaded"),
        ("--model {odd}/unknown", "cannot be loaded"),
        ("--model {odd}/file.bin", "is a file"),
        ("--model ./nothing", "no such folder"),
        ("--model a/b/c", "no such folder"),
        ("--model {odd}/bloom --revision main", "--revision main does not apply"),
        ("--model demo --revision main", "--revision main does not apply"),
        ("--device cuda:99", "--device cuda:99: this machine has"),
        ("--device tpu", "--device"),
        ("--attn_implementation flash", "invalid choice: 'flash'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--press snapkv --press_args window_size=3", "must be a JSON object"),
        ("--press snapkv --press_args [3]", "must be a JSON object"),
        ('--press snapkv --press_args {{"window_size":NaN}}', "must be a JSON object"),
        ('--press snapkv --press_args {{"windowsize":3}}', "no parameter 'windowsize'. Did you mean 'window_size'"),
        ('--press snapkv --press_args {{"window_size":0}}', "window_size must be an integer >= 1"),
        ('--press snapkv --press_args {{"window_size":"8"}}', "window_size must be"),
        ('--press expected_attention --press_args {{"epsilon":"a"}}', "epsilon must be int or float, got 'a'"),
        ('--press random --press_args {{"seed":"a"}}', "seed must be int, got 'a'"),
        ('--press adakv_snapkv --press_args {{"window_size":"a"}}', "window_size must be int, got 'a'"),
        ('--press adakv_snapkv --press_args {{"windowsize":8}}', "Did you mean 'window_size'"),
        ('--press compactor --press_args {{"blending":"a"}}', "blending must be int or float, got 'a'"),
        ('--press snapkv --press_args {{"compression_ratio":0.3}}', "use --compression_ratio"),
        ('--press snapkv knorm --press_args {{"window_size":3}}', "name a single one"),
        ('--press snapkv --press_args {{"budget_tokens":3}}', "use --budget_tokens"),
        ("--press knorm --budget_tokens 8 --compression_ratio 0.5", "--compression_ratio and --budget_tokens both say"),
        ("--press knorm --budget_tokens 8 --budget_bytes 9", "--budget_tokens and --budget_bytes both say"),
        ("--press knorm simlayerkv --budget_tokens 8", "simlayerkv has no budget in tokens or bytes"),
        ("--press knorm --budget_tokens 0", "at least 1, got '0'"),
        ("--press knorm --chunk_tokens 0", "at least 1, got '0'"),
        ("--press compactor --chunk_tokens 16", "again and again.*CompactorPress"),
        ("--press simlayerkv --chunk_tokens 16", "again and again.*SimLayerKVPress"),
        ("--press knorm --chunk_tokens 16 --ppl_only", "add --ppl_apply_press"),
        ("--press knorm --budget_bytes 1.5", "must be an integer"),
        ("--press knorm --budget_tokens 8,0", "at least 1, got '0'"),
        ("--press knorm --compression_ratio 0.5,half", "--compression_ratio: invalid float value: 'half'"),
        ("--press knorm --compression_ratio ,", "--compression_ratio: invalid float value: ','"),
        ("--press knorm --kv_bits 4,3", "must be 8, 4, 2, keys and values apart as in k8v4, or mixed; got '3'"),
        ("--press knorm --ppl_preset gptq", "--ppl_preset gptq is the uncompressed model's perplexity"),
        ("--ppl_preset hf", "invalid choice: 'hf'"),
        ("--max_new_tokens many", "must be an integer of at least 1, got 'many'"),
        ("--max_new_tokens 1", "at least 2 to time decoding"),
        ("--max_new_tokens 200", "leaves no room for a context in 128 positions"),
        ("--stride 0", "at least 1, got '0'"),
        ("--stride 400 --ppl_only", "--stride in 1..max_length"),
        ("--limit_tokens 2.5", "must be an integer"),
        ("--seed -1", "at least 0"),
        (f"--seed {10**30}", f"--seed: must be an integer of at most {2**63 - 1}, got '{10**30}'"),
        (f"--context_tokens {10**20 - 1} --ppl_apply_press", f"at most {2**63 - 1}, got '9{'9' * 19}'"),
        (f"--stride {'9' * 5000}", f"at most {2**63 - 1}, got '9{'9' * 29}... of 5000 characters'"),
        (f"--context_tokens {2**63 - 1} --ppl_apply_press --allow_extrapolation", "The text has [0-9]+ tokens, a wind"),
        ("--repetitions 1000001", "at most 1000000"),
        ("--warmup 1000001", "at most 1000000"),
        ("--warmup -1", "at least 0"),
        ("--speed_only --ppl_apply_press", "--speed_only measures no perplexity"),
        (
            "--compresion_ratio 0.5",
            "unrecognized arguments: --compresion_ratio 0.5. Did you mean '--compression_ratio'",
        ),
        ("--press", "expected at least one argument"),
        ("--output_dir {data}/text.txt", "is a file"),
        ("--output_dir {data}/text.txt/below", "cannot write into folder"),
        ("--output_dir /proc/nothing", "cannot write into folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, data: Path, odd_models: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    before = sorted(data.rglob("*"))
    done = run(*arguments.format(data=data, odd=odd_models).split(" "))
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ") and done.err.endswith("\n")
    assert re.search(message, done.err), done.err
    assert os.listdir(tmp_path) == [] and sorted(data.rglob("*")) == before


def test_a_model_whose_attention_is_not_installed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    done = run("--attn_implementation", "flash_attention_2")
    assert (done.code, os.listdir(tmp_path)) == (2, [])
    assert "pip install flash-attn" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "repository", "folder"),
    [
        (["--model", "EleutherAI/no-such-model-at-all"], "EleutherAI/no-such-model-at-all", "--model PATH"),
        (["--dataset", "wikitext"], "Salesforce/wikitext", "--dataset PATH"),
        (["--dataset", "pg19", "--sample_idx", "0"], "emozilla/pg19-test", "--dataset PATH"),
    ],
)
def test_a_hub_that_cannot_be_reached(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], repository: str, folder: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    done = run(*arguments)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    for text in ("127.0.0.1:9", repository, folder, "hf download", "--model demo --dataset demo"):
        assert text in done.err
    assert not (tmp_path / "results").exists()


# Other commands


def test_report_prints_what_a_folder_holds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("--press", "knorm", *QUALITY)
    run("--press", "knorm", "--ppl_only", "--limit_tokens", "300")
    assert main(["report", str(done.folder), "--table"]) == 0
    out = capsys.readouterr().out
    assert out.count("| knorm") == 1 and out.count("protocol ") == 2  # the second measured no press
    assert "The uncompressed model has loss" in out and "no press touches this" in out
    assert main(["report", str(done.folder / "nothing")]) == 2
    assert "no folder" in capsys.readouterr().err


ODD: tuple[Any, ...] = (None, "abc", 5, -1.5, True, [], [[]], {}, {"a": [1]}, 10**400, "9" * 400)


def test_report_leaves_out_what_is_no_result(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("--press", "knorm", "--ppl_apply_press", *SMALL)
    (path,) = done.folder.glob("*.json")
    bad = {
        "a.json": json.dumps({**done.record, "loss": "abc"}),
        "b.json": json.dumps({**done.record, "press": None}),
        "c.json": json.dumps({**done.record, "status": 5}),
        "d.json": json.dumps([done.record]),
        "e.json": "[" * 100_000,
        "f.json": json.dumps({**done.record, "kv_bytes": 10**400}),
        "g.json": '{"schema_version": 1, "loss": ' + "9" * 5000 + "}",
        "h.json": "",
        "i.json": '{"schema_version": 1}',
    }
    for name, text in bad.items():
        (done.folder / name).write_text(text)
    (done.folder / "j.json").mkdir()
    assert main(["report", str(done.folder), "--table"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out.count("| knorm") == 2 and len(lines) == len(bad) + 1
    for line, name in zip(lines, [*bad, "j.json"], strict=True):
        assert line.startswith(f"note: skipped {done.folder / name}: ") and len(line) < 400
    assert "loss must be a number, got 'abc'" in lines[0]
    assert main(["report", str(done.folder), "--table", "--output", "elsewhere"]) == 2
    assert "--table writes no report to --output elsewhere; give one of them" in capsys.readouterr().err
    path.unlink()
    assert main(["report", str(done.folder), "--table"]) == 2
    assert "holds no result that can be read; run coldpress ppl first" in capsys.readouterr().err.splitlines()[-1]
    for name in ("", " "):
        assert main(["report", name]) == 2
        assert capsys.readouterr().err == (
            "error: The folder's name is empty; give the folder that a run wrote its results to.\n"
        )


@pytest.mark.parametrize("how", [("--ppl_apply_press", *SMALL), ("--ppl_mode", "streaming", "--budget_tokens", "32")])
def test_report_survives_any_value_of_any_field(run: Run, how: tuple[str, ...]) -> None:
    """Whatever the check lets pass can be shown."""
    done = run("--press", "knorm", *how, "--limit_tokens", "400")
    n_shown = 0
    record = done.records[0]
    for where in (record, record["env"], record["settings"]):
        for field in [*where]:
            for value in (*ODD, ODD):  # ODD itself: without the field
                before = where.pop(field)
                where |= {} if value is ODD else {field: value}
                try:
                    check_record(record)
                except ValueError:
                    continue
                else:
                    for group in groups([record]):
                        n_shown += len(show(group))
                finally:
                    where[field] = before
    assert n_shown


def test_presses_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_terminal(*_: int) -> os.terminal_size:
        raise OSError

    monkeypatch.setattr("os.get_terminal_size", no_terminal)
    for columns, width in (("80", 80), ("300", 100), ("", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["presses"]) == 0
        lines = capsys.readouterr().out.splitlines()
        first = [line.split()[0] for line in lines if line.strip()]
        assert all(name in first for name in [*press_names(), "DecodingPress", "ComposedPress"])
        assert width - 10 < max(len(line) for line in lines) <= width


def test_one_press_is_described_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["presses", "adakv_snapkv"]) == 0
    out = capsys.readouterr().out
    for text in (
        "adakv_snapkv: AdaKVPress(SnapKVPress)\n",
        "https://arxiv.org/abs/2407.11550",
        "  alpha_safeguard=0.2\n      share of the mean budget",
        "  window_size=64\n      last tokens that score",
        "from the paper: any scorer",
        "heads may keep different numbers",
    ):
        assert text in out
    assert main(["presses", "DecodingPress"]) == 0
    assert "  target_size=2048\n" in capsys.readouterr().out
    assert main(["presses", "decodingpres"]) == 2
    said = capsys.readouterr().err
    assert "Unknown press 'decodingpres'. Did you mean " in said and "'DecodingPress'" in said


def test_presses_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presses", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in entries if e["name"]] == press_names()
    assert {"CAMPress", "DMSPress", "PrefillDecodingPress"} <= {e["class_name"] for e in entries if not e["name"]}
    assert main(["presses", "kvzap", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["in_block"]) == ("trained", True)
    assert entry["parameters"][0]["name"] == "model_type" and entry["parameters"][0]["default"] == "'mlp'"


def test_speed_is_a_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", str(tiny), "--dataset", "demo", "--output_dir", str(tmp_path)]
    assert main(["speed", *where, *SMALL]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["protocol"] == "speed" and record["command"].startswith("coldpress speed --model")
    assert main(["speed", *where, "--ppl_apply_press"]) == 2
    assert "--speed_only measures no perplexity" in capsys.readouterr().err


# In a process of its own


def start(code: str, *arguments: object, script: Path = ROOT / "evaluation" / "perplexity.py") -> subprocess.Popen[str]:
    """Run a script in another process, after ``code``; interrupts reach it even if this one ignores them."""
    lines = [
        "import os, runpy, signal, sys",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        code,
        f"sys.argv = {[str(script), *map(str, arguments)]!r}",
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


TEN = [
    "no_press",
    "expected_attention",
    "keydiff",
    "knorm",
    "observed_attention",
    "pyramidkv",
    "random",
    "snapkv",
    "streaming_llm",
    "tova",
]
EVERY_LINE = "import coldpress.io.progress as progress; progress.LINE_EVERY_S = 0.0"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(beginning):
            return
    finish(process)
    raise AssertionError(f"it ended before it said {beginning!r}: {''.join(said)}")


def test_interrupted_it_keeps_what_is_finished_and_exits_with_130(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny, "--dataset", "demo", "--press", *TEN, "--ppl_apply_press", "--max_new_tokens", 8]
    process = start(EVERY_LINE, *arguments, "--output_dir", tmp_path)
    wait_for(process, "perplexity: 2/")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err and "interrupted; 10 result(s) kept" in err
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 10 and all(file.name.endswith(".interrupted.json") for file in files)
    assert "the same command goes on from here" in err
    records = [json.loads(file.read_text()) for file in files]
    windows = {record["windows"] for record in records}
    assert len(windows) == 1 and windows.pop() >= 2  # whole windows, the same for all
    for record in records:
        assert record["status"] == "interrupted" and record["ppl"] > 0 and record["tpot_ms"] is None
        assert record["scored_tokens"] == record["windows"] * 31
    assert out.count("| interrupted |") == 10


@pytest.mark.slow
def test_interrupted_while_timing_it_keeps_finished_presses_as_finished(tiny: Path, tmp_path: Path) -> None:
    small = ["--repetitions", 1, "--warmup", 0, "--max_new_tokens", 4, "--context_limit", 40]
    arguments = [
        "--model",
        tiny,
        "--dataset",
        "demo",
        "--press",
        *TEN,
        "--speed_only",
        "--output_dir",
        tmp_path,
        *small,
    ]
    slow = "; import time, coldpress.eval.speed as s; f = s.MemoryMeter"
    slow += "; s.MemoryMeter = lambda device: (time.sleep(0.3), f(device))[1]"
    process = start(EVERY_LINE + slow, *arguments)
    wait_for(process, "speed: 13/20")  # every press is timed, the memory of three is measured
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    status = [record["status"] for record in records]
    assert len(records) == 10 and 3 <= status.count("ok") < 10
    for record in records:
        assert record["tpot_ms"] > 0
        assert (record["peak_mem_bytes"] is not None) == (record["status"] == "ok")


@pytest.mark.parametrize(
    ("how", "n_kept"),
    [
        (("--ppl_only", "--max_length", "32", "--stride", "16"), 3),
        pytest.param(("--press", "knorm", *QUALITY), 2, marks=pytest.mark.slow),
        (("--ppl_mode", "streaming", "--stream_chunk", "64", "--press", "no_press", "streaming_llm"), 1),
        pytest.param(
            ("--press", "knorm", "--speed_only", "--repetitions", "3", "--max_new_tokens", "4"),
            2,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "windows", "streams", "speed"],
)
def test_killed_it_goes_on_when_the_same_command_runs_again(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...], n_kept: int
) -> None:
    arguments = ["--model", tiny, "--dataset", "demo", "--device", "cpu", *how]
    if "streaming" in how:
        arguments += ["--budget_tokens", 32]
    whole, kept = run(*arguments, folder="whole"), Ledger._replace
    code = f"import coldpress.eval.ledger as l; f = l.replace_file; left = {[1] * (n_kept - 1) + [0]}\n"
    code += "def killed(*given): f(*given); left.pop(0) or os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "l.replace_file = killed"
    code, _, err = finish(start(code, *arguments, "--output_dir", tmp_path / "killed"))
    assert code == -signal.SIGKILL, err
    n_saved = {"whole": 0, "killed": 0}
    for folder in n_saved:

        def counted(self: Ledger, name: str, write: Any, folder: str = folder) -> None:
            n_saved[folder] += 1
            kept(self, name, write)

        monkeypatch.setattr(Ledger, "_replace", counted)
        done = run(*arguments, folder=folder)
        assert done.code == 0 and [r["status"] for r in done.records] == ["ok"] * len(whole.records)
        assert [r["loss"] for r in done.records] == [r["loss"] for r in whole.records]
    assert n_saved["killed"] == n_saved["whole"] - n_kept
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json"] * len(whole.records)


@pytest.mark.slow
def test_killed_while_timing_it_has_kept_the_perplexity(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny, "--dataset", "demo", "--press", "no_press", "knorm", "snapkv", "--ppl_apply_press"]
    kill = "import coldpress.eval.speed as s; s.prefilling = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
    code, out, err = finish(start(kill, *arguments, *SMALL, "--output_dir", tmp_path))
    assert code == -signal.SIGKILL, err
    files = sorted(path.name for path in tmp_path.glob("*.json"))
    assert len(files) == 3 and all(name.endswith(".interrupted.json") for name in files)
    records = [json.loads((tmp_path / name).read_text()) for name in files]
    for record in records:
        assert record["status"] == "interrupted" and record["ppl"] > 0 and record["windows"] == 3
        assert record["tpot_ms"] is None
    assert len({record["run_id"] for record in records}) == 1
    assert out.count("| knorm ") == 1 and "ΔNLL" in out and "interrupted" not in out  # the table of what is done
    kill = "import coldpress.eval.speed as s; f = s.check_stored_pairs\n"  # asked while the memory is measured
    kill += "def check(press, *a): return f(press, *a) if 'Snap' not in repr(press) else os.kill(os.getpid(), 9)\n"
    kill += "s.check_stored_pairs = check"
    code, out, err = finish(start(kill, *arguments, *SMALL, "--output_dir", tmp_path))
    assert code == -signal.SIGKILL, err
    found = {record["press"]: record for record in (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))}
    assert {press: record["status"] for press, record in found.items()} == {
        "no_press": "ok",
        "knorm": "ok",
        "snapkv": "interrupted",
    }
    assert found["knorm"]["peak_mem_bytes"] > 0 and len(list(tmp_path.glob("*.json"))) == 3
    code, out, err = finish(start("", *arguments, *SMALL, "--output_dir", tmp_path))
    assert code == 0, err
    assert [json.loads(path.read_text())["status"] for path in tmp_path.glob("*.json")] == ["ok"] * 3
    assert out.count("| knorm ") == 2  # in the tables of quality and of speed


@pytest.mark.slow
def test_a_press_that_fails_while_timed_leaves_one_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilling = speed.prefilling

    def broken(model: Any, cache: PressedCache) -> Any:
        if isinstance(cache.press, KnormPress):
            raise RuntimeError("out of order")
        return prefilling(model, cache)

    monkeypatch.setattr(speed, "prefilling", broken)
    done = run("--press", "knorm", "snapkv", "--ppl_apply_press", *SMALL)
    assert done.code == 1
    assert {r["press"]: r["status"] for r in done.records} == {"knorm": "failed", "snapkv": "ok"}
    assert len(done.records) == 2
    assert run("--press", "knorm", "--speed_only", *SMALL).code == 1
    monkeypatch.setattr(speed, "prefilling", prefilling)
    for what in ("--ppl_apply_press", "--speed_only"):
        done = run("--press", "knorm", what, *SMALL)
    assert [record["status"] for record in done.records] == ["ok"] * 3  # under the names of those that failed


def test_interrupted_it_leaves_an_earlier_result_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("--press", "knorm", *QUALITY)
    (finished,) = done.folder.glob("*.json")
    before = finished.read_text()
    original = KnormPress.score

    def interrupted(self: KnormPress, view: LayerView) -> Tensor:
        interrupted.calls += 1  # type: ignore[attr-defined]
        if interrupted.calls > 4:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(self, view)

    interrupted.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(KnormPress, "score", interrupted)
    done = run("--press", "knorm", *QUALITY)
    assert done.code == 130
    assert finished.read_text() == before
    (partial,) = done.folder.glob("*.interrupted.json")
    assert json.loads(partial.read_text())["windows"] == 2
    monkeypatch.setattr(KnormPress, "score", original)
    assert len(run("--press", "knorm", *QUALITY).records) == 1  # a finished run removes the partial result


def test_interrupted_again_while_the_results_are_written_it_still_writes_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_module.write_result

    def interrupted(folder: Path, record: dict[str, Any]) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return write(folder, record)

    monkeypatch.setattr(run_module, "write_result", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("--press", "knorm", "snapkv", *QUALITY)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 0 and len(done.records) == 2


COMMAND = ROOT / "src" / "coldpress_command.py"


@pytest.mark.parametrize("script", [ROOT / "evaluation" / "perplexity.py", COMMAND], ids=lambda script: script.stem)
def test_interrupted_while_torch_is_imported(tiny: Path, tmp_path: Path, script: Path) -> None:
    arguments = [*(["ppl"] if script == COMMAND else []), "--model", tiny, "--dataset", "demo"]
    process = start("os.write(2, b'now\\n')", *arguments, "--output_dir", tmp_path / "results", script=script)
    wait_for(process, "now")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, err
    assert out == "" and err.split() == ["interrupted"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_command_of_the_package() -> None:
    code, out, err = finish(start("", "report", "", script=COMMAND))
    assert (code, out) == (2, "") and err.startswith("error: The folder's name is empty")
    assert 'coldpress = "coldpress_command:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("step", ["evaluate.load_corpus", "evaluate.load_model", "evaluate.make_plan"])
def test_interrupted_before_anything_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"coldpress.eval.{step}", interrupted)
    done = run()
    assert (done.code, done.out, done.err.split()) == (130, "", ["interrupted"])
    assert not done.folder.exists()


@pytest.mark.slow
def test_killed_it_leaves_no_broken_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    kill = "import coldpress.records.results as r; r.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)"
    arguments = ["--model", tiny, "--dataset", "demo", "--press", "knorm", "snapkv", *QUALITY, "--output_dir", tmp_path]
    code, _, err = finish(start(kill, *arguments))
    assert code == -signal.SIGKILL, err
    assert list(tmp_path.glob("*.json")) == []  # the temporary file is hidden and nobody reads it
    assert main(["report", str(tmp_path)]) == 2
    assert len(run(*arguments).records) == 2  # and is not in the way of the next run


@pytest.mark.slow
def test_the_script_prints_the_table_and_only_progress_on_stderr(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny, "--dataset", "demo", "--press", "knorm", *SMALL, "--output_dir", tmp_path / "results"]
    process = start("", *arguments)
    code, out, err = finish(process)
    assert code == 0, err
    assert [line.split(":")[0] for line in err.splitlines()] == ["note", "perplexity", "speed"]
    assert "| knorm " in out and out.rstrip().endswith("results/")
    assert "1 result(s) in" in out
