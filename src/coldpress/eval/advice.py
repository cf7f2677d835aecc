"""Which press to take, from what was measured of several on the same windows and questions: the rule, and its words.

Everything here is a function of numbers; :mod:`coldpress.eval.recommend` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coldpress.records.metrics import FEWEST_QUESTIONS, Paired, paired_difference, score_difference
from coldpress.records.wording import aligned, format_bytes, listed, percent
from coldpress.report.glance import FEWEST_WINDOWS

LOST = 0.1  # of the questions that the uncompressed cache answers: so many may be lost
ALIKE = 1.05  # costs within this factor are one
ANSWER_TOKENS = 100  # of an answer, where time is compared


class Scored(NamedTuple):
    """One window: tokens scored, the sums of their losses with and without the press, their mean KL; in nats."""

    n: int
    nll: float
    nll_base: float
    kld: float


@dataclass(frozen=True)
class Row:
    """What was measured of one press of one size; of the uncompressed cache without ``windows``."""

    label: str  # of the table: the press, and its size where there are several
    windows: tuple[Scored, ...] = ()  # the same ones in every row
    right: tuple[bool, ...] = ()  # whether each question was answered right, the same ones in every row
    kv_bytes: int | None = None
    ttft_s: float | None = None  # seconds to the first token: the context is read and compressed
    tpot_ms: float | None = None  # milliseconds for each token after the first

    @property
    def loss(self) -> Paired:
        """Difference to the uncompressed cache."""
        return paired_difference(*([getattr(w, name) for w in self.windows] for name in ("n", "nll", "nll_base")))

    @property
    def kl(self) -> float:
        return math.fsum(w.n * w.kld for w in self.windows) / sum(w.n for w in self.windows)

    @property
    def n_right(self) -> int:
        return sum(self.right)

    @property
    def seconds(self) -> float:
        """To read a context, to compress it and to answer with ANSWER_TOKENS; infinite where it was not timed."""
        if self.ttft_s is None or self.tpot_ms is None:
            return math.inf
        return self.ttft_s + ANSWER_TOKENS * self.tpot_ms / 1e3

    def later_s(self, base: Row) -> float | None:
        """Seconds to compress: that the first token comes later than without a press."""
        return None if self.ttft_s is None or base.ttft_s is None else max(0.0, self.ttft_s - base.ttft_s)


@dataclass(frozen=True)
class Advice:
    """What the rule says of the rows."""

    # the rows that keep to the rule, the best in quality first: most right answers, then the lowest KL
    fits: tuple[Row, ...]
    best: tuple[Row, ...]  # the first of them, and those that were not told apart from it
    cheap: Row | None  # the cheapest of them; None if none fits
    open: tuple[Row, ...]  # rows of which there is too little to say whether they fit
    lost: tuple[Row, ...]  # rows whose loss is below the margin, as far as is known, and that lose too many answers


def fewest_right(base: Row) -> int:
    """How many questions a press has to answer."""
    return math.ceil((1 - LOST) * base.n_right - 1e-9)


def rule_of(base: Row, margin: float) -> str:
    """The rule in one sentence."""
    said = (
        f"A press fits if the upper end of the 95 % interval of its loss difference is below {margin:+g} nats a token "
        f"({100 * math.expm1(margin):+.0f} % of perplexity, --margin)"
    )
    if not base.n_right:
        return f"{said}; the uncompressed cache answers no question, so the questions decide nothing here."
    return (
        f"{said} and it answers {100 * (1 - LOST):.0f} % of the questions that the uncompressed cache answers "
        f"(here {fewest_right(base)} of {base.n_right})."
    )


def advise(base: Row, rows: Sequence[Row], margin: float, by_time: bool = False) -> Advice:
    """Sort rows by the rule, and name the best and the cheapest.

    Args:
        base: the uncompressed cache.
        rows: one of each press and size.
        margin: of the loss difference, in nats a token.
        by_time: the cost is the time of a whole answer, then bytes; otherwise bytes, then the time to the first token.
    """
    answers = [row for row in rows if row.n_right >= fewest_right(base)]
    lost = [row for row in rows if row not in answers and row.loss.delta < margin]
    fits = sorted((row for row in answers if _interval(row)[1] < margin), key=_quality)
    undecided = [row for row in answers if row not in fits and _interval(row)[0] < margin]
    if len(base.right) < FEWEST_QUESTIONS:  # so few say nothing
        fits, undecided = [], [*fits, *undecided]
    best = [row for row in fits if row is fits[0] or not _is_ahead(fits[0], row)]
    left = fits
    for name in ("seconds", "kv_bytes") if by_time else ("kv_bytes", "ttft_s"):
        costs = {row: math.inf if getattr(row, name) is None else getattr(row, name) for row in left}
        left = [row for row, cost in costs.items() if cost <= ALIKE * min(costs.values())]
    return Advice(tuple(fits), tuple(best), next(iter(left), None), tuple(undecided), tuple(lost))


def _interval(row: Row) -> tuple[float, float]:
    """Of its loss difference; without an end where too little was measured."""
    ci = row.loss.ci95
    return (-math.inf, math.inf) if ci is None or len(row.windows) < FEWEST_WINDOWS else ci


def _quality(row: Row) -> tuple[int, float]:
    return -row.n_right, row.kl


def _kl_difference(row: Row, other: Row) -> Paired:
    counts = [w.n for w in row.windows]
    return paired_difference(counts, *([w.n * w.kld for w in own.windows] for own in (row, other)))


def _is_ahead(row: Row, other: Row) -> bool:
    """Whether ``row`` is told apart from one behind it: by its answers, or by its KL on the same windows."""
    if row.right and score_difference([*map(float, row.right)], [*map(float, other.right)])[0] > 0:
        return True
    ci = _kl_difference(row, other).ci95
    return ci is not None and ci[1] < 0


def table_of(base: Row, rows: Sequence[Row], advice: Advice) -> str:
    """The rows, the best first of those that fit, in columns that fit into a line of 100 characters."""
    rest = sorted((row for row in rows if row not in advice.fits), key=_quality)
    lines = [("press", "KL", "loss difference", "right", "bytes", "compress", "ms", "fit")]
    lines.append((base.label, "", "", _right(base), format_bytes(base.kv_bytes), "", _number(base.tpot_ms, 1), ""))
    for row in (*advice.fits, *rest):
        fit = "yes" if row in advice.fits else "?" if row in advice.open else "no"
        times = _number(row.later_s(base), 2, " s"), _number(row.tpot_ms, 1)
        lines.append((row.label, f"{row.kl:.4f}", _loss(row), _right(row), format_bytes(row.kv_bytes), *times, fit))
    return "\n".join("  ".join(line) for line in aligned(lines))


def _loss(row: Row) -> str:
    ci = row.loss.ci95
    return f"{row.loss.delta:+.3f}" if ci is None else f"{row.loss.delta:+.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def _right(row: Row) -> str:
    return f"{row.n_right}/{len(row.right)}" if row.right else "-"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def words_of(base: Row, rows: Sequence[Row], advice: Advice, by_time: bool = False) -> list[str]:
    """What a reader should take and why, a sentence or two for each, and what the rule left out."""
    n = f"{_count(len(rows[0].windows), 'window')} and {_count(len(base.right), 'question')}"
    said = []
    if base.right and 2 * base.n_right < len(base.right):
        said.append(
            f"The uncompressed cache has only {_right(base)} questions right: they say little about presses, and the "
            "loss decides."
        )
    if advice.cheap is not None:
        said += [_best(base, advice, n), _cheapest(base, advice)]
    if by_time and advice.cheap is not None and advice.cheap.seconds > base.seconds:
        said.append(
            f"None that fits is faster here than the uncompressed cache ({_number(base.tpot_ms, 1)} ms a token): take "
            "one for its memory only, or measure a longer --context_tokens."
        )
    elif advice.cheap is not None and (advice.cheap.tpot_ms or 0) > (base.tpot_ms or math.inf):
        said.append(
            f"{advice.cheap.label} saves memory here and no time: the uncompressed cache takes "
            f"{_number(base.tpot_ms, 1)} ms a token."
        )
    names = listed([row.label for row in advice.open]) if advice.open else ""
    if advice.open and advice.cheap is not None:
        said.append(f"Not decided by {n}: {names}.")
    elif advice.open:
        said.append(
            f"Nothing is named: {n} are too few to say whether {names} {'fits' if len(advice.open) == 1 else 'fit'}. "
            "Measure more (--budget_minutes, --max_windows); until then keep the uncompressed cache."
        )
    elif advice.cheap is None:
        said.append(
            f"None of these {len(rows)} fits: keep the uncompressed cache, or ask for a smaller --compression_ratio."
        )
    if advice.lost:
        each = listed([f"{row.label} ({percent(math.expm1(row.loss.delta))}) {_right(row)}" for row in advice.lost])
        said.append(f"Perplexity hides what is lost: {each} right, the uncompressed cache {_right(base)}.")
    return said


def _best(base: Row, advice: Advice, n: str) -> str:
    first, *others = advice.best
    why = f"{_right(first)} questions right (uncompressed {_right(base)}), a loss difference of {_loss(first)} nats a "
    why += f"token and a KL of {first.kl:.4f}"
    if not others:
        behind = f"the best of the {len(advice.fits)} that fit" if len(advice.fits) > 1 else "the only one that fits"
        return f"Best in quality: {first.label}, {behind}: {why}."
    ci = _kl_difference(first, others[0]).ci95 or (math.nan, math.nan)
    return (
        f"Best in quality: {n} do not tell {listed([row.label for row in advice.best])} apart. {first.label} comes "
        f"first with {why}; between it and {others[0].label} the KL differs by [{ci[0]:.4f}, {ci[1]:.4f}]."
    )


def _cheapest(base: Row, advice: Advice) -> str:
    row, first = advice.cheap, advice.best[0]
    assert row is not None
    if row is first:
        return f"Cheapest that fits: {row.label} too, with {_costs(row, base)}."
    return (
        f"Cheapest that fits: {row.label}, with {_costs(row, base)}, against {_costs(first, base)}. It has "
        f"{_right(row)} questions right at a loss difference of {_loss(row)}."
    )


def _costs(row: Row, base: Row) -> str:
    left = f"{format_bytes(row.kv_bytes)} (of {format_bytes(base.kv_bytes)})"
    if math.isinf(row.seconds):
        return f"{left}, not timed"
    return f"{left}, {_number(row.later_s(base), 2)} s to compress and {_number(row.tpot_ms, 1)} ms a token"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
