"""What a report says in words, sentence by sentence, and what it must not say."""

from __future__ import annotations

import pytest
from tests.report.records import MIB, Record, failed, record, spread, stream, tasked, timed

from coldpress.records.wording import clean, listed
from coldpress.report.page import findings, headline
from coldpress.report.sections import Section, paired, sections
from coldpress.report.terminal import table

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
    assert findings(one(BASE, cheap)) == []


def test_a_run_of_its_own_tells_the_speed() -> None:
    """As in a sweep; the longest context counts, and another ratio or press is another point."""
    runs = [timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.3), timed("snapkv", 0.5, 256, 0.9)]
    runs += [timed("snapkv", 0.75, 1024, 1.7), timed("knorm", 0.5, 1024, 1.9)]
    cheap = record("snapkv", 0.5, spread(0.004, 0.003))
    (quality,) = [section for section in sections([BASE, cheap, *runs]) if section.kind == "quality"]
    assert "decodes 1.30 times as fast" in headline(quality)
    (quality,) = [section for section in sections([BASE, cheap, runs[0], *runs[3:]]) if section.kind == "quality"]
    assert "times as fast" not in headline(quality) and "Speed was not measured." in headline(quality)


def test_the_smallest_cheap_cache_is_in_the_headline() -> None:
    quarter = [record("snapkv", 0.75, spread(0.005, 0.001)), record("knorm", 0.75, spread(0.006, 0.001))]
    more = [record("tova", 0.5, spread(0.001, 0.0005)), record("cur", 0.9, spread(0.02, 0.001))]
    section = one(BASE, *quarter, *more)
    assert "within +1 % of PPL is knorm with 75 % of the cache removed" in headline(section)


@pytest.mark.parametrize(
    ("delta", "noise", "words"),
    [
        (0.05, 0.001, "No press is shown to stay within +1 % of PPL."),
        (0.012, 0.01, "No press is shown to stay within +1 % of PPL."),
        (0.002, 0.001, "surely stays within +1 % of PPL is snapkv"),
    ],
)
def test_cheap_is_said_of_whole_intervals(delta: float, noise: float, words: str) -> None:
    assert words in headline(one(BASE, record("snapkv", 0.5, spread(delta, noise))))


def test_a_press_is_told_from_another_only_where_the_paired_interval_excludes_zero() -> None:
    """The windows differ by much more than the presses do: unpaired, nothing could be said."""
    a = [0.01 * i for i in range(8)]
    behind = record("knorm", 0.5, [x + 0.004 + 0.001 * (x > 0.03) for x in a])
    level = record("knorm", 0.5, [x + 0.001 + 0.02 * (-1) ** i for i, x in enumerate(a)])
    for other, is_level in ((behind, False), (level, True)):
        words = headline(one(BASE, record("snapkv", 0.5, a), {**other, "kld": {"mean": 0.02}}))
        assert "snapkv stays closest" in words
        assert ("though knorm cannot be told from it" in words) == is_level


def test_random_is_never_the_winner() -> None:
    words = headline(one(BASE, record("random", 0.5, spread(0.01, 0.001)), record("knorm", 0.5, spread(0.03, 0.001))))
    assert "knorm stays closest" in words and "random" not in words


def test_without_the_same_windows_nothing_is_paired() -> None:
    a, b = record("snapkv", 0.5, spread(0.01, 0.001)), record("knorm", 0.5, spread(0.5, 0.001))
    b["per_window"] = [{**w, "id": f"other {w['id']}"} for w in b["per_window"]]
    first, second = (p for p in one(BASE, a, b).entries if not p.is_baseline)
    assert paired(first, second) is None


