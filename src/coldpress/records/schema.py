"""The fields of a result record, each registered once: what may stand there, and how tables show it.

From here follow what a record has before anything is measured, which files a report leaves out, and the columns of the
tables on the terminal, in Markdown and on the page of a report. Records may have more fields than these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from coldpress.backends import BUDGETS

Fits = Callable[[Any], bool]
OF_A_POINT = ("press", "press_config", "compression_ratio", *BUDGETS, "kv_bits_config")
# What was asked for and what it was asked of: a run that fails has the same name as one that finishes. Measured values
# (loss, achieved ratio, ...) are in the record, not in its name.
IDENTIFYING = (
    *("protocol", "mode", "ppl_mode", "speed_only", "settings"),
    *("model", "model_revision", "weights_fingerprint", "dtype", "device", "attn_implementation", "quantization"),
    *("dataset", "dataset_revision", "subset", "split", "sample_idx", "text_file", "text_sha256", "add_bos"),
    *("max_tokens", "max_windows", "max_documents", "context_tokens", "target_tokens", "stride", "chunk_size"),
    *("batch_size", "position_mode", *OF_A_POINT, "max_new_tokens", "warmup", "repetitions", "threads", "seed"),
)
# Sizes of the cache: when perplexity has its own context, those of the timed one are named speed_...
SIZES = (
    *("context_tokens", "kv_bytes", "kv_bytes_baseline", "kv_len_before", "kv_len_after"),
    "effective_compression_ratio",
)
SPEED_SETTINGS = (
    *("context_limit", "max_new_tokens", "min_new_tokens", "repetitions", "warmup", "speed_decode_only", "compile"),
)
ENVIRONMENT = ("transformers", "torch", "cpu", "threads")  # that a caption names


# What may stand in a field


class Kind(NamedTuple):
    """What a value has to be, and how that is called."""

    fits: Fits
    wanted: str


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable() and len(value) <= 80


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or is_number(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _maybe(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


def _table(fits: Fits, is_name: Fits = _is_text) -> Fits:
    """An object of not too many values, each of which fits."""
    return lambda value: (
        isinstance(value, dict) and len(value) < 1000 and all(map(is_name, value)) and all(map(fits, value.values()))
    )


def _has(**needed: Fits) -> Fits:
    """An object with these fields, which fit."""
    return lambda value: isinstance(value, dict) and all(fits(value.get(name)) for name, fits in needed.items())


def _list(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_bucket(name: Any) -> bool:
    return isinstance(name, str) and name.partition("-")[0].isdecimal() and len(name) < 40


_number, _interval, _id = _maybe(is_number), _maybe(_is_pair), lambda value: isinstance(value, str | int)
_n = _maybe(_is_count)
_scores = {"n": _n} | dict.fromkeys(("score", "score_base", "answer_nll", "answer_nll_base"), _number)
_counted = {"n_contexts": _n} | dict.fromkeys(
    ("same_answers", "gained", "lost", "mcnemar_p", "delta_answer_nll"), _number
)
_cis = dict.fromkeys(("delta_score_ci95", "delta_answer_nll_ci95"), _interval)
_depths = _maybe(_list(_has(**_scores, depth=is_number)))

ANY = Kind(lambda value: True, "anything")
TEXT = Kind(_is_text, "a text")
NUMBER = Kind(is_number, "a number")
WORD = Kind(_is_word, "a word")
BITS = Kind(lambda value: is_number(value) or _is_word(value), "a number, or a name as k8v4")
BYTES = Kind(is_number, "a number")
INTERVAL = Kind(_is_pair, "two numbers")
NUMBERS = Kind(_table(_number), "an object of numbers")
BUCKETS = Kind(_table(_number, _is_bucket), "an object of numbers")
SPREAD = Kind(_has(min=is_number, max=is_number), "an object with min and max")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object of parameters")
ENV = Kind(
    lambda env: isinstance(env, dict) and all(_is_simple(env.get(key, ())) for key in ENVIRONMENT), "an environment"
)
SETTINGS = Kind(
    lambda said: (
        isinstance(said, dict)
        and all(_is_simple(said.get(name)) and not _is_text(said.get(name)) for name in SPEED_SETTINGS)
    ),
    "an object of settings",
)
AGREEMENT = Kind(_has(mean=_number, median=_number, n_tokens=_number, windows=_number), "an object of numbers")
DELTAS = Kind(_table(_has(delta=is_number, ci95=_interval)), "an object of differences with their intervals")
WINDOWS = Kind(
    _list(_has(id=_id, n=_is_count, nll=is_number, nll_base=_number)), "a list of windows with id, n and nll"
)
DOCUMENTS = Kind(_list(_has(id=_id, n=_is_count, nll=is_number)), "a list of documents")
TASKS = Kind(
    _list(_has(task=_is_text, length=is_number, by_depth=_depths, **_scores, **_counted, **_cis)),
    "a list of tasks with their scores",
)


# The fields


@dataclass(frozen=True)
class Field:
    """One field of a record."""

    kind: Kind = NUMBER  # what may stand there
    head: str = ""  # of a column that shows it; empty: a table says it in another way, or not at all
    about: str = ""  # what the page of a report says of the column
    digits: int = 0  # after the point; of bytes nothing
    page: str = ""  # the head on the page, if it is another one
    unit: tuple[str, str] = ("", "")  # after the number, on the terminal and on the page
    factor: float = 1.0  # by which the number is shown
    inner: str = ""  # the field of an object that is shown
    has_spread: bool = False  # whether another field, ..._spread, holds the smallest and the largest
    is_metric: bool = True  # whether it is null until it is measured, and where a press failed
    is_needed: bool = False  # whether a table cannot do without


def _asked(kind: Kind, *names: str, is_needed: bool = False) -> dict[str, Field]:
    """What a record says that is not measured, or only sometimes."""
    return dict.fromkeys(names, Field(kind, is_metric=False, is_needed=is_needed))


FIELDS: dict[str, Field] = {
    **_asked(TEXT, "press", "protocol", "model", "dataset", is_needed=True),
    **_asked(WORD, "status", "dtype", "device", "attn_implementation", "text_sha256", is_needed=True),
    **_asked(TEXT, "subset", "ppl_mode", "position_mode", "error", "command", "timestamp", "ppl_preset"),
    **_asked(NUMBER, "num_params", "total_tokens", is_needed=True),
    **_asked(NUMBER, "compression_ratio", *BUDGETS, "speed_context_tokens"),
    **_asked(BITS, "kv_bits"),
    **_asked(ENV, "env", is_needed=True),
    **_asked(SETTINGS, "settings"),
    **_asked(OBJECT, "press_config", "kv_bits_config"),
    **_asked(SPREAD, "tpot_ms_spread", "tpot_ms_baseline_spread", "decode_speedup_spread", "ttft_s_spread"),
    **_asked(TASKS, "tasks"),
    "scored_tokens": Field(),
    "windows": Field(),
    "loss": Field(head="loss", about="nats a token", digits=4),
    "ppl": Field(),
    "baseline_loss": Field(),
    "baseline_ppl": Field(),
    "delta_nll": Field(),
    "delta_nll_se": Field(ANY),
    "delta_nll_ci95": Field(INTERVAL),
    "ppl_ratio_ci95": Field(INTERVAL),
    "top1_acc": Field(),
    "same_top1": Field(
        NUMBER, "same top-1", "tokens whose likeliest continuation is the same", 1, unit=("%", " %"), factor=100
    ),
    "kld": Field(
        NUMBERS, "KL", "mean Kullback-Leibler divergence from the uncompressed model, nats", 4, "KLD", inner="mean"
    ),
    "delta_p": Field(NUMBERS),
    "nll_by_distance": Field(NUMBERS),
    "per_window": Field(WINDOWS),
    "nll_by_position": Field(BUCKETS),
    "per_document": Field(DOCUMENTS),
    "kv_bytes_max": Field(BYTES, "KV most", "most bytes stored while reading"),
    "ppl_ci95": Field(INTERVAL),
    "bits_per_byte": Field(head="bits/byte", about="of the scored text", digits=4),
    "scored_bytes": Field(ANY),
    "delta_by_distance": Field(DELTAS),
    "greedy_agreement": Field(AGREEMENT),
    "context_tokens": Field(),
    "target_tokens": Field(ANY),
    "kv_bytes": Field(BYTES, "KV after", "bytes of the compressed cache"),
    "kv_bytes_baseline": Field(BYTES, "KV before", "bytes of the uncompressed cache"),
    "kv_len_before": Field(),
    "kv_len_after": Field(ANY),
    "kept_hash": Field(TEXT),
    "effective_compression_ratio": Field(NUMBER, "achieved", "fraction that was really removed", 3),
    "read_ratio": Field(
        NUMBER, "read", "fraction of the stored pairs that a decoding query reads", 3, is_metric=False
    ),
    "generated_tokens": Field(),
    "repetitions": Field(ANY),
    "generation_tokens_per_s": Field(head="generation tok/s", digits=1),
    "speed_tokens_per_s": Field(ANY),
    "decode_tokens_per_s": Field(head="decode tok/s", about="tokens a second after the first", digits=1),
    "prefill_tokens_per_s": Field(head="prefill tok/s", about="tokens of the context a second"),
    "ttft_s": Field(NUMBER, "TTFT s", "time to the first token, compression included", 3, has_spread=True),
    "tpot_ms": Field(
        *(NUMBER, "TPOT ms", "time per output token after the first, median of the rounds", 2, "TPOT ms [rounds]"),
        has_spread=True,
    ),
    "decode_speedup": Field(
        *(NUMBER, "decode speed-up", "of decoding against the uncompressed cache in the same round, median", 2),
        *("speed-up [rounds]", ("x", "×")),
        has_spread=True,
    ),
    "timed_round": Field(),  # of earlier versions, whose numbers are those of one round
    "total_s": Field(),
    "tpot_ms_baseline": Field(
        NUMBER, "TPOT uncompressed", "that of the uncompressed cache in the same rounds, ms", 2, has_spread=True
    ),
    "peak_mem_bytes": Field(BYTES, "peak memory", "peak memory", page="peak"),
    "peak_mem_kind": Field(TEXT),
    "peak_mem_baseline_bytes": Field(),
    "peak_mem_bytes_uncompressed": Field(BYTES, is_metric=False),
    "peak_mem_delta_bytes": Field(
        BYTES, "above start", "peak memory above what was held before", page="peak above start"
    ),
    "peak_reserved_bytes": Field(ANY),
}  # fmt: skip
METRICS = tuple(name for name, field in FIELDS.items() if field.is_metric)
_TOGETHER = {  # where the first is there, so is one of the others
    "windows": ("scored_tokens",),
    "nll_by_position": ("scored_tokens",),
    "generated_tokens": ("speed_context_tokens", "context_tokens"),
    "baseline_loss": ("baseline_ppl",),
}


def check_record(record: dict[str, Any]) -> None:
    """Raise ValueError, with the field's name, where a table or a report could not show what a file holds."""
    for name, field in FIELDS.items():
        value = record.get(name)
        if (value is not None or field.is_needed) and not field.kind.fits(value):
            raise ValueError(f"{name} must be {field.kind.wanted}, got {repr(value)[:40]}")
    for name, others in _TOGETHER.items():
        if record.get(name) and all(record.get(other) is None for other in others):
            raise ValueError(f"{' or '.join(others)} must be beside {name}, got None")
