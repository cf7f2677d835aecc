"""The page and the summary: whole, escaped, self-contained, the same each time, and with the records' numbers."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.records import NASTY, Record, everything, failed, many, record, spread, tasked, write

from coldpress.bases.registry import find_press
from coldpress.cli import main
from coldpress.errors import MissingDependencyError
from coldpress.records.results import Collection
from coldpress.report.brief import brief
from coldpress.report.columns import opening_table
from coldpress.report.figures import _inline
from coldpress.report.glance import Row
from coldpress.report.page import Report, escape, make_report, page, summary, write_report
from coldpress.report.phrases import WORDS

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Parsed(HTMLParser):
    """Open elements, texts, attributes; an element that is closed out of turn is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def document(records: list[Record], skipped: tuple[str, ...] = ()) -> Report:
    return make_report(Collection(tuple(records), skipped))


@pytest.fixture(scope="module")
def made() -> Report:
    return document(everything(), ("skipped <b>x</b>.json: it holds no object",))


@pytest.fixture(scope="module")
def html(made: Report) -> str:
    return page(made)


def test_the_page_is_well_formed(html: str) -> None:
    parsed = Parsed(html)
    assert not parsed.errors and not parsed.open
    names = [name for name, _ in parsed.tags]
    assert html.startswith("<!DOCTYPE html>") and ("html", {"lang": "en"}) in parsed.tags
    assert names.count("title") > 1 and "viewport" in [a.get("name") for n, a in parsed.tags if n == "meta"]
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for _, a in parsed.tags if a.get("href")]
    assert links and all(link is not None and link.startswith("#") and link[1:] in ids for link in links)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_nothing_is_fetched_from_anywhere(html: str) -> None:
    for name, attrs in Parsed(html).tags:
        assert name not in ("link", "iframe", "object", "img", "image") and "src" not in attrs
    outside = re.sub(re.escape("https://evil.example"), "", html)  # a text of a record, as text
    assert not re.search(r"https?:|@import|url\((?!#)", outside)
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_texts_of_records_are_texts(html: str, made: Report) -> None:
    parsed = Parsed(html)
    assert [name for name, _ in parsed.tags].count("script") == 1
    assert any("<script>alert(1)</script>" in text for _, text in parsed.texts)
    assert not re.search("[\x00-\x08\u202e\ud800-\udfff]", html)
    html.encode()
    markdown = summary(made)
    assert "<script>" not in re.sub(r"```.*?```|\\<script", "", markdown, flags=re.DOTALL)
    assert "skipped <b>" not in html and "skipped &lt;b&gt;" in html and r"\<b\>" in markdown


def test_markdown_is_escaped() -> None:
    assert escape("a|b *c* `d` [e](f) <g> $h$") == r"a\|b \*c\* \`d\` \[e\](f) \<g\> \$h\$"
    assert escape("streaming_llm _x_") == r"streaming_llm \_x\_"
    assert escape("- x\n# y") == r"\- x \# y"
    assert "https://" not in escape(NASTY)


def test_no_cell_breaks_a_markdown_table(made: Report) -> None:
    lines = summary(made).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(starts) == 1 + sum(len(part.tables) for part in made.parts)
    for start in starts:
        n = len(re.findall(r"(?<!\\)\|", lines[start]))
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        assert end - start > 1
        assert all(len(re.findall(r"(?<!\\)\|", line)) == n for line in lines[start - 1 : end])


