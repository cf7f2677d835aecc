"""What a ledger gives back is what was measured, or nothing: whatever became of its files meanwhile."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import KnormPress, RandomPress
from coldpress.errors import OutputError
from coldpress.eval.evaluate import digest_of
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Answered, Ledger, Measured, versions
from coldpress.eval.losses import Scores
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.speed import Sample, SpeedPoint, SpeedRun
from coldpress.eval.windows import plan_prefix
from coldpress.io import lock
from coldpress.io.files import replace_file
from coldpress.records import results
from coldpress.records.results import is_finished

PLACES = 3  # batches, or examples


@dataclass
class Kept:
    """A folder with a ledger, and what is in each of its places."""

    folder: Path
    load: Callable[[Path, int], Any]
    whole: list[Any]

    def found(self) -> list[Any]:
        return [self.load(self.folder, place) for place in range(len(self.whole))]


def windows(folder: Path, place: int) -> Any:
    found = Ledger(folder).load(Measured, place)
    return {key: (m.scores.rows().tolist(), {**vars(m), "scores": None}) for key, m in found.items()}


def tasks(folder: Path, place: int) -> Any:
    return Ledger(folder).load(Answered, place, f"example {place}")


def rounds(folder: Path, place: int) -> Any:
    run = timed()
    return [vars(sample) for point in run.points for sample in point.samples] if run._restore(Ledger(folder)) else []


def timed(samples: Sequence[list[Sample]] = ((), ())) -> SpeedRun:  # type: ignore[assignment]
    """The rounds of two points, with nothing measured but these samples."""
    run = SpeedRun(None, torch.zeros(1, 8), [BASELINE, Point(KnormPress(0.5))], max_new_tokens=4)  # type: ignore[arg-type]
    run.points = [SpeedPoint(point.press, samples=list(own)) for point, own in zip(run.points, samples, strict=True)]
    return run


def fill(folder: Path, seed: int = 0) -> dict[str, Callable[[Path, int], Any]]:
    torch.manual_seed(seed)
    for place in range(PLACES):
        sizes: dict[str, Any] = {"kv_bytes": 4096 + place, "kv_lengths": [24, 24], "achieved_ratio": 0.5}
        found = {
            key: Measured(scores=Scores(*torch.rand(5, 2, 7)), **sizes, kept_hash=key) for key in ("a" * 16, "b" * 16)
        }
        Ledger(folder / "windows").save(place, found)
        answered = {
            key: Answered(losses=torch.rand(3).tolist(), answer_ids=[5, 6, place], **sizes)
            for key in ("a" * 16, "b" * 16)
        }
        Ledger(folder / "tasks").save(place, answered, f"example {place}")
    samples = [[Sample(int(ns), 2 * int(ns), 4) for ns in torch.randint(1000, 9000, (2,))] for _ in range(2)]
    timed(samples)._save(Ledger(folder / "rounds"))
    return {"windows": windows, "tasks": tasks, "rounds": rounds}


@pytest.fixture(params=["windows", "tasks", "rounds"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    load, folder = fill(tmp_path)[request.param], tmp_path / request.param
    whole = [load(folder, place) for place in range(1 if request.param == "rounds" else PLACES)]
    assert all(whole)
    return Kept(folder, load, whole)


def test_a_changed_bit_changes_no_result(kept: Kept) -> None:
    """Each of 120 bits in turn: every place gives what was measured, or has to be measured again."""
    draw, n_lost = random.Random(0), 0
    files = sorted(kept.folder.iterdir())
    for _ in range(120):
        file = draw.choice(files)
        content = file.read_bytes()
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        for found, whole in zip(kept.found(), kept.whole, strict=True):
            assert not found or found == whole
            n_lost += not found
        file.write_bytes(content)
    assert n_lost > 60  # a bit in the margin of a file may change nothing
    assert kept.found() == kept.whole


def test_what_other_code_has_begun_is_known(kept: Kept, tmp_path: Path) -> None:
    assert not Ledger(kept.folder).is_of_other_code and not Ledger(tmp_path / "none").is_of_other_code
    kept.folder.with_name(f"{kept.folder.name}.code").write_text("0")
    assert Ledger(kept.folder).is_of_other_code
    kept.folder.with_name(f"{kept.folder.name}.code").unlink()  # as earlier versions left it
    assert Ledger(kept.folder).is_of_other_code


def test_a_file_in_another_s_place_is_none(kept: Kept, tmp_path: Path) -> None:
    for file in kept.folder.iterdir():  # of another run
        other = tmp_path / "other" / file.name
        other.parent.mkdir(exist_ok=True)
        shutil.copy(file, other)
    assert not any(kept.load(tmp_path / "other", place) for place in range(len(kept.whole)))
    files = sorted(kept.folder.iterdir())
    if len(files) > 1:  # of another place of the same run
        shutil.copy(files[0], files[1])
        first, second, third = kept.found()
        assert (first, second, third) == (kept.whole[0], type(first)(), kept.whole[2])


def test_what_one_point_made_is_not_taken_for_another_s(tmp_path: Path) -> None:
    fill(tmp_path)
    for path in (tmp_path / "windows" / "batch-000000.safetensors", tmp_path / "tasks" / "example-000000.json"):
        content = path.read_bytes()
        swapped = content.replace(b"a" * 16, b"c" * 16).replace(b"b" * 16, b"a" * 16).replace(b"c" * 16, b"b" * 16)
        assert swapped != content
        path.write_bytes(swapped)
    assert windows(tmp_path / "windows", 0) == {} and tasks(tmp_path / "tasks", 0) == {}


@pytest.mark.slow
def test_a_run_goes_on_from_damage_to_the_same_result(model: PreTrainedModel, text: Tensor, tmp_path: Path) -> None:
    def measured() -> list[Any]:
        presses = [KnormPress(0.5), RandomPress(0.5)]
        run = PrefixRun(
            model, list(map(Point, presses)), [(text, plan_prefix(len(text), 48, 32))], ledger=Ledger(tmp_path / "one")
        )
        run.run()
        return [result for _, result in run.results()]

    whole, draw = measured(), random.Random(1)
    for _ in range(100):
        file = draw.choice(sorted((tmp_path / "one").iterdir()))
        changed = bytearray(file.read_bytes())
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        assert measured() == whole


def test_versions_tell_ledgers_apart() -> None:
    env = {"torch": "2.13.0", "transformers": "5.24.0", "coldpress": "1.0.0", "threads": 2}
    record = {"env": env, "tokens_sha256": "0" * 64, "model": "demo"}
    assert versions(record) == ["2.13.0", "5.24.0", "1.0.0"]
    digests = {digest_of({**record, "env": {**env, package: "9"}}) for package in env}
    assert len(digests) == 4 and digest_of(record) in digests  # the number of threads is a setting, and no version


def test_another_s_result_under_the_name_of_this_one_is_no_result(tmp_path: Path) -> None:
    record = {"status": "ok", "protocol": "p", "model": "m", "dataset": "d", "press": "knorm", "compression_ratio": 0.5}
    one = results.write_result(tmp_path, record)
    other = results.write_result(tmp_path, {**record, "press": "random"})
    assert is_finished(one) and is_finished(other)
    shutil.copy(other, one)
    assert not is_finished(one)
    one.write_text(json.dumps({**record, "schema_version": 1, "compression_ratio": "x"}))
    assert not is_finished(one)


# The writer of all files


def test_nobody_s_link_is_followed_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, path = tmp_path / "target", tmp_path / "folder" / "file"
    target.write_text("mine")
    path.parent.mkdir()
    names = iter(["guessed", "free"])
    monkeypatch.setattr("coldpress.io.files.secrets.token_hex", lambda n: next(names))
    (path.parent / ".guessed.tmp").symlink_to(target)
    with pytest.raises(FileExistsError):
        replace_file(path, lambda part: part.write_text("theirs"))
    assert target.read_text() == "mine"
    replace_file(path, lambda part: part.write_text("theirs"))
    assert path.read_text() == "theirs" and target.read_text() == "mine"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """As two sweeps in one folder: the second writes, and clears the ledger, while the first one writes."""
    ledger, run = Ledger(tmp_path / "run"), timed([[Sample(1, 2, 3)], []])
    path = tmp_path / "run" / "rounds.json"
    n = 0

    def write(part: Path) -> None:
        nonlocal n
        n += 1
        part.write_text("first")
        run._save(ledger)
        if n == 1:
            Ledger(tmp_path / "run").clear()

    replace_file(path, write)
    assert n == 2 and path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["rounds.json"]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fails(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("no more room")

    with pytest.raises(RuntimeError, match="no more room"):
        replace_file(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    """Processes that take it as fast as they can, and remove its file each time: each sees that it is alone."""
    code = "import os, sys, pathlib, contextlib, time; from coldpress.io.lock import locked\n"
    code += "path, inside = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
    code += "end, n = time.monotonic() + 2.0, 0\n"
    code += "while time.monotonic() < end:\n"
    code += "    with contextlib.suppress(BlockingIOError), locked(path):\n"
    code += "        os.close(os.open(inside, os.O_CREAT | os.O_EXCL)); n += 1; inside.unlink()\n"
    code += "print(n)"
    arguments = [sys.executable, "-c", code, str(tmp_path / "locks" / "one.lock"), str(tmp_path / "inside")]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and int(out) > 0, err.decode()
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_lock_that_was_got_after_its_file_went_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "one.lock", lock.fcntl.flock
    (tmp_path / "other").touch()

    def late(file: int, how: int) -> None:
        real(file, how)
        if (tmp_path / "other").exists():  # its holder removes it, and another process makes a new one
            (tmp_path / "other").replace(path)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.locked(path), pytest.raises(BlockingIOError), lock.locked(path):
        pass
    assert not path.exists()


def test_the_lock_of_a_run_that_was_killed_goes_with_its_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / ".unfinished" / "one")
    with ledger.held():
        ledger.discard()  # another is at it
        assert list((tmp_path / ".unfinished").iterdir()) == [tmp_path / ".unfinished" / "one.lock"]
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "one.lock").touch()
    ledger.discard()
    assert list(tmp_path.iterdir()) == []
    ledger.discard()
    assert list(tmp_path.iterdir()) == []


def test_another_process_at_the_same_ledger_is_a_clear_answer(tmp_path: Path) -> None:
    """A second process is refused while one is at it, and let in when that was killed."""
    code = "import sys, time, pathlib; from coldpress.eval.ledger import Ledger\n"
    code += "with Ledger(pathlib.Path(sys.argv[1])).held():\n    print(flush=True); time.sleep(600)\n"
    folder = tmp_path / "results" / ".unfinished" / "one"
    first = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline()
        with (
            pytest.raises(OutputError, match=r"another process is measuring the same into .*results'"),
            Ledger(folder).held(),
        ):
            raise AssertionError("two at one ledger")
        with Ledger(folder.with_name("two")).held():  # of another run in the same folder
            pass
    finally:
        first.kill()
        first.communicate()
    with Ledger(folder).held():
        pass
    assert not (tmp_path / "results" / ".unfinished").exists()
