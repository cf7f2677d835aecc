"""What a report says in words, sentence by sentence, and what it must not say."""

from __future__ import annotations

import pytest
from tests.eval.report_records import MIB, Record, failed, record, spread, stream, tasked, timed

from coldpress.eval.conclusions import findings, headline
from coldpress.eval.report import table
from coldpress.eval.sections import Section, paired, sections
from coldpress.eval.wording import clean, listed

BASE = record("no_press", 0.0)


def one(*records: Record) -> Section:
    (section,) = sections(records)
    return section


def said(*records: Record) -> str:
    return "\n".join(findings(one(*records)))


def test_the_headline_is_the_minutes_answer() -> None:
    fast = {"decode_speedup": 1.2, "decode_speedup_spread": {"min": 1.15, "max": 1.3}, "repetitions": 5, "tpot_ms": 4.0}
    cheap = record("snapkv", 0.5, spread(0.004, 0.003), speed_context_tokens=4096, **fast)
    assert headline(one(BASE, cheap)) == (
        "On WikiText-103 with models/tiny: With 50 % of the cache removed, snapkv stays closest to the uncompressed "
        "model (KL 0.010, PPL +0.4 %); the cache shrinks from 8.00 MiB to 4.00 MiB. The smallest cache that surely "
        "stays within +1 % of PPL is snapkv with 50 % of the cache removed (4.00 MiB of 8.00 MiB). With 4,096 tokens "
        "of context, snapkv with 50 % of the cache removed decodes 1.20 times as fast, in every one of 5 rounds faster "
        "than the uncompressed cache."
    )
    low, high = (100 * (x - 1) for x in cheap["ppl_ratio_ci95"])
    assert findings(one(BASE, cheap))[0] == (
        f"At ratio 0.5, snapkv changes PPL by +0.4 % [{low:.1f}, {high:.1f}], leaves 50 % of the KV cache (8.00 MiB to "
        "4.00 MiB) and decodes 1.20 times as fast with 4,096 tokens of context (5 rounds from 1.15 to 1.30)."
    )


def test_a_run_of_its_own_tells_the_speed() -> None:
    """As in a sweep; the longest context counts, and another ratio or press is another point."""
    runs = [timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.3), timed("snapkv", 0.5, 256, 0.9)]
    runs += [timed("snapkv", 0.75, 1024, 1.7), timed("knorm", 0.5, 1024, 1.9)]
    cheap = record("snapkv", 0.5, spread(0.004, 0.003))
    (quality,) = [section for section in sections([BASE, cheap, *runs]) if section.kind == "quality"]
    assert "and decodes 1.30 times as fast with 1,024 tokens of context (5 rounds from 1.25 to 1.35)" in "\n".join(
        findings(quality)
    )
    assert "decodes 1.30 times as fast" in headline(quality)
    (quality,) = [section for section in sections([BASE, cheap, runs[0], *runs[3:]]) if section.kind == "quality"]
    assert "times as fast" not in headline(quality) and "Speed was not measured." in headline(quality)


def test_the_smallest_cheap_cache_is_in_the_headline_and_all_of_its_size_are_named() -> None:
    quarter = [record("snapkv", 0.75, spread(0.005, 0.001)), record("knorm", 0.75, spread(0.006, 0.001))]
    more = [record("tova", 0.5, spread(0.001, 0.0005)), record("cur", 0.9, spread(0.02, 0.001))]
    section = one(BASE, *quarter, *more)
    assert "within +1 % of PPL is knorm with 75 % of the cache removed" in headline(section)
    words = "\n".join(findings(section))
    assert "snapkv changes PPL by +0.50 %" in words and "leaves 25 % of the KV cache" in words
    assert "Cheap at ratio 0.75 (whole interval within +1 % of PPL): snapkv and knorm." in words


@pytest.mark.parametrize(
    ("delta", "noise", "headline_words", "words"),
    [
        (
            0.05,
            0.001,
            "No press is shown to stay within +1 % of PPL.",
            "No press at ratio 0.5 is cheap: every interval lies above +1 % of PPL.",
        ),
        (
            0.012,
            0.01,
            "No press is shown to stay within +1 % of PPL.",
            "No press at ratio 0.5 is shown to be cheap: some intervals",
        ),
        (
            0.002,
            0.001,
            "surely stays within +1 % of PPL is snapkv",
            "Cheap at ratio 0.5 (whole interval within +1 % of PPL): snapkv.",
        ),
    ],
)
def test_cheap_is_said_of_whole_intervals(delta: float, noise: float, headline_words: str, words: str) -> None:
    section = one(BASE, record("snapkv", 0.5, spread(delta, noise)))
    assert headline_words in headline(section) and words in "\n".join(findings(section))


