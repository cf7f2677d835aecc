"""``coldpress serve --engine ray``: several processes with the model on a Ray cluster, behind one address."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coldpress.errors import MissingDependencyError
from coldpress.io.ray import connect, import_ray
from coldpress.serving.service import Limits, Service

__all__ = ["replicas"]

_NAME = "coldpress"
_HEALTH_S = 2.0  # between two looks at a replica


@contextmanager
def replicas(make_service: Callable[[], Service], n: int, address: str | None, limits: Limits) -> Iterator[Any]:
    """The front of ``n`` replicas that Ray Serve runs; they end with the block, and so does a cluster started for it.

    Args:
        make_service: is run in each of them.
        address: of a cluster; None: one on this machine.
        limits: of each replica.

    Raises:
        MissingDependencyError: there is no ray[serve].
        UnreachableError, ClusterError: no cluster answers.
    """
    ray = import_ray()
    try:
        from ray import serve
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        from coldpress.serving.front import Front
        from coldpress.serving.replica import Replica
    except ImportError as error:
        raise MissingDependencyError(
            f'--engine ray needs a package that is not installed ({error.name}): pip install "coldpress[serve,ray]".'
        ) from error
    cores = os.cpu_count() or 1
    is_own = connect(ray, address, max(n, cores))
    try:
        serve.start(proxy_location="Disabled")
        threads = {"OMP_NUM_THREADS": str(max(1, cores // n))} if address is None else {}
        deployment = serve.deployment(
            name=_NAME,
            num_replicas=n,
            max_ongoing_requests=limits.running + limits.waiting,
            health_check_period_s=_HEALTH_S,
            health_check_timeout_s=10 * _HEALTH_S,
            graceful_shutdown_timeout_s=limits.idle_s,
            ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": threads}},
        )(Replica)
        handle = serve.run(deployment.bind(make_service), name=_NAME, route_prefix=None)

        def stream(scope: dict[str, Any], body: bytes, key: str) -> Any:
            options = handle.options(stream=True, multiplexed_model_id=key, method_name="answer")
            return options.remote(scope, body)

        yield Front(stream, (RayActorError, RayServeException), limits, lambda: None)
    finally:
        serve.shutdown()
        if is_own:
            ray.shutdown()
