"""An artefact with right checksums and wrong contents is refused in one sentence, or works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.contract.architectures import tiny, tokens
from tests.hostile import OTHERS, changed_tensors
from torch import Tensor

from coldpress import DuoAttentionPress, ExpectedAttentionStatsPress, LUKVPress, PressedCache, QFilterPress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.press import BasePress
from coldpress.errors import PressError
from coldpress.io.artefacts import digest_of
from coldpress.learned.calibrated import Calibrated

KINDS: dict[type[Calibrated], dict[str, Tensor]] = {
    QFilterPress: {"filters": torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))},
    ExpectedAttentionStatsPress: {"mean": torch.ones(2, 4, 8), "covariance": torch.eye(8).expand(2, 4, 8, 8).clone()},
    DuoAttentionPress: {"gates": torch.tensor([[0.1, 0.9], [0.4, 0.2]])},
    LUKVPress: {"removed": torch.linspace(0, 1, 99).expand(2, 2, 99).clone()},
}


def press_with(kind: type[Calibrated], path: Path) -> BasePress:
    given: dict[str, Any] = {kind.parameter: str(path)}
    return kind(
        **given, **({"head_compression_ratio": 0.5} if kind is DuoAttentionPress else {"compression_ratio": 0.5})
    )


def use(kind: type[Calibrated], path: Path) -> None:
    past = PressedCache(press_with(kind, path))
    with torch.no_grad():
        tiny("llama")(tokens(1, 500 if kind is DuoAttentionPress else 40), **cache_argument(past))
    past.get_seq_length()


def changes(kind: type[Calibrated]) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    tensors, facts = KINDS[kind], {"model": "some/model", "sink_size": 4, "recent_size": 8}
    said = {"press": kind.artefact, "facts": facts, "sha256": digest_of(tensors)}
    for other in OTHERS:
        yield f"the whole {other!r}", other, tensors
        for name in ("press", "facts", "sha256"):
            yield f"{name} {other!r}", said | {name: other}, tensors
        for name in facts:
            yield f"{name} {other!r}", said | {"facts": facts | {name: other}}, tensors
    for change, new in changed_tensors(tensors):
        yield change, said | {"sha256": digest_of(new)}, new
    for number in (-1e30, 1e30, -1.0, 2.0):
        new = {name: torch.full_like(tensor, number) for name, tensor in tensors.items()}
        yield f"all {number}", said | {"sha256": digest_of(new)}, new


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_changed_is_refused_or_works(kind: type[Calibrated], tmp_path: Path) -> None:
    n_refused, n = 0, 0
    for n, (change, said, tensors) in enumerate(changes(kind), start=1):
        path = tmp_path / f"{n}.safetensors"
        save_file(tensors, path, metadata={"coldpress": json.dumps(said)})
        try:
            use(kind, path)
        except PressError as error:
            n_refused += 1
            assert "\n" not in str(error), change
        except Exception as error:
            raise AssertionError(f"{change}: {type(error).__name__}: {error}") from error
    assert 0.5 * n < n_refused < n


def test_curves_of_others_are_no_larger_than_their_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.npy"
    for content in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, "
                    b"'shape': (99, 1000000, 1000000), }".ljust(128)):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(PressError, match="cannot read the curves"):
            LUKVPress(compression_ratio=0.5, curves=str(path))