def test_numbers_are_those_of_the_records(html: str, made: Report) -> None:
    records = [r for r in everything() if r.get("delta_nll") is not None and r["status"] == "ok"]
    for one in records:
        assert f'data-v="{one["delta_nll"]!r}"' in html and f'data-v="{one["kv_bytes"]!r}"' in html
    (row,) = (row for row in made.parts[0].tables[0].rows if row[0].text == "snapkv" and row[1].text == "0.25")
    (one,) = (r for r in records[:12] if r["press"] == "snapkv" and r["compression_ratio"] == 0.25)
    low, high = one["delta_nll_ci95"]
    shown = dict(zip([head for head, _ in made.parts[0].tables[0].heads], row, strict=True))
    delta = shown["ΔNLL"]
    assert (delta.text, delta.said) == (f"{one['delta_nll']:+.4f}", f"[{low:.4f}, {high:.4f}]")
    assert shown["PPL"].text == f"{one['ppl']:.3f}" and shown["same top-1"].text == "90.0 %"
    assert shown["KV after"].text == "6.00 MiB" and [head for head, _ in made.parts[0].tables[0].heads][3] == "KV after"


def test_intervals_are_drawn_on_the_scale_of_their_column_and_spelled_for_a_pointer(made: Report, html: str) -> None:
    rows = made.parts[0].tables[0].rows
    at = [head for head, _ in made.parts[0].tables[0].heads].index("ΔNLL")
    cells = {(row[0].text, row[1].text): row[at] for row in rows if row[at].span is not None}
    ends = [end for name, cell in cells.items() if name[0] != "random" for end in cell.span or ()]
    low, high = min(0, *ends), max(0, *ends)
    for cell in cells.values():
        assert cell.span is not None and cell.value is not None
        wanted = [(x - low) / (high - low) for x in (*cell.span, cell.value, 0)]
        assert cell.bar == pytest.approx(wanted) and f'title="{cell.text} {cell.said}"' in html
    beyond = cells["random", "0.75"].bar
    assert beyond is not None and beyond[1] > 1  # random does not stretch the scale


def test_the_opening_table_is_sorted_by_numbers(made: Report, html: str) -> None:
    heads, *_ = zip(*made.opening.table.heads, strict=True)
    for row in made.opening.table.rows:
        for head, cell in zip(heads, row, strict=True):
            is_number = bool(cell.text) and head not in ("press", "status")
            assert (cell.value is not None) == is_number, (head, cell)
    sizes = [Row("knorm", "0.5", 0.5, kv_bytes=n) for n in (900 << 20, 2 << 30, 500 << 10)]
    by_text, by_number = (
        [row[2].text for row in sorted(opening_table(sizes).rows, key=key)]
        for key in (lambda row: row[2].text, lambda row: row[2].value)
    )
    assert by_number == ["500 KiB", "900 MiB", "2.00 GiB"] != by_text


def test_the_page_opens_with_three_sentences_a_table_of_eight_columns_and_a_plot(made: Report, html: str) -> None:
    opening = made.opening
    assert 0 < len(opening.sentences) <= 3 and len(opening.table.heads) <= 9  # eight, and what failed
    assert opening.figure is not None and opening.figure.kind == "kl"
    assert not any(figure is opening.figure for part in made.parts for figure in part.figures)
    assert html.index('class="answer"') < html.index("<table") < html.index("<nav") < html.index("<details")
    folded = re.findall(r'<details id="([^"]+)"', html)
    assert [part.anchor for part in made.parts] == folded[: len(made.parts)]
    assert all(f'href="#{anchor}"' in html for anchor in folded)


def test_no_interval_of_a_score_leaves_0_to_1(made: Report) -> None:
    spans = [
        cell.span for part in made.parts for table in part.tables if table.title == "Task × press"
        for row in table.rows for cell in row[2:] if cell.span is not None and "nats" not in cell.text
    ]  # fmt: skip
    assert spans and all(0 <= low <= high <= 1 for low, high in spans)


def test_each_picture_has_one_protocol_and_one_text(made: Report) -> None:
    protocols = {r["protocol"] for r in everything()}
    assert made.opening.figure is not None
    figures = [(made.parts[0], made.opening.figure), *((part, f) for part in made.parts for f in part.figures)]
    assert {f.kind for _, f in figures} == {
        "quality",
        "kl",
        "distance",
        "positions",
        "speed",
        "tasks",
        "depth",
    }
    for part, figure in figures:
        named = [p for p in protocols if f"protocol {p};" in figure.caption]
        assert len(named) == 1 and part.title.endswith(named[0]) and "sha256 abababababab" in figure.caption
        assert figure.png.startswith(b"\x89PNG")
    assert len({f.file for _, f in figures}) == len(figures)


