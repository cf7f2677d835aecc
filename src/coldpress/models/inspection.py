"""Inspection: which tokens of a text a press keeps in which layers and heads, as tensors and as a page."""

from __future__ import annotations

import base64
import html
import importlib.resources
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.layer import PressedLayer
from coldpress.cache.pressed import PressedCache
from coldpress.core.definition import as_given
from coldpress.core.press import Press
from coldpress.errors import DataError, InputError, ModelError, OutputError, PressError
from coldpress.io.files import path_of, replace_file
from coldpress.models.block import prefilling
from coldpress.models.prompts import prefill
from coldpress.models.supported import use_coldpress

__all__ = ["MOST_PRESSES", "Inspection", "check_presses", "inspect", "inspection_of"]

MOST_PRESSES = 2  # that a page has room for


@dataclass(frozen=True, eq=False)
class _Survivors:
    """The pairs that one press has kept."""

    press: Press
    name: str
    kept: Tensor  # bool [layers, heads, tokens]
    pairs: Tensor  # int64 [layers, heads], those of no token included
    n_before: int  # pairs that there were to choose among; of a sliding window, those in its reach
    achieved_ratio: float


@dataclass(frozen=True, eq=False)
class Inspection:
    """Which tokens of a text one or two presses keep, in every layer and head; what :func:`inspect` returns.

    Attributes:
        text: what was read, up to the end of its last token.
        ids: the tokens.
        ends: for each token, where its part of ``text`` ends; a part begins where the one before ends, and tokens that
            are parts of one character have one end.
        heads: for each layer, how many heads store pairs that a press chose among; 0 where it was shown none.
        kinds: for each layer, what it stores instead, such as ``sliding window``; an empty text where heads are given.
        presses: what was inspected.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    heads: tuple[int, ...]
    kinds: tuple[str, ...]
    found: tuple[_Survivors, ...]

    @property
    def presses(self) -> tuple[Press, ...]:
        return tuple(own.press for own in self.found)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the presses on the page."""
        return tuple(own.name for own in self.found)

    def _of(self, press: Press | int) -> _Survivors:
        places = range(len(self.found))
        if isinstance(press, int) and not isinstance(press, bool) and press in places:
            return self.found[press]
        for own in self.found:
            if own.press is press or own.press == press:
                return own
        raise PressError(f"{press!r} was not inspected; give one of {list(self.presses)}, or its number.")

    def kept(self, press: Press | int = 0) -> Tensor:
        """Bool ``[layers, heads, tokens]``, of a press or the number of one; False in layers that it was not shown."""
        return self._of(press).kept

    def pairs(self, press: Press | int = 0) -> Tensor:
        """Stored pairs, int64 ``[layers, heads]``; those that belong to no token (RestoreKV) are counted too."""
        return self._of(press).pairs

    def achieved_ratio(self, press: Press | int = 0) -> float:
        """Fraction of the pairs that the press removed, of all layers that it was shown."""
        return self._of(press).achieved_ratio

    def overlap(self) -> Tensor:
        """Jaccard index of what the two presses keep, float64 ``[layers]``: common tokens over tokens of either.

        NaN where neither keeps any.

        Raises:
            PressError: one press alone was inspected.
        """
        both, either = self._common()
        return both.double() / either.double()

    def total_overlap(self) -> float:
        """:meth:`overlap` of all layers together."""
        both, either = self._common()
        return int(both.sum()) / int(either.sum())

    def _common(self) -> tuple[Tensor, Tensor]:
        if len(self.found) != 2:
            raise PressError("An overlap is that of two presses, and one was inspected.")
        a, b = (own.kept for own in self.found)
        return (a & b).sum((1, 2)), (a | b).sum((1, 2))

    def summary(self) -> str:
        """A table for the terminal: each press with the pairs it keeps and the ratio it achieves; their overlap."""
        lines = [("press", "kept pairs", "of", "achieved ratio")]
        for own in self.found:
            lines.append((own.name, f"{int(own.pairs.sum()):,}", f"{own.n_before:,}", f"{own.achieved_ratio:.4f}"))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        if len(self.found) == 2:
            layers = [float(value) for value in self.overlap() if value == value]
            spread = f", {min(layers):.3f} to {max(layers):.3f} by layer" if layers else ""
            rows.append(f"overlap (Jaccard): {self.total_overlap():.3f}{spread}")
        unseen = [i for i, n in enumerate(self.heads) if not n]
        if unseen:
            rows.append(f"layers that no press is shown: {', '.join(map(str, unseen))}")
        return "\n".join(rows)

    def save_html(self, path: str | Path, title: str = "", facts: Sequence[str] = ()) -> None:
        """Write the page: one file without anything from outside, whole or not at all.

        Args:
            path: the file; one that is there is replaced.
            title: what was read.
            facts: lines about where it comes from, such as the model and the command.

        Raises:
            OutputError: it cannot be written.
        """
        path = path_of(path)
        page = self.to_html(title, facts).encode("utf-8", "backslashreplace")
        try:
            replace_file(path, lambda part: part.write_bytes(page))
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}); name a file such as page.html.") from error

    def to_html(self, title: str = "", facts: Sequence[str] = ()) -> str:
        """The page as a text; the arguments are those of :meth:`save_html`."""
        page = importlib.resources.files("coldpress").joinpath("assets", "inspect.html").read_text(encoding="utf-8")
        parts = {"title": html.escape(title or "a text"), "data": _script_json(self._data(title, facts))}
        return re.sub(r"\{\{(title|data)\}\}", lambda found: parts[found[1]], page)

    def _data(self, title: str, facts: Sequence[str]) -> dict[str, Any]:
        """The data of the page. Bits and numbers are base64, lowest bit and byte first; places count UTF-16 units."""
        units = [0, *itertools.accumulate(1 + (char > "\uffff") for char in self.text)]
        return {
            "title": title,
            "facts": list(facts),
            "text": self.text,
            "ids": _base64(np.array(self.ids, dtype="<u4")),
            "ends": _base64(np.array([units[end] for end in self.ends], dtype="<u4")),
            "heads": list(self.heads),
            "kinds": list(self.kinds),
            "presses": [
                {
                    "name": own.name,
                    "call": repr(own.press),
                    "ratio": own.achieved_ratio,
                    "pairs": int(own.pairs.sum()),
                    "before": own.n_before,
                    "of_no_token": int(own.pairs.sum() - own.kept.sum()),
                    # uint8 [layers, heads, ceil(tokens / 8)]
                    "kept": _base64(np.packbits(own.kept.numpy(), axis=-1, bitorder="little")),
                }
                for own in self.found
            ],
        }


