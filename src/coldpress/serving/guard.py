"""The guard before an application: hosts, keys, and a last net for errors."""

from __future__ import annotations

import asyncio
import hmac
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from fastapi.responses import JSONResponse, Response

from coldpress.errors import RequestError
from coldpress.serving.receiving import Early, Unread
from coldpress.serving.replies import own_fault
from coldpress.serving.service import Limits
from coldpress.serving.shapes import error_of

__all__ = ["Guard", "refused"]

_OPEN = ("/", "/health")  # paths that need no key


class Guard:
    """What every request passes: its host's name, its key, and a last net for errors.

    Args:
        app: an ASGI application.
        limits: of requests.
        api_key: that requests have to bring; None: none is needed.
        hosts: names under which the server may be asked; None: any.
        count: is called with the route and the status of each answer, 499 where the client was gone.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        api_key: str | None = None,
        hosts: Iterable[str] | None = None,
        count: Callable[[str, int], object] = lambda route, status: None,
    ):
        self.app, self.limits, self.count = app, limits, count
        self.hosts = None if hosts is None else frozenset(hosts)
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await asyncio.wait_for(send(message), self.limits.idle_s)  # who stops reading is left

        try:
            self._check(scope)
            await self.app(scope, receive, sent)
        except RequestError as error:
            await refused(error)(scope, receive, sent)
        except (asyncio.TimeoutError, OSError):
            pass  # the client is gone, or takes nothing
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not status:
                await refused(own_fault())(scope, receive, sent)
        route = getattr(scope.get("route"), "path", "other")
        self.count(route, status or 499)

    def _check(self, scope: Any) -> None:
        """Raise :class:`RequestError` for a wrong host or key."""
        headers = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").rpartition("@")[2]
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in self.hosts:
                raise RequestError(f"This server is not {name[:80]!r}.", 403, "wrong_host")
        if self.api_key is None or scope["path"] in _OPEN:
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(key.strip(), self.api_key) or kind.lower() != b"bearer":
            raise RequestError(
                "The key is missing or wrong; send the header 'Authorization: Bearer KEY'.", 401, "invalid_api_key"
            )


def refused(error: RequestError) -> Response:
    """The answer to a request that is refused."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"
    kind = Early if isinstance(error, Unread) else JSONResponse
    return kind(error_of(error), error.status, headers)
