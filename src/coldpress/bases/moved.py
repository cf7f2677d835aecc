"""Reference queries: those of a prompt's last tokens, as if the tokens to come asked the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coldpress.core.view import LayerView

__all__ = ["asked_ahead", "queries_moved_on", "samples_moved_on"]


def queries_moved_on(view: LayerView, n: int) -> LayerView:
    """The view with its last ``n`` queries, moved on by ``n`` positions, or as far as the model has any."""
    newest = replace(view, queries=view.queries[:, :, -n:], _memo={})
    return _moved_on(view, newest.unrotated_queries())


def samples_moved_on(view: LayerView, n: int) -> LayerView:
    """The view with ``n`` queries from all over the text, evenly apart, as if the next ``n`` tokens asked them."""
    at = (2 * torch.arange(n, device=view.queries.device) + 1) * view.n_queries // (2 * n)
    return _moved_on(view, view.unrotated_queries()[:, :, at])


def _moved_on(view: LayerView, queries: Tensor) -> LayerView:
    """The view with ``queries``, ``[B, Hq, n, D]`` before rotary embedding, at the next ``n`` positions."""
    rope = view.find_rope()
    if rope is not None:
        at = torch.arange(view.end, view.end + queries.shape[2], device=queries.device)
        queries = rope.rotate(
            queries, *rope.cos_sin(at if rope.n_positions is None else at.clamp(max=rope.n_positions - 1))
        )
    return asked_ahead(view, queries)


def asked_ahead(view: LayerView, queries: Tensor) -> LayerView:
    """The view with other queries, ``[B, Hq, n, D]``, of tokens that come after all of its own."""
    at = torch.arange(view.first_position, view.end, device=queries.device).expand(view.keys.shape[:3])
    return replace(view, queries=queries, positions=at, first_position=view.first_position + queries.shape[2], _memo={})