def inspect(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    presses: Press | Sequence[Press],
    *,
    limit_tokens: int | None = None,
    chunk_tokens: int | None = None,
    names: Sequence[str] = (),
) -> Inspection:
    """Have the model read a text, and report which of its tokens each press keeps.

    ::

        found = coldpress.inspect(model, tokenizer, text, [SnapKVPress(0.5), StreamingLLMPress(0.5)])
        found.kept(0)  # bool [layers, heads, tokens]
        found.save_html("page.html")

    One prefill serves both presses, unless it comes in pieces. The text is read as evaluations read it: without special
    tokens.

    Args:
        model: a causal language model; it remains on coldpress's attention backend.
        tokenizer: the model's, a fast one.
        text: what to read.
        presses: one or two.
        limit_tokens: read only so many tokens.
        chunk_tokens: as in :class:`coldpress.PressedCache`.
        names: how the presses are called on the page; their classes if left out.

    Raises:
        PressError: no press, too many, one that leaves a prompt as it is, or that lacks what it needs of the model.
        DataError: there is nothing to read.
        ModelError: the tokenizer does not say where its tokens are in the text, or is another model's.
    """
    presses = [presses] if isinstance(presses, Press) else list(presses)
    check_presses(presses)
    if names and len(names) != len(presses):
        raise PressError(f"There are {len(presses)} presses and {len(names)} names.")
    ids, ends = _tokenize(tokenizer, text, limit_tokens)
    known = model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise ModelError(f"The tokenizer gives the id {max(ids)} and the model knows {known} tokens.")
    use_coldpress(model)
    prepared = [press.prepared(model, tokenizer) for press in presses]
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    caches = _prefilled(model, prompt, prepared, chunk_tokens)
    pressed = caches[-len(presses) :]
    n_layers = max(len(cache.layers) for cache in caches)
    kinds = tuple(_kind([cache.layers[i] for cache in caches if i < len(cache.layers)]) for i in range(n_layers))
    stored = {i: [cache.positions(i)[0].cpu() for cache in pressed] for i, kind in enumerate(kinds) if not kind}
    if not stored:
        raise ModelError("No layer of this model holds pairs that a press could choose among.")
    heads = tuple(len(stored[i][0]) if i in stored else 0 for i in range(n_layers))
    found = []
    for i, (press, cache) in enumerate(zip(presses, pressed, strict=True)):
        kept, pairs = _kept(n_layers, max(heads), len(ids), {layer: stored[layer][i] for layer in stored})
        name = names[i] if names else _name(press)
        n_before = sum(layer.n_pairs[0] for layer in cache.pressed_layers())
        found.append(_Survivors(press, name, kept, pairs, n_before, cache.achieved_ratio()))
    return Inspection(text[: ends[-1]], tuple(ids), tuple(ends), heads, kinds, tuple(found))


