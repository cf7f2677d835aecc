"""The model, the texts and the clock of the benchmark; nothing here imports coldpress, which kvpress's side has not."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

__all__ = ["UNTIMED", "Sizes", "clock", "decode_ms", "make_model", "median", "sizes_of", "text"]

VOCABULARY = 8192
UNTIMED = 2  # tokens before those that are timed: the first one moves a compressed cache to a buffer with room


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        config: of the model.
        dtype: of weights, keys and values.
        contexts: tokens.
        rounds: at most; fewer where the time is short.
        new_tokens: timed in each sample.
        window: queries by which SnapKV scores.
        chunk: tokens of a piece of a prompt.
        batches: rows.
        batch_tokens: context of each row.
        budget_bytes: for the keys and values of a batch.
    """

    config: dict[str, Any]
    dtype: str
    contexts: tuple[int, ...]
    rounds: int
    new_tokens: int
    window: int
    chunk: int
    batches: tuple[int, ...]
    batch_tokens: int
    budget_bytes: int


FULL = Sizes(
    config={
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "rope_theta": 500_000.0, "max_position_embeddings": 1 << 18,
        "vocab_size": VOCABULARY,
    },
    dtype="bfloat16", contexts=(32_768, 131_072), rounds=8, new_tokens=8, window=64, chunk=4096,
    batches=(1, 8, 32), batch_tokens=8192, budget_bytes=20_000_000_000,
)  # fmt: skip
TINY = Sizes(
    config={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "rope_theta": 500_000.0, "max_position_embeddings": 4096, "vocab_size": 256,
    },
    dtype="float32", contexts=(256, 1024), rounds=2, new_tokens=2, window=16, chunk=64,
    batches=(1, 3), batch_tokens=192, budget_bytes=200_000,
)  # fmt: skip


def sizes_of(is_tiny: bool) -> Sizes:
    return TINY if is_tiny else FULL


def make_model(sizes: Sizes, device: str) -> Any:
    """Random weights, drawn on the device itself: moving 15 GB there would take longer than what is measured.

    The vocabulary is small, because the products with it are the same for every cache, and random ids need no more.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**sizes.config, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype), attn_implementation="sdpa")
    model = model.to(device).eval()  # what was not made there, such as tables of the rotary embedding
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def text(n_rows: int, n_tokens: int, model: nn.Module, seed: int = 0) -> Tensor:
    """Random ids on the model's device."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (n_rows, n_tokens), generator=generator)
    return ids.to(next(model.parameters()).device)


def clock(device: torch.device) -> float:
    """Seconds, after everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def decode_ms(model: Any, cache: Any, cache_name: str, n_seen: int, n_new: int, n_rows: int = 1) -> list[float]:
    """Milliseconds of ``n_new`` tokens of each row, one at a time, each waited for, as a text has to know its tokens.

    They are forgotten afterwards.
    """
    device = next(model.parameters()).device
    token = torch.full((n_rows, 1), 5, device=device)
    times = []
    with torch.inference_mode():
        for i in range(UNTIMED + n_new):
            position = torch.full((n_rows, 1), n_seen + i, device=device)
            start = clock(device)
            model(token, position_ids=position, **{cache_name: cache})
            times.append(1e3 * (clock(device) - start))
        _crop(cache, UNTIMED + n_new, n_seen)
    return [round(ms, 4) for ms in times[UNTIMED:]]


def _crop(cache: Any, n: int, n_seen: int) -> None:
    try:
        cache.crop(-n)
    except ValueError:  # a transformers whose DynamicCache takes the length that is left
        if not isinstance(cache, DynamicCache):
            raise
        cache.crop(n_seen)


def median(values: list[float]) -> float:
    return statistics.median(values)
