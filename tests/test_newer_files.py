"""Files with pins, columns or a codec: of format 2, strict in what they may say; all others are as they were."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.contract.architectures import tiny, tokens
from torch import Tensor

from coldpress import AdaKVPress, DecodingPress, Kept, KnormPress, KVBits, LayerView, PressedCache, RotatedBits
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.column import Column
from coldpress.errors import CacheError, InputError
from coldpress.io.artefacts import digest_of
from coldpress.stores.codec import Codec, codec_of


@dataclass(frozen=True)
class Sums(KnormPress):
    """Each pair has what it has received, how many calls it has been in, and a bias when it is kept."""

    columns: ClassVar[tuple[Column, ...]] = (Column("received"), Column("calls", 1, torch.int16, 1))

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        received = view.columns["received"] + view.attention_column_sums()
        return {"received": received, "calls": view.columns["calls"] + 1}

    def compress(self, view: LayerView) -> Kept | None:
        kept = super().compress(view)
        return kept and kept._replace(bias=torch.full(kept.positions.shape, 0.25))


@dataclass(frozen=True)
class Halves(Codec):
    """Numbers in float16."""

    block_tokens: int = 4
    exact_tokens: int = 3
    note: str = "x"

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"k": keys.half(), "v": values.half()}

    def decode_keys(self, blocks: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(blocks["k"].view(out.shape))

    def decode_values(self, blocks: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(blocks["v"].view(out.shape))


@dataclass(frozen=True)
class Early(RotatedBits):
    """Encodes four pairs at a time, so that short texts have codes."""

    batch_tokens: ClassVar[int] = 4  # type: ignore[misc]


class Taking(Early):
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"n_codes": keys, "v": values}


class Reads(KnormPress):
    """Has queries read the newest 9 slots."""

    def select(self, view: LayerView) -> Tensor | None:
        return torch.arange(view.n_tokens - 9, view.n_tokens).expand(*view.keys.shape[:2], -1)


class Colliding(Halves):
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"counts": keys, "v": values}


CACHES: dict[str, Callable[[], PressedCache]] = {
    "columns": lambda: PressedCache(DecodingPress(Sums(), compression_interval=3, target_size=12)),
    "bias": lambda: PressedCache(Sums(0.4)),
    "coded": lambda: PressedCache(KnormPress(0.5), storage=Halves()),
    "coded ragged": lambda: PressedCache(AdaKVPress(KnormPress(0.5)), storage=Halves()),
    "coded singly": lambda: PressedCache(KnormPress(0.3), storage=Early(8, 4, 2, 6)),
    "coded singly ragged": lambda: PressedCache(
        DecodingPress(AdaKVPress(KnormPress()), 3, 14, 0), storage=Early(4, 8, 2, 6)
    ),
    "pins": lambda: PressedCache(KnormPress(0.5), pin=[[(0, 4)], [(2, 3), (7, 9)]]),
    "all": lambda: PressedCache(AdaKVPress(KnormPress(0.5)), storage=Halves(), pin=[(0, 4)]),
}
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    1.5,
    -1,
    0,
    3,
    2**31,
    2**70,
    float("nan"),
    [],
    {},
    [1, 2],
    [[1, 2]],
    {"class": "x"},
)


def read(past: PressedCache, *lengths: int, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [tiny("llama")(tokens(2, n, seed=seed + i), **cache_argument(past)).logits for i, n in enumerate(lengths)],
            1,
        )


def saved(name: str, path: Path) -> PressedCache:
    past = CACHES[name]()
    read(past, 30, 4, 1, 1)
    past.save(path, tiny("llama"))
    return past


def contents(path: Path) -> tuple[dict[str, str], dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        return metadata, json.loads(metadata["cache"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write(path: Path, said: Any, tensors: dict[str, Tensor], version: int = 2) -> None:
    text = json.dumps(said | {"sha256": digest_of(tensors)})
    checksum = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"format": f"coldpress cache {version}", "cache": text, "sha256": checksum}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def is_refused(path: Path) -> bool:
    """Whether a file is refused in one sentence; if it is not, its cache works."""
    try:
        past = PressedCache.load(path, tiny("llama"))
    except InputError as error:
        assert "\n" not in str(error)
        return True
    assert torch.isfinite(read(past, 3, 1, 1, seed=5)).all() or any("columns" in x for x in past.layer(0).columns())
    return False


@pytest.mark.parametrize("name", CACHES)
def test_they_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    past = saved(name, tmp_path / "a")
    assert contents(tmp_path / "a")[0]["format"] == "coldpress cache 2"
    loaded = PressedCache.load(tmp_path / "a", tiny("llama"))
    assert torch.equal(read(loaded, 3, *[1] * 9, seed=5), read(past, 3, *[1] * 9, seed=5))
    for ours, theirs in zip(loaded.pressed_layers(), past.pressed_layers(), strict=True):
        assert ours.columns().keys() == theirs.columns().keys()
        for key, column in ours.columns().items():
            assert torch.equal(column, theirs.columns()[key]) and column.dtype == theirs.columns()[key].dtype


@pytest.mark.parametrize("options", [{}, {"kv_bits": KVBits(8, 4, 4)}, {"pin": []}])
def test_whatever_an_older_coldpress_could_hold_is_of_format_1(options: dict[str, Any], tmp_path: Path) -> None:
    past = PressedCache(KnormPress(0.5), **options)
    read(past, 30, 1)
    past.save(tmp_path / "a", tiny("llama"))
    metadata, said, tensors = contents(tmp_path / "a")
    assert metadata["format"] == "coldpress cache 1"
    assert not {"pins", "storage", "columns"} & said.keys() and "columns" not in said["layers"][0]
    assert list(said)[:2] == ["coldpress", "model"] and not any("columns" in name for name in tensors)
    write(tmp_path / "a", said, tensors, version=2)
    assert is_refused(tmp_path / "a")
    for newer in ({"pins": [[[0, 4]]]}, {"columns": True}, {"storage": {"class": "x:y", "parameters": {}}}):
        write(tmp_path / "a", newer | said, tensors, version=1)
        assert is_refused(tmp_path / "a")


def parts_of(said: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The path of everything that is newer in ``said``."""
    yield from ((name,) for name in ("pins", "storage", "columns") if name in said)
    yield from (("storage", name) for name in said.get("storage", {}))
    yield from (("storage", "parameters", name) for name in said.get("storage", {}).get("parameters", {}))
    for i, row in enumerate(said.get("pins", [])):
        yield "pins", i
        yield from (("pins", i, j, *end) for j in range(len(row)) for end in ((), (0,), (1,)))
    for i, layer in enumerate(said["layers"]):
        yield from (("layers", i, name) for name in ("store", "columns") if name in layer)
        yield from (("layers", i, "columns", name) for name in layer.get("columns", {}))


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.thinned(2)
def test_what_they_say_is_checked(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "a")
    _, said, tensors = contents(tmp_path / "a")
    n, n_refused = 0, 0
    for path in parts_of(said):
        for other in ("delete", *VALUES):
            new = copy.deepcopy(said)
            place = new
            for key in path[:-1]:
                place = place[key]
            old = place[path[-1]]
            if other == "delete":
                del place[path[-1]]
            elif other == old and type(other) in (type(old), int):
                continue
            else:
                place[path[-1]] = other
            write(tmp_path / "a", new, tensors)
            is_free = path[0] == "pins" or path[:2] == ("storage", "parameters")  # other pins, another such codec
            refused = is_refused(tmp_path / "a")
            assert refused or is_free, (path, other)
            n, n_refused = n + 1, n_refused + refused
    assert n_refused > 0.7 * n


