"""Replies: events come from the thread of the desk, and go to a client as one body or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from coldpress.errors import RequestError
from coldpress.serving.answering import Answer, End, Failure, Piece, Wanted
from coldpress.serving.meters import Meters
from coldpress.serving.refusing import refusal
from coldpress.serving.service import Service
from coldpress.serving.shapes import Gathered, error_of, usage_of

__all__ = ["GONE", "Asked", "Events", "Line", "own_fault", "told"]

GONE = object()  # the client
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Line:
    """Events from the thread of the desk, for a coroutine that waits for them or for its client to go away.

    Args:
        request: whose client is watched.
        when_gone: called at once when the client is gone, whatever events are still to be taken.
    """

    def __init__(self, request: Request, when_gone: Callable[[], object] = lambda: None):
        self._loop, self._events, self._when_gone = asyncio.get_running_loop(), asyncio.Queue[Any](), when_gone
        self._watch = asyncio.ensure_future(self._watched(request))

    def tell(self, event: Any) -> None:
        """Add an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Any:
        """The next event, or ``GONE``."""
        return await self._events.get()

    def close(self) -> None:
        """Stop looking whether the client is there."""
        self._watch.cancel()

    async def _watched(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._when_gone()
        self._events.put_nowait(GONE)


class Asked:
    """The answers to the prompts of one request, from the desk to the client."""

    def __init__(
        self,
        service: Service,
        meters: Meters,
        request: Request,
        wanted: list[Wanted],
        shape: Any,
        ends_with_usage: bool,
    ):
        self.service, self.meters, self.wanted, self.shape = service, meters, wanted, shape
        self.ends_with_usage, self.begun = ends_with_usage, time.monotonic()
        self.line, self.jobs, self.ends = Line(request, self._cancel), list[Answer](), list[End]()
        client = request.client.host if request.client else ""
        try:
            for number, one in enumerate(wanted):
                self.jobs.append(self.service.answer(one, partial(self._told, number), client))
        except RequestError:
            self.leave()
            raise

    async def next(self) -> tuple[int, Piece] | None:
        """The next piece, and the number of its choice; None after the last one, or where the client is gone.

        Raises:
            RequestError: there will be no more.
        """
        while len(self.ends) < len(self.wanted):
            event = await self.line.next()
            if event is GONE:
                return None
            number, event = event
            if isinstance(event, Failure):
                raise told(event.error)
            if isinstance(event, End):
                self.ends.append(event)
                continue
            if self.begun:
                self.meters.first_token_s.observe(time.monotonic() - self.begun)
                self.begun = 0.0
            return number * self.wanted[number].n + event.index, event
        return None

    def _told(self, number: int, event: Any) -> None:
        self.line.tell((number, event))

    def leave(self) -> None:
        """Give up what is not done, and count what is."""
        self.line.close()
        self._cancel()
        self.meters.prompt_tokens.inc(sum(end.prompt_tokens for end in self.ends))
        self.meters.cached_tokens.inc(sum(end.cached_tokens for end in self.ends))
        self.meters.completion_tokens.inc(sum(end.completion_tokens for end in self.ends))

    def _cancel(self) -> None:
        for job in self.jobs:
            self.service.desk.cancel(job)

    @property
    def n_choices(self) -> int:
        """Choices over all prompts."""
        return sum(one.n for one in self.wanted)

    async def whole(self) -> Response:
        """The answer in one piece."""
        choices = [Gathered() for _ in range(self.n_choices)]
        try:
            while (found := await self.next()) is not None:
                choices[found[0]].add(found[1])
        finally:
            self.leave()
        if len(self.ends) < len(self.wanted):
            return Response(status_code=499)  # nobody will read it
        return JSONResponse(self.shape.whole(choices, usage_of(self.ends)))


class Events(Response):
    """A streamed answer: events with a JSON object each, and [DONE] after the last one."""

    def __init__(self, asked: Asked, first: tuple[int, Piece] | None):
        super().__init__()
        self.asked, self.first = asked, first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = self.asked
        more = {"usage": None} if asked.ends_with_usage else {}

        async def say(said: Any, is_last: bool = False) -> None:
            text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            for choice in asked.shape.first(asked.n_choices):
                await say(asked.shape.chunk([choice], **more))
            found = self.first
            while found is not None:
                await say(asked.shape.chunk([asked.shape.piece(*found)], **more))
                found = await asked.next()
            if len(asked.ends) < len(asked.wanted):
                return  # the client is gone
            if asked.ends_with_usage:
                await say(asked.shape.chunk([], usage=usage_of(asked.ends)))
            await say("[DONE]", is_last=True)
        except RequestError as error:
            await say(error_of(error), is_last=True)
        finally:
            asked.leave()


def told(error: Exception) -> RequestError:
    """What a client is told of an error; one of our own is printed."""
    found = refusal(error)
    if found is None:
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
        found = own_fault()
    return found


def own_fault() -> RequestError:
    return RequestError("The server has failed at this request; its log says why.", 500, "internal_error")
