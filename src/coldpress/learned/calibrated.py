"""Calibrated: the base of presses that need an artefact of the model, and how it is looked up."""

from __future__ import annotations

import json
import math
import os
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.press import BasePress
from coldpress.core.view import LayerView
from coldpress.errors import PressError, UnreachableError
from coldpress.io.artefacts import Artefact, Shape, artefact_path, is_hub_id, read_artefact
from coldpress.io.files import forbidden, path_of
from coldpress.io.network import fetch_hub_file

__all__ = ["Calibrated", "Calibration"]

_C = TypeVar("_C", bound="Calibrated")
_LOADED: dict[Hashable, Artefact] = {}  # presses are immutable; what they have read lives here


class Calibration(Protocol):
    """A measurement of a model on samples."""

    def run(self, model: nn.Module, ids: Tensor) -> None:
        """Run ``model`` on a sample, int64 ``[1, T]`` on its device."""

    def tensors(self) -> dict[str, Tensor]:
        """The measured tensors, on the CPU in float32; the first dimension is the layer."""


class Calibrated(BasePress):
    """A press that needs an artefact, made by ``coldpress calibrate`` or published by others.

    The first of these that is there counts: what the user gave the press; the artefact of this machine; the published
    one. Subclasses say what is theirs:

    Attributes:
        artefact: the press's name, which is also the folder of its artefacts.
        holds: what an artefact has, in a word.
        parameter: the press's parameter that names one.
        published_names: what published files call their tensors, and what we call them.
        between: the least and the largest number that an artefact may have.
    """

    kind = "calibrated"
    per_head_independent = False  # artefacts are read by the index of a head

    artefact: ClassVar[str]
    holds: ClassVar[str]
    parameter: ClassVar[str]
    published_names: ClassVar[Mapping[str, str]] = {}
    between: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @abstractmethod
    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        """Shape of each tensor of an artefact for one layer, by name; None for a size that is not known."""

    @abstractmethod
    def calibration(self) -> Calibration:
        """A new measurement."""

    def variant(self) -> str:
        """The part of a file's name that tells a press's artefacts of one model apart."""
        return ""

    def repository(self, model: str) -> str | None:
        """The repository of the hub in which the artefact of ``model`` is published, if there may be one."""
        return None

    def published(self, model: str) -> Artefact | None:
        """The published artefact of ``model``, or None.

        Raises:
            UnreachableError: the place where it may be cannot be asked.
        """
        repository = self.repository(model)
        return None if repository is None else self._of_hub(repository)

    def look_up(self, shape: Shape) -> Artefact:
        """The artefact for a model.

        Raises:
            PressError: there is none, it is damaged, or it was made for another press or model; says what to do.
        """
        given = getattr(self, self.parameter)
        if given is not None:
            found = self._from_user(str(given))
        elif not shape.name:
            found = self.missing(shape, "the model was not loaded from anywhere, so they cannot be looked up by name")
        else:
            path = artefact_path(self.artefact, shape.name, self.variant())
            if (why := forbidden(path)) is not None:
                raise PressError(f"{type(self).__name__}: {path} cannot be read ({why}).")
            if path.is_file():
                found = self.from_file(path)
            else:
                try:
                    published = self.published(shape.name) if is_hub_id(shape.name) else None
                    why = "and none are published for this model"
                except UnreachableError as error:
                    published, why = None, f"and {error}"
                found = published or self.missing(shape, f"there is no {path}, {why}")
        self._check(found, shape)
        return found

    def missing(self, shape: Shape, why: str) -> Artefact:
        """Raise that there is no artefact, and say how to make one."""
        needs = f"{type(self).__name__} needs {self.holds} of {shape.name or 'the model'}"
        raise PressError(f"{needs}: {why}. Make them with {self.made_with(shape.name)}.")

    def made_with(self, model: str) -> str:
        """What makes an artefact of ``model``, empty where it has no name, for the end of a sentence."""
        made = f"coldpress calibrate {self.artefact} --model {model or 'MODEL'} --dataset wikitext{self._options()}"
        return made if model else f"{made} --output PATH, and give them: {type(self).__name__}({self.parameter}=PATH)"

    def _options(self) -> str:
        """What ``coldpress calibrate`` has to be told beside the name, so that it measures for this press."""
        known = {f.name: f.default for f in fields(self) if isinstance(f.default, (bool, int, float, str))}  # type: ignore[arg-type]
        own = {name: getattr(self, name) for name, default in known.items() if getattr(self, name) != default}
        of_variant = {n: v for n, v in own.items() if replace(self, **{n: known[n]}).variant() != self.variant()}  # type: ignore[type-var]
        return f" --press_args '{json.dumps(of_variant)}'" if of_variant else ""

    def of_model(self, view: LayerView) -> Artefact:
        """The artefact for the model that ``view`` belongs to."""
        whole = view if view.whole is None else view.whole
        shape = Shape.of_config(view.module.config)._replace(
            n_layers=view.n_layers,
            n_heads=whole.queries.shape[1],
            n_kv_heads=whole.keys.shape[1],
            head_dim=view.keys.shape[-1],
        )
        return self.look_up(shape)

    def of_layer(self, view: LayerView) -> dict[str, Tensor]:
        """The artefact's tensors for the layer and the heads of ``view``, on its device."""
        found = {}
        for name, tensor in self.of_model(view).on(view.keys.device).items():
            index: Any = view.layer_idx if len(tensor) == view.n_layers else getattr(view.module, "layer_idx", None)
            own = tensor[index]
            if view.whole is not None:
                n = own.shape[0] // view.whole.keys.shape[1]  # 1, or the query heads of a KV head
                own = own[view.row_head[1] * n : (view.row_head[1] + 1) * n]
            found[name] = own
        return found

    def prepared(self: _C, model: PreTrainedModel, tokenizer: Any = None) -> _C:
        if self.needs_artefact():
            self.look_up(Shape.of_config(model.config))
        return super().prepared(model, tokenizer)

    def needs_artefact(self) -> bool:
        """Whether there is anything to look up."""
        return True

    def _check(self, found: Artefact, shape: Shape) -> None:
        measured = found.facts.get("variant", self.variant())
        if measured != self.variant():
            raise PressError(
                f"{found.source} has {self.holds} of {type(self).__name__} with {measured}, and this one has "
                f"{self.variant()}: make others with coldpress calibrate {self.artefact}{self._options()}."
            )
        wanted = self.layer_shapes(shape)
        for name, sizes in wanted.items():
            tensor = found.tensors.get(name)
            fits = tensor is not None and len(tensor) in (shape.n_layers, shape.n_hidden_layers)
            fits = fits and tensor is not None and len(tensor.shape) == 1 + len(sizes)
            if (
                tensor is None
                or not fits
                or any(b not in (None, a) for a, b in zip(tensor.shape[1:], sizes, strict=True))
            ):
                there = "nothing" if tensor is None else "x".join(map(str, tensor.shape))
                need = "x".join(str(size or "?") for size in (shape.n_layers, *sizes))
                of = found.facts.get("model")
                raise PressError(
                    f"{found.source} was made for another model{f' ({of})' if of else ''}: its {name} are {there}, and "
                    f"{shape.name or 'this model'} needs {need}. Make it with coldpress calibrate {self.artefact}."
                )

    def _from_user(self, given: str) -> Artefact:
        path = path_of(given)
        if (why := forbidden(path)) is not None:
            raise PressError(f"{type(self).__name__}: {self.parameter}={given!r} cannot be read ({why}).")
        if os.path.isdir(path):
            path = path / "model.safetensors"
        if os.path.isfile(path):
            return self.from_file(path)
        if self.published_names and is_hub_id(given) and "/" in given:
            try:
                published = self._of_hub(given)
            except UnreachableError as error:
                raise PressError(f"{self.parameter}={given!r}: no such file or folder here, and {error}.") from error
            if published is not None:
                return published
        here = "is no file or folder that is here"
        if os.path.isdir(path_of(given)):
            here = "is a folder with no file model.safetensors in it; name the file itself"
        raise PressError(
            f"{type(self).__name__}: {self.parameter}={given!r} {here}"
            f"{', and no repository of the hub' if self.published_names else ''}; coldpress calibrate {self.artefact} "
            "--output PATH makes one."
        )

    def _of_hub(self, repository: str) -> Artefact | None:
        key = type(self), repository
        if key not in _LOADED:
            path = fetch_hub_file(repository, "model.safetensors")
            if path is None:
                return None
            _LOADED[key] = self.from_file(path)
        return _LOADED[key]

    def from_file(self, path: Path) -> Artefact:
        """The artefact in a file, read once."""
        try:
            state = path.stat()
        except OSError as error:
            raise PressError(
                f"{type(self).__name__}: {self.parameter}={str(path)!r} cannot be read ({error.strerror})."
            ) from error
        key = self.artefact, path, state.st_mtime_ns, state.st_size
        if key not in _LOADED:
            found = read_artefact(path, self.artefact, self.published_names)
            low, high = self.between
            if any(tensor.min() < low or tensor.max() > high for tensor in found.tensors.values()):
                raise PressError(
                    f"{path} is damaged: it holds numbers that are not between {low:g} and {high:g}. Make it with "
                    f"coldpress calibrate {self.artefact}."
                )
            _LOADED[key] = found
        return _LOADED[key]

    def form_checked(self, found: Artefact) -> Artefact:
        """``found``, if it may be an artefact of some model.

        Raises:
            PressError: its tensors have other names or numbers of dimensions.
        """
        for name, sizes in self.layer_shapes(Shape("", 0, 0, None, None, None)).items():
            shape = tuple(found.tensors[name].shape) if name in found.tensors else ()
            if len(shape) != 1 + len(sizes) or any(b not in (None, a) for a, b in zip(shape[1:], sizes, strict=True)):
                there = "x".join(map(str, shape)) or "nothing"
                raise PressError(
                    f"{found.source} is not for {self.artefact}: its {name} are {there}, "
                    f"not {'x'.join(str(size or '?') for size in (None, *sizes))}. Make it with coldpress calibrate "
                    f"{self.artefact}."
                )
        return found
