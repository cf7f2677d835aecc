"""How far a model has come with a text that takes minutes to read and to compress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.replay import decoder_layers
from coldpress.errors import ModelError
from coldpress.io.progress import counted, note


@contextlib.contextmanager
def reading_shown(model: PreTrainedModel, n_tokens: Callable[[], int], press: str) -> Iterator[None]:
    """Show how many tokens of a text the model reads in the block, and then how many it reads again for a press.

    Args:
        model: nothing is shown of one whose decoder layers are not found.
        n_tokens: of the text; asked when the first layer has seen some of it.
        press: what compresses, in words.
    """
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
