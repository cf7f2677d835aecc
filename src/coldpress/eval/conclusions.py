"""What the records say, in words: no ranking but where a paired 95 % interval excludes 0.

A press is called *cheap* where its whole interval lies below a change of perplexity by 1 %. Intervals are of one
comparison each: they are not widened for the number of presses that were compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from coldpress.eval.glance import CHEAP, FEWEST_WINDOWS, Task, answer, is_cheap, n_windows, standing, task_name
from coldpress.eval.phrases import sentences
from coldpress.eval.report import few_questions
from coldpress.eval.sections import REFERENCES, Entry, Section, paired, text_name
from coldpress.eval.wording import at_words, capital, clean, format_bytes, listed, model_name, number, percent

WITHIN = f"+{CHEAP * 100:g} % of PPL"
_STANDING = {
    "worse": "below the uncompressed cache",
    "same": "within the error bars of it",
    "better": "above it",
    "few_questions": "too few questions to say",
    "unknown": "without error bars",
}


def _task_findings(section: Section) -> list[str]:
    """A sentence for each task and size."""
    verdicts: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in section.entries:
        for task in [] if entry.is_baseline else entry.tasks or []:
            kind, words = _verdict(entry, task)
            verdicts.setdefault((entry.size, task_name(task)), {}).setdefault(kind, []).append(words)
    said = []
    for (size, task), kinds in verdicts.items():
        parts = [f"{words}: {listed(kinds[kind])}" for kind, words in _STANDING.items() if kind in kinds]
        said.append(f"{task}{f', presses at {size}' if size else ''}: {'; '.join(parts)}.")
    return said


def _verdict(entry: Entry, task: Task) -> tuple[str, str]:
    """Whether it is worse than the baseline, and by how much."""
    kind, difference = standing(task)
    score, base = task.get("score"), task.get("score_base")
    few = few_questions(task)
    n = "" if few is None else f" ({few})"
    if score is not None:
        return kind, f"{entry.label} {score:.2f}" + ("" if base is None else f" against {base:.2f}") + n
    return kind, (entry.label if difference is None else f"{entry.label} {difference:+.3f} nats") + n


def where(section: Section) -> str:
    """``On WikiText-103 with pythia-70m``."""
    return f"On {clean(text_name(section.first))} with {model_name(section.first)}"


def headline(section: Section, apart: str = "") -> str:
    """What to quote from a section; ``apart`` tells it from another of the same text and model."""
    lead = where(section) + (f" ({apart})" if apart else "")
    if not section.entries:
        return f"{lead}, nothing was finished under {clean(section.first['protocol'])}."
    return f"{lead}: {' '.join(sentences(answer(section)))}"


def findings(section: Section) -> list[str]:
    """What can be said of each size, of speed, and of what went wrong."""
    said: list[str] = []
    if section.kind == "quality":
        compared = _compared(p for p in section.entries if not p.is_baseline)
        if compared and (n := n_windows(compared)) < FEWEST_WINDOWS:
            said.append(f"Too few windows ({n}): presses are not ranked; score {FEWEST_WINDOWS} at least.")
        else:
            for size in section.sizes:
                said += _at(section, size)
        said += _oddities(section)
    elif section.kind == "stream":
        said += [sentence for size in section.sizes for sentence in _stream_at(section, size)]
    elif section.kind == "speed":
        said += [_speed_at(section, context) for context in section.contexts]
    elif section.kind == "tasks":
        said += _task_findings(section)
    said += [f"{clean(p.name)} {_error_words(p)}." for p in section.unfinished]
    return said


def _effect(entry: Entry) -> str:
    """What it does to the loss, the cache and the speed."""
    return listed([part for part in (_ppl_words(entry), _cache_words(entry), _speed_words(entry)) if part])


def _compared(entries: Iterable[Entry]) -> list[Entry]:
    """Those with a difference to the baseline, the smallest first."""
    return sorted((p for p in entries if p.delta_nll is not None), key=lambda p: (p.delta_nll, p.label))


def _at(section: Section, size: str) -> list[str]:
    """Of one size: who loses least, who cannot be told from it, who is behind the references, whether one is cheap."""
    entries = section.at(size)
    uneven = [p for p in entries if p.keeps_more or p.equals_baseline]
    compared = _compared(p for p in entries if p not in uneven)
    ranked = [p for p in compared if p.record["press"] != "random" or p.kv_bits is not None]
    said = []
    at = at_words(size)
    apart = "" if len(ranked) == len(compared) else " but random"  # of which the next sentence speaks
    if ranked:
        best = ranked[0]
        said.append(f"{capital(at)}, {clean(best.label)} {_effect(best)}{_standing(best, ranked[1:], apart)}.")
        said += [s for name in REFERENCES if name != best.label and (s := _against(compared, name, at))]
        said.append(_cheap_words(ranked, at))
    elif compared:
        said.append(f"{capital(at)}, only {clean(compared[0].label)} was measured: it {_effect(compared[0])}.")
    more = [p for p in uneven if p.keeps_more and not p.equals_baseline]
    if more:
        kept = listed([f"{p.label} ({p.removed:.2f})" for p in more])
        said.append(f"{capital(at)}, less than that was removed by {kept}; left out of the comparison.")
    return said


def _told_apart(best: Entry, others: Sequence[Entry]) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Of ``others``: those that lose more, those within the error bars, those that lose less."""
    more: list[Entry] = []
    level: list[Entry] = []
    less: list[Entry] = []
    for other in others:
        difference = paired(other, best)
        if difference is None or difference.ci95 is None:
            continue
        low, high = difference.ci95
        (more if low > 0 else less if high < 0 else level).append(other)
    return more, level, less


