"""A section in words: where it was measured, the minute's answer, what is odd or failed, and what tells it from others.

Who is ahead of whom is said by the answer alone; the numbers stand in tables and drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from coldpress.eval.glance import answer
from coldpress.eval.phrases import sentences
from coldpress.eval.schema import ENVIRONMENT, SPEED_SETTINGS
from coldpress.eval.sections import Entry, Section, text_name
from coldpress.eval.wording import at_words, capital, clean, listed, model_name


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
    """What a reader of the numbers must know: points that hide or are left out, and what went wrong."""
    said = _oddities(section) if section.kind == "quality" else []
    return said + [f"{clean(p.name)} {_error_words(p)}." for p in section.unfinished]


def _oddities(section: Section) -> list[str]:
    """Points that removed less than others, or are the same as the baseline or each other to the last digit."""
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
        more = [f"{p.label} ({p.removed:.2f})" for p in section.at(size) if p.keeps_more and not p.equals_baseline]
        if more:
            said.append(
                f"{capital(at_words(size))}, less than that was removed by {listed(more)}; left out of the comparison."
            )
        alike: dict[str, list[Entry]] = {}
        for entry in section.at(size):
            if entry.per_window and not entry.equals_baseline:
                alike.setdefault(repr([w["nll"] for w in entry.per_window]), []).append(entry)
        for same in alike.values():
            if len(same) > 1:
                said.append(f"{listed([p.label for p in same])} have the same loss in every window {at_words(size)}.")
    return said


def _error_words(entry: Entry) -> str:
    """``failed: ValueError: ...`` or how far an interrupted run came."""
    if entry.record["status"] == "failed":
        said = clean(entry.record.get("error") or "no error is recorded")
        return f"failed: {said if len(said) <= 200 else said[:197] + '...'}"
    if entry.record["status"] == "interrupted":
        windows = entry.record.get("windows")
        return "was interrupted" + (f" after {windows:g} windows" if windows else "")
    return f"has the status {clean(entry.record['status'])[:40]}"


# What tells sections of one name apart: as little of what differs as does it


def added(found: Iterable[Section], named: Callable[[Section], object]) -> dict[int, str]:
    """By the ``id`` of each section what to add to its name; an empty text where no other has the name."""
    twins: dict[object, list[Section]] = {}
    for section in found:
        twins.setdefault(named(section), []).append(section)
    return {
        id(section): words
        for own in twins.values()
        for section, words in zip(own, _told_apart(own) if len(own) > 1 else [""], strict=True)
    }


def _told_apart(found: Sequence[Section]) -> list[str]:
    """One fact, if that tells all from each other; else several, and a number where no fact does."""
    facts = [_facts(section) for section in found]

    def words(names: Sequence[str]) -> list[str]:
        return [", ".join(own[name] for name in names if own[name]) for own in facts]

    chosen: list[str] = next(([name] for name in facts[0] if len(set(words([name]))) == len(found)), [])
    if not chosen:
        for name in facts[0]:
            if len(set(words([*chosen, name]))) > len(set(words(chosen))):
                chosen.append(name)
    said = words(chosen)
    return [
        one if said.count(one) == 1 else f"{f'{one}, ' if one else ''}part {said[: i + 1].count(one)}"
        for i, one in enumerate(said)
    ]


def _facts(section: Section) -> dict[str, str]:
    """What records of two sections may differ in, in words; an empty text where there is nothing to say."""
    record, env = section.first, section.first["env"]
    settings = {} if (record.get("settings") or {}).get("ppl_only") else {**(record.get("settings") or {})}
    if section.kind == "speed":  # of several contexts
        settings.pop("context_limit", None)
    windows, scored = record.get("windows"), record.get("scored_tokens")
    said = {
        "protocol": f"protocol {record['protocol']}",
        "model": f"model {record['model']}",
        "num_params": f"{record['num_params'] / 1e6:.1f} M parameters",
        "dtype": record["dtype"],
        "device": record["device"],
        "attn_implementation": f"attention {record['attn_implementation']}",
        "dataset": f"text {record['dataset']}",
        "subset": f"subset {record['subset']}" if record.get("subset") else "",
        "text_sha256": f"text sha256 {str(record['text_sha256'])[:12]}",
        "total_tokens": f"{record['total_tokens']:,} tokens of text",
        **{name: _setting(name, settings.get(name)) for name in SPEED_SETTINGS},
        **{name: env[name] if name == "cpu" else f"{name} {env[name]}" for name in ENVIRONMENT},
        "windows": "" if windows is None else f"{windows:,} windows",
        "scored_tokens": "" if scored is None else f"{scored:,} scored tokens",
    }
    return {name: clean(words or "") for name, words in said.items()}


def _setting(name: str, value: object) -> str:
    """``repetitions 3``; a switch by its name alone."""
    return "" if value is None or value is False else name if value is True else f"{name} {value}"
