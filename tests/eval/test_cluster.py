"""Work on a Ray cluster: the local run's numbers, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import AdaKVPress, KnormPress, SnapKVPress
from coldpress.errors import (
    ClusterError,
    LostWorkersError,
    MissingDependencyError,
    SelfCheckError,
    UnreachableError,
)
from coldpress.eval import cluster
from coldpress.eval.cluster import RayEngine, check_engine, make_engine
from coldpress.eval.engine import LocalEngine
from coldpress.eval.models import LoadedModel, load_model
from coldpress.eval.prefix import PrefixRun, WindowWork
from coldpress.eval.windows import plan_prefix

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its processes' pipes to the collector
CONTEXT, TARGET = 60, 24


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[RayEngine]:
    """Two workers of one thread, as the tests have, on a cluster of their own."""
    engine = RayEngine(loaded, workers=2, threads=1)
    yield engine
    engine.close()
    assert not ray.is_initialized()


def run(model: PreTrainedModel, text: Tensor, engine: Any = None, presses: Any = None) -> PrefixRun:
    presses = [KnormPress(0.5), SnapKVPress(0.3, window_size=8), AdaKVPress(KnormPress(0.6))] if not presses else presses
    run = PrefixRun(model, presses, [(text, plan_prefix(len(text), CONTEXT, TARGET))])
    run.run(engine=engine)
    return run


def assert_same(ours: PrefixRun, theirs: PrefixRun) -> None:
    """Bit for bit, and there is something to compare."""
    assert ours.is_complete and theirs.is_complete and len(ours.done) == 5
    for own, its in zip(ours.done, theirs.done, strict=True):
        assert own.keys() == its.keys() and len(own) == 4
        for key in own:
            assert torch.equal(own[key].scores.rows(), its[key].scores.rows())
    assert list(ours.results()) == list(theirs.results())


@dataclass(frozen=True)
class Fatal:
    """Work that a worker does not survive the first time (or ever)."""

    inner: WindowWork
    flag: Path
    is_always: bool = False

    def __call__(self, model: PreTrainedModel, batch: Any) -> Any:
        found = self.inner(model, batch)
        if batch.index == 1 and (self.is_always or not self.flag.exists()):
            self.flag.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return found


# The same numbers


def test_two_workers_one_of_them_killed_give_the_local_results(
    loaded: LoadedModel, engine: RayEngine, text: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = run(loaded.model, text)
    assert_same(run(loaded.model, text, engine), local)
    hurt = PrefixRun(loaded.model, [p.press for p in local.points], [(text, local.plan)])
    hurt.work = Fatal(hurt.work, tmp_path / "flag")  # type: ignore[assignment]
    hurt.run(engine=engine)
    assert (tmp_path / "flag").exists() and engine.facts()["lost_workers"] == 1
    assert "was lost" in capsys.readouterr().err
    assert_same(hurt, local)