def test_what_failed_is_drawn_and_told(made: Report) -> None:
    part = made.parts[0]
    (quality,) = (f for f in part.figures if f.kind == "quality")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", quality.svg)
    assert {"failed", "interrupted", "= baseline", "tova", "cur", "keydiff"} <= set(texts)
    bad = [cell.text for row in part.tables[0].rows for cell in row if cell.is_bad]
    assert any(text.startswith("failed: ValueError: <script>") for text in bad) and "same as baseline" in bad
    assert "2 failed, 1 interrupted" in made.counts and "1 other file that is no record was left out" in made.counts


def test_the_opening_shows_other_texts_and_tasks_of_the_same_presses_and_other_versions_in_a_footnote() -> None:
    names = [f"press_{i}" for i in range(4)]
    sizes = (0.25, 0.5, 0.75, 0.9)
    texts = [
        record(name, size, spread(0.1 * size, 0.01), **more)
        for more in ({}, {"dataset": "pg19", "subset": None, "timestamp": "2026-02-02T00:00:00Z"})
        for size in sizes
        for name in names
    ]
    newer = {"env": texts[0]["env"] | {"transformers": "9.9"}}
    texts = [one | newer if one["press"] == names[3] else one for one in texts]
    tasks = [tasked(name, 0.5, 0.1) for name in names]
    opening = document([record("no_press"), *texts, *tasks]).opening
    heads = [head for head, _ in opening.table.heads]
    assert heads[5:] == ["change of PPL", "PPL, PG-19", "needle at 512 tokens", "needle at 1,024 tokens"]
    assert [row[0].text for row in opening.table.rows] == ["no_press", *names]
    assert {row[1].text for row in opening.table.rows[1:]} == {"50 %"}
    assert [cell.text for cell in opening.table.rows[0][6:]] == ["20.09", "100 %", "100 %"]
    assert [cell.text for cell in opening.table.rows[1][6:]] == ["+5.1 %", "90 %", "90 %"]
    assert "needle at 512 tokens and needle at 1,024 tokens: answers that are right, of 15 questions." in opening.notes
    assert "Transformers 9.9 ran press_3, transformers 5.0 the others" in opening.notes
    whole = Collection((record("no_press"), *texts), ())
    assert brief(whole).count("Transformers 9.9 ran press_3, transformers 5.0 the others") == 2  # texts
    assert brief(whole, "zh").count("在 transformers 9.9 下测量的是 press_3，其余在 transformers 5.0 下") == 2
    without = document([record("no_press"), *texts, tasks[0]]).opening  # tasks of one press only
    assert len({row[1].text for row in without.table.rows}) == 5


def test_parts_of_one_text_are_told_apart() -> None:
    older = [record("no_press"), record("snapkv", 0.5, spread(0.1, 0.01))]
    newer = [one | {"env": one["env"] | {"transformers": "9.9"}} for one in older]
    titles = [part.title for part in document(older + newer).parts]
    assert len(titles) == 2 and titles[1].endswith(", transformers 9.9") and ", transformers" in titles[0]


def test_a_caption_of_timings_names_all_contexts(made: Report) -> None:
    (part,) = (part for part in made.parts if part.title.endswith("speed"))
    assert "timed with 256 and 1,024 tokens of context" in part.caption


def test_references_are_in_every_picture_of_losses(made: Report) -> None:
    for figure in made.parts[0].figures:
        for name in ("no_press", "random", "streaming_llm"):
            assert name in figure.svg, (figure.kind, name)


def test_one_size_is_drawn_press_by_press_with_what_failed() -> None:
    rows = [record("no_press"), record("snapkv", 0.5, spread(0.1, 0.01)), failed("tova", 0.5), record("keydiff", 0.5)]
    (part,) = document(rows).parts
    (quality,) = (f for f in part.figures if f.kind == "quality")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", quality.svg)
    assert {"snapkv", "tova", "× failed", "keydiff = baseline"} <= set(texts)


