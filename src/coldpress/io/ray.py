"""A connection to a Ray cluster: one that answers at an address, or one that is started here on this machine alone."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from coldpress.errors import ClusterError, MissingDependencyError, UnreachableError
from coldpress.io.network import one_line, within

LOOPBACK = "127.0.0.1"  # what a cluster that is started here listens on
PROBE_S = 10.0  # for a cluster to answer


def import_ray() -> Any:
    """The module; :class:`MissingDependencyError` says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            '--engine ray needs Ray (Python 3.10 to 3.13): pip install "coldpress[ray]".'
        ) from error
    return ray


def connect(ray: Any, address: str | None, cores: int | None) -> bool:
    """Connect to the cluster at ``address``, or start one that listens on 127.0.0.1 alone.

    Args:
        address: None starts a cluster on this machine, unless this process is connected to one.
        cores: of a cluster that is started here; None: all.

    Returns:
        Whether there was no connection before, so that it is the caller's to end.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": LOOPBACK}
    try:
        with _on_loopback() if address is None else nullcontext():
            ray.init(address=address or "local", **options)
    except (Exception, SystemExit) as error:  # it ends the process where a connection breaks
        where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        raise UnreachableError(
            f"{where} could not be {'reached' if address else 'started'} ({type(error).__name__}: "
            f"{one_line(error)}); leave --ray_address out to run on this machine alone."
        ) from error
    if address is None and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise ClusterError(
            f"Ray {ray.__version__} does not keep the cluster that it starts on {LOOPBACK}; install a version "
            'that is tested, pip install "coldpress[ray]", or start a cluster yourself and give --ray_address.'
        )
    return True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started in the block listens on the loopback interface alone.

    Ray takes an address of this machine that others can reach in the place of 127.0.0.1, unless it is told that a
    cluster has one machine only, as it is by default on Windows and macOS.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_address(address: str) -> None:
    """Raise unless a Ray cluster answers at ``address``.

    Asked from outside, because Ray's own client tries for more than a minute, and then ends the process it is in.
    """
    help_ = "leave --ray_address out to run on this machine alone."
    if address == "local":
        raise ClusterError("--ray_address local: leave it out to start a cluster on this machine.")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ClusterError(f"--ray_address {address!r} is not an address; give host:port, ray://host:port or auto.")
        started = time.monotonic()
        problem = _knock(host.strip("[]"), int(port))
        if problem is not None:
            raise UnreachableError(f"no Ray cluster can be reached at {address} ({problem}); {help_}")
        if address.startswith("ray://"):
            return
        left = max(3.0, PROBE_S - (time.monotonic() - started))
    else:
        left = PROBE_S
    problem = _ask(address, left)
    if problem is not None:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise UnreachableError(f"no Ray cluster can be reached {where} ({problem}); {help_}")


def _ask(address: str, seconds: float) -> str | None:
    """Why the cluster at ``address`` does not say that it is well, or None."""
    where = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *where]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    if b"Unauthenticated" in asked.stderr:
        if address == "auto" and "RAY_AUTH_MODE" not in os.environ:
            return None  # Ray takes the token of this machine by itself then
        return "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"
    return None if asked.returncode == 0 else "nobody there says that it is a Ray cluster and well"


def _knock(host: str, port: int) -> str | None:
    """Why there is no answer at a port; None if there is one."""

    def ask() -> None:
        socket.create_connection((host, port), timeout=PROBE_S / 2).close()

    return within(PROBE_S / 2 + 1, ask)[0]
