"""The results as one JSON document, and that document as the tables of docs/parity.md. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results.json"
SHOWN = 0.5  # the ratio at which the tables show how a press is made

COLUMNS = ["model", "ratio", "variant", "agrees", "pairs", "theirs", "moved", "ties", "loss", "their_loss"]
COLUMNS += ["loss_difference", "error"]

Record = Mapping[str, Any]

SAME = {  # the columns of the first table, and what they say
    "case": "name of the press, and what is special about this case",
    "press, at one of its ratios": "how the press is made in both libraries; FOLDER and FILE hold random weights",
    "runs that agree": "of the runs that kvpress finishes: both keep the same pairs and losses differ by at most 1e-4 "
    "nats a token, or the kept pairs differ in ties only",
    "with ties": "those of them in which the kept pairs differ in ties only, pairs with the same score",
    "difference in loss": "largest difference of any run without ties: nats a token, mean over the tokens of the "
    "absolute difference",
    "notes": "models on which kvpress raises an error, and why",
}
DIFFERENT = {  # likewise of the second
    "case": SAME["case"],
    "press, at one of its ratios": SAME["press, at one of its ratios"],
    "runs that differ": "of the runs that kvpress finishes, those that do not agree",
    "kept pairs that differ": "of these runs: pairs that one library keeps and the other does not, as a share of all "
    "that the one keeps and all that the other keeps together; least to most",
    "losses differ by": "largest difference in loss of these runs, as above",
    "SmolLM2-135M: pairs that differ": "the same on the one trained model; empty where that was not run, or agrees",
    "losses, coldpress / kvpress": "loss in nats a token on that model, for each ratio that differs; lower is better",
    "kvpress repaired": "how many runs agree when the expression in question is replaced in kvpress, and the largest "
    "difference in loss that is left; empty where nothing was replaced",
    "source": "what explains the difference: a letter, the fault of kvpress in the table of faults below (K: a "
    "detail of scoring); paper, a statement of the paper; decision, one of coldpress; table, a deviation that is no "
    "fault by itself",
    "why": "the explanation",
}


class Spelled:
    """Stands for a library: which classes would be called with what, as text."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)

        def call(*given: Any, **named: Any) -> Any:
            words = [_spell(x) for x in given] + [f"{key}={_spell(x)}" for key, x in named.items()]
            return SimpleNamespace(text=f"{name}({', '.join(words)})")

        return call


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, str) and "/" in value:
        return "FOLDER" if Path(value).is_dir() else "FILE"
    return str(value.text) if isinstance(value, SimpleNamespace) else repr(value)


def spelled(case: Any) -> tuple[str, list[str]]:
    """How the press of a case is made, at ratio ``SHOWN`` or its first one, and the classes that this takes."""
    ratio = SHOWN if SHOWN in case.ratios else case.ratios[0]
    attention = SimpleNamespace(self_attn=SimpleNamespace(head_dim=16))
    config = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    model = SimpleNamespace(config=config, model=SimpleNamespace(layers=[attention]))
    library = Spelled()
    press = case.make(library, ratio, model)
    return "none" if press is None else str(press.text), library.names


