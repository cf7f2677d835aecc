"""A million pinned entries under all presses, wrappers and schedules, in chunks, forks and few bits: none is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, press_of, small_press
from tests.presses.words import Words

from coldpress import (
    AdaKVPress,
    BasePress,
    BoundaryPress,
    CAMPress,
    CriticalKVPress,
    DecodingPress,
    FairPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    PressedCache,
    RandomPress,
    SnapKVPress,
    make_press,
    prefill,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import parameters_of
from coldpress.errors import ColdpressError
from coldpress.models.block import prefilling

N, PINNED, STEPS = 160, 48, 12
ENTRIES, ROUNDS = 1_000_000, 24
pytestmark = pytest.mark.usefixtures("given_artefacts", "given_weights")


def compositions() -> Iterator[BasePress]:
    for name in (*WITH_RATIO, *IN_BLOCK, *OTHERS):
        ratio = 0.2 if "pyramid" in name else 0.4  # its last layers keep less
        yield press_of(name, ratio) if name not in OTHERS else small_press(name, "llama")
    for name in press_names(at_prefill=False):
        own = {"window_size": 4} if "window_size" in parameters_of(name) else {}
        yield make_press(name, 0.4, compression_interval=4, **own)  # type: ignore[misc]
    yield CriticalKVPress(SnapKVPress(0.4, 8))
    scorers = (KnormPress(0.4), SnapKVPress(0.4, 8), RandomPress(0.4, seed=0))
    for press in scorers:
        yield AdaKVPress(press)
        yield FairPress(press, [(0, 40), (60, 90)])
        yield CAMPress(press.with_ratio(0), 4, 96)
        yield BoundaryPress(press)
        yield KeyRerotationPress(press)
        yield PrefillDecodingPress(AdaKVPress(press), DecodingPress(press.with_ratio(0), 4, 96))


def spans(rng: random.Random, n_tokens: int) -> list[tuple[int, int]]:
    """Spans of PINNED tokens together."""
    starts = sorted(rng.sample(range(0, n_tokens - 16, 16), PINNED // 8))
    return [(start, start + 8) for start in starts]


def check(past: PressedCache, pin: list[list[tuple[int, int]]], n_padding: int) -> int:
    """How many pinned entries were looked for, and found."""
    n = 0
    for layer in past.pressed_layers():
        at = layer.positions()
        for row, first in zip(range(len(at)), (0, n_padding), strict=False):
            wanted = torch.tensor([t + first for start, stop in pin[row] for t in range(start, stop)])
            found = (at[row, :, :, None] == wanted).sum(1)
            assert bool((found == 1).all()), f"{past.press}: {int((found != 1).sum())} pinned entries are lost"
            n += found.numel()
    return n


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_none_of_a_million_is_lost() -> None:
    rng, model, n, refused, taken = random.Random(0), tiny("llama"), 0, set(), set()
    made, rounds = [*compositions()], 0
    while n < ENTRIES or rounds < ROUNDS:
        rounds += 1
        for index, press in enumerate(made):
            n_rows = 1 if press.needs_model else 2
            n_padding = rng.choice((0, 0, 13)) if n_rows > 1 else 0
            pin = [spans(rng, N), spans(rng, N - n_padding)][:n_rows]
            mask = torch.ones(2, N + STEPS, dtype=torch.long)[:n_rows]
            mask[1:, :n_padding] = 0
            options = {
                "chunk_tokens": rng.choice((None, 48)),
                "positions": rng.choice(("original", "rerotate")),
                "kv_bits": rng.choice((None, None, 8, "k8v4")),
            }
            ids = tokens(n_rows, N + STEPS, seed=rng.randrange(1000))
            try:
                past = PressedCache(press.prepared(model, Words()), pin=pin, **options)  # type: ignore[arg-type]
                with torch.no_grad(), prefilling(model, past):
                    prefill(model, ids[:, :N], past, attention_mask=mask[:, :N])
            except ColdpressError as error:
                refused.add((type(press).__name__, str(error).partition(":")[0][:40]))
                continue
            taken.add(index)
            n += check(past, pin, n_padding)
            fork = past.fork()
            for i in range(N, N + STEPS):
                given = {"attention_mask": mask[:, : i + 1], "position_ids": (mask.cumsum(-1) - 1)[:, i : i + 1]}
                with torch.no_grad():
                    model(ids[:, i : i + 1], **given, **cache_argument(past))
                n += check(past, pin, n_padding)
            n += check(fork, pin, n_padding)
            turned = torch.arange(n_rows).flip(0)
            fork.reorder_cache(turned)
            fork.reorder_cache(turned)
            n += check(fork, pin, n_padding)
    never = {type(press).__name__ for index, press in enumerate(made) if index not in taken}
    why = {name: said for name, said in refused if name in never}
    assert not never, why
    print(f"{n:,} pinned entries found; refused: {sorted(refused)}")
