"""What a cache may be for, and how that is measured: the presses, and how they are given the text."""

from __future__ import annotations

from dataclasses import dataclass

from coldpress.eval.settings import STREAM_CHUNK

__all__ = ["NEW_TOKENS", "ROUNDS", "USES", "Use", "target_of"]

ROUNDS, NEW_TOKENS = 3, 24  # timed


def target_of(context: int) -> int:
    """Tokens that are scored after so many."""
    return max(NEW_TOKENS, context // 8)


@dataclass(frozen=True)
class Use:
    """What a cache is for, and how that is measured.

    Attributes:
        about: the use, in a few words.
        presses: measured where none is named.
        chunk_tokens: the context comes in pieces of so many tokens, and is compressed after each.
        kv_bits: also measured, without a press.
        in_tokens: a budget in tokens instead of a ratio: constant memory.
        by_time: time is the first cost, bytes the second.
        shares: until which part of the time windows, timed rounds and questions are measured.
    """

    about: str
    presses: tuple[str, ...]
    chunk_tokens: int | None = None
    kv_bits: tuple[int | str, ...] = ()
    in_tokens: bool = False
    by_time: bool = False
    shares: tuple[float, float, float] = (0.4, 0.55, 1.0)


_DECODING = ("h2o", "tova", "morphkv", "keydiff", "snapkv", "streaming_llm")
USES = {
    "qa": Use(
        "a text is compressed once, without its questions, and asked many times",
        (
            *("kvzip", "attention_matching_kvzip", "layer_defensive", "adakv_snapkv", "snapkv"),
            *("expected_attention", "keydiff", "streaming_llm"),
        ),
    ),
    "chat": Use("a text grows in turns of 128 tokens, and is cut back after each of them", _DECODING, chunk_tokens=128),
    "streaming": Use(
        f"a text comes {STREAM_CHUNK} tokens at a time, and is cut back to constant memory after each",
        _DECODING,
        chunk_tokens=STREAM_CHUNK,
        in_tokens=True,
        shares=(0.35, 0.5, 0.8),
    ),
    "throughput": Use(
        "one pass over a prompt, then fast decoding",
        ("snapkv", "expected_attention", "keydiff", "knorm", "streaming_llm"),
        kv_bits=("k8v4",),
        by_time=True,
    ),
}