def _standing(best: Entry, others: Sequence[Entry], apart: str) -> str:
    if not others:
        return ""
    more, level, less = _told_apart(best, others)
    if not more and not level and not less:
        return ", the smallest change measured here; without windows in common nothing is said about who is better"
    level += less  # the next of a smaller mean can only be behind: here for completeness
    if level:
        behind = f"; {len(more)} {'is' if len(more) == 1 else 'are'} behind it" if more else ""
        return f", the smallest change measured here, but {listed([p.label for p in level])} " + (
            f"{'is' if len(level) == 1 else 'are'} within the error bars of it{behind}"
        )
    following = paired(more[0], best)
    assert following is not None and following.ci95 is not None
    low, high = following.ci95
    n = len(others)
    everyone = f"{('both' if n == 2 else f'all {n}') if len(more) == n else f'{len(more)} of {n}'} others{apart}"
    lead = clean(more[0].label) if len(others) == 1 else f"{everyone}; the next is {clean(more[0].label)}"
    return f", ahead of {lead} (by {number(following.delta)} [{number(low)}, {number(high)}] nats a token)"


def _against(compared: Sequence[Entry], name: str, at: str) -> str | None:
    """How the presses stand to a reference."""
    reference = next((p for p in compared if p.record["press"] == name and p.is_reference), None)
    others = [p for p in compared if p is not reference and p.record["press"] not in REFERENCES]
    if reference is None or not others:
        return None
    apart = _apart_words(reference, others) or "no windows in common, so nothing is said about who is better"
    return f"The reference {name} {at} {_ppl_words(reference)}; {apart}."


def _apart_words(entry: Entry, others: Sequence[Entry]) -> str:
    """Who is ahead of an entry, who within its error bars and who behind it; nothing where none can be compared."""
    more, level, less = _told_apart(entry, others)
    if not more and not level and not less:
        return ""
    parts = [f"ahead of it: {listed([p.label for p in less])}" if less else "no press is ahead of it"]
    parts += [f"within the error bars: {listed([p.label for p in level])}"] if level else []
    parts += [f"behind it: {listed([p.label for p in more])}"] if more else []
    return "; ".join(parts)


def _cheap_words(ranked: Sequence[Entry], at: str) -> str:
    cheap = [p for p in ranked if is_cheap(p)]
    known = [ci for p in ranked if (ci := p.ppl_change_ci) is not None]
    if cheap:
        return f"Cheap {at} (whole interval within {WITHIN}): {listed([p.label for p in cheap])}."
    if not known:
        return f"There are no error bars {at}, so no press is called cheap."
    if all(low > CHEAP for low, _ in known):
        return f"No press {at} is cheap: every interval lies above {WITHIN}."
    return f"No press {at} is shown to be cheap: some intervals reach below {WITHIN}, none stays there."


def _oddities(section: Section) -> list[str]:
    """Points that hide behind others: the same as the baseline, or as each other, to the last digit."""
    said = []
    for entry in section.entries:
        if entry.equals_baseline and entry.removed:
            said.append(
                f"{clean(entry.name)} has the uncompressed model's loss in every window, though "
                f"{100 * entry.removed:.0f} % was removed: check that it was really applied."
            )
        elif entry.equals_baseline:
            said.append(f"{clean(entry.name)} removed nothing, and changed nothing.")
    for size in section.sizes:
        alike: dict[str, list[Entry]] = {}
        for entry in section.at(size):
            if entry.per_window and not entry.equals_baseline:
                alike.setdefault(repr([w["nll"] for w in entry.per_window]), []).append(entry)
        for same in alike.values():
            if len(same) > 1:
                said.append(f"{listed([p.label for p in same])} have the same loss in every window {at_words(size)}.")
    return said


def _stream_at(section: Section, size: str) -> list[str]:
    """Of one budget: the losses, and who is ahead where there are several texts."""
    entries = sorted((p for p in section.at(size) if p.loss is not None), key=lambda p: (p.loss, p.label))
    if not entries:
        return []
    at = at_words(size)
    base = section.baseline
    shown = [*entries, *([base] if base is not None and base.scored_tokens == entries[0].scored_tokens else [])]
    values = listed([f"{p.label} {p.ppl:.2f}" for p in shown if p.ppl is not None], most=12)
    said = [f"{capital(at)}, PPL is {values}."]
    best, others = entries[0], entries[1:]
    if apart := _apart_words(best, others):
        said.append(f"Paired by text {at}, of {clean(best.label)}: {apart}.")
    elif others:
        said.append(f"The texts {at} are too few for error bars, or not the same; nothing is said about who is better.")
    return said


