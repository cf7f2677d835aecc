"""The warning of a CPU that reads prompts in float16 more slowly than in another type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from tests.contract.architectures import tiny, tokens

from coldpress import PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.models import half

SAID = r"This CPU takes 4\.5 times as long for float16 products as for bfloat16: .* model\.to\(torch\.bfloat16\)"


@pytest.fixture(autouse=True)
def not_yet_warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU whose float16 is slow, in a process that has not said so."""
    took = {torch.float16: 9.0, torch.float32: 3.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(half, "seconds", took.__getitem__)
    half.warn_if_slow.cache_clear()
    warnings.simplefilter("error")
    yield
    half.warn_if_slow.cache_clear()


def read(dtype: torch.dtype, n_tokens: int, n_rows: int = 1) -> None:
    model = copy.deepcopy(tiny("gpt_neox")).to(dtype)
    model(tokens(n_rows, n_tokens), **cache_argument(PressedCache()))


def test_long_prompts_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=SAID):
        read(torch.float16, half.MANY)
    read(torch.float16, half.MANY)  # a second warning would be an error


def test_rows_count() -> None:
    with pytest.warns(UserWarning, match=SAID):
        read(torch.float16, half.MANY // 2, 2)


@pytest.mark.parametrize(
    ("dtype", "n"), [(torch.float32, half.MANY), (torch.bfloat16, half.MANY), (torch.float16, half.MANY - 1)]
)
def test_else_nothing_is_said(dtype: torch.dtype, n: int) -> None:
    read(dtype, n)


def test_fast_float16_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "seconds", lambda dtype: 1.0)
    read(torch.float16, half.MANY)


def test_types_are_timed() -> None:
    assert all(half.seconds(dtype) > 0 for dtype in (torch.float16, torch.float32))


def test_a_graph_has_nothing_of_it() -> None:
    def noted(query: torch.Tensor) -> torch.Tensor:
        half.note_float16(query)
        return query + 1

    query = torch.zeros(1, 1, half.MANY, 4, dtype=torch.float16)
    torch.compile(noted, backend="eager", fullgraph=True)(query)
