"""What transformers is told when coldpress is imported: the names of its attention backends, and its pipeline's task.

torch and the parts of transformers that keep these names take seconds to import. So none of them is imported for it:
the parts that are there are told at once, and each other one as soon as it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from coldpress.backends import BACKENDS

__all__ = ["register"]


def register() -> None:
    """Tell transformers, now or when its parts are imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for part, tell in _PARTS.items():
        if part in sys.modules:
            tell()


# A part may be imported while others are only half imported, so the first two import nothing else: what they name is
# there when it is called. coldpress.models.backend, once it is needed, replaces it.


def _tell_attention() -> None:
    from transformers.modeling_utils import AttentionInterface

    for ours, native in BACKENDS.items():
        AttentionInterface.register(ours, partial(_attention, native))


def _tell_masks() -> None:
    from transformers.masking_utils import AttentionMaskInterface

    for ours, native in BACKENDS.items():
        AttentionMaskInterface.register(ours, partial(_mask, native))


def _tell_task() -> None:
    import coldpress.models.pipeline  # noqa: F401  (registers itself)


_PARTS: dict[str, Callable[[], None]] = {
    "transformers.modeling_utils": _tell_attention,
    "transformers.masking_utils": _tell_masks,
    "transformers.pipelines": _tell_task,
}


def _attention(native: str, *args: Any, **kwargs: Any) -> Any:
    from coldpress.models.backend import attention

    return attention(native, *args, **kwargs)


def _mask(native: str, *args: Any, **kwargs: Any) -> Any:
    from coldpress.models.backend import mask

    return mask(native, *args, **kwargs)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, with a loader that tells it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PARTS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _PARTS[fullname])
        return spec


class _Loader(Loader):
    """Another loader, which has the module to itself again before the module runs, and what is done after it."""

    def __init__(self, loader: Loader, tell: Callable[[], None]):
        self.loader, self.tell = loader, tell

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.tell()
