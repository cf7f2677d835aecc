"""``coldpress inspect``: a page that shows which tokens of a text one or two presses keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import NO_PRESS, make_press, takes_ratio
from coldpress.commands.reading import reading_shown
from coldpress.errors import InputError, PressError
from coldpress.io.output import check_output
from coldpress.io.progress import note
from coldpress.io.terminal import printable
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model, pick_device
from coldpress.loading.presses import check_no_size, check_one_press, check_types, default_press
from coldpress.loading.tokens import encode, note_unreadable
from coldpress.models.inspection import MOST_PRESSES, check_presses, inspect

LIMIT_TOKENS = 4096  # of a page, unless asked otherwise


def make_page(
    output: str,
    press: Sequence[str],
    press_args: dict[str, Any],
    source: dict[str, Any],
    model_options: dict[str, Any],
    compression_ratio: Sequence[float] = (),
    budget_tokens: Sequence[int] = (),
    limit_tokens: int | None = None,
    chunk_tokens: int | None = None,
    command: str = "",
) -> None:
    """What the command does: read a text, write the page to ``output``, and print a summary.

    Args:
        press: one or two registered names; none for :func:`default_press`.
        source: what :func:`load_corpus` is given.
        compression_ratio: one for all presses or one for each, 0.5 if neither it nor a budget is given. Two of them
            show a single press twice.
        budget_tokens: likewise, instead of a ratio.
        command: the command line, for the page.
    """
    press = press or [default_press(chunk_tokens)]
    names, presses = _make_presses(press, press_args, compression_ratio, budget_tokens)
    pick_device(model_options.get("device", "auto"))
    path = check_output(output, "page.html")
    corpus = load_corpus(**source)
    document = corpus.documents[0]
    if len(corpus.documents) > 1:
        note(f"the first of {len(corpus.documents)} texts is read, {document.doc_id}; --sample_idx reads another.")
    loaded = load_model(**model_options)
    note_unreadable(loaded.tokenizer, [document.text], loaded.name)
    limit = _limit(limit_tokens, loaded.max_positions, loaded.name)
    torch.manual_seed(0)  # of presses that draw numbers
    with reading_shown(
        loaded.model, lambda: min(limit, len(encode(loaded.tokenizer, document.text)[0])), " and ".join(names)
    ):
        found = inspect(
            loaded.model,
            loaded.tokenizer,
            document.text,
            presses,
            limit_tokens=limit,
            chunk_tokens=chunk_tokens,
            names=names,
        )
    if limit_tokens is None and document.text[len(found.text) :].strip():
        note(f"only the first {len(found.ids):,} tokens are shown; --limit_tokens says how many.")
    where = Path(corpus.name).name
    title = document.doc_id if where == document.doc_id else f"{where}: {document.doc_id}"
    found.save_html(path, title, [f"Model: {loaded.name}", *([f"Made by: {command}"] if command else [])])
    print(found.summary())
    print(f"{printable(str(path))}: {len(found.ids):,} tokens, {path.stat().st_size:,} bytes")


def _make_presses(
    press: Sequence[str], press_args: dict[str, Any], ratios: Sequence[float], budgets: Sequence[int]
) -> tuple[list[str], list[BasePress]]:
    """What to call each press, and the presses."""
    if ratios and budgets:
        raise InputError("--compression_ratio and --budget_tokens both say how much is kept; give one of them.")
    check_one_press(press, press_args)
    check_no_size(press_args)
    sizes: list[Any]
    option, sizes = "--compression_ratio", list(ratios) or [0.5]
    if budgets:
        option, sizes = "--budget_tokens", list(budgets)
    n = max(len(press), len(sizes))
    if n > MOST_PRESSES:
        raise PressError(f"A page shows one press or two side by side; {n} were asked for, by --press or {option}.")
    if len(press) not in (1, n) or len(sizes) not in (1, n):
        raise PressError(f"Give one {option} for all presses, or one for each.")
    load_press_files(press)
    names, presses = [], []
    for name, size in zip(list(press) * (n // len(press)), sizes * (n // len(sizes)), strict=True):
        check_types(name, press_args)
        if name == NO_PRESS:
            raise PressError("no_press keeps every token, so there is nothing to see; name a press.")
        has_ratio = takes_ratio(name)
        if budgets:  # make_press says if it takes none
            made, shown = make_press(name, 0.0, budget_tokens=size, **press_args), f"{name}, {size} tokens"
        elif has_ratio:
            made, shown = make_press(name, size, **press_args), f"{name} {size:.15g}"
        else:
            made, shown = make_press(name, 0.0, **press_args), name
            if ratios:
                note(f"{name} has no compression ratio: its own parameters say how much is kept.")
        assert made is not None
        names.append(shown)
        presses.append(made)
    check_presses(presses)
    return names, presses


def _limit(asked: int | None, positions: int | None, model: str) -> int:
    """How many tokens are read at most: none past the positions that the model was trained on."""
    wanted = LIMIT_TOKENS if asked is None else asked
    if positions is None or wanted <= positions:
        return wanted
    if asked is not None:
        note(f"--limit_tokens {asked} is past the {positions} positions {model} was trained on; cut to {positions}.")
    return positions