def inspection_of(cache: PressedCache, press: Press, text: str, ids: Sequence[int], ends: Sequence[int]) -> Inspection:
    """Which tokens a cache of one row stores, which ``press`` has compressed and nothing was added to.

    Args:
        text, ids, ends: as in :class:`Inspection`, of all tokens that the cache has seen.

    Raises:
        ModelError: no layer holds pairs that a press could choose among.
    """
    kinds = tuple(_kind([layer]) for layer in cache.layers)
    stored = {i: cache.positions(i)[0].cpu() for i, kind in enumerate(kinds) if not kind}
    if not stored:
        raise ModelError("No layer of this cache holds pairs that a press has chosen among.")
    heads = tuple(len(stored[i]) if i in stored else 0 for i in range(len(kinds)))
    kept, pairs = _kept(len(kinds), max(heads), len(ids), stored)
    n_before = sum(layer.n_pairs[0] for layer in cache.pressed_layers())
    found = _Survivors(press, _name(press), kept, pairs, n_before, cache.achieved_ratio())
    return Inspection(text, tuple(ids), tuple(ends), heads, kinds, (found,))


def _name(press: Press) -> str:
    """Name of a press: its class, and how much is kept."""
    name, ratio = type(press).__name__, getattr(press, "compression_ratio", 0.0)
    budgets = [f", {size} {unit}" for unit in ("tokens", "bytes") if (size := getattr(press, f"budget_{unit}", None))]
    return name + "".join(budgets) + (f" {ratio:.15g}" if ratio else "")


def check_presses(presses: Sequence[Press]) -> None:
    """Raise :class:`PressError` unless these can be inspected: one or two, each of which compresses a prompt."""
    if not 1 <= len(presses) <= MOST_PRESSES:
        raise PressError(f"One press or two are inspected; got {len(presses)}.")
    for press in presses:
        if not isinstance(press, Press):
            raise PressError(f"presses must be presses such as coldpress.SnapKVPress(0.5), got {as_given(press)}.")
        if not press.at_prefill:
            raise PressError(
                f"{type(press).__name__} compresses what is generated and nothing of a prompt, so every token is "
                "still there after it. Inspect the press inside."
            )


def _tokenize(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], list[int]]:
    """The tokens of ``text``, and where each one's part of it ends.

    A part begins where the one before ends: what a tokenizer counts to none, such as the space before a word, belongs
    to the token after it. Tokens of bytes of one character share its part.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("This tokenizer does not say where its tokens are in a text; a fast one is needed.")
    if limit is not None and limit < 1:
        raise InputError(f"limit_tokens must be at least 1, got {limit}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The text is no Unicode: half a character stands at {error.start}.") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"][:limit]
    ends: list[int] = []
    for _, end in encoded["offset_mapping"][:limit]:
        ends.append(max(end, ends[-1] if ends else 0))
    if not text.strip() or not ids or not ends[-1]:
        raise DataError("The text holds no tokens; give one with some.")
    first = next(end for end in ends if end)
    return ids, [end or first for end in ends]


def _prefilled(
    model: PreTrainedModel, prompt: Tensor, presses: Sequence[Press], chunk_tokens: int | None
) -> list[PressedCache]:
    """The cache that each press leaves of ``prompt [1, T]``; before them the whole one, if they come of one."""
    if chunk_tokens is not None:  # what the model makes of a piece depends on what was kept of those before
        caches = [PressedCache(press, chunk_tokens=chunk_tokens) for press in presses]
        for cache in caches:
            with prefilling(model, cache):
                prefill(model, prompt, cache)
    else:
        full = PressedCache()
        caches = [full, *full.branches(presses)]
        with prefilling(model, *caches):
            prefill(model, prompt, full)
    for cache in caches:
        cache.session.check_claimed()  # raises what the press raised
    return caches


def _kind(layers: list[Any]) -> str:
    """What a layer that no press is shown stores instead; an empty text for the others.

    Args:
        layers: that layer of each cache, the one that the model itself has filled first.
    """
    if not isinstance(layers[0], PressedLayer):
        return "a state, no pairs"
    if not layers[0].is_initialized:
        return "no pairs of its own"
    if not any(layer.n_pairs[0] for layer in layers):
        return "sliding window, left alone"
    return ""


def _kept(n_layers: int, n_heads: int, n_tokens: int, stored: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Kept tokens, bool ``[layers, heads, tokens]``, and stored pairs, int64 ``[layers, heads]``.

    Args:
        stored: for each layer that the press was shown, positions ``[heads, T]``; -1 in empty slots.
    """
    kept = torch.zeros(n_layers, n_heads, n_tokens + 1, dtype=torch.bool)
    pairs = torch.zeros(n_layers, n_heads, dtype=torch.long)
    for layer, positions in stored.items():
        at = positions.masked_fill(positions < 0, n_tokens)  # the empty slots: one more token, cut off below
        kept[layer, : len(at)].scatter_(1, at, True)
        pairs[layer, : len(at)] = (positions >= 0).sum(-1)
    return kept[..., :n_tokens].contiguous(), pairs


def _base64(numbers: Any) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _script_json(data: Any) -> str:
    """JSON that is plain ASCII and has nothing that ends or changes the script element around it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
