"""Point: what an evaluation compares, a press of one size, with its pairs stored as they are or in few bits."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import file_digest
from coldpress.bases.scorer import BUDGETS
from coldpress.stores.codec import Codec

__all__ = ["BASELINE", "Point", "config_of"]


@dataclass(frozen=True)
class Point:
    """One press of one size, in so many bits; without a press and bits, the uncompressed baseline."""

    press: BasePress | None
    kv_bits: Codec | None = None

    @functools.cached_property
    def key(self) -> str:
        """The same for points that measure the same, in this process or another: 16 hex digits."""
        name = None if self.press is None else type(self.press).__name__
        bits = None if self.kv_bits is None else dict(vars(self.kv_bits))
        text = json.dumps([name, config_of(self.press), bits], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


BASELINE = Point(None)


def _without_tokenizer(press: BasePress) -> BasePress:
    """``press``, and each press inside it, as it is before it is given the model's tokenizer."""
    bare: dict[str, Any] = {
        name: _without_tokenizer(value) for name, value in vars(press).items() if isinstance(value, BasePress)
    }
    if hasattr(press, "tokenizer"):
        bare["tokenizer"] = None
    return replace(press, **bare) if bare else press  # type: ignore[type-var]


def config_of(press: BasePress | None) -> dict[str, Any] | None:
    """The parameters of a press, without the budgets that it was not given, and without the model's tokenizer.

    Of one that was loaded from a file also the file's digest, as ``file_sha256``.
    """
    if press is None:
        return None
    unset = (*BUDGETS, "tokenizer")
    config: dict[str, Any] = asdict(
        _without_tokenizer(press),
        dict_factory=lambda items: {k: v for k, v in items if k not in unset or v is not None},
    )  # type: ignore[call-overload]
    digest = file_digest(press)
    return config if digest is None else config | {"file_sha256": digest}