@pytest.mark.parametrize("name", CACHES)
def test_their_tensors_are_checked(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "a")
    _, said, tensors = contents(tmp_path / "a")
    own = [key for key in tensors if ".columns." in key or (".store." in key and "coded" in name)]
    assert own or name in ("pins", "all")
    for key in own:
        tensor = tensors[key]
        rest = {other: part for other, part in tensors.items() if other != key}
        bad = [rest, rest | {f"{key}x": tensor}, rest | {key: tensor[None]}, rest | {key: torch.cat([tensor, tensor])}]
        bad += [rest | {key: tensor.to(torch.complex64)}, rest | {key: tensor.flatten()}]
        bad += [rest | {key: tensor.double()}, rest | {key: torch.cat([tensor] * 40, dim=min(2, tensor.dim() - 1))}]
        if key.endswith("bias"):
            bad.append(rest | {key: tensor.fill_(torch.inf).clone()})
        for changed in bad:
            if tensor.dim() != 1 or (changed.get(key) is not None and changed[key].shape != tensor.shape):
                write(tmp_path / "a", said, changed)
                assert is_refused(tmp_path / "a"), (key, changed.get(key, tensor).shape)
    for key in ("layers.0.columns.x", "layers.0.columns.carried", "layers.0.columns.pinned", "layers.0.store.x"):
        write(tmp_path / "a", said, tensors | {key: torch.zeros(2, 2, 3)})
        assert is_refused(tmp_path / "a")


