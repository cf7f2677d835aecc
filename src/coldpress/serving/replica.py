"""A replica: one of several processes with the model, which Ray Serve runs and hands requests to.

It answers as a server of its own does, without a socket: a request comes as an ASGI scope and a body, and the messages
of its answer go back one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from coldpress.serving.app import make_app
from coldpress.serving.service import Service

__all__ = ["SNAPSHOTS", "Replica"]

SNAPSHOTS = "/v1/snapshots"
_END = object()


class Replica:
    """What Ray Serve makes in each process.

    Args:
        make_service: loads the model, whose snapshots are in a folder that all replicas share.
        most_held: snapshots that Ray Serve remembers of this replica, the most recently asked ones.
    """

    def __init__(self, make_service: Callable[[], Service], most_held: int = 1024):
        from ray import serve

        self.service = make_service()
        self.app = make_app(self.service)
        self._hold = serve.multiplexed(max_num_models_per_replica=most_held)(_held)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The ASGI messages of the answer to a request; what it needs of other replicas is in the folder."""
        from ray import serve

        loop, messages, has_left = asyncio.get_running_loop(), asyncio.Queue[Any](), asyncio.Event()
        await loop.run_in_executor(None, self.service.snapshots.refresh)
        key = serve.get_multiplexed_model_id()
        if key:
            await self._hold(key)
        parts = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and scope["method"] == "POST" and scope["path"] == SNAPSHOTS:
                await loop.run_in_executor(None, self.service.snapshots.flush)  # so that the others have it
                with contextlib.suppress(ValueError, KeyError):  # it was refused
                    await self._hold(json.loads(message["body"])["id"])
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self.app(scope, receive, send)
            finally:
                messages.put_nowait(_END)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not _END:
                yield message
            await task
        finally:  # whoever asked may be gone
            has_left.set()
            await asyncio.wait([task], timeout=5)

    def check_health(self) -> None:
        """Raise where the thread that answers has ended; Ray Serve asks, and replaces the replica."""
        if not self.service.desk.is_alive:
            raise RuntimeError("the desk has ended")


async def _held(key: str) -> str:
    """Ray Serve notes that this replica has the snapshot ``key``, which is read when it is asked."""
    return key
