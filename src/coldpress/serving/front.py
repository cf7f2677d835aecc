"""The front of several replicas: takes requests over HTTP, and hands each to a replica by way of Ray Serve.

A request that names a snapshot, or begins with the text of one, goes where Ray Serve knows it to be held (multiplexing
by model id, of which the snapshot's id is one). Which replica is asked otherwise is Ray Serve's choice. Where a replica
is lost before its answer has begun, the request is handed to another one, once.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from coldpress.errors import RequestError
from coldpress.serving.guard import refused
from coldpress.serving.receiving import received
from coldpress.serving.replica import SNAPSHOTS
from coldpress.serving.service import Limits
from coldpress.serving.shapes import error_of

__all__ = ["Front"]

_MOST_KNOWN = 4096  # snapshots whose texts are remembered
_LOST = RequestError(
    "The replica that answered was lost; ask again, another one takes its place.", 503, "replica_lost", retry_after_s=1
)


class Front:
    """An ASGI application, and what a listener asks of a service.

    Args:
        stream: hands a scope, a body and a snapshot's id ("" for none) to a replica, and returns the messages of its
            answer, an asynchronous iterator with ``cancel()``.
        lost: the exceptions that say that a replica is gone.
        limits: of a request.
        close: ends the replicas.
    """

    def __init__(
        self,
        stream: Callable[[dict[str, Any], bytes, str], Any],
        lost: tuple[type[Exception], ...],
        limits: Limits,
        close: Callable[[], None],
    ):
        self._stream, self._lost, self.limits, self.close = stream, lost, limits, close
        self.desk = self  # what a listener looks at to drain
        self.is_draining, self.n_running = False, 0
        self._texts: OrderedDict[str, str] = OrderedDict()  # of snapshots that were made here, by id

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return not self.n_running

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self.is_draining:
            error = RequestError(
                "The server is about to end; ask again later.", 503, "server_draining", retry_after_s=5
            )
            await JSONResponse(error_of(error), 503, {"retry-after": "5"})(scope, receive, send)
            return
        self.n_running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.n_running -= 1

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            body = await received(Request(scope, receive), self.limits)
        except RequestError as error:
            await refused(error)(scope, receive, send)
            return
        plain = {
            name: scope[name]
            for name in (
                "type",
                "http_version",
                "method",
                "path",
                "raw_path",
                "query_string",
                "headers",
                "client",
                "scheme",
            )
            if name in scope
        } | {"asgi": {"version": "3.0"}, "root_path": ""}
        gone = asyncio.ensure_future(_gone(receive))
        try:
            for is_retry in (False, True):
                has_begun = False
                found = self._stream(plain, body, self._key_of(scope["path"], body))
                made = bytearray()
                try:
                    while True:
                        step = asyncio.ensure_future(found.__anext__())
                        await asyncio.wait([step, gone], return_when=asyncio.FIRST_COMPLETED)
                        if not step.done():
                            found.cancel()
                            step.cancel()
                            return
                        message = step.result()
                        has_begun = True
                        if scope["method"] == "POST" and scope["path"] == SNAPSHOTS:
                            made += message.get("body", b"")
                        await asyncio.wait_for(send(message), self.limits.idle_s)
                except StopAsyncIteration:
                    self._learn(body, bytes(made))
                    return
                except self._lost:
                    if has_begun:
                        raise  # the connection breaks, and the client asks again
                    if is_retry:
                        await JSONResponse(error_of(_LOST), 503, {"retry-after": "1"})(scope, receive, send)
        finally:
            gone.cancel()

    def _key_of(self, path: str, body: bytes) -> str:
        """The id of the snapshot that a request is about, "" for none that is known."""
        if path.startswith(f"{SNAPSHOTS}/"):
            return path[len(SNAPSHOTS) + 1 :].partition("/")[0]
        found = _read(body)
        named = found.get("snapshot")
        if isinstance(named, str):
            return named
        text = _text_of(found)
        known = [(len(own), key) for key, own in self._texts.items() if text and own and text.startswith(own)]
        return max(known, default=(0, ""))[1]

    def _learn(self, body: bytes, answer: bytes) -> None:
        """Remember the text of a snapshot that was made, to know requests that begin with it."""
        key = _read(answer).get("id")
        if isinstance(key, str) and answer:
            self._texts[key] = _text_of(_read(body))
            self._texts.move_to_end(key)
            while len(self._texts) > _MOST_KNOWN:
                self._texts.popitem(last=False)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _read(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else, which a replica refuses."""
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text_of(body: dict[str, Any]) -> str:
    """What a request says, as one text whose beginning is that of a snapshot's where the request begins with it."""
    messages = body.get("messages")
    if isinstance(messages, list):
        parts = [f"{one.get('role')}\0{one.get('content')}" for one in messages if isinstance(one, dict)]
        return "\0\0".join(parts)
    text = body.get("text", body.get("prompt"))
    return text if isinstance(text, str) else ""