def test_a_column_is_as_the_press_declares_it(tmp_path: Path) -> None:
    saved("columns", tmp_path / "a")
    _, said, tensors = contents(tmp_path / "a")
    for name, fill in (("received", 1.0), ("received", "nan"), ("calls", 2), ("bias", 0.5)):
        new = copy.deepcopy(said)
        new["layers"][0]["columns"][name] = float(fill) if fill == "nan" else fill
        write(tmp_path / "a", new, tensors)
        with pytest.raises(CacheError, match=rf"layers.0.columns.{name}, which is not what the press declares"):
            PressedCache.load(tmp_path / "a", tiny("llama"))


def test_a_press_that_says_what_is_read_has_to_come_back(tmp_path: Path) -> None:
    past = PressedCache(Reads(0.2))
    read(past, 30, 1)
    past.save(tmp_path / "a", tiny("llama"))
    metadata, said, tensors = contents(tmp_path / "a")
    assert metadata["format"] == "coldpress cache 1" and said["press"]["goes_on"] is True
    loaded = PressedCache.load(tmp_path / "a", tiny("llama"))
    assert torch.equal(read(loaded, 1, 1, seed=5), read(past, 1, 1, seed=5))
    said["press"]["data"]["class"] = "elsewhere:Reads"
    write(tmp_path / "a", said, tensors, version=1)
    with pytest.raises(CacheError, match=r"goes on being compressed by Reads.*import the module elsewhere"):
        PressedCache.load(tmp_path / "a", tiny("llama"))


def test_a_codec_has_to_be_there_and_to_be_what_it_was(tmp_path: Path) -> None:
    saved("coded", tmp_path / "a")
    _, said, tensors = contents(tmp_path / "a")
    said["storage"]["class"] = "elsewhere:Halves"
    write(tmp_path / "a", said, tensors)
    with pytest.raises(CacheError, match="There is no codec elsewhere:Halves here; import the module elsewhere"):
        PressedCache.load(tmp_path / "a", tiny("llama"))
    for parameters in ({"block_tokens": 2**40}, {"block_tokens": "4"}, {"exact_tokens": -1}, {"unknown": 1}):
        with pytest.raises(CacheError, match=r"must be an integer in|does not take the parameters"):
            codec_of({"class": f"{__name__}:Halves", "parameters": parameters})
    past = PressedCache(storage=Halves(note={1, 2}))  # type: ignore[arg-type]
    read(past, 30)
    with pytest.raises(CacheError, match=r"A file cannot hold Halves.*set is not JSON"):
        past.save(tmp_path / "a", tiny("llama"))
    past = PressedCache(storage=Colliding())
    read(past, 30)
    with pytest.raises(CacheError, match="Colliding calls a tensor 'counts', which a file has already"):
        past.save(tmp_path / "a", tiny("llama"))
    past = PressedCache(storage=Taking())
    read(past, 30)
    with pytest.raises(CacheError, match="Taking calls a tensor 'n_codes', which a file has already"):
        past.save(tmp_path / "a", tiny("llama"))


@pytest.mark.parametrize("given", [{"block_tokens": 0}, {"block_tokens": True}, {"exact_tokens": -1}])
def test_a_codec_without_blocks_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(CacheError, match=r"Halves: (block|exact)_tokens must be an integer in"):
        PressedCache(storage=Halves(**given))
