"""What users have in their programs and on their disks stays as it is, wherever in the package it is computed.

A change that is meant goes into the files with ``python -m tests.golden.make``, and into CHANGELOG.md.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
from tests.golden import record
from tests.golden.record import CACHES, CASES, HERE, RUNS, from_data, kept, load, main

from coldpress import PressedCache

RENAMED = {  # see CHANGELOG.md
    "decodes": "can_rechoose",
    "goes_on": "evicts_while_decoding",
    "layers_differ": "per_layer",
    "leaves_keys": "changes",
    "heads_alone": "per_head_independent",
    "scores_alone": "pointwise",
    "fine": "rounding_residual",
    "look": "on_attention",
}
CHANGED = {("LayerView", "guard")}  # is given the mask of what must stay in place of two numbers: see CHANGELOG.md
SIGNATURES, PRESSES, KEPT = load("signatures.json"), load("presses.json"), load("kept.json")
CACHE_FOLDER, RECORD_FOLDER = HERE / "cache_format1", HERE / "records"
N_TIED = 2  # positions of a head that may be others: processors round differently
LOSS, LOSS_IN_BITS = 1e-5, 1e-4  # nats; in few bits a number at the edge of a step may be rounded the other way
LOSS_SOLVED = 1e-3  # of values that solve equations, which make more of rounding
SAME = ("protocol", "settings", "press", "press_config", "text_sha256", "tokens_sha256", "kv_len_after", "status")
NUMBERS = (
    *("loss", "ppl", "baseline_loss", "baseline_ppl", "delta_nll", "bits_per_byte", "nll_by_distance", "per_window"),
    *("nll_by_position", "per_document", "kv_bytes", "effective_compression_ratio", "tasks"),
)
signatures = functools.cache(record.signatures)
commands = functools.cache(record.commands)
presses = functools.cache(record.presses)


# -- what is called ---------------------------------------------------------------------------------------------------


def test_there_are_the_same_names() -> None:
    assert not SIGNATURES["names"].keys() - signatures().keys()
    assert not SIGNATURES["commands"].keys() - commands().keys()
    assert {part: list(entries) for part, entries in presses().items()} == {
        part: list(entries) for part, entries in PRESSES.items()
    }


@pytest.mark.parametrize("name", SIGNATURES["names"])
def test_signatures(name: str) -> None:
    """What a program calls is there and takes what it took; there may be more."""
    before, now = SIGNATURES["names"][name], signatures()[name]
    if isinstance(before, str):
        assert takes(now) == takes(before, now)
        return
    assert not set(before["bases"]) - set(now["bases"])
    if before["constructor"] is not None:
        assert takes(now["constructor"]) == takes(before["constructor"], now["constructor"])
    members = record.members(name)
    for member, said in before["members"].items():
        own = members[RENAMED.get(member, member)]
        if (
            member not in RENAMED
            and said.startswith(("method", "classmethod", "staticmethod"))
            and (name, member) not in CHANGED
        ):
            assert takes(own) == takes(said, own), member


def takes(signature: str, later: str | None = None) -> list[tuple[str, str | None]] | str:
    """Parameters and defaults of a signature, and those that ``later`` has more and need not be given.

    Parameters are in the order in which they stand; what they are annotated with may be called otherwise.
    """
    start = signature.find("(")
    if start < 0:
        return signature
    written = re.sub(r"<[^>]*>", "...", signature[start:])  # a default that is made anew
    parts = ast.parse(f"def f{written}: ...").body[0]
    assert isinstance(parts, ast.FunctionDef)
    given = parts.args.posonlyargs + parts.args.args
    defaults = [None] * (len(given) - len(parts.args.defaults)) + parts.args.defaults
    pairs = [*zip(given, defaults, strict=True), *zip(parts.args.kwonlyargs, parts.args.kw_defaults, strict=True)]
    found = [
        (RENAMED.get(arg.arg, arg.arg), None if default is None else ast.unparse(default)) for arg, default in pairs
    ]
    more = takes(later) if later is not None else []
    assert not isinstance(more, str)
    return found + [pair for pair in more if pair[0] not in dict(found) and pair[1] is not None]


@pytest.mark.parametrize("name", SIGNATURES["commands"])
def test_arguments_of_commands(name: str) -> None:
    """What was an option is one, in the same order; there may be more."""
    before = SIGNATURES["commands"][name]
    assert [option for option in commands()[name] if option in before] == before


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, entries in PRESSES.items() for name in entries])
def test_presses(part: str, name: str) -> None:
    assert presses()[part][name] == PRESSES[part][name]


@pytest.mark.parametrize("name", PRESSES["named"])
def test_presses_in_files_are_found_again(name: str) -> None:
    for ratio in (0.0, 0.5):
        written = PRESSES["named"][name].get(f"at {ratio}")
        if written is not None:
            assert from_data(written["data"]) == record.make_press(name, ratio)
            assert repr(from_data(written["data"])) == written["repr"]


@pytest.mark.parametrize("name", PRESSES["made"])
def test_presses_without_a_name_in_files_are_found_again(name: str) -> None:
    assert from_data(PRESSES["made"][name]["data"]) == record.MADE[name]


# -- what is kept -----------------------------------------------------------------------------------------------------


def n_others(old: list[Any] | str, new: list[Any] | str) -> int:
    """How many positions are kept in the place of others, of which a head may have ``N_TIED``."""
    if isinstance(old, list):
        assert len(old) == len(new)
        return sum(map(n_others, old, new))
    assert isinstance(new, str)
    before, after = int(old, 16), int(new, 16)
    assert before.bit_count() == after.bit_count()
    n = (before & ~after).bit_count()
    assert n <= N_TIED, f"{n} positions of a head are others"
    return n


def test_every_case_is_there() -> None:
    assert list(CASES) == list(KEPT["cases"])
    assert record.token_digest() == KEPT["tokens"]["sha256"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(5)
def test_kept(name: str) -> None:
    old, new = KEPT["cases"][name], kept(name)
    assert new.keys() == old.keys()
    bound = LOSS_IN_BITS if "kv_bits" in CASES[name].options else LOSS
    bound = LOSS_SOLVED if name.startswith("attention_matching") else bound
    assert new["loss"] == pytest.approx(old["loss"], abs=bound, rel=0)
    assert new["lengths"] == old["lengths"]
    n = n_others(old["kept"], new["kept"])
    if n:
        print(f"{name}: {n} of the positions that are kept are others")


# -- caches that were saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_saved_caches_go_on(name: str) -> None:
    old = load("cache_format1/expected.json")["caches"][name]
    new = record.go_on(PressedCache.load(CACHE_FOLDER / f"{name}.safetensors", record.tiny()))
    assert new.pop("logits") == pytest.approx(old.pop("logits"), abs=1e-5, rel=1e-5)
    assert new == old


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_saved_as_they_were(name: str, tmp_path: Path) -> None:
    record.filled(name).save(tmp_path / "new.safetensors", record.tiny())
    assert record.header(tmp_path / "new.safetensors") == record.header(CACHE_FOLDER / f"{name}.safetensors")


# -- results ----------------------------------------------------------------------------------------------------------


def flat(value: Any) -> list[Any]:
    """Numbers and texts in the order of their keys; no intervals, which of two examples are 13 times as uncertain."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) if not key.endswith("_ci95") for leaf in flat(value[key])]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list) else [value]


