"""Files of trained weights: from a folder of this machine, from the hub's cache, or from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from coldpress.bases.press import BasePress
from coldpress.errors import PressError, UnreachableError
from coldpress.io.files import forbidden
from coldpress.io.network import fetch_hub_file

__all__ = ["damaged", "model_name", "published_file"]


def model_name(press: BasePress, config: object) -> str:
    """The name of the model of ``config`` on the hub, without its owner: weights trained for it are found by it.

    Raises:
        PressError: the model was not loaded from anywhere.
    """
    name = str(getattr(config, "_name_or_path", "") or "").rstrip("/\\")
    if not name:
        raise PressError(
            f"{type(press).__name__} has trained weights for some models, found by the model's name, and this model "
            f"was not loaded from anywhere; give the weights: {type(press).__name__}(weights=FOLDER)."
        )
    return name.replace("\\", "/").split("/")[-1]


def published_file(press: BasePress, repo: str, name: str, weights: str | None) -> Path:
    """Where the file ``name`` of the hub's repository ``repo`` lies on this machine; it is fetched if need be.

    Args:
        press: who asks.
        repo, name: on the hub; a copy in the hub's cache is taken as it is.
        weights: a folder laid out as the repository, or one with the file in it, that is used instead.

    Raises:
        PressError: nothing of the kind is published, or the folder has no such file.
        UnreachableError: it is not on this machine and the hub cannot be asked.
    """
    who = type(press).__name__
    if weights is not None:
        for path in (Path(weights, name), Path(weights, Path(name).name)):
            if (why := forbidden(path)) is not None:
                raise PressError(f"{who}: {path} cannot be read ({why}).")
            if os.path.isfile(path):
                return path
        raise PressError(f"{who}: weights={weights!r} has no file {name}; give the folder with the files of {repo}.")
    try:
        found = fetch_hub_file(repo, name)
    except UnreachableError as error:
        raise UnreachableError(
            f"{who}: {name} is not in the hub's cache, and {error}: fill the cache where there is a network "
            f"(hf download {repo} {name}), or give a folder with weights=FOLDER."
        ) from error
    if found is None:
        raise PressError(
            f"{who} has no published weights for this model: there is no {name} in {repo} on the hub. Use a model that "
            "has some, train your own and give them with weights=FOLDER, or take a press that needs none, such as "
            "SnapKVPress."
        )
    return found


def damaged(press: BasePress, path: Path, reason: object) -> PressError:
    """The error for a file of weights that is damaged or of something else."""
    return PressError(
        f"{type(press).__name__}: {path} is damaged or holds something else ({' '.join(str(reason).split())[:200]}); "
        "fetch it again."
    )
