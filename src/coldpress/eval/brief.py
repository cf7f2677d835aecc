"""The brief report: models, data, methods, tables, conclusion and commands as one short Markdown text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.errors import PressError
from coldpress.eval.columns import task_table
from coldpress.eval.glance import Row, answer, chosen, rows
from coldpress.eval.phrases import WORDS, contexts, headed, memory, removed_words, sentences, versions
from coldpress.eval.results import Collection, check_writable, write_file
from coldpress.eval.sections import Section, sections, text_name
from coldpress.eval.wording import clean, escape, fenced, model_name, table_lines

_MARKS = ("KL", "PPL", "±", "tok/s")  # of a table, that are explained where they stand in one


def _told(found: Sequence[Section]) -> list[Section]:
    """The sections that a brief report shows: timings of a model only where no other table of it holds them."""
    holds = {_model(s.first) for s in found for p in s.entries if s.kind == "quality" and p.timed is not None}
    return [s for s in found if s.entries and not (s.kind == "speed" and _model(s.first) in holds)]


def _model(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["model"], record["dtype"], record["device"], record["num_params"]


def brief(collection: Collection, language: str = "en") -> str:
    """The whole text."""
    words, found = WORDS[language], _told(sections(collection.records))
    records = collection.records
    blocks = [f"# {words['title']}"]
    blocks += [f"## {words['models']}", _list(_model_words(r, words) for r in records)]
    blocks += [f"## {words['data']}", _list(_text_words(r, words) for r in records)]
    results = [block for section in found for block in _results(section, language)]
    marks = [words[mark] for mark in _MARKS if any(mark in block for block in results)]
    methods = [*_methods(records, language), *([("" if language == "zh" else " ").join(marks)] if marks else [])]
    blocks += [f"## {words['methods']}", _list(methods)]
    blocks += [f"## {words['results']}", *results]
    blocks += [f"## {words['conclusion']}"]
    for section in found:
        said = sentences(answer(section), language)
        title = f"**{escape(_title(section))}**: " if len(found) > 1 else ""
        space = " " if language == "en" else ""
        blocks.append(f"{'* ' if len(found) > 1 else ''}{title}{escape(space.join(said))}")
    commands = dict.fromkeys(clean(r["command"]) for r in records if r.get("command"))
    if commands:
        blocks += [f"## {words['commands']}", "\n".join(fenced([*commands]))]
    machines = {
        f"torch {e['torch']}, transformers {e['transformers']}, {e['cpu']}" for e in (r["env"] for r in records)
    }
    blocks += [f"## {words['machine']}", _list(sorted(machines))]
    return "\n\n".join(blocks) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {escape(clean(line))}" for line in dict.fromkeys(lines))


def _title(section: Section) -> str:
    return f"{model_name(section.first)}, {clean(text_name(section.first))}, {clean(section.first['protocol'])}"


def _model_words(record: dict[str, Any], words: dict[str, str]) -> str:
    facts = {name: record[name] for name in ("dtype", "device")}
    attention = record["attn_implementation"]
    return words["model"].format(
        name=model_name(record), n=f"{record['num_params'] / 1e6:.1f}", attention=attention, **facts
    )


def _text_words(record: dict[str, Any], words: dict[str, str]) -> str:
    sha = record["text_sha256"][:12]
    return words["text"].format(name=text_name(record), n=f"{record['total_tokens']:,}", sha=sha)


def _methods(records: Sequence[dict[str, Any]], language: str) -> list[str]:
    """A line for each press, and how quality, speed and memory were measured."""
    from coldpress.bases.registry import find_press  # which other reports do without

    words, said = WORDS[language], [WORDS[language]["no_press"]]
    for name in sorted({r["press"] for r in records} - {NO_PRESS}):
        try:
            info = find_press(name)
        except PressError:  # of a file, or of another version
            said.append(name)
            continue
        said.append(f"{name}: {info.summary.replace('``', '')} {info.source}".strip())
    for record in records:
        protocol = str(record["protocol"])
        sizes = {"context": f"{record.get('context_tokens') or 0:,}", "target": f"{record.get('target_tokens') or 0:,}"}
        if protocol.startswith("prefix") and record.get("target_tokens") and record.get("windows"):
            said.append(words["prefix"].format(protocol=protocol, windows=record["windows"], **sizes))
        elif protocol.startswith("strided"):
            said.append(words["strided"].format(protocol=protocol))
        elif not protocol.startswith(("prefix", "speed")):
            said.append(words["other"].format(protocol=protocol))
    timed = [r for r in records if r.get("generated_tokens")]
    lengths = sorted({r.get("speed_context_tokens") or r.get("context_tokens") or 0 for r in timed})
    for n, rounds in dict.fromkeys((r["generated_tokens"], r.get("repetitions") or 1) for r in timed):
        context = " / ".join(f"{length:,}" for length in lengths)
        said.append(words["timing"].format(context=context, n=n, rounds=rounds))
    kinds = dict.fromkeys(r["peak_mem_kind"] for r in timed if r.get("peak_mem_kind"))
    said += [words["peak"].format(kind=memory(kind, language)) for kind in kinds]
    return [*dict.fromkeys(said)]


def _results(section: Section, language: str) -> list[str]:
    found = rows(section)
    shown, heading = chosen(found), f"### {escape(_title(section))}"
    notes = contexts(section, language)
    if len(shown) < len(found):
        notes.append(WORDS[language]["left_out"].format(n=len(shown), of=len(found)))
    notes += versions([section], language)
    opening = "\n".join(table_lines(headed(shown, language)))
    return [heading, opening, *_tasks(section, shown, language), *([" ".join(notes)] if notes else [])]


def _tasks(section: Section, shown: Sequence[Row], language: str) -> list[str]:
    """What each task gave, which the opening table holds the mean of at most: a table; none where there are none."""
    table = task_table(section)
    names = [head for head, _ in table.heads[2:]]
    heads = [*WORDS[language]["heads"].split("|")[:2], *names]
    known = {(clean(row.press), row.size) for row in shown}
    found = [[cell.text for cell in row] for row in table.rows]
    found = [[press, "" if press == NO_PRESS else size, *cells] for press, size, *cells in found]
    lines = [[press, removed_words(size), *cells] for press, size, *cells in found if (press, size) in known]
    return ["\n".join(table_lines([heads, *lines]))] if names else []


def write_brief(collection: Collection, folder: Path, language: str) -> tuple[str, Path]:
    """Write ``brief.md``, or ``brief.zh.md``, into ``folder``; the text and where it went."""
    check_writable(folder)
    text = brief(collection, language)
    return text, write_file(folder / ("brief.md" if language == "en" else f"brief.{language}.md"), text.encode())
