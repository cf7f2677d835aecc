"""Compare what the two libraries kept and predicted, and judge whether every difference is explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.parity.case import Case
from benchmarks.parity.models import MODELS
from torch import Tensor

TOLERANCE = 1e-4  # nats a token
TIE = 1e-5  # scores that differ by less, relative to the larger one, are a tie

Results = Mapping[tuple[str, str, float, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One case on one model at one ratio, coldpress against one variant of kvpress.

    Attributes:
        variant: ``kvpress``, or ``repaired`` for kvpress without the fault that the case names.
        pairs: that coldpress keeps, over all layers and heads.
        theirs: that kvpress keeps.
        moved: that one of them keeps and the other does not, divided by ``pairs + theirs``.
        ties: the kept sets differ, and only in pairs with the same score.
        loss, their_loss: mean over the scored tokens, nats a token, of coldpress and of kvpress.
        loss_difference: mean over the scored tokens of the absolute difference, nats a token.
        error: what a library raised.
    """

    case: str
    model: str
    ratio: float
    variant: str
    pairs: int = 0
    theirs: int = 0
    moved: float = 0.0
    ties: bool = False
    loss: float = 0.0
    their_loss: float = 0.0
    loss_difference: float = 0.0
    error: str = ""

    @property
    def agrees(self) -> bool:
        if self.error:
            return False
        return self.ties or (self.moved == 0 and self.loss_difference <= TOLERANCE)

    def as_record(self) -> dict[str, Any]:
        """What is worth writing down."""
        return asdict(self) | {
            "agrees": self.agrees,
            "moved": round(self.moved, 6),
            "loss": round(self.loss, 4),
            "their_loss": round(self.their_loss, 4),
            "loss_difference": float(f"{self.loss_difference:.3g}"),
        }


def only_ties(ours: Tensor, theirs: Tensor, scores: Tensor, scope: str) -> bool:
    """Whether two selections differ only in pairs whose scores are equal up to rounding.

    What one keeps and the other does not is then matched, score by score, by what only the other keeps.

    Args:
        ours, theirs: bool ``[B, L, Hkv, T]``.
        scores: float32 of the same shape; larger = keep.
        scope: whose pairs compete: those of a ``head``, of a ``layer`` or of the ``model``.
    """
    start = {"head": 3, "layer": 2, "model": 1}[scope]
    flat = [x.flatten(start).flatten(0, start - 1) for x in (ours, theirs, scores)]
    for a, b, s in zip(*flat, strict=True):
        if int(a.sum()) != int(b.sum()):
            return False
        if not s[a & ~b].sort().values.isclose(s[b & ~a].sort().values, rtol=TIE, atol=0).all():
            return False
    return True


def compare_one(
    case: Case, key: tuple[str, str, float, str], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Row:
    """The row of one measurement of each library."""
    model, _, ratio, variant = key
    if ours["error"] or theirs["error"]:
        who = "coldpress" if ours["error"] else "kvpress"
        return Row(case.name, model, ratio, variant, error=f"{who}: {ours['error'] or theirs['error']}")
    kept, other = ours["kept"], theirs["kept"]
    extra = ours["extra"], theirs["extra"]
    differ = int((kept ^ other).sum()) + sum(extra)
    n_kept = int(kept.sum()) + extra[0], int(other.sum()) + extra[1]
    ties = bool(differ) and not sum(extra) and theirs["scores"] is not None
    ties = ties and only_ties(kept, other, theirs["scores"], case.scope)
    losses = ours["losses"], theirs["losses"]
    return Row(
        case.name,
        model,
        ratio,
        variant,
        pairs=n_kept[0],
        theirs=n_kept[1],
        moved=differ / sum(n_kept),
        ties=ties,
        loss=float(losses[0].mean()),
        their_loss=float(losses[1].mean()),
        loss_difference=float((losses[0] - losses[1]).abs().mean()),
    )


def compare(cases: list[Case], coldpress: Results, kvpress: Results) -> list[Row]:
    """All rows, in the order of the cases."""
    order = {case.name: (i, case) for i, case in enumerate(cases)}
    rows = []
    for key, theirs in kvpress.items():
        model, name, ratio, _ = key
        ours = coldpress.get((model, name, ratio, "coldpress"))
        if ours is not None and name in order:
            rows.append((order[name][0], compare_one(order[name][1], key, ours, theirs)))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def problems(case: Case, rows: list[Row]) -> list[str]:
    """What is wrong with a case: differences nobody explains, explanations that nothing needs."""
    found = []
    asis = [row for row in rows if row.variant == "kvpress"]
    for row in asis:
        expected = row.model in case.breaks and row.error.startswith("kvpress: ")
        if row.error and not expected:
            found.append(f"{_at(row)}: {row.error}")
        elif not row.error and not row.agrees and not case.why:
            found.append(f"{_at(row)}: {_difference(row)}, and nothing explains it")
    for row in rows:
        if row.variant == "repaired" and not row.agrees:
            found.append(f"{_at(row)}: {row.error or _difference(row)} even with kvpress's fault repaired")
    ran = {row.model for row in asis}
    if case.why and all(row.agrees for row in asis) and all(model in ran for model in MODELS if case.runs_on(model)):
        found.append(f"{case.name}: the libraries agree, so the reason for a difference is out of date: {case.why}")
    for model in case.breaks:
        if any(row.model == model and not row.error for row in asis):
            found.append(f"{case.name}: kvpress runs on {model}, so this is out of date: {case.breaks_why}")
    return found


def _at(row: Row) -> str:
    return f"{row.case} on {row.model} at {row.ratio}"


def _difference(row: Row) -> str:
    return (
        f"{row.moved:.2%} of the kept pairs differ ({row.pairs} and {row.theirs}), losses by {row.loss_difference:.1e}"
    )
