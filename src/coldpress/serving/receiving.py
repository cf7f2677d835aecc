"""The body of a request, as it comes: no larger and no slower than allowed, and from a client that stays."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from coldpress.errors import RequestError
from coldpress.serving.service import Limits

__all__ = ["Early", "Unread", "received"]

_REST_S, _REST_BYTES = 5.0, 64 << 20  # of a body that is refused: what its client may still send


class Unread(RequestError):
    """A body is refused by what its header says; its client may be sending it."""


async def received(request: Request, limits: Limits) -> bytes:
    """The bytes of a body.

    Raises:
        RequestError: 413 where it is larger than allowed, before any of it is read if its header says so; 408 where it
            does not come in time; 499 where the client leaves before its end, which nobody will read.
    """
    refusal = f"The body is larger than {limits.body_bytes:,} bytes.", 413, "body_too_large"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > limits.body_bytes:
        raise Unread(*refusal)

    async def content() -> bytes:
        found, n = bytearray(), 0
        async for part in request.stream():
            n += len(part)
            if n > 2 * limits.body_bytes:
                raise RequestError(*refusal)
            if n <= limits.body_bytes:  # the rest is read and dropped: a client that still sends misses the answer
                found += part
        if n > limits.body_bytes:
            raise RequestError(*refusal)
        return bytes(found)

    try:
        return await asyncio.wait_for(content(), limits.idle_s)
    except asyncio.TimeoutError as error:
        raise RequestError("The body did not come in time.", 408, "timeout") from error
    except ClientDisconnect as error:
        raise RequestError("The client left before the end of its body.", 499, "client_left") from error


class Early(JSONResponse):
    """An answer that is sent at once, before the body has come.

    What still comes is dropped for a while, and the connection closed then: closed at once it would be reset under a
    client that reads no answer before it has sent all.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def kept_open(message: Any) -> None:
            await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

        async def dropped() -> None:
            n, more = 0, True
            while more and n < _REST_BYTES:
                message = await receive()
                n, more = n + len(message.get("body", b"")), message.get("more_body", False)

        await super().__call__(scope, receive, kept_open)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dropped(), _REST_S)
        await send({"type": "http.response.body", "body": b""})
