"""Work on a Ray cluster: the local run's numbers, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
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
from coldpress.eval import ray_cluster as transport
from coldpress.eval.cluster import RayEngine, check_engine, make_engine
from coldpress.eval.jobs import Point
from coldpress.eval.point_run import Engine
from coldpress.eval.prefix import PrefixRun, WindowWork
from coldpress.eval.windows import plan_prefix
from coldpress.io import ray as connection
from coldpress.loading.models import LoadedModel, load_model

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its processes' pipes to the collector
CONTEXT, TARGET = 60, 24


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[RayEngine]:
    """Two workers of one thread, as the tests have, on a cluster of their own."""
    engine = RayEngine(loaded, workers=2, threads=1, patience_s=600)
    yield engine
    engine.close()
    assert not ray.is_initialized()


def run(model: PreTrainedModel, text: Tensor, engine: Any = None, presses: Any = None) -> PrefixRun:
    presses = presses or [KnormPress(0.5), SnapKVPress(0.3, window_size=8), AdaKVPress(KnormPress(0.6))]
    run = PrefixRun(model, list(map(Point, presses)), [(text, plan_prefix(len(text), CONTEXT, TARGET))])
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


def test_a_cluster_of_our_own_cannot_be_reached_from_outside(engine: RayEngine) -> None:
    """Ray's servers run what they are sent, so no socket may listen on another interface than the loopback."""
    psutil = pytest.importorskip("psutil")
    here = psutil.Process()
    found = set()
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found |= {
                (process.name(), each.laddr.ip.removeprefix("::ffff:"))
                for each in process.net_connections("inet")
                if each.status == psutil.CONN_LISTEN
            }
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {ip for _, ip in found} == {"127.0.0.1"}, found


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
    hurt = PrefixRun(loaded.model, local.points, [(text, local.plan)])
    hurt.work = Fatal(hurt.work, tmp_path / "flag")  # type: ignore[assignment]
    hurt.run(engine=engine)
    assert (tmp_path / "flag").exists() and engine.facts()["lost_workers"] == 1
    assert "was lost" in capsys.readouterr().err
    assert_same(hurt, local)


# What goes wrong


class Strange(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, where: str, why: str):
        super().__init__(f"{why} in {where}")


@dataclass(frozen=True)
class Failing(KnormPress):
    """A press that fails in a way of its own."""

    how: str = "strange"

    def score(self, view: Any) -> Tensor:
        if self.how == "lock":
            raise ValueError("cannot be sent", threading.Lock())
        raise Strange("layer 0", "no olives")


def test_a_press_that_fails_on_the_workers_is_reported_as_it_would_be_here(
    loaded: LoadedModel, engine: RayEngine, text: Tensor
) -> None:
    presses = [Failing(0.5), Failing(0.5, how="lock"), KnormPress(0.5)]
    (_, _), (_, strange), (_, lock), (_, fine) = run(loaded.model, text, engine, presses).results()
    assert type(strange).__name__ == "Strange" and str(strange) == "no olives in layer 0"
    assert type(lock).__name__ == "ValueError" and "cannot be sent" in str(lock)
    for error in (strange, lock):
        assert isinstance(error, Exception)
        report = "".join(traceback.format_exception(error))
        assert f"on {socket.gethostname()}" in report and "in score" in report
    assert isinstance(fine, dict)


def doubled(model: PreTrainedModel, item: int) -> int:
    if item < 0:
        raise SelfCheckError(f"{item} is less than nothing")
    return 2 * item


def test_what_work_raises_is_raised_here_and_the_engine_goes_on(engine: RayEngine) -> None:
    with pytest.raises(SelfCheckError, match="-1 is less than nothing") as raised:
        list(engine.map(doubled, [1, -1]))
    assert "in doubled" in str(raised.value.__cause__)
    assert sorted(engine.map(doubled, range(5))) == [(i, 2 * i) for i in range(5)]
    assert list(engine.map(doubled, [])) == []


