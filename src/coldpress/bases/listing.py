"""The catalogue of presses as text: what ``coldpress presses`` prints, and what the documents say in the same words."""

from __future__ import annotations

import shutil
import textwrap

from coldpress.bases.registry import PressInfo, catalogue, press_classes

__all__ = ["KINDS", "entry", "keeps", "listing", "python_only", "traits"]

KINDS = {
    "training-free": "nothing is needed but the model",
    "calibrated": "numbers of the model are needed, published ones or those of 'coldpress calibrate'",
    "trained": "weights are needed that were trained for the model",
}
MAX_WIDTH = 100  # columns; 80 where no terminal says how many there are
_NAMES = 33  # columns of the longest name


def python_only() -> list[PressInfo]:
    """The classes without a name: their parameters cannot be written on a command line."""
    named = {info.class_name for info in catalogue()}
    return [info for info in press_classes() if info.class_name not in named]


def keeps(info: PressInfo) -> str:
    """What a press keeps, as a phrase."""
    return info.summary.removeprefix("Keep ").rstrip(".")


def traits(info: PressInfo) -> list[str]:
    """What a press can do, and what to watch for, in words."""
    while_decoding = "with decoding=True works" if _takes(info, "decoding") else "works"
    found = [_ratio(info), f"{while_decoding} while decoding" if info.can_rechoose else "compresses the prompt only"]
    found += ["heads may keep different numbers"] if info.per_head else []
    found += ["layers may keep different numbers"] if info.per_layer else []
    found += ["runs inside 'with press(model):' only"] if info.in_block else []
    return found


def _takes(info: PressInfo, parameter: str) -> bool:
    return any(p.name == parameter for p in info.parameters)


def _ratio(info: PressInfo) -> str:
    """What says how much is kept. A name has a ratio or none; a class may leave that to the presses inside it."""
    if not info.has_ratio:
        return "no ratio: its own parameters say how much is kept"
    if not info.at_prefill:
        return "has a ratio, of the text so far, and takes no budget"
    if info.name or (_takes(info, "compression_ratio") and not _takes(info, "press")):
        return "has a compression ratio"
    if _takes(info, "compression_ratios"):
        return "has a ratio for each layer, and takes no budget"
    return f"its ratio is that of the press{'es' if _takes(info, 'presses') else ''} inside"


def listing() -> str:
    """All presses by kind, a line or two each."""
    groups = [(kind, what, [i for i in catalogue() if i.kind == kind]) for kind, what in KINDS.items()]
    groups.append(("only in Python", "made by calling the class", python_only()))
    lines = ["d  works while decoding             h  heads may keep different numbers"]
    lines += ["b  inside 'with press(model):' only  l  layers may keep different numbers", ""]
    for title, what, infos in groups:
        lines += [_hanging("", f"{title}: {what}", _width()), *map(_row, infos), ""]
    return "\n".join([*lines, "coldpress presses NAME tells all about one: paper, parameters, needs, cost."])


def entry(info: PressInfo) -> str:
    """All about one press."""
    width = _width()
    text = [f"{info.name}: {info.title}" if info.name else info.title]
    text += [textwrap.fill(part, width) for part in (info.summary or "no description", *info.details)]
    facts = [("made by", info.call), ("kind", f"{info.kind}: {KINDS[info.kind]}"), ("", "; ".join(traits(info)))]
    facts += [("source", info.source), ("", info.link if info.link not in info.source else "")]
    facts += [("differs", said.removeprefix("Differs ")) for said in info.differs] + [
        ("needs", info.needs),
        ("cost", info.cost),
    ]
    text.append("\n".join(_hanging(f"{name:9}", said, width) for name, said in facts if said))
    if info.parameters:
        shown = [(f"{p.name}={p.default}" if p.default else p.name, p.text) for p in info.parameters]
        text.append("\n".join(["parameters", *(f"  {call}\n{_hanging(' ' * 6, said, width)}" for call, said in shown)]))
    return "\n\n".join(text).replace("``", "")


def _row(info: PressInfo) -> str:
    found = {"d": info.can_rechoose, "h": info.per_head, "l": info.per_layer, "b": info.in_block}
    marks = "".join(mark if is_so else " " for mark, is_so in found.items())
    special = f" (needs {info.needs})" if info.in_block or info.kind != "training-free" else ""
    if info.name and not info.at_prefill:
        special = f", by {info.title.rstrip(')').rpartition('(')[2]}{special}"
    first = f"  {info.name or info.class_name:{_NAMES}}  {marks}  "
    return _hanging(first, (keeps(info) + special).replace("``", ""), _width())


def _hanging(first: str, text: str, width: int) -> str:
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def _width() -> int:
    return max(60, min(MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns))
