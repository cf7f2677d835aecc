"""ThinKeys, ThinStore: keys of which each head stores some channels only, and their full width for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.dense import DenseStore

__all__ = ["ThinKeys", "ThinStore"]


@dataclass(frozen=True, eq=False)
class ThinKeys:
    """The first ``n`` keys of a layer, in fewer channels; the last ones of every head in all of them.

    Attention sees them at full width, with zeros where a channel is not stored. They are widened for one layer at a
    time, for as long as its attention takes.

    Attributes:
        narrow: ``[B, Hkv, n, d]``, the channels that are stored of every key.
        channels: int16 ``[B, Hkv, D]``: the d channels that are stored, then the others.
        others: ``[B, Hkv, w, D - d]``, the other channels of the keys that are stored whole.
        wide: int32 ``[B, Hkv, w]``, which ones these are; n for none.
    """

    narrow: Tensor
    channels: Tensor
    others: Tensor
    wide: Tensor

    @classmethod
    def of(cls, keys: Tensor, counts: Tensor, channels: Tensor, n_wide: int) -> ThinKeys:
        """Store some channels.

        Args:
            keys: ``[B, Hkv, n, D]``.
            counts: int64 ``[B, Hkv]``, how many of them each head has; they are the first ones.
            channels: int64 ``[B, Hkv, d]``, ascending, the channels to store.
            n_wide: how many of each head's last keys to store with all channels.
        """
        n_batch, n_heads, n_keys, dim = keys.shape
        n_narrow = channels.shape[-1]
        is_stored = torch.zeros(n_batch, n_heads, dim, dtype=torch.bool, device=keys.device).scatter(2, channels, True)
        order = (~is_stored).int().argsort(dim=-1, stable=True)  # [B, Hkv, D]
        wide = counts[..., None] - 1 - torch.arange(min(n_wide, n_keys), device=keys.device)  # [B, Hkv, w]
        rows = keys.gather(2, wide.clamp(min=0)[..., None].expand(-1, -1, -1, dim))
        return cls(
            narrow=_pick(keys, order[..., :n_narrow]),
            channels=order.to(torch.int16),
            others=_pick(rows, order[..., n_narrow:]),
            wide=wide.where(wide >= 0, n_keys).int(),
        )

    @property
    def n_tokens(self) -> int:
        return self.narrow.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        return self.narrow, self.channels, self.others, self.wide

    def before(self, tail: Tensor) -> Tensor:
        """These keys at full width, then ``tail [B, Hkv, m, D]``: a new tensor ``[B, Hkv, n + m, D]``."""
        n_batch, n_heads, n_tail, dim = tail.shape
        n_keys, n_narrow = self.narrow.shape[2:]
        keys = tail.new_zeros(n_batch, n_heads, n_keys + n_tail + 1, dim)  # the last one for what belongs nowhere
        channels = self.channels.long()
        stored = channels[:, :, None, :n_narrow].expand(-1, -1, n_keys, -1)
        keys[:, :, :n_keys].scatter_(3, stored, self.narrow)
        row, head = torch.arange(n_batch, device=tail.device), torch.arange(n_heads, device=tail.device)
        slots = self.wide.long().where(self.wide < n_keys, n_keys + n_tail)
        at = row[:, None, None, None], head[:, None, None], slots[..., None], channels[:, :, None, n_narrow:]
        keys[at] = self.others
        keys[:, :, n_keys : n_keys + n_tail] = tail
        return keys[:, :, : n_keys + n_tail]

    def index_rows(self, rows: Tensor) -> ThinKeys:
        """The same keys of other rows."""
        return ThinKeys(*(tensor.index_select(0, rows) for tensor in self.tensors()))


class ThinStore(DenseStore):
    """The first keys in fewer channels; the values, and the keys of later tokens, as they are."""

    name = "thin"
    moves_pairs = False
    takes_codec = False

    def __init__(self, thin: ThinKeys, values: Tensor, dim: int):
        super().__init__(thin.narrow.new_empty(*values.shape[:2], 0, dim), values)
        self.thin, self.n_apart = thin, thin.n_tokens

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy."""
        return self.thin.before(self._k[:, :, : self.n - self.n_apart])

    def tensors(self) -> tuple[Tensor, ...]:
        return *super().tensors(), *self.thin.tensors()

    def packed(self) -> dict[str, Tensor]:
        thin = self.thin
        own = {"narrow": thin.narrow, "channels": thin.channels, "others": thin.others, "wide": thin.wide}
        return super().packed() | own

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> ThinStore:
        thin = ThinKeys(*(parts[name] for name in ("narrow", "channels", "others", "wide")))
        store = cls(thin, parts["values"], parts["keys"].shape[3])
        store._k = parts["keys"]
        if room:
            store.own(store.n + room)
        return store

    def index_rows(self, rows: Tensor) -> None:
        super().index_rows(rows)
        self.thin = self.thin.index_rows(rows)

    def buffers_for(self, n_tokens: int) -> None:
        return None

    def encode(self) -> None:
        raise CacheError("Keys in fewer channels cannot be stored in fewer bits as well; leave kv_bits out.")


def _pick(keys: Tensor, channels: Tensor) -> Tensor:
    """Channels ``[B, Hkv, d]`` of ``[B, Hkv, n, D]``: ``[B, Hkv, n, d]``."""
    return keys.gather(3, channels[:, :, None].expand(-1, -1, keys.shape[2], -1))