def test_a_press_is_ahead_only_where_the_paired_interval_excludes_zero() -> None:
    """The windows differ by much more than the presses do: unpaired, nothing could be said."""
    a = [0.01 * i for i in range(8)]
    ahead = said(BASE, record("snapkv", 0.5, a), record("knorm", 0.5, [x + 0.004 + 0.001 * (x > 0.03) for x in a]))
    assert "ahead of knorm (by 0.0045 [0.0041, 0.0049] nats a token)" in ahead
    level = said(
        BASE, record("snapkv", 0.5, a), record("knorm", 0.5, [x + 0.001 + 0.02 * (-1) ** i for i, x in enumerate(a)])
    )
    assert "but knorm is within the error bars of it" in level and "ahead" not in level


def test_what_is_within_the_error_bars_of_no_change_is_said_to_be() -> None:
    words = said(BASE, record("snapkv", 0.5, spread(0.001, 0.01)))
    assert "within the error bars of no change" in words
    assert "within the error bars of no change" not in said(BASE, record("snapkv", 0.5, spread(0.1, 0.01)))


def test_the_references_are_compared_press_by_press() -> None:
    rows = [
        record("random", 0.5, spread(0.05, 0.001)),
        record("streaming_llm", 0.5, spread(0.02, 0.001)),
        record("good", 0.5, spread(0.01, 0.001)),
        record("alike", 0.5, spread(0.0205, 0.01)),
        record("bad", 0.5, spread(0.5, 0.001)),
    ]
    lines = findings(one(BASE, *rows))
    (random,) = (line for line in lines if line.startswith("The reference random"))
    (streaming,) = (line for line in lines if line.startswith("The reference streaming_llm"))
    assert random.endswith("ahead of it: good and alike; behind it: bad.")
    assert streaming.endswith("ahead of it: good; within the error bars: alike; behind it: bad.")
    assert "good changes PPL" in lines[0]
    none = said(BASE, *rows[:2], rows[4])
    assert "no press is ahead of it; behind it: bad." in none


def test_random_is_never_the_winner() -> None:
    lines = findings(one(BASE, record("random", 0.5, spread(0.01, 0.001)), record("knorm", 0.5, spread(0.03, 0.001))))
    assert lines[0].startswith("At ratio 0.5, knorm") and "no press is ahead of it; behind it: knorm" in lines[1]


def test_without_the_same_windows_nothing_is_ranked() -> None:
    a, b = record("snapkv", 0.5, spread(0.01, 0.001)), record("knorm", 0.5, spread(0.5, 0.001))
    b["per_window"] = [{**w, "id": f"other {w['id']}"} for w in b["per_window"]]
    words = said(BASE, a, b)
    assert "without windows in common nothing is said about who is better" in words and "ahead" not in words
    first, second = (p for p in one(BASE, a, b).entries if not p.is_baseline)
    assert paired(first, second) is None
    del b["per_window"]
    assert "nothing is said about who is better" in said(BASE, a, b)


def test_few_windows_give_no_ranks() -> None:
    section = one(record("no_press", 0.0, [0.0]), record("snapkv", 0.5, [0.01]), record("knorm", 0.5, [0.3]))
    words = headline(section) + "\n".join(findings(section))
    assert "Too few windows (1) to say which press is better or what it costs" in words
    assert "ahead" not in words and "behind" not in words and "PPL" not in words
    base = record("no_press", 0.0, [0.0] * 4)
    four = said(base, record("snapkv", 0.5, spread(0.4, 0.5, n=4)), record("knorm", 0.5, spread(9, 0.001, n=4)))
    assert "Too few windows (4)" in four and "knorm" not in four
    eight = said(BASE, record("snapkv", 0.5, spread(0.4, 0.001)), record("knorm", 0.5, spread(9, 0.001)))
    assert "Too few" not in eight and "ahead of knorm" in eight


def test_less_than_was_asked_for_is_left_out_of_the_comparison() -> None:
    lazy = record("lazy", 0.5, spread(0.001, 0.0005), effective_compression_ratio=0.2, kv_bytes=6 * MIB)
    words = said(BASE, lazy, record("knorm", 0.5, spread(0.03, 0.001)))
    assert "At ratio 0.5, knorm changes" in words
    assert "At ratio 0.5, less than that was removed by lazy (0.20); left out of the comparison." in words


def test_what_failed_or_was_interrupted_is_named_with_its_error() -> None:
    words = said(BASE, failed("tova", 0.5, "ValueError: no\nroom"), record("cur", 0.5, [0.1] * 3, status="interrupted"))
    assert "tova at 0.5 failed: ValueError: no room." in words
    assert "cur at 0.5 was interrupted after 3 windows." in words
    assert headline(one(failed("tova", 0.5))).endswith("nothing was finished under prefix-C768-T256-S1024.")


def test_the_same_loss_everywhere_does_not_hide() -> None:
    words = said(BASE, record("keydiff", 0.5), *(record(n, 0.5, spread(0.1, 0.01)) for n in ("a", "b")))
    assert "keydiff at 0.5 has the uncompressed model's loss in every window, though 50 % was removed" in words
    assert "a and b have the same loss in every window at ratio 0.5." in words
    assert "Cheap" not in words


