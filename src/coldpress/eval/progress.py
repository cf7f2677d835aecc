"""What a run tells its user on stderr: progress, and notes on what its numbers mean."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tqdm import tqdm

from coldpress.errors import ModelError
from coldpress.io.terminal import printable

if TYPE_CHECKING:
    from torch import nn
    from transformers.modeling_utils import PreTrainedModel

LINE_EVERY_S = 10.0

_T = TypeVar("_T")


class Sized(Generic[_T]):
    """An iterator of which it is known how much it gives."""

    def __init__(self, items: Iterator[_T], n: int):
        self.items, self.n = items, n

    def __iter__(self) -> Iterator[_T]:
        return self.items

    def __len__(self) -> int:
        return self.n


def note(message: str, kind: str = "note") -> None:
    """One line on stderr, above a progress bar if there is one; where stderr is full or gone, none."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
        tqdm.write(printable(f"{kind}: {message}"), file=sys.stderr)


@contextlib.contextmanager
def warnings_noted(kind: type[Warning] = UserWarning) -> Iterator[None]:
    """The warnings of a block as notes, once it has ended."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", kind)
        yield
    for warning in said:
        note(str(warning.message))


def progress(items: Sequence[_T] | Sized[_T], name: str, more: Callable[[], str] = str) -> Iterator[_T]:
    """``items``, with a progress bar on a terminal; elsewhere, as in a log file, a line every 10 s and a last one.

    ``more`` gives what else to say at any time, such as the time left of something larger.
    """
    with counted(name, len(items), more) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def counted(
    name: str, total: int | None, more: Callable[[], str] = str, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done, and shows it as :func:`progress` does.

    ``total`` is None where nobody knows it.
    """
    if sys.stderr.isatty():
        how = {"file": sys.stderr, "dynamic_ncols": True, "smoothing": 0.05, "unit": f" {unit}" if unit else "it"}
        with tqdm(total=total, desc=name, **how) as bar:

            def advance(n: int) -> None:
                bar.update(n)
                bar.set_postfix_str(more(), refresh=False)

            yield advance
        return
    start = said = time.monotonic()
    done, of = 0, "" if total is None else f"/{total}"

    def count(n: int) -> None:
        nonlocal done, said
        done, now = done + n, time.monotonic()
        if done == total or now - said >= LINE_EVERY_S:
            said = now
            parts = [f"{name}: {done}{of} {unit}".rstrip(), f"{now - start:.0f} s", more()]
            with contextlib.suppress(OSError):
                sys.stderr.write(printable(", ".join(part for part in parts if part)) + "\n")
                sys.stderr.flush()

    yield count


# How far a model has come with a text that takes minutes to read and to compress


@contextlib.contextmanager
def reading_shown(model: PreTrainedModel, n_tokens: Callable[[], int], press: str) -> Iterator[None]:
    """Show how many tokens of a text the model reads in the block, and then how many it reads again for a press.

    Args:
        model: nothing is shown of one whose decoder layers are not found.
        n_tokens: of the text; asked when the first layer has seen some of it.
        press: what compresses, in words.
    """
    from coldpress.bases.replay import decoder_layers  # which notes do without

    try:
        layers = list(decoder_layers(model))
    except ModelError:
        layers = []
    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as bars:
        shown = _Shown(n_tokens, press, len(layers), bars)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(shown.after_layer, with_kwargs=True).remove)
        yield


class _Shown:
    """Counts what each decoder layer is given; a token is read when all of them have had it."""

    def __init__(self, n_tokens: Callable[[], int], press: str, n_layers: int, bars: contextlib.ExitStack):
        self.n_tokens, self.press, self.n_layers, self.bars = n_tokens, press, n_layers, bars
        self.total: int | None = None  # tokens of the text
        self.given = self.read = 0  # tokens of this bar, counted for each layer; those that were shown
        self.advance: Callable[[int], None]

    def after_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.total is None:
            self.total = self.n_tokens()
            note(f"reading {self.total:,} tokens, compressing by {self.press}")
            self._begin("reading", self.total, "tokens")
        elif self.read == self.total and self.given == self.total * self.n_layers:
            self._begin("compressing", None, "tokens read again")
            self.total = 0  # the second bar is the last one
        hidden = args[0] if args else kwargs.get("hidden_states")  # [B, Q, hidden]
        self.given += 0 if hidden is None else hidden.shape[1]
        self.advance(self.given // self.n_layers - self.read)
        self.read = self.given // self.n_layers

    def _begin(self, name: str, total: int | None, unit: str) -> None:
        self.bars.close()
        self.advance = self.bars.enter_context(counted(name, total, unit=unit))
        self.given = self.read = 0