def test_items_are_asked_for_as_they_are_needed(engine: RayEngine) -> None:
    asked = 0

    def items() -> Iterator[int]:
        nonlocal asked
        while True:
            asked += 1
            yield asked

    for n_done, _ in enumerate(engine.map(doubled, items()), start=1):
        assert asked - n_done <= 2 * cluster.IN_HAND
        if n_done == 10:
            break
    assert asked <= 10 + 2 * cluster.IN_HAND


@pytest.mark.slow
def test_work_that_no_worker_survives_ends_the_run_and_leaves_what_was_finished(
    loaded: LoadedModel, engine: RayEngine, text: Tensor, tmp_path: Path
) -> None:
    hurt = PrefixRun(loaded.model, [Point(KnormPress(0.5))], [(text, plan_prefix(len(text), CONTEXT, TARGET))])
    hurt.work = Fatal(hurt.work, tmp_path / "flag", is_always=True)  # type: ignore[assignment]
    with pytest.raises(LostWorkersError, match="workers were lost one after the other at the same piece of work"):
        hurt.run(engine=engine)
    assert hurt.done[0] and not hurt.done[1]


def test_other_weights_and_other_code_are_refused(engine: RayEngine) -> None:
    spec = dataclasses.replace(engine.spec, fingerprint="0" * 16)
    about = dict(spec.about, host="olive")
    spec.check_code(about)
    with pytest.raises(ClusterError, match=r"olive has another coldpress .*files differ"):
        spec.check_code({**about, "code": "1"})
    with pytest.raises(ClusterError, match=r"another coldpress \(9.9 there"):
        spec.check_code({**about, "code": "1", "coldpress": "9.9"})
    (line,) = spec.differences({**about, "torch": "1.0"})
    assert line.startswith("olive has torch 1.0") and list(spec.differences(about)) == []
    (line,) = spec.differences({**about, "threads": 7})
    assert "to rounding" in line
    loaded = ray.put(transport.answer(lambda: "0" * 16))  # what a worker says that has loaded a model
    with pytest.raises(ClusterError, match=f"demo has other weights on olive than here.*{'0' * 16}"):
        engine._greet(cluster._Hand(None, loaded, 0.0, has_begun=True, about={"host": "olive"}))


def test_a_cluster_without_room_is_said_to_have_none(loaded: LoadedModel, engine: RayEngine) -> None:
    with pytest.raises(ClusterError, match=r"no room for a worker of 999 core\(s\): it has .* CPU"):
        RayEngine(loaded, threads=999)
    with pytest.raises(ClusterError, match=r"found no room for a worker of 999 core\(s\) within 0 s"):
        RayEngine(loaded, workers=1, threads=999, patience_s=0.1)
    assert ray.is_initialized()  # the cluster was there before, and is not theirs to end


# What was asked for


def test_engines_by_name(loaded: LoadedModel) -> None:
    with make_engine("local", loaded) as engine:
        assert type(engine) is Engine
    with pytest.raises(ClusterError, match=r"allowed are local, ray\. Did you mean 'ray'"):
        check_engine("rya")
    for options in ({"ray_address": "auto"}, {"workers": 2}):
        with pytest.raises(ClusterError, match="for --engine ray"):
            check_engine("local", **options)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="at least 1"):
        check_engine("ray", workers=0)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"coldpress\[ray\]\""):
        check_engine("ray")


@pytest.mark.parametrize("address", ["olives", "local", "host:0", "host:port", ":6379", "ray://"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterError, match="--ray_address"):
        connection.check_address(address)


def test_a_closed_port_is_out_of_reach_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UnreachableError, match=f"no Ray cluster can be reached at {address}.*refused"):
            connection.check_address(address)
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_who_listens_and_is_no_cluster_is_out_of_reach_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PROBE_S", 1.0)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="no Ray cluster can be reached"):
            connection.check_address(address)
    assert time.monotonic() - started < 15
