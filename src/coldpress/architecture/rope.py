"""Rotary position embedding: rotate, rotate back, and rotate by the mean of many positions.

Nothing here knows a model, or reads its source. The frequencies come from the rotary class of the module's own modeling
file, the layout (halves or interleaved pairs, full or partial width) from ``apply_rotary_pos_emb`` among that file's
globals, so that undoing the rotation is running the model's own function with ``-sin``. Whether a layer rotates at all,
and in this way, is observed (``rotation.py``).

With "dynamic" scaling a model that has read a longer text goes on with that text's frequencies until it reads one
within its trained length. :func:`stand_at` puts it where a text leaves it, whatever it has read since. Inside
``with press(model):`` that state is taken from the model; a cache by itself does not know its model, and what is
rebuilt then is one that reads its first text.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coldpress.errors import ModelError

__all__ = ["INSTEAD", "Rope", "has_fixed_frequencies", "layer_type", "stand_at"]

INSTEAD = "Use a press that neither undoes rotations nor moves keys, such as SnapKVPress, without positions='rerotate'."


class Rope:
    """The rotary embedding of one attention layer.

    Args:
        build: makes the model's rotary embedding; ``embed(x, position_ids)`` gives ``cos, sin`` of ``[1, T, ...]``.
        apply: the model's own ``apply_rotary_pos_emb(q, k, cos, sin)``.
        layer_type: what ``embed`` wants to be told where it serves several kinds of layers, else None.

    Attributes:
        n_seen: length of the text so far, for frequencies that depend on it.
        n_positions: that the model can rotate to, or None for any.
    """

    n_seen = 0

    def __init__(self, build: Callable[[], nn.Module], apply: Callable[..., Any], layer_type: str):
        self._build, self._apply, self._embed = build, apply, build()
        takes_type = "layer_type" in inspect.signature(self._embed.forward).parameters
        self._type_arg = (layer_type,) if takes_type else ()
        table = getattr(self._embed, "embed_positions", None)  # GPT-J and CodeGen: [n, Drot], sines first
        self._is_table, self.n_positions = table is not None, None if table is None else len(table)
        if table is not None:
            self.width = table.shape[1]
        else:
            frequencies = getattr(self._embed, f"{layer_type}_inv_freq" if takes_type else "inv_freq")
            self.width = 2 * frequencies.shape[-1]  # Drot, the rotated dimensions of each head
        kinds = getattr(self._embed, "rope_type", "default")
        kind = kinds.get(layer_type) if isinstance(kinds, dict) else kinds
        self._remembers = "dynamic" in str(kind)  # its frequencies depend on the longest input so far
        self._length_name = f"{layer_type}_max_seq_len_cached" if takes_type else "max_seq_len_cached"
        self.switches = self._remembers or "longrope" in str(kind)  # frequencies change with the length of a text

    @classmethod
    def of(cls, module: nn.Module, device: torch.device, model: nn.Module | None = None) -> Rope | None:
        """The rotation of attention layers like ``module``, should they rotate; None if their model has none.

        Args:
            model: what ``module`` belongs to, if that is known: frequencies that change are those of this moment.

        Raises:
            ModelError: it cannot be undone from outside.
        """
        classes = _rotary_classes(module)
        if not classes:
            return None
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise ModelError(f"{type(module).__name__} rotates in a way that coldpress cannot undo. {INSTEAD}")
        try:
            rope = cls(lambda: _build(classes[0], module).to(device), apply, layer_type(module))
        except (TypeError, AttributeError, KeyError) as error:
            raise ModelError(
                f"The rotary embedding of {type(module).__name__} could not be built from its configuration ({error}). "
                f"{INSTEAD}"
            ) from error
        own = [part for part in model.modules() if type(part) is classes[0]] if model is not None else []
        if len(own) == 1:
            rope._build = _as_it_is(own[0], rope._build, device)
            rope._embed = rope._build()
        return rope

    @classmethod
    def to_move(cls, module: nn.Module, rope: Rope | None) -> Rope | None:
        """``rope``, which is ``module``'s, if it may move keys as a text goes on without end.

        Raises:
            ModelError: the model has learned positions or none, or frequencies that change with the length of a text.
        """
        name = type(module).__name__
        if not _rotary_classes(module):
            raise ModelError(
                f"positions='rerotate' moves keys by rotating them, and {name} has no rotary embedding; leave it out."
            )
        if rope is not None and rope.switches:
            raise ModelError(
                f"positions='rerotate' lets a text go on beyond the trained positions, and the frequencies of {name} "
                "change with the length of a text (dynamic or longrope scaling), so that keys made before and after "
                "would not fit together. Leave it out, or configure the model without that scaling."
            )
        return rope

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[1, T, Drot or Drot / 2]``, of integer positions ``[T]``."""
        x = torch.empty(0, dtype=torch.float32, device=positions.device)
        if not self.switches:
            cos, sin = self._embed(x, positions[None], *self._type_arg)
            return (sin, cos) if self._is_table else (cos, sin)
        embed: Any = self._build() if self._remembers else self._embed
        longest = self.n_seen
        if self._remembers:
            longest = max(longest, int(getattr(embed, self._length_name, embed.max_seq_len_cached)))
        positions = torch.nn.functional.pad(
            positions, (0, 1), value=max(0, longest - 1)
        )  # a part of a text is no shorter text
        cos, sin = embed(x, positions[None], *self._type_arg)
        return cos[:, :-1], sin[:, :-1]

    def as_given(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rotation as the model passes it to its attention layers, for integer positions ``[T]``."""
        cos, sin = self.cos_sin(positions)
        return (sin, cos) if self._is_table else (cos, sin)

    def turn_by(self, distances: Tensor) -> Tensor:
        """The rotations by so many positions, int64 ``[n]``: ``[n, 2, Drot or Drot / 2]``, in the model's own order."""
        a, b = (part[0] for part in self.as_given(torch.nn.functional.pad(distances, (1, 0))))
        return torch.stack([a[1:] * a[0] + b[1:] * b[0], b[1:] * a[0] - a[1:] * b[0]], 1)

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate float32 ``[B, H, T, D]`` by what :meth:`cos_sin` gives for ``T`` positions, or for one."""
        part = states[..., : self.width]
        if self._is_table:  # its function takes one tensor, [B, T, H, D]
            rotated = self._apply(part.transpose(1, 2), sin, cos).transpose(1, 2)
        else:
            rotated, _ = self._apply(part, part[:, :0], cos, sin)
        return rotated if self.width == states.shape[-1] else torch.cat([rotated, states[..., self.width :]], -1)

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """States ``[B, H, T, D]`` as they were before they were rotated to positions ``[T]``, in float32."""
        return self.rotate(states.float(), *self.inverse(*self.cos_sin(positions)))

    @staticmethod
    def inverse(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of the rotation by ``cos, sin``."""
        scale = cos[:, :1].square() + sin[:, :1].square()  # 1, or attention_scaling**2 with YaRN and its relatives
        return cos / scale, -sin / scale

    def rotate_each(self, states: Tensor, cos: Tensor, sin: Tensor, index: Tensor) -> Tensor:
        """Rotate float32 ``[B, H, n, D]``, each head by other positions: entries ``index`` ``[B, H, n]`` of
        ``cos, sin`` ``[1, T, ...]``.
        """
        rows = index.flatten(0, 1)  # heads take the place of batch rows, which may differ in position
        return self.rotate(states.flatten(0, 1)[:, None], cos[0, rows], sin[0, rows]).view_as(states)

    def turn(self, states: Tensor, moves: Tensor) -> Tensor:
        """Rotated states, float32 ``[B, H, n, D]``, as they would be ``moves`` positions later, int64 ``[B, H, n]``."""
        cos, sin = self.cos_sin(torch.arange(int(moves.max()) + 1, device=moves.device))
        scale = (cos[:, :1].square() + sin[:, :1].square()).sqrt()  # they have been scaled already
        return self.rotate_each(states, cos / scale, sin / scale, moves)

    def mean_rotation(self, start: int, n_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean rotation over positions ``start .. start + n_positions - 1``: ``cos, sin`` of one position.

        Rotation is linear in (cos, sin), so rotating by their means is the mean of the rotations. Where the model has
        no more positions, it is the mean over those that it has.
        """
        if self.n_positions is not None:
            start = min(start, self.n_positions - 1)
            n_positions = min(n_positions, self.n_positions - start)
        cos, sin = self.cos_sin(torch.arange(start, start + n_positions, device=device))
        return cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)

    def mean_ahead(self, position: int, offsets: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean rotation over positions ``position + offset``: ``cos, sin`` of one position.

        The model is asked for ``position`` and for one step, which is then taken ``offset`` times. So the frequencies
        are those of the text so far, and offsets may reach beyond what the model has positions for.
        """
        cos, sin = (part[0].cpu().double() for part in self.cos_sin(torch.tensor([0, 1, position], device=device)))
        angles, scale = torch.atan2(sin, cos), torch.hypot(cos[0], sin[0])
        turns = angles[2] + (angles[1] - angles[0]) * torch.tensor(offsets, dtype=torch.double)[:, None]
        mean = (scale * turned.mean(0) for turned in (turns.cos(), turns.sin()))
        cos, sin = (part.float().to(device)[None, None] for part in mean)  # [1, 1, Drot or Drot / 2]
        return cos, sin

    def pair_norms(self, states: Tensor) -> Tensor:
        """Norms of the pairs of numbers that turn together, of float32 ``[B, H, T, D]``: ``[B, H, T, Drot]``.

        Each stands twice, in the places of both numbers of its pair. No rotation changes them.
        """
        cos, sin = self.cos_sin(torch.zeros(1, dtype=torch.long, device=states.device))
        turned = self.rotate(states, torch.zeros_like(cos), torch.ones_like(sin))  # by a right angle
        return torch.hypot(states[..., : self.width], turned[..., : self.width])


_CHANGING: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()  # of a model, found once


def stand_at(model: nn.Module, n_tokens: int) -> None:
    """Give ``model`` the rotary frequencies that it has after a text of ``n_tokens``, 0 for none, and no other.

    They are the same for all texts but with "dynamic" scaling, where the longest text so far decides: without this an
    answer depends on what was asked before it, and a text on the one before.
    """
    if model not in _CHANGING:
        _CHANGING[model] = [part for part in model.modules() if "dynamic" in str(getattr(part, "rope_type", ""))]
    embed: Any
    for embed in _CHANGING[model]:
        kinds = embed.rope_type if isinstance(embed.rope_type, dict) else {None: embed.rope_type}
        for kind, prefix in [(k, f"{k}_" if k else "") for k, name in kinds.items() if "dynamic" in name]:
            longest = int(getattr(embed, f"{prefix}max_seq_len_cached", embed.max_seq_len_cached))
            if longest == n_tokens > embed.original_max_seq_len:
                continue
            now = getattr(embed, f"{prefix}inv_freq")
            embed.register_buffer(
                f"{prefix}inv_freq", getattr(embed, f"{prefix}original_inv_freq").to(now.device), persistent=False
            )
            setattr(embed, f"{prefix}max_seq_len_cached", embed.original_max_seq_len)
            if n_tokens > embed.original_max_seq_len:
                end = torch.tensor([[n_tokens - 1]], device=now.device)
                embed(torch.empty(0, device=now.device), end, *((kind,) if kind else ()))


def has_fixed_frequencies(model: nn.Module) -> bool:
    """Whether the rotary frequencies of ``model`` do not depend on the length of a text ("dynamic", "longrope")."""
    kinds = [str(getattr(part, "rope_type", "")) for part in model.modules()]
    return not any("dynamic" in kind or "longrope" in kind for kind in kinds)


def _as_it_is(own: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> Callable[[], nn.Module]:
    """A maker of rotary embeddings with the present frequencies of ``own``, which may change later."""
    buffers = {name: buffer.detach().to(device, copy=True) for name, buffer in own.named_buffers(recurse=False)}
    numbers = {
        name: value
        for name, value in vars(own).items()
        if name.endswith("max_seq_len_cached") or name == "attention_scaling"
    }

    def rebuild() -> nn.Module:
        embed = build()
        for name, buffer in buffers.items():
            embed.register_buffer(name, buffer, persistent=False)
        for name, value in numbers.items():
            setattr(embed, name, value)
        return embed

    return rebuild


def _rotary_classes(module: nn.Module) -> list[type[nn.Module]]:
    """The rotary embeddings of the module's own modeling file."""
    return [
        c
        for name, c in vars(sys.modules[type(module).__module__]).items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name and issubclass(c, nn.Module)
    ]


def layer_type(module: nn.Module) -> str:
    """The kind of layer that an attention module is, in the words of its model's configuration."""
    types = getattr(module.config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types and index is not None and index < len(types) else "full_attention"


def _build(rotary: type[nn.Module], module: nn.Module) -> nn.Module:
    """A fresh rotary embedding of the model's own class; the model's is not reachable from an attention module."""
    config: Any = module.config
    local_base = getattr(config, "rope_local_base_freq", None)
    if local_base is not None and layer_type(module) == "sliding_attention":  # gemma3 before transformers 5
        config = copy.deepcopy(config)
        config.rope_theta, config.rope_scaling = local_base, {"rope_type": "default"}
    return rotary(config=config)
