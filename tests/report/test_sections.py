"""Records of several folders, and what they are called beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.records import ENV, MIB, everything, failed, many, record, spread, stream, tasked, timed, write

from coldpress.errors import DataError
from coldpress.records.results import collect
from coldpress.records.schema import check_record
from coldpress.report.glance import beside
from coldpress.report.sections import Entry, sections


def test_records_of_subfolders_and_of_several_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a", [record("no_press")])
    write(tmp_path / "a" / "deep" / "er", [record("snapkv", 0.5)])
    write(tmp_path / "b", [record("knorm", 0.5)])
    write(tmp_path / "a" / ".hidden", [record("tova", 0.5)])
    names = [str(tmp_path / name) for name in ("a", "b", "a/deep")]
    assert [r["press"] for r in collect(names).records] == ["no_press", "snapkv", "knorm"]
    with pytest.raises(DataError, match="no folder"):
        collect([str(tmp_path / "c")])
    with pytest.raises(DataError, match="name is empty"):
        collect([" "])


def test_what_is_no_record_is_counted(tmp_path: Path) -> None:
    write(
        tmp_path, [record("no_press"), record("snapkv", 0.5, per_window=[{"id": 0}]), record("knorm", 0.5, tasks=[{}])]
    )
    (tmp_path / "foreign.json").write_text("{")
    found = collect([str(tmp_path)])
    assert len(found.records) == 1 and len(found.skipped) == 3
    assert "per_window must be a list of windows with id, n and nll" in found.skipped[0]


ODD = (5, "abc", True, [], [[]], {}, {"a": [1]}, {"a": None}, [None], [1, "b"], 10**400, {"min": 1}, [{"task": 5}])


@pytest.mark.parametrize("make", [record, timed, tasked, stream])
def test_whatever_the_check_lets_pass_has_a_section_and_words(make: object) -> None:
    from coldpress.report.columns import tables
    from coldpress.report.page import findings, headline

    made = {
        record: lambda: record(
            "snapkv", 0.5, spread(0.1, 0.01), delta_by_distance={"1-16": {"delta": 1, "ci95": None}}
        ),
        timed: lambda: timed("snapkv", 0.5, 512, 1.2),
        tasked: lambda: tasked("snapkv", 0.5, 0.1),
        stream: lambda: stream("snapkv", 128, [3.0, 3.1]),
    }[make]()  # type: ignore[index]
    n_shown = 0
    for field in made:
        for value in ODD:
            changed = {**made, field: value}
            try:
                check_record(changed)
            except ValueError:
                continue
            for section in sections([changed]):
                n_shown += len(headline(section)) + len(findings(section)) + len(tables(section))
    assert n_shown


def test_two_protocols_are_two_sections() -> None:
    found = sections(everything())
    assert len({(s.first["protocol"], s.first["model"]) for s in found}) == len(found)
    for section in found:
        assert len({p.record["protocol"] for p in section.all}) == 1


def test_the_interrupted_stand_beside_the_finished() -> None:
    (section,) = sections(
        [record("no_press"), record("cur", 0.5, [0.1] * 3, status="interrupted"), failed("tova", 0.5)]
    )
    assert [p.label for p in section.entries] == ["no_press"]
    assert sorted(p.label for p in section.unfinished) == ["cur", "tova"]


def test_points_of_one_press_are_told_apart() -> None:
    small, large = (record("snapkv", 0.5, press_config={"window_size": n, "compression_ratio": 0.5}) for n in (16, 64))
    (section,) = sections([small, large, large, record("snapkv", 0.5, kv_bits=4)])
    assert sorted(p.label for p in section.entries) == [
        *("snapkv (window_size=16)", "snapkv (window_size=64)", "snapkv (window_size=64) (run 2)", "snapkv 4-bit"),
    ]


def test_where_a_point_stands_is_what_was_asked_for_unless_it_differs() -> None:
    def at(ratio: float | None, achieved: float | None, kept: float = 0.5) -> float | None:
        more = {"effective_compression_ratio": achieved, "kv_bytes": round(8 * MIB * kept)}
        return Entry(record("x", ratio, **more), "x", "").at

    assert at(0.5, 0.48) == 0.5 and at(0.5, 0.3) == 0.3 and at(None, 0.3) == 0.3
    assert at(0.5, 0.0, 0.75) == 0.25  # fewer channels, the same pairs


def test_of_many_presses_the_best_are_in_colour() -> None:
    (section,) = sections(many())
    best = section.best()
    assert len(section.labels) == 34 and len(best) == 8
    mean = {name: sum(p.delta_nll for p in section.entries if p.label == name) for name in section.labels}
    assert min(mean, key=lambda name: mean[name]) in best and max(mean, key=lambda name: mean[name]) not in best


NEWER = {"env": ENV | {"transformers": "9.9"}}


def test_versions_share_a_section_where_the_uncompressed_cache_is_the_same_under_them() -> None:
    older = [record("no_press"), record("snapkv", 0.5, spread(0.1, 0.01)), record("knorm", 0.5, spread(0.2, 0.01))]
    (section,) = sections([*older, record("kvzip", 0.5, spread(0.01, 0.001), **NEWER)])
    assert [p.label for p in section.entries] == ["no_press", "knorm", "snapkv", "kvzip"]
    assert [*section.by_version().values()] == [["no_press", "knorm", "snapkv"], ["kvzip"]]
    tasks = [tasked("no_press", 0.0, 0.0), tasked("snapkv", 0.5, 0.1), tasked("knorm", 0.5, 0.1)]
    (section,) = sections([*tasks, tasked("kvzip", 0.5, 0.0) | NEWER])
    assert len(section.entries) == 4


@pytest.mark.parametrize(
    "newer",
    [
        record("snapkv", 0.5, spread(0.1, 0.01), **NEWER),  # the same press: it compares the versions
        record("kvzip", 0.5, spread(0.1, 0.01, n=9), **NEWER),  # other windows
        record("kvzip", 0.5, tpot_ms=4.0, **NEWER),  # timed
        record("kvzip", 0.5, **NEWER | {"env": ENV | {"threads": 1}}),  # no version
        record(
            "kvzip", 0.5, per_window=[{"id": i, "n": 100, "nll": 301.0, "nll_base": 300.02} for i in range(8)], **NEWER
        ),
    ],
)
def test_other_versions_have_a_section_of_their_own(newer: dict[str, object]) -> None:
    assert len(sections([record("no_press"), record("snapkv", 0.5, spread(0.1, 0.01)), newer])) == 2


def test_beside_a_section_stands_what_else_was_measured_of_its_model() -> None:
    found = sections(everything())
    own = next(
        s for s in found if s.first["protocol"] == "prefix-C768-T256-S1024" and s.first["model"] == "models/tiny"
    )
    assert [s.kind for s in beside(own, found)] == ["tasks"]
    other = [record("no_press", dataset="pg19", subset=None), record("snapkv", 0.5, dataset="pg19", subset=None)]
    found = sections([*everything(), *other])
    own = next(s for s in found if s.first["protocol"] == own.first["protocol"] and s.first["dataset"] == "wikitext")
    assert [s.kind for s in beside(own, found)] == ["quality", "tasks"]
