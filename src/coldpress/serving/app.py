"""The server's HTTP: paths, keys, bodies, events. What is behind them is in ``service.py``."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from coldpress.errors import RequestError
from coldpress.serving.answering import Failure, Wanted
from coldpress.serving.bodies import Body
from coldpress.serving.guard import Guard, refused
from coldpress.serving.meters import Meters
from coldpress.serving.receiving import received
from coldpress.serving.refusing import refusal
from coldpress.serving.replies import GONE, Asked, Events, Line, own_fault, told
from coldpress.serving.service import Making, Service
from coldpress.serving.shapes import ChatShape, TextShape

__all__ = ["make_app"]

_T = TypeVar("_T")


def make_app(service: Service, api_key: str | None = None, hosts: Iterable[str] | None = None) -> Any:
    """The ASGI application of a service.

    Args:
        api_key: that requests have to bring; None: none is needed.
        hosts: names under which the server may be asked, so that no page of another site reaches it by a name of its
            own; None: any.
    """
    app = FastAPI(title="coldpress", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(service)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestError, _of_request)
    app.add_exception_handler(Exception, _of_ours)
    app.add_api_route("/", routes.page, methods=["GET"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/snapshots", routes.snapshots, methods=["GET"])
    app.add_api_route("/v1/snapshots", routes.add_snapshot, methods=["POST"])
    app.add_api_route("/v1/snapshots/{key}", routes.snapshot, methods=["GET"])
    app.add_api_route("/v1/snapshots/{key}/page", routes.snapshot_page, methods=["GET"])
    app.add_api_route("/v1/snapshots/{key}", routes.remove_snapshot, methods=["DELETE"])

    def count(route: str, status: int) -> None:
        routes.meters.requests.labels(route, str(status)).inc()

    return Guard(app, service.limits, api_key, hosts, count)


class _Routes:
    """What each path does."""

    def __init__(self, service: Service):
        self.service, self.meters = service, Meters(service)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="coldpress-reader")  # tokenizing takes its time

    async def page(self) -> Response:
        """A page to ask with, for a browser."""
        return HTMLResponse(_page(), headers={"content-security-policy": "frame-ancestors 'none'"})

    async def health(self) -> Response:
        """Whether requests are taken."""
        is_draining = self.service.desk.is_draining
        return JSONResponse({"status": "draining" if is_draining else "ok"}, 503 if is_draining else 200)

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model, if it has this name."""
        if name != self.service.name:
            raise RequestError(f"There is no model {name[:80]!r} here.", 404, "model_not_found", "model")
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        """An answer to messages."""
        body = await self._body(request)
        is_streamed, has_usage = _streaming(body)
        wanted = await self._in_reader(lambda: self.service.chat(body))
        shape = ChatShape(self.service.name, self.service.tokenizer, wanted.n_likely is not None)
        return await self._answered(request, [wanted], shape, is_streamed, has_usage)

    async def completions(self, request: Request) -> Response:
        """What follows texts."""
        body = await self._body(request)
        is_streamed, has_usage = _streaming(body)
        wanted = await self._in_reader(lambda: self.service.completions(body))
        shape = TextShape(self.service.name, self.service.tokenizer, wanted[0].n_likely is not None)
        return await self._answered(request, wanted, shape, is_streamed, has_usage)

    async def snapshots(self) -> Response:
        """All snapshots, the most recently used first."""
        data = [self.service.shown(snapshot) for snapshot in self.service.snapshots]
        return JSONResponse({"object": "list", "data": data, "counts": self.service.snapshots.counts()})

    async def add_snapshot(self, request: Request) -> Response:
        """A snapshot of a text or of messages, made unless it is there."""
        body = await self._body(request)
        made = await self._made(request, lambda tell, client: self.service.make(body, tell, client))
        return Response(status_code=499) if made is GONE else JSONResponse(self.service.shown(made))

    async def snapshot_page(self, request: Request, key: str) -> Response:
        """A page that shows which tokens of a snapshot are kept."""
        snapshot = self.service.found(key)
        made = await self._made(request, lambda tell, client: self.service.page(snapshot, tell, client))
        return Response(status_code=499) if made is GONE else HTMLResponse(made)

    async def _made(self, request: Request, submit: Callable[[Any, str], Making]) -> Any:
        """What a job of the desk makes, or ``GONE`` where its client is."""
        line, client = Line(request), request.client.host if request.client else ""
        try:
            job = await self._in_reader(lambda: submit(line.tell, client))
            made = await line.next()
        finally:
            line.close()
        if made is GONE:
            self.service.desk.cancel(job)
        if isinstance(made, Failure):
            raise told(made.error)
        return made

    async def snapshot(self, key: str) -> Response:
        """One snapshot."""
        return JSONResponse(self.service.shown(self.service.found(key)))

    async def remove_snapshot(self, key: str) -> Response:
        """A snapshot is forgotten; answers that are under way go on."""
        self.service.found(key)
        await self._in_reader(lambda: self.service.snapshots.remove(key))
        return JSONResponse({"id": key, "object": "snapshot", "deleted": True})

    async def _answered(
        self, request: Request, wanted: list[Wanted], shape: Any, is_streamed: bool, has_usage: bool
    ) -> Response:
        asked = Asked(self.service, self.meters, request, wanted, shape, has_usage)
        if not is_streamed:
            return await asked.whole()
        try:
            first = await asked.next()  # what goes wrong before it has a status of its own
        except BaseException:
            asked.leave()
            raise
        return Events(asked, first)

    async def _body(self, request: Request) -> Body:
        """The JSON of a request, of no more bytes than allowed."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError("The header 'Content-Type: application/json' is missing.", 415, "wrong_content_type")
        read = await received(request, self.service.limits)
        return await self._in_reader(lambda: Body(read))

    async def _in_reader(self, function: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function)
        except Exception as error:
            raise (refusal(error) or error) from error

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": self.service.started_at,
            "owned_by": "coldpress",
            "max_model_len": self.service.max_positions,
        }


@functools.cache
def _page() -> str:
    return resources.files("coldpress").joinpath("assets", "serve.html").read_text(encoding="utf-8")


def _streaming(body: Body) -> tuple[bool, bool]:
    """Whether an answer is streamed, and whether its usage comes at the end."""
    is_streamed, options = body.flag("stream"), body.mapping("stream_options")
    has_usage = options.pop("include_usage", False)
    if options or type(has_usage) is not bool:
        raise RequestError("stream_options may say include_usage: true or false, and no more.", param="stream_options")
    if has_usage and not is_streamed:
        raise RequestError("stream_options needs stream: true.", param="stream_options")
    return is_streamed, has_usage


async def _of_request(request: Request, error: Any) -> Response:
    return refused(error)


async def _of_ours(request: Request, error: Any) -> Response:
    return refused(own_fault())  # the guard prints it


async def _of_http(request: Request, error: Any) -> Response:
    """No such path, or another method."""
    words = {404: f"There is nothing at {request.url.path[:80]}.", 405: "This path takes another method."}
    return refused(RequestError(words.get(error.status_code, str(error.detail)), error.status_code, "not_found"))