def _speed_at(section: Section, context: int) -> str:
    """Of one context: what was faster in every round, the fastest first."""
    timed = [p for p in section.entries if p.context == context and p.decode_speedup is not None and not p.is_baseline]
    timed.sort(key=lambda p: (-p.decode_speedup, p.label))
    surely = [p for p in timed if p.is_surely_faster]
    at = f"With {context:,} tokens of context"
    if not timed:
        return f"{at} no press was compared with the uncompressed cache."
    if not surely:
        known = any(p.has_rounds for p in timed)
        because = "by more than the rounds differ" if known else "for certain: no spread of several rounds is recorded"
        return f"{at} no press decodes faster than the uncompressed cache {because}."
    best = surely[0]
    rest = [p.name for p in surely[1:]]
    also = f"; faster in every round, too: {listed(rest)}" if rest else ""
    base = next((p for p in section.entries if p.is_baseline and p.context == context), None)
    first = ""
    if base is not None and base.ttft_s and best.ttft_s:
        first = f", first token after {best.ttft_s:.3f} s against {base.ttft_s:.3f} s"
    return (
        f"{at} {clean(best.name)} decodes {best.decode_speedup:.2f} times as fast as the uncompressed cache "
        f"({_rounds_words(best)}){first}{also}."
    )


# What is said of one press at one size


def _ppl_words(entry: Entry) -> str:
    """``changes PPL by +0.4 % [0.1, 0.7]``, the brackets holding the 95 % interval."""
    change, ci = entry.ppl_change, entry.ppl_change_ci
    if change is None:
        return "has no loss to compare"
    if entry.equals_baseline:
        return "leaves every loss exactly as it was"
    if not math.isfinite(change):
        return "multiplies PPL beyond all bounds"
    if change > 9:  # percentages of thousands say less
        low_high = "" if ci is None else f" [{1 + ci[0]:.3g}, {1 + ci[1]:.3g}]"
        return f"multiplies PPL by {1 + change:.3g}{low_high}"
    width = abs(change) if ci is None else (ci[1] - ci[0]) / 2
    decimals = 1 if width >= 0.001 else 2 if width >= 0.0001 else 3
    between = "" if ci is None else f" [{number(100 * ci[0], decimals)}, {number(100 * ci[1], decimals)}]"
    level = ", within the error bars of no change" if ci is not None and ci[0] <= 0 <= ci[1] else ""
    return f"changes PPL by {percent(change, decimals)}{between}{level}"


def _cache_words(entry: Entry) -> str | None:
    """``leaves 50 % of the KV cache``; None where its bytes are not known."""
    kept = entry.kept_bytes
    if kept is None:
        return None
    sizes = f"({format_bytes(entry.kv_bytes_baseline)} to {format_bytes(entry.kv_bytes)})"
    if kept >= 0.995:
        return "leaves the KV cache as large as it was"
    return f"leaves {100 * kept:.0f} % of the KV cache {sizes}"


def _speed_words(entry: Entry) -> str | None:
    """``decodes 1.2 times as fast``, if all rounds agree that it is faster; None where it was not timed."""
    times = entry.decode_speedup
    if times is None:
        return None if entry.timed is None else _speed_words(entry.timed)
    context = f" with {entry.context:,} tokens of context" if entry.context else ""
    if not entry.has_rounds:
        return f"was {times:.2f} times as fast in the one round that is recorded{context}"
    rounds, spread = _rounds_words(entry), entry.decode_speedup_spread
    if spread["min"] <= 1 <= spread["max"]:
        return f"decodes as fast as before{context}, to within the rounds ({times:.2f} times; {rounds})"
    return f"decodes {times:.2f} times as fast{context} ({rounds})"


def _rounds_words(entry: Entry) -> str:
    """How far the rounds of a timing lie apart; those with a spread only."""
    spread, n = entry.decode_speedup_spread, entry.record.get("repetitions")
    return f"{f'{n} ' if isinstance(n, int) else ''}rounds from {spread['min']:.2f} to {spread['max']:.2f}"


def _error_words(entry: Entry) -> str:
    """``failed: ValueError: ...`` or how far an interrupted run came."""
    if entry.record["status"] == "failed":
        said = clean(entry.record.get("error") or "no error is recorded")
        return f"failed: {said if len(said) <= 200 else said[:197] + '...'}"
    if entry.record["status"] == "interrupted":
        windows = entry.record.get("windows")
        return "was interrupted" + (f" after {windows:g} windows" if windows else "")
    return f"has the status {clean(entry.record['status'])[:40]}"
