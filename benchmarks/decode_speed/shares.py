"""Where a decoding step's time goes: torch's operations, and the Python between them, by their share of it.

What runs in coldpress's functions (the cache's update, attention, masks) is coldpress's; the rest is transformers'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.decoding import UNTIMED, Decoder, footer
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coldpress.cache.layer import PressedLayer

__all__ = ["shares", "table"]

OURS, THEIRS, PYTHON = "coldpress", "transformers", "Python between operations"
SHOWN = 10


def shares(decoder: Decoder, n: int, is_compiled: bool) -> list[dict[str, Any]]:
    """Operations while decoding n tokens, the longest first: their part of the time, calls a token, and whose they are.

    Of a compiled step, in which torch has made new functions of all, nothing says whose an operation is.
    """
    for _ in range(2):  # a compiled step may be specialised at the second
        decoder.tokens(n)
    with _marked(decoder.model, is_compiled), profile(activities=[ProfilerActivity.CPU]) as recorded:
        decoder.tokens(n)
    took: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in recorded.events() or ():
        whose = _whose(event)
        if whose is not None:
            kind = PYTHON if event.name in (OURS, THEIRS) else event.name.removeprefix("aten::"), whose
            took[kind] += event.self_cpu_time_total
            calls[kind] += 1
    total = sum(took.values())
    return [
        {
            "operation": name,
            "of": "" if is_compiled else whose,
            "share": round(us / total, 4),
            "calls": round(calls[name, whose] / (UNTIMED + n), 1),
        }
        for (name, whose), us in took.most_common()
    ]


def _whose(event: FunctionEvent) -> str | None:
    """The nearest mark around an event, itself included; None outside of the model."""
    at: FunctionEvent | None = event
    while at is not None and at.name not in (OURS, THEIRS):
        at = at.cpu_parent
    return None if at is None else at.name


@contextmanager
def _marked(model: Any, is_compiled: bool) -> Iterator[None]:
    """Mark calls of the model as transformers', and those of coldpress's functions inside as coldpress's."""
    functions = () if is_compiled else (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    with ExitStack() as stack:
        stack.enter_context(patch.object(model, "forward", _under(THEIRS, model.forward)))
        if not is_compiled:
            stack.enter_context(patch.object(PressedLayer, "update", _under(OURS, PressedLayer.update)))
        for found in functions:
            found["coldpress"] = _under(OURS, found["coldpress"])
            stack.callback(found.__delitem__, "coldpress")
        yield


def _under(mark: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(mark):
            return function(*args, **kwargs)

    return run


def table(record: dict[str, Any]) -> str:
    """The longest operations of a record of ``decode_speed --profile`` as a Markdown table, then what is left."""
    settings, rows = record["settings"], record["samples"]
    lines = ["| operation | of | calls a token | share % |", "|---|---|---:|---:|"]
    for row in rows[:SHOWN]:
        calls = "" if row["operation"] == PYTHON else f"{row['calls']:,.0f}"
        lines.append(f"| {row['operation']} | {row['of']} | {calls} | {100 * row['share']:.1f} |")
    lines.append(f"| {len(rows) - SHOWN} others | | | {100 * sum(row['share'] for row in rows[SHOWN:]):.1f} |")
    sums = {of: 100 * sum(row["share"] for row in rows if row["of"] == of) for of in (THEIRS, OURS)}
    whose = ", ".join(f"{share:.0f} % {of}" for of, share in sums.items() if share)
    return "\n".join(lines) + (
        f"\n\n{settings['profile']}{f'; {whose}' if whose else ''}. Context of {settings['tokens']:,} tokens. "
        f"{footer(settings)}"
    )
