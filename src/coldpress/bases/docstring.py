"""The parts of a press's docstring, for the catalogue: summary, formula, source, needs, cost and parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

__all__ = ["Docstring", "parse"]

_TAG = re.compile(r"(?:^|(?<=\. ))(?P<tag>Source|Differs from [^:.]+|Needs|Cost): ")
_ROLE = re.compile(r":\w+:`~?([^`]+)`")  # :class:`coldpress.PressedCache`
_ARGUMENT = re.compile(r"^    (?P<names>\w+(?:, \w+)*): ", re.MULTILINE)


class Docstring(NamedTuple):
    """The parts of a docstring; an empty text for a part that it does not have.

    Attributes:
        summary: its first line, with the full stop.
        details: its paragraphs up to the source, formulas included.
        source: where the method comes from, without the full stop; so are ``needs`` and ``cost``.
        differs: sentences that begin with ``Differs from``.
        arguments: what it says of each parameter; of several together, the same of each.
    """

    summary: str
    details: tuple[str, ...]
    source: str
    differs: tuple[str, ...]
    needs: str
    cost: str
    arguments: dict[str, str]


@cache
def parse(cls: type) -> Docstring:
    """The parts of the class's own docstring."""
    own = cls.__doc__ or ""
    own = "" if own.startswith(f"{cls.__name__}(") else own  # what dataclass() writes where there is none
    text = _ROLE.sub(r"``\1``", inspect.cleandoc(own))
    text, _, rest = text.partition("\nArgs:\n")
    block = re.split(r"\n(?=\S)", rest)[0]
    summary, *paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    # "Source: ..." may follow the formula without an empty line
    paragraphs = [part for paragraph in paragraphs for part in re.split(r"(?<=[.)\]]) (?=Source: )", paragraph) if part]
    first = next((i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("Source: ")), len(paragraphs))
    tags: dict[str, str] = {}
    for paragraph in paragraphs[first:]:
        tags |= {match["tag"]: said for match, said in _between(_TAG, paragraph)}
    arguments: dict[str, str] = {}
    for match, said in _between(_ARGUMENT, block):
        arguments |= dict.fromkeys(match["names"].split(", "), said)
    return Docstring(
        summary=summary,
        details=tuple(paragraphs[:first]),
        source=tags.get("Source", "").rstrip("."),
        differs=tuple(f"{tag}: {said}" for tag, said in tags.items() if tag.startswith("Differs")),
        needs=tags.get("Needs", "").rstrip("."),
        cost=tags.get("Cost", "").rstrip("."),
        arguments=arguments,
    )


def _between(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each match, and what stands between it and the next one, in one line."""
    found = [*pattern.finditer(text)]
    for i, match in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        yield match, " ".join(text[match.end() : end].split())
