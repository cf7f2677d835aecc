"""Presses in files outside of the package: ``--press file.py:MyPress``, or ``file.py`` where it has one press.

A file is run when a command of the user names it, and never for anybody else: names that come over the network are
looked up among what is loaded already. What was measured is told by a digest of the file (:func:`file_digest`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from coldpress.bases.press import BasePress
from coldpress.bases.registry import register_file_press, registered_only
from coldpress.core.press import parts
from coldpress.errors import PressError, nearest

__all__ = ["file_digest", "is_press_file", "load_press_files"]

_NAME = re.compile(r"(?P<file>.+\.py)(?::(?P<cls>\w+))?")
_DIGEST = "__coldpress_file_sha256__"  # of a module that was made of such a file


def is_press_file(name: str) -> bool:
    """Whether ``name`` is that of a Python file, with or without a class in it."""
    return _NAME.fullmatch(name) is not None


def load_press_files(names: Iterable[str], engine: str = "local") -> None:
    """Run the files among ``names``, so that :func:`make_press` knows their presses by these names.

    Args:
        names: of presses, of files or not.
        engine: where they will run; workers elsewhere have no file of ours.

    Raises:
        PressError: there is no such file, the engine is not local, the file cannot be run, it has no such class, or
            several and none is named.
    """
    for name in names:
        found = _NAME.fullmatch(name)
        if found is not None:
            if engine != "local":
                raise PressError(f"--engine {engine} has workers that do not have {name}; leave --engine out.")
            register_file_press(name, _class(name, _module(name, Path(found["file"]).expanduser()), found["cls"]))


def file_digest(press: BasePress | None) -> str | None:
    """SHA-256 of the file that a press, or a press inside it, was loaded from; None for those of packages."""
    modules = (sys.modules.get(type(part).__module__) for part in ([] if press is None else parts(press)))
    return next((digest for module in modules if (digest := getattr(module, _DIGEST, None)) is not None), None)


def _module(name: str, file: Path) -> ModuleType:
    """The module of a file, run once for each of its contents."""
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise PressError(f"--press {name}: {file} cannot be read ({getattr(error, 'strerror', error)}).") from error
    called = f"coldpress_press_file_{digest[:16]}"
    if called in sys.modules:
        return sys.modules[called]
    spec = importlib.util.spec_from_file_location(called, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _DIGEST, digest)
    sys.modules[called] = module  # where dataclasses look for it
    try:
        with registered_only():  # 'all' means the package's presses; those of a file have its name
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends the process, as argparse does
        del sys.modules[called]
        if isinstance(error, PressError):
            raise PressError(f"--press {name}: {error}") from error
        what = " ".join(str(error).split())
        raise PressError(f"--press {name}: {file} cannot be run ({type(error).__name__}: {what}).") from error
    return module


def _class(name: str, module: ModuleType, wanted: str | None) -> type[BasePress]:
    """The class that is wanted, or the only press that the file defines."""
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BasePress) and value.__module__ == module.__name__
    ]
    names = sorted(cls.__name__ for cls in own)
    if not own:
        raise PressError(f"--press {name}: the file defines no press, a class such as MyPress(ScorerPress).")
    if wanted is None:
        if len(own) > 1:
            raise PressError(f"--press {name}: the file defines {', '.join(names)}; say which, as {name}:{names[0]}.")
        return own[0]
    for cls in own:
        if cls.__name__ == wanted:
            return cls
    raise PressError(
        f"--press {name}: the file has no press {wanted}.{nearest(wanted, names)} It has {', '.join(names)}."
    )