def test_speed_is_a_gain_only_in_every_round() -> None:
    assert headline(one(BASE, record("snapkv", 0.5, spread(0.1, 0.01)))).endswith("Speed was not measured.")
    both = one(timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.2), timed("knorm", 0.5, 1024, 1.02))
    assert "snapkv with 50 % of the cache removed decodes 1.20 times as fast, in every one of 5 rounds" in headline(
        both
    )
    words = "\n".join(findings(both))
    assert "With 1,024 tokens of context snapkv at 0.5 decodes 1.20 times as fast" in words and "knorm" not in words
    none = one(timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.2, noise=0.3))
    assert headline(none).endswith("no press decodes faster than the uncompressed cache in every round.")
    assert findings(none)[0].endswith(
        "no press decodes faster than the uncompressed cache by more than the rounds differ."
    )
    unknown = timed("snapkv", 0.5, 1024, 1.2) | {"decode_speedup_spread": None}
    unsure = "for certain: no spread of several rounds is recorded."
    assert said(timed("no_press", 0, 1024, 1.0), unknown).endswith(unsure)
    once = timed("snapkv", 0.5, 1024, 1.2, noise=0.0)
    assert said(timed("no_press", 0, 1024, 1.0), once).endswith(unsure)
    words = said(BASE, record("snapkv", 0.5, spread(0.1, 0.01), decode_speedup=1.2))
    assert "was 1.20 times as fast in the one round that is recorded" in words


def test_timings_at_several_contexts_share_a_section() -> None:
    records = [timed(p, r, n, s) for n in (256, 1024) for p, r, s in (("no_press", 0.0, 1.0), ("snapkv", 0.5, 1.2))]
    lines = findings(one(*records))
    assert [line[:15] for line in lines] == ["With 256 tokens", "With 1,024 toke"]


def test_streams_are_ranked_by_text() -> None:
    texts = [stream("no_press", None, [3.0, 3.1]), stream("snapkv", 128, [3.1, 3.2]), stream("knorm", 128, [3.5, 3.6])]
    assert "PPL is snapkv 23.34, knorm 34.81 and no_press 21.12." in said(*texts)
    assert "of snapkv: no press is ahead of it; behind it: knorm." in said(*texts)
    single = [stream("snapkv", 128, [3.1]), stream("knorm", 128, [3.5])]
    assert "nothing is said about who is better" in said(*single) and "behind" not in said(*single)


def test_tasks_are_compared_with_the_uncompressed_cache() -> None:
    section = one(tasked("no_press", 0.0, 0.0), tasked("snapkv", 0.5, 0.3), tasked("knorm", 0.5, 0.01))
    words = "\n".join(findings(section))
    assert "needle at 512 tokens, presses at 0.5: below the uncompressed cache: snapkv 0.70 against 1.00; " in words
    assert "within the error bars of it: knorm 0.99 against 1.00." in words
    assert "span at 512 tokens, presses at 0.5: below the uncompressed cache: snapkv +0.300 nats;" in words
    assert "of 8 scores (a press, a size and a task each) 4 are below it" in headline(section)


def test_too_few_questions_give_no_verdict() -> None:
    """A paired bootstrap over two contexts that are alike has no width."""

    def asked(n: int, n_contexts: int | None = None) -> Section:
        made = tasked("snapkv", 0.5, 0.5)
        needle = {**made["tasks"][0], "n": n, "delta_score_ci95": [-0.5, -0.5]}
        needle |= {} if n_contexts is None else {"n_contexts": n_contexts}
        return one({**made, "tasks": [needle]})

    few, below = "1 has too few questions (2; at least 8 are needed)", "1 is below it"
    for section, is_few in ((asked(2), True), (asked(8), False), (asked(100, 2), True), (asked(100, 8), False)):
        words, line = "\n".join(findings(section)), headline(section)
        assert (few in line, below in line) == (is_few, not is_few) and "of 1 score (a press" in line
        assert ("too few questions to say: snapkv 0.50 against 1.00 (2)." in words) == is_few
        assert ("below the uncompressed cache: snapkv" in words) != is_few
    pair = {"same_answers": 0.0, "gained": 0, "lost": 2, "mcnemar_p": 0.5}
    for n, interval in ((2, ""), (8, " [-50.0%, -50.0%]")):
        own = asked(n).entries[0].record
        own["tasks"][0] |= pair
        assert f" -50.0%{interval} |" in table([own])
        assert "right with the press only | right uncompressed only | McNemar p | same answers |" in table([own])


def test_names_are_listed_and_long_lists_are_cut() -> None:
    assert [listed(["a"]), listed(["a", "b"]), listed([*"abc"])] == ["a", "a and b", "a, b and c"]
    assert listed([*"abcdefghi"]) == "a, b, c, d, e, f and 3 more"
    assert clean("a\nb\x00\u202e\ud800c") == "a b\ufffd\ufffd\ufffdc"
