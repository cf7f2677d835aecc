"""A file with right checksums and wrong contents is refused in one sentence, or is a cache that works."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.contract.architectures import tiny, tokens
from tests.hostile import OTHERS, changed_tensors
from tests.saved import SCHEDULES, check_same, go_on, prefilled
from torch import Tensor

from coldpress import (
    AdaKVPress,
    KnormPress,
    KVBits,
    PressedCache,
    SnapKVPress,
    ThinKPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError, InputError
from coldpress.io.artefacts import digest_of

IDS = tokens(1, 30)


def decoded(past: PressedCache) -> PressedCache:
    with torch.no_grad():
        for part in tokens(1, 9, seed=2).split([6, 1, 1, 1], dim=1):
            tiny("llama")(part, **cache_argument(past))
    return past


def in_bits(press: Any) -> PressedCache:
    past = PressedCache(press, kv_bits=KVBits(2, 4, 6))
    with torch.no_grad():
        tiny("llama")(IDS, **cache_argument(past))
    return past


def in_pieces() -> PressedCache:
    past = PressedCache(SnapKVPress(0.5, window_size=4), chunk_tokens=16)
    with torch.no_grad():
        tiny("llama")(IDS[:, :16], **cache_argument(past))
    return past


def told() -> PressedCache:
    past = PressedCache(KnormPress(0.5))
    prefill(tiny("llama"), IDS, past)
    return past


CACHES: dict[str, Callable[[], PressedCache]] = {
    "told": told,
    "whole": lambda: prefilled(ids=IDS),
    "dense": lambda: decoded(prefilled(SnapKVPress(0.5, window_size=8), ids=IDS)),
    "ragged": lambda: decoded(prefilled(AdaKVPress(KnormPress(0.8)), ids=IDS)),
    "thin": lambda: decoded(prefilled(ThinKPress(0.5, 8, press=KnormPress(0.3)), ids=IDS)),
    "bits": lambda: in_bits(SnapKVPress(0.3, window_size=8)),
    "ragged bits": lambda: in_bits(AdaKVPress(KnormPress(0.5))),
    "decoding": lambda: decoded(prefilled(SCHEDULES["decoding"], ids=IDS)),
    "carried": lambda: decoded(prefilled(SCHEDULES["cam"], ids=IDS)),
    "judged": lambda: decoded(prefilled(SCHEDULES["dms"], ids=IDS)),
    "pieces": in_pieces,
}
# Of these any value of the right kind is one that a cache may have: what they change is not wrong, only another cache.
FREE = (
    "press",
    "seed",
    "chunk_tokens",
    "room",
    "n_new",
    "is_prefilled",
    "pairs",
    "window",
    "residual_tokens",
    "repr",
    "has_padding",
)
FREE_TENSORS = ("keys", "values", "narrow", "others", "scale", "zero", "packed", "carry", "recent", "channels", "wide")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of ``value``, the inner ones too."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def changed_said(said: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in leaves(said):
        if path == ("sha256",):
            continue
        for n, other in enumerate(("delete", "next", *OTHERS)):
            new = copy.deepcopy(said)
            place = new
            for key in path[:-1]:
                place = place[key]
            old = place[path[-1]]
            if n == 0:
                del place[path[-1]]
            elif n == 1:
                place[path[-1]] = (
                    old + 1 if isinstance(old, int) else [*old, *old] if isinstance(old, list) else f"{old}x"
                )
            else:
                place[path[-1]] = other
            if new != said or type(old) is not type(other):
                yield f"{'.'.join(map(str, path))} {other!r}", new


def write(path: Path, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    text = json.dumps(said | {"sha256": digest_of(tensors)})
    checksum = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, metadata={"format": "coldpress cache 1", "cache": text, "sha256": checksum})


def check(path: Path, past: PressedCache, expected: Tensor, change: str) -> bool:
    """Whether a changed file is refused; if it is not, its cache is the one that was saved, or one that works.

    Args:
        past, expected: what was saved, and what comes of it.
    """
    try:
        loaded = PressedCache.load(path, tiny("llama"))
    except InputError as error:
        assert "\n" not in str(error), change
        return True
    what, how = change.split(" ", 1)
    parts = what.split(".")
    is_free = any(part in FREE for part in parts) or (parts[-1] == "kept" and how.startswith("first"))
    is_free |= parts[-1] in FREE_TENSORS and (how == "flipped" or how.startswith("first"))
    is_free |= parts[-1] in ("stays", "carry", "recent")  # what a press remembers; it may be more or less
    if not is_free:
        check_same(loaded, past)
    fork = loaded.fork()
    fork.batch_repeat_interleave(2)
    try:
        answer = go_on(loaded)
    except InputError:  # such as a prompt in pieces that are smaller
        assert is_free, change
    else:
        assert is_free or torch.equal(answer, expected), change
    with contextlib.suppress(CacheError):
        fork.crop(-3)
    return False


def every_change(path: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["cache"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no iterator
    yield from ((change, new, tensors) for change, new in changed_said(said))
    yield from ((change, said, new) for change, new in changed_tensors(tensors))


def check_changes(name: str, folder: Path, step: int) -> None:
    torch.manual_seed(0)
    past, path = CACHES[name](), folder / "cache.safetensors"
    past.save(path, tiny("llama"))
    changes, n_refused = list(every_change(path))[::step], 0
    expected = go_on(PressedCache.load(path, tiny("llama")))
    for change, said, tensors in changes:
        write(path, said, tensors)
        try:
            n_refused += check(path, past, expected, change)
        except Exception as error:
            raise AssertionError(f"{name}: {change}: {type(error).__name__}: {error}") from error
    assert n_refused > 0.7 * len(changes)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.thinned(2)
def test_some_changes_of_a_file(name: str, tmp_path: Path) -> None:
    check_changes(name, tmp_path, 61)


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_many_changes_of_a_file(name: str, tmp_path: Path) -> None:
    check_changes(name, tmp_path, 3)