def test_few_windows_give_no_ranks() -> None:
    section = one(record("no_press", 0.0, [0.0]), record("snapkv", 0.5, [0.01]), record("knorm", 0.5, [0.3]))
    words = headline(section) + "\n".join(findings(section))
    assert "Too few windows (1) to say which press is better or what it costs" in words
    assert "ahead" not in words and "behind" not in words and "PPL" not in words
    base = record("no_press", 0.0, [0.0] * 4)
    presses = record("snapkv", 0.5, spread(0.4, 0.5, n=4)), record("knorm", 0.5, spread(9, 0.001, n=4))
    four = headline(one(base, *presses))
    assert "Too few windows (4)" in four and "knorm" not in four
    eight = headline(
        one(BASE, record("snapkv", 0.5, spread(0.4, 0.001)), record("knorm", 0.5, spread(9, 0.001), kld={"mean": 3}))
    )
    assert "Too few" not in eight and "snapkv stays closest" in eight


def test_less_than_was_asked_for_is_left_out_of_the_comparison() -> None:
    lazy = record("lazy", 0.5, spread(0.001, 0.0005), effective_compression_ratio=0.2, kv_bytes=6 * MIB)
    section = one(BASE, lazy, record("knorm", 0.5, spread(0.03, 0.001)))
    words = "\n".join(findings(section))
    assert "knorm stays closest" in headline(section)
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


def test_speed_is_a_gain_only_in_every_round() -> None:
    assert headline(one(BASE, record("snapkv", 0.5, spread(0.1, 0.01)))).endswith("Speed was not measured.")
    both = one(timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.2), timed("knorm", 0.5, 1024, 1.02))
    assert "snapkv with 50 % of the cache removed decodes 1.20 times as fast, in every one of 5 rounds" in headline(
        both
    )
    none = one(timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.2, noise=0.3))
    assert headline(none).endswith("no press decodes faster than the uncompressed cache in every round.")
    once = one(timed("no_press", 0, 1024, 1.0), timed("snapkv", 0.5, 1024, 1.2, noise=0.0))
    assert "faster than the uncompressed cache in every" in headline(once) and "times as fast" not in headline(once)


def test_streams_are_ranked_by_text() -> None:
    texts = [stream("no_press", None, [3.0, 3.1]), stream("snapkv", 128, [3.1, 3.2]), stream("knorm", 128, [3.5, 3.6])]
    assert "snapkv has the lowest PPL (23.34)" in headline(one(*texts))
    single = [stream("snapkv", 128, [3.1]), stream("knorm", 128, [3.5])]
    assert "too few texts (1)" in headline(one(*single))


def test_tasks_are_compared_with_the_uncompressed_cache() -> None:
    section = one(tasked("no_press", 0.0, 0.0), tasked("snapkv", 0.5, 0.3), tasked("knorm", 0.5, 0.01))
    assert "of 8 scores (a press, a size and a task each) 4 are below it" in headline(section)


def test_tasks_that_the_model_itself_cannot_do_are_named() -> None:
    made = tasked("snapkv", 0.5, 0.3)
    hard = {**made["tasks"][0], "score": 0.0, "score_base": 0.0}
    assert "scores 0 on needle at 512 tokens, which says nothing" in headline(one({**made, "tasks": [hard]}))
    assert "scores 0" not in headline(one(made))


def test_too_few_questions_give_no_verdict() -> None:
    """A paired bootstrap over two contexts that are alike has no width."""

    def asked(n: int, n_contexts: int | None = None) -> Section:
        made = tasked("snapkv", 0.5, 0.5)
        needle = {**made["tasks"][0], "n": n, "delta_score_ci95": [-0.5, -0.5]}
        needle |= {} if n_contexts is None else {"n_contexts": n_contexts}
        return one({**made, "tasks": [needle]})

    few, below = "1 has too few questions (2; at least 8 are needed)", "1 is below it"
    for section, is_few in ((asked(2), True), (asked(8), False), (asked(100, 2), True), (asked(100, 8), False)):
        line = headline(section)
        assert (few in line, below in line) == (is_few, not is_few) and "of 1 score (a press" in line
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