def test_the_same_records_make_the_same_files(tmp_path: Path) -> None:
    records = tuple(everything()[:16])
    first, second = (tmp_path / name for name in "ab")
    for folder in (first, second):
        write_report(Collection(records, ()), folder)
    names = sorted(path.name for path in first.iterdir())
    assert {"report.html", "report.md", "1-quality.png"} <= set(names) and names == sorted(
        p.name for p in second.iterdir()
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (first / "report.md").read_text())
    assert sorted(images) == [name for name in names if name.endswith(".png")]


@pytest.mark.slow
def test_the_page_of_many_records_is_small() -> None:
    made = document(many())
    assert len(page(made).encode()) < 500_000
    assert "the 26 others thin grey" in made.parts[0].figures[0].caption


def test_a_picture_takes_the_colours_of_its_page_and_keeps_its_texts() -> None:
    drawn = (
        '<svg height="1pt" viewBox="0 0 72 9"><g id="t0"/><g id="t1"><path id="a" style="fill: #0072B2" d="M1.23456"/>'
    )
    texts = '</g><use href="#a"/><text style="fill: #1b1f24">0.12345 #0072b2 url(#a)</text></svg>'
    assert _inline(drawn + texts, "p", {"t1": "<x>"}, "q: w") == (
        '<svg viewBox="0 0 72 9" style="--wide: 6.6rem" role="img" aria-label="q: w"><g/><g><title>&lt;x&gt;</title>'
        '<path id="p-a" style="fill: var(--s0)" d="M1.23"/></g><use href="#p-a"/>'
        '<text style="fill: currentColor">0.12345 #0072b2 url(#a)</text></svg>'
    )


