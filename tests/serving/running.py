"""A server in a thread of the test's process, on a port of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coldpress import Snapshots
from coldpress.commands.serving import press_of
from coldpress.core.press import Press
from coldpress.loading.models import LoadedModel
from coldpress.serving.service import Limits, Service

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")
MODEL = "tiny"


@dataclass
class Running:
    """A server and a client of it."""

    url: str
    service: Service
    client: Any
    listener: Any

    def post(self, path: str, body: Any, **options: Any) -> Any:
        return self.client.post(path, json=body, **options)

    def add(self, **body: Any) -> dict[str, Any]:
        """Declare a snapshot."""
        response = self.post("/v1/snapshots", body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


@contextlib.contextmanager
def running(
    loaded: LoadedModel,
    press: Press | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: Any = None,
    name: str = MODEL,
    files: Path | None = None,
    **snapshots: Any,
) -> Iterator[Running]:
    from coldpress.serving.app import make_app
    from coldpress.serving.listening import Listener, bound

    held = Snapshots(loaded.model, loaded.tokenizer, press, **snapshots)
    own = {"press": "snapkv", "press_args": {"window_size": 8}}
    service = Service(
        loaded.model, loaded.tokenizer, name, held, limits or Limits(), lambda given: press_of(own, given), files
    )
    is_there = threading.Event()
    with bound("127.0.0.1", 0) as at:
        listener = Listener(make_app(service, api_key, hosts), service, is_there.set)
        thread = threading.Thread(target=listener.listen, args=(at,))
        url = f"http://127.0.0.1:{at.getsockname()[1]}"
        thread.start()
        assert is_there.wait(10)
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Running(url, service, client, listener)
        finally:
            listener.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
