"""The server's socket and signals: it listens, and when it is told to end, it finishes what it has begun."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from coldpress.errors import InputError
from coldpress.serving.service import Service

__all__ = ["Listener", "bound"]

_BACKLOG = 2048


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises:
        InputError: the address is taken or is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"The server cannot listen at {host}:{port} ({why}); give another --host or --port."
        ) from error
    return found


class Listener(uvicorn.Server):
    """A server that drains: after SIGTERM or Ctrl-C running answers finish, and new requests get 503.

    A second signal ends it at once.

    Args:
        app: of :func:`coldpress.serving.app.make_app`.
        service: behind it.
        when_listening: called once.
    """

    def __init__(self, app: Any, service: Service, when_listening: Callable[[], object] = lambda: None):
        config = uvicorn.Config(
            app,
            http="h11",  # and no other that may be installed: what is tested
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(service.limits.idle_s),
            timeout_keep_alive=30,
        )
        super().__init__(config)
        self.service, self.when_listening = service, when_listening
        self.signal: int | None = None  # that has ended it

    def listen(self, at: socket.socket) -> None:
        """Answer requests until a signal comes."""
        try:
            self.run(sockets=[at])
        finally:
            self.service.close()

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets=sockets)
        self.when_listening()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: nothing is left of a server that drains."""
        if self.service.desk.is_draining and self.service.desk.is_idle:
            self.should_exit = True
        return bool(await super().on_tick(counter))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the server drain, the second ends it."""
        if self.signal is not None:
            self.should_exit = self.force_exit = True
        self.signal = self.signal or sig
        self.service.desk.is_draining = True  # no lock is taken here: the signal may have come while one was held

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C has ended it."""
        return self.signal == signal.SIGINT
