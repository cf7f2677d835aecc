"""What a press is: something that looks at one layer and says which pairs are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.budget import check_ratio, keep_count, select
from coldpress.errors import PressError
from coldpress.view import Kept, LayerView

__all__ = ["BasePress", "ScorerPress", "check_at_least"]

_S = TypeVar("_S", bound="ScorerPress")


class BasePress:
    """A way to compress the pairs of one layer. Presses are immutable; what a run accumulates lives in the cache.

    Use one in a cache, ``PressedCache(press)``, or around calls of a model, as in kvpress::

        with press(model):
            model(input_ids, past_key_values=cache)
    """

    def compress(self, view: LayerView) -> Kept | None:
        """What is kept of ``view``; None keeps everything."""
        raise NotImplementedError(f"{type(self).__name__} must define compress(view)")

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Compress every cache that ``model`` prefills inside the block. See :func:`coldpress.pressing.pressed`."""
        from coldpress.pressing import pressed

        with pressed(model, self):
            yield model


@dataclass(frozen=True)
class ScorerPress(BasePress):
    """Keep the pairs with the largest scores; subclasses define :meth:`score`.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)

    def score(self, view: LayerView) -> Tensor:
        """Scores ``[B, Hkv, T]`` in float32; larger = keep. Must not depend on ``compression_ratio``."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def keep(self, view: LayerView) -> int:
        """How many pairs each head of this layer keeps, 1 <= n <= T."""
        return keep_count(view.n_tokens, self.compression_ratio)

    def protected(self, view: LayerView) -> tuple[int, int]:
        """How many of the first and of the last tokens of the text are kept whatever their score."""
        return 0, 0

    def with_ratio(self: _S, compression_ratio: float) -> _S:
        """The same press at another ratio."""
        return replace(self, compression_ratio=compression_ratio)

    def scores(self, view: LayerView) -> Tensor:
        """:meth:`score`, computed once per view for all ratios."""
        return view.once(self.with_ratio(0.0), lambda: self.score(view))

    def compress(self, view: LayerView) -> Kept | None:
        n_keep = self.keep(view)
        if n_keep >= view.n_tokens:
            return None
        n_sink, n_window = self.protected(view)
        n_sink = max(0, n_sink - view.first_position)
        positions = select(self.scores(view), n_keep, n_sink=n_sink, n_window=n_window)
        index = positions[..., None]
        return Kept(
            view.keys.gather(2, index.expand(-1, -1, -1, view.keys.shape[3])),
            view.values.gather(2, index.expand(-1, -1, -1, view.values.shape[3])),
            positions,
        )


def check_at_least(press: BasePress, minimum: int, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are integers of at least ``minimum``."""
    for name in names:
        value = getattr(press, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise PressError(f"{type(press).__name__}: {name} must be an integer >= {minimum}, got {value!r}.")
