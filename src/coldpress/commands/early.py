"""What a command refuses before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from coldpress.core.ratio import check_ratio
from coldpress.errors import InputError, MissingDependencyError
from coldpress.io.files import is_utf8

__all__ = ["check_early", "check_server", "check_utf8"]


# What may hold any bytes: names of files, which are checked where they are looked for.
_FILES = (
    *("allow_files", "config", "data", "dataset", "file", "folder", "folders", "model", "output", "output_dir"),
    "text_file",
)


def check_utf8(given: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` if what is no file's name holds bytes that are no text."""
    for name, value in given.items():
        if name not in _FILES and not is_utf8(json.dumps(value, ensure_ascii=False, default=str)):
            raise InputError(f"{name} holds bytes that are not UTF-8, {ascii(value)[:80]}; write it in UTF-8.")


def check_early(given: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for a ratio that is none, or a text that is not there or takes no such options.

    Texts of the hub, of folders and of tables are left to those who read them.

    Args:
        given: options by name, of any command; None: not given.
    """
    from coldpress.loading.datasets import is_single, load_corpus, source_of  # which help does without

    is_advice = "use" in given  # which takes no ratio of 0, and says so itself
    ratios = None if is_advice else given.get("compression_ratio")
    for ratio in ratios if isinstance(ratios, (list, tuple)) else () if ratios is None else (ratios,):
        check_ratio(ratio, "--compression_ratio")
    options: dict[str, Any] = {name: given.get(name) for name in ("subset", "sample_idx")}
    if given.get("text_file") is not None and given.get("dataset") is not None:
        return  # which of the two is meant is asked elsewhere
    texts, dataset, data = given.get("text_file"), given.get("dataset"), given.get("data")
    for text in (texts,) if isinstance(texts, str) else texts or ():
        if is_single(text, is_text=True):
            load_corpus("", text_file=text, **options)
    if texts is None and isinstance(dataset, str) and is_single(dataset):
        load_corpus(dataset, **options)
    if is_advice and data is not None and is_single(data, is_text="text_file" in source_of(data)):
        load_corpus(**{"dataset": "", **source_of(data)}, **options)


def check_server() -> None:
    """Raise :class:`MissingDependencyError` where a package of a server is not installed."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f'coldpress serve needs a package that is not installed ({package}): pip install "coldpress[serve]".'
            )
