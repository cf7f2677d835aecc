"""Keys at other positions: rotated back to none, side by side at the end of the text, or anywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.architecture.rope import Rope
from coldpress.core.kept import Kept
from coldpress.core.pick import at_once, pick

__all__ = ["moved_keys", "side_by_side", "unrotated"]


def side_by_side(kept: Kept, n_stored: int | Tensor, residual: Tensor | None, rope: Rope) -> Kept:
    """See :meth:`coldpress.core.view.LayerView.side_by_side`.

    Args:
        n_stored: pairs of each head before some were evicted, or int64 ``[B, Hkv, 1]``.
        residual: ``[B, Hkv, T, Drot]``, float32 key minus stored key, of the pairs before; or None.
    """
    is_kept, slot = kept.positions >= 0, torch.arange(kept.positions.shape[2], device=kept.keys.device)
    n_after = is_kept.sum(-1, keepdim=True) - slot
    moves = (n_stored - kept.positions - n_after).masked_fill(~is_kept, 0)  # [B, Hkv, n]
    is_moved = moves > 0
    if residual is not None:
        residual = pick(residual, kept.positions.clamp(min=0)) * is_kept[..., None]
        is_moved = is_moved | (residual != 0).any(-1)
    n = int((is_moved * (slot + 1)).max())  # the later ones stay where they are
    if n == 0:
        return kept
    exact = kept.keys[:, :, :n].float()
    if residual is not None:
        exact = exact + pad(residual[:, :, :n].float(), (0, exact.shape[3] - residual.shape[3]))
    exact = rope.turn(exact, moves[..., :n])
    keys = exact.to(kept.keys.dtype)
    if keys.dtype != torch.float32:
        residual = (exact - keys.float())[..., : rope.width].to(keys.dtype)
    return kept._replace(keys=torch.cat([keys, kept.keys[:, :, n:]], dim=2), rounding_residual=residual)


def moved_keys(keys: Tensor, here: Tensor, there: Tensor, turned: tuple[Tensor, Tensor], rope: Rope) -> Tensor:
    """See :meth:`coldpress.core.view.LayerView.moved_keys`.

    Args:
        keys: ``[B, Hkv, n, D]``.
        here, there: int64 ``[B, Hkv, n]``, positions before and after; -1 for none.
        turned: cosines and sines of all positions, ``[1, T, ...]`` each.
    """
    cos, sin = turned
    scale = cos[:, :1].square() + sin[:, :1].square()  # as in Rope.inverse
    here, there = (at.clamp(min=0).flatten() for at in (here, there))
    shape = (-1, here.numel() // max(1, keys.shape[:2].numel()), cos.shape[-1])  # heads as rows of a batch
    (cos_here, sin_here), (cos_there, sin_there) = (
        (cos[0].index_select(0, at), sin[0].index_select(0, at)) for at in (here, there)
    )
    cos = ((cos_there * cos_here).addcmul_(sin_there, sin_here) / scale[0]).view(shape)
    sin = ((sin_there * cos_here).addcmul_(cos_there, sin_here, value=-1) / scale[0]).view(shape)
    return rope.rotate(keys.float().flatten(0, 1)[:, None], cos, sin).view_as(keys).to(keys.dtype)


def unrotated(rope: Rope, states: Tensor, positions: Tensor) -> Tensor:
    """States ``[B, H, T, D]`` as they were before they were rotated to positions ``[T]``, float32; block by block."""
    back = rope.inverse(*rope.cos_sin(positions))
    block = at_once(states.device, states[:, :, :1].numel())
    parts = zip(states.split(block, dim=2), *(x.split(block, dim=1) for x in back), strict=True)
    return torch.cat([rope.rotate(part.float(), cos, sin) for part, cos, sin in parts], dim=2)
