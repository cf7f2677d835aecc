"""What a terminal may be given of a text that others wrote."""

from __future__ import annotations

import re

__all__ = ["UNSAFE", "printable"]

# Control characters, lone surrogates, marks of direction and what is no character: they move the cursor or change
# colours, turn the words around them, or cannot be written at all.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def printable(text: str, keep: str = "") -> str:
    """``text`` with what a terminal would act on written out, such as ``\\x1b``, but for the characters of ``keep``."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
