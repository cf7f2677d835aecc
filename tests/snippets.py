"""Code of the documents, which is written for the newest transformers."""

from __future__ import annotations

import re

from coldpress.architecture.cache_argument import argument_name


def for_installed(code: str) -> str:
    """``code`` with the name that the installed transformers has for the cache of a model's call."""
    return re.sub(r"(\bmodel(?:\.generate)?\([^\n]*?)\bcache=", rf"\1{argument_name()}=", code)
