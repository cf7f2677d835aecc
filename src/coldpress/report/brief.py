"""The brief report: models, data, methods, tables, conclusion and commands as one short Markdown text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.errors import PressError
from coldpress.io.output import check_writable, write_file
from coldpress.records.results import Collection
from coldpress.records.wording import capital, clean, escape, fenced, model_name, table_lines, weights_file
from coldpress.report.columns import task_table
from coldpress.report.glance import Row, answer, chosen, rows
from coldpress.report.phrases import WORDS, contexts, headed, memory, removed_words, sentences, versions
from coldpress.report.sections import Section, sections, text_name

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
    blocks += [f"## {words['data']}", _list(_texts(records, words))]
    together = _together(found)
    results = [block for own in together for block in _group(own, language)]
    unfinished = [s for s in sections(records) if not s.entries]
    if unfinished:
        results.append(escape(words["unfinished"].format(names="; ".join(dict.fromkeys(map(_title, unfinished))))))
    marks = [words[mark] for mark in _MARKS if any(mark in block for block in results)]
    methods = [*_methods(records, language), *([("" if language == "zh" else " ").join(marks)] if marks else [])]
    blocks += [f"## {words['methods']}", _list(methods)]
    blocks += [f"## {words['results']}", *results]
    blocks += [f"## {words['conclusion']}"]
    blocks += [_conclusion(own, language, len(found) > 1) for own in together]
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
    return f"{_of_what(section)}, {_protocol(section)}"


def _of_what(section: Section) -> str:
    return f"{model_name(section.first)}, {clean(text_name(section.first))}"


def _protocol(section: Section) -> str:
    return clean(section.first["protocol"])


def _model_words(record: dict[str, Any], words: dict[str, str]) -> str:
    facts = {name: record[name] for name in ("dtype", "device")}
    attention = record["attn_implementation"]
    file, name = weights_file(record), model_name(record)
    name += words["brackets"].format(file) if file else ""
    return words["model"].format(name=name, n=f"{record['num_params'] / 1e6:.1f}", attention=attention, **facts)


def _texts(records: Sequence[dict[str, Any]], words: dict[str, str]) -> list[str]:
    """A line for each text; models read it as different numbers of tokens."""
    sizes: dict[tuple[str, str], dict[str, None]] = {}
    for r in records:
        sizes.setdefault((text_name(r), r["text_sha256"][:12]), {})[f"{r['total_tokens']:,}"] = None
    return [words["text"].format(name=name, n=" / ".join(n), sha=sha) for (name, sha), n in sizes.items()]


def _methods(records: Sequence[dict[str, Any]], language: str) -> list[str]:
    """A line for each press, and how quality, speed and memory were measured."""
    from coldpress.bases.registry import find_press  # which other reports do without

    words, said = WORDS[language], [WORDS[language]["no_press"]]
    done = [r for r in records if r["status"] != "failed"]
    for name in sorted({r["press"] for r in done} - {NO_PRESS}):
        own = [r for r in done if r["press"] == name]
        is_open = all(r["status"] == "interrupted" for r in own)
        mark = words["brackets"].format(words["interrupted"]) if is_open else ""
        digests = dict.fromkeys((r.get("press_config") or {}).get("file_sha256") for r in own)
        if any(digests):
            file, _, press = name.rpartition(":")
            about = {"name": f"{press or name}{mark}", "file": Path(file or name).name}
            said += [words["own"].format(sha=str(digest)[:12], **about) for digest in digests if digest]
            continue
        try:
            info = find_press(name)
        except PressError:  # of another version
            said.append(f"{name}{mark}")
            continue
        source = capital(info.source) if info.source else ""
        said.append(f"{name}{mark}: {info.summary.replace('``', '')} {source}".strip())
    windows: dict[str, list[int]] = {}  # of runs that differ in their number alone
    for record in [r for r in done if r["status"] == "ok"] or done:
        protocol = str(record["protocol"])
        sizes = {"context": f"{record.get('context_tokens') or 0:,}", "target": f"{record.get('target_tokens') or 0:,}"}
        if protocol.startswith("prefix") and record.get("target_tokens") and record.get("windows"):
            windows.setdefault(words["prefix"].format(protocol=protocol, **sizes), []).append(record["windows"])
        elif protocol.startswith("strided"):
            said.append(words["strided"].format(protocol=protocol))
        elif not protocol.startswith(("prefix", "speed")):
            said.append(words["other"].format(protocol=protocol))
    said += [f"{line}{_windows_words(numbers, words)}" for line, numbers in windows.items()]
    timed = [r for r in records if r.get("generated_tokens")]
    lengths = sorted({r.get("speed_context_tokens") or r.get("context_tokens") or 0 for r in timed})
    for n, rounds in dict.fromkeys((r["generated_tokens"], r.get("repetitions") or 1) for r in timed):
        context = " / ".join(f"{length:,}" for length in lengths)
        said.append(words["timing"].format(context=context, n=n, rounds=rounds))
    kinds = dict.fromkeys(r["peak_mem_kind"] for r in timed if r.get("peak_mem_kind"))
    said += [words["peak"].format(kind=memory(kind, language)) for kind in kinds]
    return [*dict.fromkeys(said)]


def _windows_words(numbers: Sequence[int], words: dict[str, str]) -> str:
    least, most = min(numbers), max(numbers)
    n = f"{least:,}" if least == most else words["to"].format(least=f"{least:,}", most=f"{most:,}")
    return words["one_window" if most == 1 else "windows"].format(n=n)


def _together(found: Sequence[Section]) -> list[list[Section]]:
    """The sections of each model and text."""
    together: dict[tuple[Any, ...], list[Section]] = {}
    for section in found:
        key = *_model(section.first), section.first["text_sha256"], text_name(section.first)
        together.setdefault(key, []).append(section)
    return [*together.values()]


def _group(own: Sequence[Section], language: str) -> list[str]:
    """The results of one model and text: under one heading, and one for each protocol where there are several."""
    if len(own) == 1:
        return [f"### {escape(_title(own[0]))}", *_results(own[0], language)]
    blocks = [f"### {escape(_of_what(own[0]))}"]
    for section, title in zip(own, _protocols(own, language), strict=True):
        blocks += [f"#### {escape(title)}", *_results(section, language)]
    return blocks


def _protocols(own: Sequence[Section], language: str) -> list[str]:
    """Of each section; with its windows where others have the same."""
    names = [_protocol(section) for section in own]
    numbers = [[int(p.record["windows"]) for p in s.entries if p.record.get("windows")] for s in own]
    return [
        f"{name}, {_windows_words(n, WORDS[language]).rstrip('.。')}" if names.count(name) > 1 and n else name
        for name, n in zip(names, numbers, strict=True)
    ]


def _conclusion(own: Sequence[Section], language: str, is_listed: bool) -> str:
    space = " " if language == "en" else ""
    said = [escape(space.join(sentences(answer(section), language))) for section in own]
    if not is_listed:
        return said[0]
    if len(own) == 1:
        return f"* **{escape(_title(own[0]))}**: {said[0]}"
    lines = [f"  * {escape(title)}: {text}" for title, text in zip(_protocols(own, language), said, strict=True)]
    return "\n".join([f"* **{escape(_of_what(own[0]))}**:", *lines])


def _results(section: Section, language: str) -> list[str]:
    found = rows(section)
    shown = chosen(found)
    notes = contexts(section, language)
    if len(shown) < len(found):
        notes.append(WORDS[language]["left_out"].format(n=len(shown), of=len(found)))
    notes += versions([section], language)
    opening = "\n".join(table_lines(headed(shown, language)))
    return [opening, *_tasks(section, shown, language), *([" ".join(notes)] if notes else [])]


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
