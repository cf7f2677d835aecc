"""BasePress: what every press is derived from, with the block that it opens around a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.modeling_utils import PreTrainedModel

from coldpress.core.press import Press
from coldpress.models.block import pressed

__all__ = ["BasePress"]


class BasePress(Press, is_root=True):
    """A way to compress the pairs of one layer. Presses are immutable; what a run accumulates lives in the cache.

    Use one in a cache, ``PressedCache(press)``, or around calls of a model, as in kvpress::

        with press(model):
            model(input_ids, cache=cache)

    What it may say of itself, and what a cache asks of it, stands in :class:`coldpress.core.press.Press`.
    """

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Compress every cache that ``model`` prefills inside the block. See :func:`coldpress.models.block.pressed`."""
        with pressed(model, self):
            yield model