def write(path: Path, document: Record) -> None:
    """Rows as lists of the values of COLUMNS, one line each, so that two runs can be compared by eye."""
    cases = []
    for case in document["cases"]:
        head = json.dumps({k: v for k, v in case.items() if k != "rows"}, ensure_ascii=False)
        rows = ",\n".join("   " + json.dumps([row[column] for column in COLUMNS]) for row in case["rows"])
        cases.append(f'  {head[:-1]}, "rows": [\n{rows}\n  ]}}' if rows else f'  {head[:-1]}, "rows": []}}')
    top = json.dumps({k: v for k, v in document.items() if k != "cases"} | {"columns": COLUMNS})
    path.write_text(f'{top[:-1]}, "cases": [\n' + ",\n".join(cases) + "\n]}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` was given."""
    document = json.loads(path.read_text(encoding="utf-8"))
    columns = document.pop("columns")
    for case in document["cases"]:
        case["rows"] = [dict(zip(columns, row, strict=True)) for row in case["rows"]]
    return dict(document)


def tables(document: Record) -> str:
    """The three tables: what agrees, what differs and why, what is not compared."""
    cases = document["cases"]
    run = [case for case in cases if case["rows"]]
    parts = [
        f"coldpress {document['coldpress']} against kvpress {document['kvpress']}, torch {document['torch']}, "
        f"transformers {document['transformers']}; models: {'; '.join(document['models'])}. "
        f"Losses of {document['scored']} tokens, {document['scored_long']} after the two long texts; ratios "
        f"{', '.join(map(str, document['ratios']))} where a row does not say otherwise.",
        "### How to read the tables",
        _table(["column", "meaning"], (SAME | DIFFERENT).items()),
    ]
    for is_default, where in ((False, ""), (True, ", with kvpress's parameters")):
        mine = [case for case in run if case["is_default"] == is_default]
        if same := [case for case in mine if not case["why"]]:
            parts += [f"### Same pairs, same losses{where}", _table(list(SAME), map(_same, same))]
        if other := [case for case in mine if case["why"]]:
            parts += [f"### Different, and why{where}", _table(list(DIFFERENT), map(_different, other))]
    absent = [(case["name"], case["absent"]) for case in cases if not case["rows"]]
    if absent:
        parts += ["### Not compared", _table(["case", "because"], absent)]
    return "\n\n".join(parts)


def _table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([body[0], "|---" * len(header) + "|", *body[1:]])


def _of(case: Record, variant: str) -> list[Record]:
    return [row for row in case["rows"] if row["variant"] == variant]


def _agrees(row: Record) -> bool:
    return bool(row["agrees"])


def _same(case: Record) -> list[str]:
    rows = _of(case, "kvpress")
    ran = [row for row in rows if not row["error"]]
    notes = []
    if case["breaks"]:
        fixed = [row for row in _of(case, "repaired") if row["model"] in case["breaks"]]
        agree = f"; repaired: {sum(map(_agrees, fixed))} of {len(fixed)} agree" if fixed else ""
        notes.append(f"fails on {' and '.join(case['breaks'])}: {case['breaks_why']}{agree}")
    return [
        case["name"],
        f"`{case['press']}`",
        f"{sum(map(_agrees, ran))} of {len(ran)}",
        str(sum(row["ties"] for row in ran)),
        _largest(row for row in ran if not row["ties"]),
        "; ".join(notes),
    ]


def _different(case: Record) -> list[str]:
    rows = [row for row in _of(case, "kvpress") if not row["error"]]
    differ = [row for row in rows if not _agrees(row)]
    real = [row for row in differ if row["model"] not in _TINY]
    repaired = _of(case, "repaired")
    ties = sum(row["ties"] for row in repaired)
    fixed = f"{sum(map(_agrees, repaired))} of {len(repaired)} agree{f', {ties} of them with ties' if ties else ''}; "
    fixed += f"losses within {_largest(row for row in repaired if not row['ties'])}"
    return [
        case["name"],
        f"`{case['press']}`",
        f"{len(differ)} of {len(rows)}",
        _span(row["moved"] for row in differ),
        f"up to {_largest(differ)}",
        _span(row["moved"] for row in real),
        ", ".join(f"{row['loss']:.2f} / {row['their_loss']:.2f}" for row in real),
        fixed if repaired else "",
        case["letter"],
        case["why"],
    ]


_TINY = ("llama", "qwen2", "qwen3", "mistral", "phi3")


def _largest(rows: Iterable[Record]) -> str:
    return f"{max((row['loss_difference'] for row in rows), default=0.0):.2g}"


def _span(shares: Iterable[float]) -> str:
    values = sorted(shares)
    if not values:
        return ""
    low, high = (f"{100 * value:.{0 if value >= 0.1 else 1}f}" for value in (values[0], values[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"