def asked(file: str) -> str:
    """A file's name without the hash over its settings, the last 10 digits."""
    return re.sub(r"__[0-9a-f]{10}(?=\.json$)", "", file)


@pytest.mark.parametrize("name", RUNS)
def test_results(name: str, tmp_path: Path) -> None:
    new = {asked(file): (file, found) for file, found in record.run(name, tmp_path).items()}
    files = sorted(path.name for path in (RECORD_FOLDER / name).glob("*.json"))
    assert sorted(new) == list(map(asked, files))
    for old_file in files:
        old, (file, found) = load(f"records/{name}/{old_file}"), new[asked(old_file)]
        for window in found.get("per_window") or []:
            for added in ("document", "start", "kld"):  # where a window is from, and its own KL, for ranks
                window.pop(added, None)
        for added in ("peak_mem_bytes_uncompressed", "tpot_ms_baseline_spread"):  # those of the cache beside it
            found.pop(added, None)
        if found["weights_fingerprint"] == old["weights_fingerprint"]:  # else this transformers orders them otherwise
            assert file == old_file
        assert set(record.keys_of(found)) == set(record.keys_of(old))
        assert {key: found.get(key) for key in SAME} == {key: old.get(key) for key in SAME}
        for key in NUMBERS:
            for ours, theirs in zip(flat(found.get(key)), flat(old.get(key)), strict=True):
                is_number = isinstance(theirs, float)
                assert ours == (pytest.approx(theirs, abs=1e-5, rel=1e-5) if is_number else theirs), key


def test_old_results_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(RECORD_FOLDER), "--table"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for path in RECORD_FOLDER.rglob("*.json"):
        assert f"| {load(str(path.relative_to(HERE)))['press']} " in out
    for words in (
        "prefix-C96-T32-S128",
        "stream-K16",
        "tasks-v1-C128-n2",
        "ΔNLL",
        "TPOT ms",
        "niah_single at 128 tokens",
    ):
        assert words in out


def test_old_results_make_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", str(RECORD_FOLDER), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    assert {"report.html", "report.md"} <= {path.name for path in tmp_path.iterdir()}
