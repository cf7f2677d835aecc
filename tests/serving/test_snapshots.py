"""Snapshots: read once, never changed, found by tokens, moved out and back, and one reading for all who ask."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder

import coldpress
from coldpress import KnormPress, PressedCache, RandomPress, SnapKVPress, Snapshots
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError, InputError, PressError
from coldpress.io.artefacts import digest_of
from coldpress.loading.models import LoadedModel, load_model
from coldpress.serving import folder as folder_module
from coldpress.serving.snapshot import Snapshot
from coldpress.serving.wording import chat_ids, joined, prefix_ids

TEXTS = [f"{start} {CONTEXT}" for start in ("First.", "Second.", "Third.")]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu")


@pytest.fixture
def fed(loaded: LoadedModel) -> Iterator[list[int]]:
    """The number of tokens of each call of the model."""
    found: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        found.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    hook = loaded.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    hook.remove()


def ids_of(loaded: LoadedModel, text: str) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer(text)["input_ids"]])


def answer(loaded: LoadedModel, ids: torch.Tensor, cache: PressedCache, n: int = 8) -> list[int]:
    output = loaded.model.generate(ids, **cache_argument(cache), max_new_tokens=n, do_sample=False, pad_token_id=1)
    return output[0, ids.shape[1] :].tolist()


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def digest(snapshot: Snapshot) -> str:
    assert snapshot._cache is not None
    layers = snapshot._cache.pressed_layers()
    return digest_of({f"{i} {j}": t for i, layer in enumerate(layers) for j, t in enumerate(layer.tensors())})


@pytest.mark.parametrize(
    "options", [{}, {"kv_bits": 4}, {"chunk_tokens": 16}, {"chunk_tokens": 500}, {"pin": [(10, 15)]}], ids=str
)
def test_an_answer_is_that_of_a_cache_made_for_it(loaded: LoadedModel, fed: list[int], options: dict[str, Any]) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5, window_size=8), **options)
    snapshot = snapshots.add(CONTEXT)
    before = digest(snapshot)
    n_read = sum(fed)
    assert n_read == snapshot.n_tokens
    for question in QUESTIONS:
        ids = ids_of(loaded, CONTEXT + question)
        own = PressedCache(SnapKVPress(0.5, window_size=8), **options)
        coldpress.prefill(loaded.model.base_model, ids[:, : snapshot.n_tokens], own)
        expected = answer(loaded, ids, own)
        fed.clear()
        assert answer(loaded, ids, snapshots.fork(ids)) == expected
        assert sum(fed) == ids.shape[1] - snapshot.n_tokens + 7  # the prefix is not read again
        assert digest(snapshot) == before
    counts = snapshots.counts()
    assert (counts["hits"], counts["misses"], counts["built"]) == (3, 0, 1)
    assert counts["tokens_saved"] == 3 * snapshot.n_tokens and counts["memory_bytes"] == snapshot.memory_bytes > 0
    assert snapshots.add(CONTEXT) is snapshot and snapshots.built == 1
    assert snapshot.achieved_ratio == pytest.approx(0.5, abs=0.05) and snapshot.uses == 3


def test_what_begins_with_none_gets_an_empty_cache(loaded: LoadedModel) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5))
    snapshots.add(TEXTS[0])
    ids = ids_of(loaded, QUESTIONS[0])
    cache = snapshots.fork(ids)
    assert cache.seen_tokens == 0 and cache.press is None and snapshots.misses == 1
    assert answer(loaded, ids, cache) == answer(loaded, ids, PressedCache())


def test_the_longest_is_found_at_its_end_only(loaded: LoadedModel) -> None:
    snapshots = Snapshots(loaded.model, press=KnormPress(0.5))
    ids = ids_of(loaded, CONTEXT)[0].tolist()
    other = snapshots.add(ids[:40], press=None)
    long, short = snapshots.add(ids[:40]), snapshots.add(ids[:10])
    assert other is not long
    assert snapshots.find(ids) is long  # of two that are as long, that with the snapshots' own settings
    assert snapshots.find(torch.tensor([ids])) is long
    assert snapshots.find(ids[:41]) is long
    assert snapshots.find(ids[:40]) is short  # a token is needed to answer
    assert snapshots.find(ids[:10]) is None
    assert snapshots.find(ids[1:]) is None
    assert [s.n_tokens for s in snapshots] == [10, 40, 40]
    assert snapshots.remove(long.id) and not snapshots.remove(long.id)
    assert snapshots.find(ids) is other and snapshots.get(long.id) is None
    with pytest.raises(CacheError, match="was removed; declare it again"):
        long.fork()


def test_keys_tell_apart_what_gives_other_numbers(loaded: LoadedModel, folder: Path) -> None:
    def keys(model: Any, **options: Any) -> str:
        return Snapshots(model, loaded.tokenizer, **{"press": KnormPress(0.5), **options}).add(TEXTS[0]).id

    found = {keys(loaded.model, **o) for o in ({}, {"press": KnormPress(0.25)}, {"press": None}, {"kv_bits": 8})}
    found |= {keys(loaded.model, **o) for o in ({"chunk_tokens": 20}, {"pin": [(0, 2)]})}
    found.add(keys(load_model(str(folder), device="cpu", dtype="bfloat16").model))
    other = load_model(str(folder), device="cpu")
    assert keys(other.model) == keys(loaded.model)
    other.model.get_output_embeddings().weight[0, 0] += 1
    found.add(keys(other.model))
    snapshots = Snapshots(loaded.model, loaded.tokenizer, KnormPress(0.5))
    found.add(snapshots.add(TEXTS[1]).id)
    loaded.tokenizer.chat_template = "{{ messages }}"
    found.add(keys(loaded.model))
    loaded.tokenizer.chat_template = None
    assert len(found) == 10


def test_two_who_ask_at_once_wait_for_one_reading(loaded: LoadedModel, fed: list[int]) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5))
    made: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: made.append(snapshots.add(CONTEXT))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(map(id, made))) == 1
    assert fed == [made[0].n_tokens] and snapshots.built == 1


def test_the_least_recently_used_goes_to_disk_and_out_of_it(
    loaded: LoadedModel, fed: list[int], tmp_path: Path
) -> None:
    one = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5))
    size = one.add(TEXTS[0]).memory_bytes
    Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path / "one", budget_bytes=0).add(TEXTS[0])
    size_on_disk = bytes_in(tmp_path / "one")
    snapshots = Snapshots(
        loaded.model, loaded.tokenizer, SnapKVPress(0.5), budget_bytes=int(size * 1.5), folder=tmp_path / "s",
        disk_budget_bytes=int(size_on_disk * 1.5),
    )  # fmt: skip
    made = [snapshots.add(text) for text in TEXTS]
    assert [s.tier for s in made] == ["declared", "disk", "memory"]
    assert snapshots.memory_bytes == made[2].memory_bytes and snapshots.disk_bytes == made[1].disk_bytes
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [f"{made[1].id}.json", f"{made[1].id}.safetensors"]
    expected = [answer(loaded, ids, one.add(t).fork()) for t in TEXTS for ids in [ids_of(loaded, t + QUESTIONS[0])]]
    fed.clear()
    for snapshot, text, tokens in list(zip(made, TEXTS, expected, strict=True))[::-1]:
        ids = ids_of(loaded, text + QUESTIONS[0])
        assert answer(loaded, ids, snapshots.fork(ids)) == tokens
        assert snapshot.tier == "memory"
    assert (snapshots.built, snapshots.loaded) == (4, 1)  # the first was gone and is made again
    assert snapshots.tokens_saved == made[1].n_tokens + made[2].n_tokens
    again = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path / "s")
    assert again.disk_bytes == snapshots.disk_bytes
    snapshots.flush()
    fed.clear()
    another = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path / "s")
    assert another.add(TEXTS[0]).tier == "memory" and fed == [] and another.loaded == 1


def test_another_process_knows_them(loaded: LoadedModel, folder: Path, fed: list[int], tmp_path: Path) -> None:
    press = SnapKVPress(0.5, window_size=8)
    snapshots = Snapshots(loaded.model, loaded.tokenizer, press, folder=tmp_path)
    messages = [{"role": "user", "content": TEXTS[0]}]
    made = [snapshots.add(messages, kv_bits=4, pin=[(0, 3)]), snapshots.add(TEXTS[1], press=None, chunk_tokens=50)]
    snapshots.flush()
    fed.clear()
    other = Snapshots(loaded.model, loaded.tokenizer, folder=tmp_path)
    for one in made:
        found = other.get(one.id)
        assert found is not None and found.tier == "disk" and found.source == one.source and found.ids == one.ids
        assert (found.press, found.kv_bits, found.chunk_tokens, found.pins) == (
            (one.press, one.kv_bits, one.chunk_tokens, one.pins)
        )
        assert other.find([*one.ids, 1]) is found and found.fork().seen_tokens == one.n_tokens
    assert fed == [] and other.loaded == 2
    late = snapshots.add(TEXTS[2])
    snapshots.flush()
    assert other.get(late.id) is not None and other.get("../x") is None and other.get("0" * 32) is None
    model = load_model(str(folder), device="cpu").model
    model.get_output_embeddings().weight[0, 0] += 1
    assert len(Snapshots(model, loaded.tokenizer, folder=tmp_path)) == 0  # of another model
    assert len(Snapshots(loaded.model, loaded.tokenizer, folder=tmp_path, max_snapshots=2)) == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"{late.id}.{kind}").stat().st_mode & 0o77 == 0  # each holds the text


@pytest.fixture
def two(loaded: LoadedModel, tmp_path: Path) -> list[Snapshot]:
    """Two snapshots whose files are in the folder."""
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
    made = [snapshots.add(text) for text in TEXTS[:2]]
    snapshots.flush()
    assert snapshots.disk_bytes == bytes_in(tmp_path)
    return made


DAMAGE = {
    "empty": lambda said: "",
    "cut off": lambda said: said[: len(said) // 2],
    "no object": lambda said: "[]",
    "nothing in it": lambda said: "{}",
    "another number": lambda said: said.replace('"ids": [', '"ids": [7, '),
    "another type": lambda said: said.replace('"pins": []', '"pins": 3'),
    "without its source": lambda said: said.replace('"source"', '"sauce"'),
    "deep": lambda said: "[" * 99999,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("is_open", [False, True], ids=["found when opened", "found when asked for"])
def test_a_damaged_declaration_goes_with_its_file(
    loaded: LoadedModel, fed: list[int], tmp_path: Path, two: list[Snapshot], damage: Any, is_open: bool
) -> None:
    """It cannot be served, and would else fill the disk for ever."""
    bad, good = two
    said = tmp_path / f"{bad.id}.json"
    whole = said.read_text()
    gone = f"A snapshot is removed, and made again when it is declared again: {said} is damaged."
    if is_open:
        said.rename(tmp_path / "later")
        snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
        assert len(snapshots) == 1
        (tmp_path / "later").unlink()
        said.write_text(damage(whole))
        with pytest.warns(UserWarning) as warned:
            assert snapshots.get(bad.id) is None
    else:
        said.write_text(damage(whole))
        with pytest.warns(UserWarning) as warned:
            snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
        assert [s.id for s in snapshots] == [good.id]
    assert [str(w.message) for w in warned] == [gone] and snapshots.damaged == 1
    assert {f.name for f in tmp_path.iterdir()} == {f"{good.id}.json", f"{good.id}.safetensors"}
    assert snapshots.disk_bytes == bytes_in(tmp_path)
    fed.clear()
    assert snapshots.add(TEXTS[0]).id == bad.id and sum(fed) == bad.n_tokens  # made again
    snapshots.flush()
    assert said.read_text() == whole and snapshots.disk_bytes == bytes_in(tmp_path)


def test_a_declaration_without_its_file(loaded: LoadedModel, tmp_path: Path, two: list[Snapshot]) -> None:
    bad, good = two
    (tmp_path / f"{bad.id}.safetensors").unlink()
    said = tmp_path / f"{bad.id}.json"
    whole = said.read_text()
    with pytest.warns(UserWarning, match=r"\.json is removed, as the snapshot that it declares has no file any more"):
        snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
    assert [s.id for s in snapshots] == [good.id] and snapshots.disk_bytes == bytes_in(tmp_path)
    said.write_text(whole)
    with pytest.warns(UserWarning, match="has no file any more"):
        assert snapshots.get(bad.id) is None
    assert not said.exists() and snapshots.add(TEXTS[0]).id == bad.id


def test_a_file_without_its_declaration(
    loaded: LoadedModel, fed: list[int], tmp_path: Path, two: list[Snapshot]
) -> None:
    """It counts, is used when its prefix is declared, and goes when its turn comes."""
    bad, good = two
    (tmp_path / f"{bad.id}.json").unlink()
    size = bytes_in(tmp_path)
    for path in tmp_path.glob(f"{bad.id}*"):
        os.utime(path, (1, 1))
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
    assert [s.id for s in snapshots] == [good.id] and snapshots.disk_bytes == size
    fed.clear()
    assert snapshots.add(TEXTS[0]).id == bad.id and fed == []
    snapshots.flush()
    assert snapshots.disk_bytes == bytes_in(tmp_path) > size  # declared again
    (tmp_path / f"{bad.id}.json").unlink()
    os.utime(tmp_path / f"{bad.id}.safetensors", (1, 1))
    little = {"folder": tmp_path, "disk_budget_bytes": size - 1}
    assert Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), **little).disk_bytes == bytes_in(tmp_path)
    assert {f.stem for f in tmp_path.iterdir()} == {good.id}


def test_what_other_processes_write_counts_and_goes(
    loaded: LoadedModel, folder: Path, tmp_path: Path, two: list[Snapshot]
) -> None:
    """Of another model too, and what one that was killed has left."""
    model = load_model(str(folder), device="cpu").model
    model.get_output_embeddings().weight[0, 0] += 1
    budget = int(bytes_in(tmp_path) * 1.25)
    own = Snapshots(loaded.model, press=SnapKVPress(0.5), folder=tmp_path, disk_budget_bytes=budget, budget_bytes=0)
    other = Snapshots(model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
    assert len(other) == 0 and other.disk_bytes == bytes_in(tmp_path)
    foreign = other.add(TEXTS[2])
    other.flush()
    assert own.get(foreign.id) is None and own.damaged == 0  # it is whole, and of another model
    part = tmp_path / ".0123456789abcdef.tmp"
    part.write_bytes(b"0" * 1000)
    os.utime(part, (0, 0))
    last = own.add(list(range(1, 60)))
    assert last.tier == "disk" and not part.exists()
    assert own.disk_bytes == bytes_in(tmp_path) <= budget
    own.refresh()
    for path in tmp_path.glob(f"{foreign.id}*"):
        path.unlink()
    own.refresh()
    assert own.disk_bytes == bytes_in(tmp_path)


def test_a_declaration_is_read_again_only_where_it_is_another_file(
    loaded: LoadedModel, folder: Path, tmp_path: Path, two: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = folder_module.read_text

    def noted(path: Path) -> str:
        read.append(path.stem)
        return whole(path)

    monkeypatch.setattr(folder_module, "read_text", noted)
    model = load_model(str(folder), device="cpu").model
    model.get_output_embeddings().weight[0, 0] += 1
    other = Snapshots(model, loaded.tokenizer, folder=tmp_path)
    assert sorted(read) == sorted(one.id for one in two)
    for _ in range(3):
        other.refresh()
    assert len(read) == 2 and len(other) == 0  # of another model
    theirs = Snapshots(model, loaded.tokenizer, folder=tmp_path)
    late = theirs.add(TEXTS[2], press=KnormPress(0.5))
    theirs.flush()
    read.clear()
    other.refresh()
    other.refresh()
    assert read == [late.id] and [one.id for one in other] == [late.id]
    first, second = two
    said = tmp_path / f"{first.id}.json"
    text = said.read_bytes()
    (tmp_path / "new").write_bytes(text)
    os.replace(tmp_path / "new", said)  # of the same size
    other.refresh()
    other.refresh()
    assert read == [late.id, first.id]
    time_of = said.stat().st_mtime_ns
    said.write_bytes(text[:-1] + b"!")
    os.utime(said, ns=(time_of, time_of))
    with pytest.warns(UserWarning, match="is damaged"):
        other.refresh()
    assert not said.exists() and other.damaged == 1
    (tmp_path / f"{second.id}.json").unlink()
    (tmp_path / f"{second.id}.safetensors").unlink()
    other.refresh()
    assert other.disk_bytes == bytes_in(tmp_path)
    own = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5, window_size=8), folder=tmp_path)
    read.clear()
    again = [own.add(one.ids, press=one.press) for one in two]
    own.flush()
    other.refresh()
    other.refresh()
    assert sorted(read) == sorted(one.id for one in again) == sorted(one.id for one in two)
    assert other.disk_bytes == bytes_in(tmp_path)


def test_a_press_that_becomes_known_is_found(
    loaded: LoadedModel, tmp_path: Path, two: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(data: Any) -> Any:
        raise PressError("There is no such press here.")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "from_data", unknown)
        snapshots = Snapshots(loaded.model, loaded.tokenizer, folder=tmp_path)
        snapshots.refresh()
        assert len(snapshots) == 0
    snapshots.refresh()
    assert {one.id for one in snapshots} == {one.id for one in two}


def test_a_press_that_is_not_known_here_is_no_damage(loaded: LoadedModel, tmp_path: Path, two: list[Snapshot]) -> None:
    said = tmp_path / f"{two[0].id}.json"
    declared = {**json.loads(said.read_text()), "press": {"class": "theirs:TheirPress", "parameters": {}}}
    del declared["sha256"]
    text = json.dumps([two[0].id, declared], sort_keys=True)
    said.write_text(json.dumps({**declared, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    snapshots = Snapshots(loaded.model, loaded.tokenizer, folder=tmp_path)
    assert len(snapshots) == 1 and said.exists() and snapshots.disk_bytes == bytes_in(tmp_path)


def test_one_that_is_removed_as_it_is_written_is_not_there(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, KnormPress(0.5), folder=tmp_path)
    made = snapshots.add(TEXTS[0])
    write = folder_module.Folder.write

    def late(self: Any, snapshot: Snapshot, model: Any) -> None:
        assert snapshots.remove(snapshot.id)
        write(self, snapshot, model)

    monkeypatch.setattr(folder_module.Folder, "write", late)
    snapshots.flush()
    assert made.is_removed and not list(tmp_path.iterdir()) and snapshots.unwritten == 0


def test_many_threads_and_little_room(loaded: LoadedModel, tmp_path: Path) -> None:
    press = SnapKVPress(0.5, window_size=8)
    size = Snapshots(loaded.model, press=press).add(list(range(1, 41))).memory_bytes
    room = {"budget_bytes": 2 * size, "folder": tmp_path, "disk_budget_bytes": 60_000, "max_snapshots": 6}
    snapshots = Snapshots(loaded.model, press=press, **room)
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(25):
                first = (7 * turn + number) % 8 + 1
                prefix = list(range(first, first + 40))
                with contextlib.suppress(CacheError):  # one that another thread has removed
                    if turn % 9 == 8:
                        snapshots.remove(snapshots.add(prefix).id)
                    else:
                        assert snapshots.add(prefix).fork().token_ids.tolist() == [prefix]
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == [] and len(snapshots) <= 6
    assert snapshots.memory_bytes == sum(s.memory_bytes for s in snapshots if s.tier == "memory") <= 2 * size
    assert snapshots.disk_bytes == bytes_in(tmp_path) <= 60_000


def test_too_much_for_the_memory_and_no_folder(loaded: LoadedModel) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), budget_bytes=100)
    with pytest.raises(InputError, match=r"takes [\d,]+ bytes and budget_bytes allows 100"):
        snapshots.add(TEXTS[0])
    assert len(snapshots) == 0 and snapshots.memory_bytes == 0


@pytest.mark.parametrize("press", [SnapKVPress(0.5), RandomPress(0.5)], ids=repr)
def test_a_damaged_file_is_made_again(loaded: LoadedModel, tmp_path: Path, press: Any) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, press, budget_bytes=0, folder=tmp_path)
    snapshot = snapshots.add(TEXTS[0])
    ids = ids_of(loaded, TEXTS[0] + QUESTIONS[1])
    expected = answer(loaded, ids, snapshots.fork(ids))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b"", b"{" * 9000):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="A snapshot is made again: .* damaged"):
            assert answer(loaded, ids, snapshots.fork(ids)) == expected
        assert file.read_bytes()[-100:] == whole[-100:] and snapshot.tier == "disk"
    assert snapshots.damaged == 4 and snapshots.built == 5
    other = snapshots.add(TEXTS[1])
    file.write_bytes((tmp_path / f"{other.id}.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="holds other tokens than its name says"):
        assert answer(loaded, ids, snapshots.fork(ids)) == expected


@pytest.mark.parametrize(
    "other",
    [{"press": KnormPress(0.9)}, {"press": SnapKVPress(0.5)}, {"kv_bits": 4}, {"chunk_tokens": 8}, {"pin": [(0, 3)]}],
    ids=repr,
)
def test_pairs_of_other_settings_are_made_again(loaded: LoadedModel, tmp_path: Path, other: dict[str, Any]) -> None:
    """A file of the same text that was put in the place of another one was served as if it were that."""
    snapshots = Snapshots(loaded.model, loaded.tokenizer, KnormPress(0.5), budget_bytes=0, folder=tmp_path)
    first, second = snapshots.add(TEXTS[0]), snapshots.add(TEXTS[0], **other)
    expected = first.fork()
    mine = tmp_path / f"{first.id}.safetensors"
    mine.write_bytes((tmp_path / f"{second.id}.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="A snapshot is made again: .* other pairs of its tokens than its name says"):
        fork = first.fork()
    assert fork.press == KnormPress(0.5) and fork.stored_lengths() == expected.stored_lengths()
    assert fork.kv_bits is None and torch.equal(fork.positions(), expected.positions())
    assert snapshots.damaged == 1 and snapshots.built == 3
    assert first.fork().seen_tokens == second.fork().seen_tokens  # both are right, and read from their files
    assert snapshots.damaged == 1 and snapshots.built == 3


def test_a_full_disk_costs_time_and_no_answer(loaded: LoadedModel, tmp_path: Path, monkeypatch: Any) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), budget_bytes=0, folder=tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coldpress.cache.file.replace_file", full)
    with pytest.warns(UserWarning, match="not written.*No space left"):
        snapshot = snapshots.add(TEXTS[0])
    assert snapshot.tier == "declared" and snapshots.unwritten == 1 and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("coldpress.serving.folder.replace_file", full)
    with pytest.warns(UserWarning, match="not written.*No space left"):
        snapshot.fork()
    assert snapshots.disk_bytes == bytes_in(tmp_path) > 0  # the pairs, without what was declared
    monkeypatch.undo()
    assert snapshot.fork().seen_tokens == snapshot.n_tokens and snapshot.tier == "disk"


WRITER = """
import sys, torch
from coldpress import SnapKVPress, Snapshots
from coldpress.loading.models import load_model
loaded = load_model(sys.argv[1], device="cpu")
snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), budget_bytes=0, folder=sys.argv[2])
for number in range(100000):
    snapshots.add([1 + number // 4000, number % 4000 + 1] * 100)
    print("written", flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_writes(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(tmp_path)], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"written\n"
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert PressedCache.load(file, loaded.model).seen_tokens == 200  # whole
    part = tmp_path / ".0123456789abcdef.tmp"
    part.touch()
    os.utime(part, (0, 0))
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5), folder=tmp_path)
    whole = sum(
        file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".tmp"
    )  # not what was being written
    assert not part.exists() and snapshots.disk_bytes == whole


def test_more_declarations_than_allowed(loaded: LoadedModel) -> None:
    snapshots = Snapshots(loaded.model, loaded.tokenizer, max_snapshots=2)
    first, second, third = (snapshots.add(text) for text in TEXTS)
    assert [*snapshots] == [third, second] and snapshots.get(first.id) is None


def test_prefixes_stay_prefixes(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    for text in (CONTEXT, CONTEXT.strip(), CONTEXT.strip()[:-4], "The mil"):
        ids = prefix_ids(tokenizer, text)
        for more in ("ler", " weighed", "\n\nWhat?", ".", "\n", "es"):
            assert tokenizer(text + more)["input_ids"][: len(ids)] == ids
        assert len(tokenizer(text)["input_ids"]) - len(ids) <= 3
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CONTEXT}]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}{{ '<assistant>' }}"
    for tokenizer.chat_template in (None, template):
        ids = prefix_ids(tokenizer, turns)
        for more in ([{"role": "user", "content": "Who?"}], [{"role": "assistant", "content": "Yes."}]):
            whole = chat_ids(tokenizer, joined(turns, more))
            assert whole[: len(ids)] == ids and len(whole) - len(ids) < 20
    tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"press": "snapkv"}, PressError, "press must be a press such as"),
        ({"press": coldpress.DecodingPress(KnormPress())}, PressError, "goes on while decoding"),
        ({"budget_bytes": -1}, InputError, "budget_bytes must be an integer of at least 0, got -1"),
        ({"budget_bytes": 1.5}, InputError, "budget_bytes must be an integer"),
        ({"disk_budget_bytes": 1}, InputError, "give folder= too"),
        ({"max_snapshots": 0}, InputError, "max_snapshots must be an integer of at least 1"),
        ({"kv_bits": 3}, CacheError, "kv_bits must be 8, 4 or 2"),
        ({"pin": [[(0, 1)], [(0, 2)]]}, InputError, "A prefix is one row"),
    ],
)
def test_what_cannot_work(loaded: LoadedModel, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Snapshots(loaded.model, loaded.tokenizer, **arguments)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([], "at least one token"),
        ("", "at least one token"),
        ([1, -1], "token ids of at least 0"),
        ([1.5], "token ids of at least 0"),
        (torch.zeros(2, 3, dtype=torch.long), r"must be int64 \[T\] or \[1, T\]"),
        ([{"role": "user"}], "must have a role and a content"),
        ([{"role": "user", "content": "a"}, 3], "must have a role and a content"),
    ],
)
def test_what_is_no_prefix(loaded: LoadedModel, prefix: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Snapshots(loaded.model, loaded.tokenizer).add(prefix)
    with pytest.raises(InputError, match="needs a tokenizer"):
        Snapshots(loaded.model).add("text")