def test_the_command_prints_tables_and_writes_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write(tmp_path / "one", [record("no_press"), record("snapkv", 0.5, spread(0.1, 0.01))])
    two = write(tmp_path / "two" / "deep", [record("knorm", 0.5, spread(0.2, 0.01))]).parent
    assert main(["report", str(one), str(two), "--table"]) == 0
    assert "| knorm" in capsys.readouterr().out and not (one / "report").exists()
    assert main(["report", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "| snapkv" in out and f"report: {one / 'report' / 'report.html'}" in out.splitlines()[-1]
    assert main(["report", str(one), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").is_file()
    assert main(["report", str(one), "--output", str(one / "0000.json")]) == 2
    out, err = capsys.readouterr()
    assert "| snapkv" in out and len(err.splitlines()) == 1 and "is a file" in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(one)]) == 2
    out, err = capsys.readouterr()
    assert "| snapkv" in out and 'pip install "coldpress[report]"' in err and len(err.splitlines()) == 1
    with pytest.raises(MissingDependencyError):
        document([record("no_press")])
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_brief_report_has_its_parts_in_both_languages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"decode_speedup": 1.2, "decode_speedup_spread": {"min": 1.1, "max": 1.3}, "repetitions": 5, "tpot_ms": 4.0}
    fast |= {"decode_tokens_per_s": 250.0, "speed_context_tokens": 4096, "peak_mem_bytes": 5 << 30}
    fast |= {"peak_mem_kind": "vmhwm", "generated_tokens": 8}
    rows = [record("no_press"), record("snapkv", 0.5, spread(0.004, 0.003), **fast)]
    rows += [record("knorm", 0.5, spread(0.2, 0.01), kld={"mean": 0.3}), record("random", 0.5, spread(0.001, 0.0001))]
    folder = write(tmp_path / "results", rows)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # it draws nothing
    assert main(["report", str(folder), "--brief"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n") == (folder / "report" / "brief.md").read_text(encoding="utf-8").rstrip("\n")
    heads = [line[3:] for line in out.splitlines() if line.startswith("## ")]
    assert heads == ["Models", "Data", "Methods", "Results", "Conclusion", "Commands", "Machine"]
    (row,) = (line for line in out.splitlines() if line.startswith("| snapkv"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["snapkv", "50 %", "4.00 MiB", "0.010", f"{rows[1]['ppl']:.2f}"]
    assert cells[5].startswith("+0.4 % ± 0.") and cells[6:] == ["250", "5.00 GiB"]
    said = out.partition("## Conclusion")[2].partition("## ")[0]
    assert "snapkv stays closest to the uncompressed model" in said and "random" not in said
    assert "The smallest cache that surely stays within +1 % of PPL is snapkv" in said
    assert "snapkv with 50 % of the cache removed decodes 1.20 times as fast, in every one of 5 rounds" in said
    assert main(["report", str(folder), "--brief", "--lang", "zh"]) == 0
    chinese = capsys.readouterr().out
    assert "## 结论" in chinese and "snapkv 最接近未压缩模型（KL 0.010，PPL +0.4 %）" in chinese
    assert [c for c in chinese.splitlines() if c.startswith("| snapkv")] == [row]
    assert chinese.rstrip("\n") == (folder / "report" / "brief.zh.md").read_text(encoding="utf-8").rstrip("\n")
    assert out.rstrip("\n") == (folder / "report" / "brief.md").read_text(encoding="utf-8").rstrip("\n")
    assert find_press("snapkv").summary.replace("``", "") in chinese
    assert main(["report", str(folder), "--lang", "zh"]) == 2 and "add --brief" in capsys.readouterr().err
    assert main(["report", str(folder), "--brief", "--table"]) == 2 and "one of them" in capsys.readouterr().err


def test_the_brief_report_explains_what_its_tables_hold() -> None:
    def methods(*rows: Record) -> str:
        return brief(Collection(rows, ())).partition("## Methods")[2].partition("## ")[0]

    whole = methods(record("no_press"), record("snapkv", 0.5, spread(0.4, 0.9)))
    assert "±: half the paired" in whole and "KL: " in whole and "tok/s" not in whole
    few = methods(record("no_press", 0.0, [0.0] * 4), record("snapkv", 0.5, spread(0.4, 0.9, n=4)))
    assert "±" not in few and "KL: " in few


def test_the_uncompressed_cache_has_its_peak_memory_in_every_report() -> None:
    """It is timed beside each press, also where no record of its own was asked for."""
    fast = {"tpot_ms": 4.0, "tpot_ms_baseline": 5.0, "speed_context_tokens": 4096, "generated_tokens": 8}
    fast |= {"decode_tokens_per_s": 250.0, "peak_mem_bytes": 4 << 30, "peak_mem_bytes_uncompressed": 5 << 30}
    text = brief(Collection((record("snapkv", 0.5, spread(0.004, 0.003), **fast),), ()))
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(("| no_press", "| snapkv"))]
    assert [[cell.strip() for cell in line][-2:] for line in lines] == [["200", "5.00 GiB"], ["250", "4.00 GiB"]]


def test_times_of_a_busy_machine_are_noted_in_a_report() -> None:
    timed = {"tpot_ms": 20.0, "tpot_ms_baseline": 30.0, "speed_context_tokens": 4096, "generated_tokens": 8}
    rounds = {"tpot_ms_baseline_spread": {"min": 12.634, "max": 42.771}}
    busy = Collection((record("snapkv", 0.5, spread(0.004, 0.003), **timed, **rounds),), ())
    said = "Rounds of the uncompressed cache took from 12.63 to 42.77 ms a token: the machine was not quiet"
    assert said in brief(busy) and "12.63 到 42.77 ms" in brief(busy, "zh")
    quiet = Collection((record("snapkv", 0.5, spread(0.004, 0.003), **timed),), ())
    assert "not quiet" not in brief(quiet)


def test_the_brief_report_says_each_thing_once() -> None:
    """What differs in windows alone is one line, a model's protocols on a text stand together, and so on."""
    mine = {"press_config": {"file_sha256": "12ab" * 16}}
    rows = (
        record("no_press", 0.0, spread(0.0, 0.0)),
        record("snapkv", 0.5, spread(0.2, 0.01)),
        record("knorm", 0.5, spread(0.3, 0.01, n=16)),
        record("snapkv", 0.5, spread(0.2, 0.01), protocol="prefix-C512-T256-S768", context_tokens=512),
        record("dir/mine.py:MyPress", 0.5, spread(0.3, 0.01), **mine),
        record("tova", 0.5, [0.1], status="interrupted"),
        failed("keydiff", 0.5),
        failed("keydiff", 0.5) | {"text_sha256": "cd" * 32, "dataset": "book", "subset": None},
    )
    rows = tuple({"target_tokens": 256, "context_tokens": 768} | row for row in rows)
    for language, windows, one in (("en", "8 to 16 windows", "8 windows"), ("zh", "8 至 16 个窗口", "8 个窗口")):
        text = brief(Collection(rows, ()), language)
        methods = text.partition(f"## {WORDS[language]['methods']}\n")[2].partition("## ")[0]
        assert text.count("sha256 abababababab") == 1 and text.count("sha256 cdcdcdcdcdcd") == 1
        assert windows in methods and methods.count("prefix-C512") == 1
        assert "MyPress" in methods and "mine.py" in methods and "12ab12ab12ab" in methods and "dir/" not in methods
        assert "keydiff" not in methods and "tova" in methods and WORDS[language]["interrupted"] in methods
        assert f"#### prefix-C768-T256-S1024, {one}\n" in text and "#### prefix-C512-T256-S768\n" in text
        assert "book, prefix-C768" in text.partition(f"## {WORDS[language]['results']}")[2]


def test_the_brief_report_of_too_few_windows_or_of_no_press_says_so() -> None:
    def words(*rows: Record) -> str:
        return brief(Collection(rows, ())).partition("## Conclusion")[2]

    few = words(record("no_press", 0.0, [0.0] * 4), record("snapkv", 0.5, spread(0.4, 0.9, n=4)))
    assert "Too few windows (4)" in few and "snapkv" not in few.partition("## ")[0] and "±" not in few
    plain = {"protocol": "strided-L1024-S512", "nll_by_distance": None}
    none = dict.fromkeys(("delta_nll", "delta_nll_ci95", "per_window", "kld"))
    text = brief(Collection((record("knorm", 0.5) | none | plain,), ()))
    assert "The uncompressed model has PPL 20.09" in text
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(("| no_press", "| knorm"))]
    assert [cell.strip() for cell in lines[0]] == ["no_press", "", "8.00 MiB", "20.09"]
    assert [cell.strip() for cell in lines[1]] == ["knorm", "50 %", "4.00 MiB", ""]


def test_the_brief_report_shows_the_scores_that_its_conclusion_counts() -> None:
    """Of several tasks it held the mean, and of those with a loss alone nothing."""
    task = {"length": 64, "n": 2, "score": None, "score_base": None, "answer_nll": None, "answer_nll_base": None}
    tasks = [
        task | {"task": "vt", "score": 0.25, "score_base": 0.75},
        task | {"task": "repeat", "answer_nll": 2.5, "answer_nll_base": 1.0},
    ]
    rows = [record("knorm", 0.5) | {"protocol": "tasks-v1-C64-n2", "tasks": tasks, "ppl": None, "per_window": None}]
    text = brief(Collection(tuple(rows), ()))
    assert "of 2 scores" in text
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["press", "removed", "vt at 64 tokens", "repeat at 64 tokens"] in found
    assert ["no_press", "", "0.75", ""] in found and ["knorm", "50 %", "0.25", "+1.500 nats"] in found


def test_every_kind_of_record_has_a_brief_report() -> None:
    for language in ("en", "zh"):
        text = brief(Collection(tuple(everything()), ()), language)
        assert (
            "<script>" not in re.sub(r"```.*?```|\\<script", "", text, flags=re.DOTALL) and text.count("| no_press") > 4
        )
