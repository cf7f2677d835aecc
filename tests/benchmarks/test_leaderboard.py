"""The leaderboard: what it measures, how it ranks, what it does when its time is over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.leaderboard.__main__ import _waited, beside
from benchmarks.leaderboard.board import markdown, page
from benchmarks.leaderboard.goals import GOALS, OWN, READS_TWICE, goals, part_of
from benchmarks.leaderboard.plan import LEFT_OUT, SLOW, Sizes, lanes, presses
from benchmarks.leaderboard.rank import boards, command_of, condensed, ranking

from coldpress import press_names
from coldpress.eval.sweep_plan import SweepPlan


def record(press: str, klds: list[float], text: str = "pg19", ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    """A record as a sweep writes it, as far as the board looks at it."""
    return {
        "protocol": "prefix-C8-T4-S12",
        "press": press,
        "press_config": {},
        "compression_ratio": ratio,
        "status": "ok",
        "model": "smollm2",
        "dataset": text,
        "subset": None,
        "dtype": "float32",
        "windows": len(klds),
        "scored_tokens": 3 * len(klds),
        "delta_nll": 0.5,
        "delta_nll_ci95": [0.25, 0.75],
        "same_top1": 0.9,
        "kld": {"mean": sum(klds) / max(1, len(klds)), "median": 0.01},
        "kv_bytes": 50,
        "kv_bytes_baseline": 100,
        "context_tokens": 8,
        "target_tokens": 4,
        "settings": {"model": "smollm2", "dataset": text, "context_tokens": 8, "max_windows": 4, "batch_size": 2},
        "per_window": [{"document": 0, "start": 12 * i, "kld": kld} for i, kld in enumerate(klds)],
        "env": {"torch": "2", "transformers": "5", "cpu": "none", "git_commit": None},
        **more,
    }


def test_all_training_free_presses_of_prompts_are_on_it_or_left_out_with_a_reason() -> None:
    fast, slow = presses()
    every = set(press_names(kind="training-free", at_prefill=True))
    assert set(fast) | set(slow) | set(LEFT_OUT) == every and len(fast) + len(slow) + len(LEFT_OUT) == len(every)
    assert set(slow) == set(SLOW)


def test_every_stage_is_a_sweep_and_slow_windows_are_among_the_others() -> None:
    for stages in lanes("wiki", "books", "smollm2", "demo", Sizes()):
        plans = [SweepPlan.of(stage.config) for stage in stages]
        assert all(plan.evaluations for plan in plans)
        fast, slow = (plan.evaluations[0].settings for plan in plans[:2])
        assert fast.stride == slow.stride == 8192 and fast.context_tokens == slow.context_tokens  # type: ignore[union-attr]
        n_windows = (fast.max_documents or 1) * fast.max_windows  # type: ignore[union-attr, operator]
        assert n_windows >= 32


def slow_ranks(kld: np.ndarray) -> list[int]:
    """The obvious twin: each pair on the windows that both have."""
    found = []
    for own in kld:
        better = 0
        for other in kld:
            both = ~np.isnan(own) & ~np.isnan(other)
            better += other[both].sum() < own[both].sum()
        found.append(1 + better)
    return found


@pytest.mark.parametrize(("name", "is_slow"), [("kvzip", True), ("snapkv", False)])
def test_some_presses_alone_make_no_stage_without_a_press(name: str, is_slow: bool) -> None:
    stages = [stage for lane in lanes("wiki", "books", "smollm2", "demo", Sizes(), [name]) for stage in lane]
    assert all(stage.config["press"] == [name] for stage in stages)
    windowed = [stage.name for stage in stages if "perplexity" in stage.config]
    assert len(windowed) == 4 and all(of.endswith("-slow") == is_slow for of in windowed)


def test_ranks_are_those_of_a_loop_over_pairs_on_shared_windows() -> None:
    draw = np.random.default_rng(0)
    kld = draw.random((7, 12))
    kld[2, 4:] = np.nan
    kld[5, :9] = np.nan
    ranks, low, high = ranking(kld, np.array(["a"] * 6 + ["b"] * 6))
    assert ranks.tolist() == slow_ranks(kld)
    assert (low <= ranks).all() and (ranks <= high).all()


def test_few_easy_windows_help_nobody_up_the_ranks() -> None:
    """The mean of the second is the smallest by far; on the windows it has, it is the worst."""
    kld = np.array([[0.1, 0.1, 9.0, 9.0], [0.2, 0.2, np.nan, np.nan], [0.15, 0.15, 9.5, 9.5]])
    assert ranking(kld, np.array(["a"] * 4))[0].tolist() == [1, 3, 2]


def test_the_interval_of_a_rank_is_narrow_where_windows_agree_and_wide_where_they_do_not() -> None:
    draw = np.random.default_rng(0)
    clear = np.array([[1.0], [2.0], [3.0]]) + 0.01 * draw.random((3, 32))
    _, low, high = ranking(clear, np.array(["a"] * 32))
    assert low.tolist() == high.tolist() == [1, 2, 3]
    _, low, high = ranking(draw.random((3, 32)), np.array(["a"] * 32))
    assert (high - low).max() == 2


def test_the_same_windows_of_two_texts_are_two() -> None:
    rows = condensed([record("a", [0.1, 0.3]), record("a", [0.2], "wiki"), record("b", [0.2, 0.1])])["rows"]
    (board,) = boards(rows).values()
    assert {row["press"]: (row["windows"], row["rank"]) for row in board} == {"a": (3, 2), "b": (2, 1)}
    assert board[1]["kld"] == pytest.approx(0.2)


def test_a_board_shows_scores_and_times_beside_kl(tmp_path: Path) -> None:
    task = {"task": "niah_single", "n": 5, "score": 0.6}
    records = [
        record("<a>", [0.1, 0.3]),
        record("b", [0.2, 0.1], status="interrupted"),
        record("b", [], protocol="speed", ttft_s=1.25, tpot_ms=40.0, ratio=0.75),
        record("b", [], protocol="tasks-v1", tasks=[task], ratio=0.75),
    ]
    document = json.loads(json.dumps(condensed(records)))
    text, html = markdown(document), page(document)
    (line,) = (line for line in text.splitlines() if "`b`" in line)
    assert line == "| 1 [1, 2] | `b` | 0.1500 | 0.0100 | +0.500 [0.250, 0.750] | 0.900 | 0.500 | 2 | 0.60 | 1.25 | 40 |"
    assert "its time ran out" in text and "2 windows (6 scored tokens) of pg19" in text
    assert "&lt;a&gt;" in html and "<a>" not in html and "<svg" in html and "--compression_ratio 0.5" in html


def test_the_page_begins_with_a_table_and_no_table_is_wider_than_it() -> None:
    whole = [record("a", [0.1, 0.3]), record("b", [0.2, 0.1]), record("c", [0.2, 0.1], ratio=0.0)]
    html = page(json.loads(json.dumps(condensed(whole))))
    assert html.index("<table") < html.index("<p>") and html.index("ratio 0.5") < html.index("presses without a ratio")
    assert html.count('<div class="scroll"') == html.count("<table") == 2 and html.count('<div class="plot"><svg') == 1
    used = set(re.findall(r"var\((--\w+)\)", html))
    assert used <= {"--wide", *re.findall(r"(--\w+):", html)}  # the width of a plot is of the report's own


def test_a_press_that_removed_nothing_is_last_and_said_to_be_whole() -> None:
    whole = {"kv_bytes": 100, "ratio": 0.0}
    records = [
        record("<w>", [0.0, 0.0], **whole),
        record("a", [0.3, 0.4], ratio=0.0),
        record("b", [0.1, 0.2], ratio=0.0),
    ]
    document = json.loads(json.dumps(condensed(records)))
    (board,) = boards(document["rows"]).values()
    assert [(row["press"], row["rank"]) for row in board] == [("b", 1), ("a", 2), ("<w>", None)]
    text, html = markdown(document), page(document)
    lines = text.splitlines()
    assert lines[lines.index("") + 3].startswith("| 1 [1, 1] | `b` |")
    assert "|  | `<w>` | 0.0000 |" in text and "\n\n`<w>` removed nothing of these texts: it has no rank.\n" in text
    assert "<p>&lt;w&gt; removed nothing of these texts: it has no rank.</p>" in html


def test_a_press_that_removed_something_of_one_text_has_a_rank() -> None:
    rows = condensed([record("a", [0.0], kv_bytes=100), record("a", [0.1], "wiki", kv_bytes=99)])["rows"]
    (board,) = boards(rows).values()
    assert board[0]["rank"] == 1 and "removed nothing" not in markdown(condensed([record("b", [0.1])]))


def test_a_board_of_presses_that_removed_nothing_has_no_rank() -> None:
    document = condensed([record("a", [0.0], kv_bytes=100), record("b", [0.0], kv_bytes=101)])
    (board,) = boards(document["rows"]).values()
    assert [row["rank"] for row in board] == [None, None]
    assert "`a` and `b` removed nothing of these texts: they have no rank." in markdown(document)


def test_a_row_s_command_is_its_settings() -> None:
    assert command_of(record("snapkv", [0.1])) == (
        "coldpress ppl --ppl_apply_press --ppl_only --model smollm2 --dataset pg19 --max_windows 4 --context_tokens 8 "
        "--batch_size 2 --press snapkv --compression_ratio 0.5"
    )


def test_goals_compare_the_best_of_both_sides_on_shared_windows() -> None:
    klds = {
        "snapkv": {0: 0.2, 1: 0.4},
        "adakv_snapkv": {0: 0.1, 1: 0.2},
        "kvzip": {1: 0.1},  # reads twice
        "defensive": {0: 0.9, 1: 0.9},
        "layer_defensive": {0: 0.06, 1: 0.09, 2: 5.0},
        "attention_matching_kvzip": {1: 0.02},
    }
    found = goals({0.75: klds})
    assert [row[1:3] for row in found] == [
        ["`kvzip`", "`attention_matching_kvzip`"],
        ["`adakv_snapkv`", "`layer_defensive`"],
    ]
    assert found[0][3] == "0.200 [0.20, 0.20], 1 windows" and found[1][3].startswith("0.500 [")
    assert [row[4] for row in found] == ["0.35 at most: met", "0.6 at most: met"]
    part, low, high = part_of(klds["layer_defensive"], klds["adakv_snapkv"])
    assert part == pytest.approx(0.5) and (low, high) == pytest.approx((0.45, 0.6))


def test_goals_name_presses_that_there_are() -> None:
    named = {*OWN, *READS_TWICE, *(press for goal in GOALS for press in goal.of)}
    assert named <= set(press_names()) and {*READS_TWICE} <= {*SLOW}


def test_nothing_is_no_board() -> None:
    assert markdown(condensed([])) == "Not measured yet." and "Not measured yet." in page(condensed([]))


def test_a_sweep_out_of_time_is_told_as_by_ctrl_c() -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n print('on', flush=True)\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('saved')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        assert _waited(process, 0.1) == "out of time"
        assert process.stdout.read() == b"saved\n"
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        assert _waited(process, 60) == "exit code 3"


def test_presses_measured_again_stand_beside_the_others() -> None:
    timed = {"protocol": "speed", "per_window": [], "ttft_s": 2.0}
    before = condensed([record("snapkv", [1.0]), record("knorm", [3.0]), record("knorm", [], **timed)])
    again = condensed([record("knorm", [5.0])])
    both = beside(again, before)["rows"]
    assert [(row["press"], row.get("ttft_s") or row["per_window"][0][2]) for row in both] == [
        ("knorm", 5.0),
        ("snapkv", 1.0),
        ("knorm", 2.0),
    ]
    again["env"]["torch"] = "3"
    with pytest.raises(SystemExit, match="measure all of them"):
        beside(again, before)
