"""Presses of kvpress that take from this machine what they would ask a hub or a tokenizer for.

Each class adds the parameter that the press of coldpress has, and leaves everything else to kvpress; its own reading of
the files too, where that can be told from fetching them.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import kvpress
import numpy as np
from kvpress.presses import fastkvzip_press
from kvpress.presses.base_press import BasePress
from kvpress.presses.kvzap_press import KVzapModel
from kvpress.presses.qfilter_press import QFilters


@dataclass
class QFilterPress(kvpress.QFilterPress):
    filters: str = ""

    def load_q_filters(self, model_name: str) -> Any:
        return QFilters.from_pretrained(self.filters).q_filters


@dataclass
class KVzapPress(kvpress.KVzapPress):
    weights: str = ""

    def post_init_from_model(self, model: Any) -> None:
        self.kvzap_model = KVzapModel.from_pretrained(self.weights)


@dataclass
class FastKVzipPress(kvpress.FastKVzipPress):
    weights: str = ""

    def post_init_from_model(self, model: Any) -> None:
        (file,) = Path(self.weights).glob("*.pt")
        found = {"get_gate_id": lambda model_name: file.name, "hf_hub_download": lambda **asked: str(file)}
        with mock.patch.multiple(fastkvzip_press, **found):
            super().post_init_from_model(model)


@dataclass
class LUKVPress(kvpress.LUKVPress):
    curves: str = ""

    def _load_budget_curves(self, model: Any) -> Any:
        return np.load(self.curves)


@dataclass
class DuoAttentionPress(kvpress.DuoAttentionPress):
    pattern: str = ""

    def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
        sizes = json.loads(Path(self.pattern, "config.json").read_text(encoding="utf-8"))
        gates = np.loadtxt(Path(self.pattern, "full_attention_heads.tsv"), delimiter="\t")
        return sizes["sink_size"], sizes["recent_size"], gates.clip(0, 1)


@dataclass
class FinchPress(kvpress.FinchPress):
    """The length of the question is given, instead of found by a delimiter that is then cut out of the text."""

    window_size: int | None = None

    @contextmanager
    def __call__(self, model: Any) -> Any:
        with BasePress.__call__(self, model):
            yield
