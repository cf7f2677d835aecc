"""What tells sections of one name apart: as little of what differs as does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from coldpress.records.schema import ENVIRONMENT, SPEED_SETTINGS
from coldpress.records.wording import clean
from coldpress.report.sections import Section


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
        "windows": "" if windows is None else f"{windows:,} window{'' if windows == 1 else 's'}",
        "scored_tokens": "" if scored is None else f"{scored:,} scored tokens",
    }
    return {name: clean(words or "") for name, words in said.items()}


def _setting(name: str, value: object) -> str:
    """``repetitions 3``; a switch by its name alone."""
    return "" if value is None or value is False else name if value is True else f"{name} {value}"
