"""What a server survives: too many clients, those that leave or do not read, hostile bodies, and its own end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.serving.running import Running, httpx, running
from tests.serving.test_snapshots import digest
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder

from coldpress import PressedCache, SnapKVPress
from coldpress.cli import main
from coldpress.errors import RequestError
from coldpress.loading.models import LoadedModel, load_model
from coldpress.serving import answering
from coldpress.serving.desk import Desk
from coldpress.serving.service import Limits

PRESS = SnapKVPress(0.5, window_size=8)
JSON = {"content-type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    found = load_model(str(folder), device="cpu")
    found.model.generation_config.eos_token_id = []  # answers are as long as they may be
    return found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tokens are made while it is set, which it is at first."""
    event, make = threading.Event(), answering.Answer._go_on
    event.set()

    def wait(self: Any, choice: Any) -> None:
        assert event.wait(20)
        make(self, choice)

    monkeypatch.setattr(answering.Answer, "_go_on", wait)
    yield event
    event.set()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def is_idle(server: Running) -> bool:
    return server.service.desk.is_idle


def streamed(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Many at once


def test_a_hundred_clients_on_a_queue_of_sixteen(loaded: LoadedModel, gate: threading.Event) -> None:
    with running(loaded, PRESS, Limits(running=2, waiting=16)) as server:
        asked = {"prompt": QUESTIONS[0], "max_tokens": 3, "temperature": 0}
        gate.clear()
        with ThreadPoolExecutor(100) as pool:
            limits = httpx.Limits(max_connections=100)
            with httpx.Client(base_url=server.url, timeout=30, limits=limits) as client:
                replies = [pool.submit(client.post, "/v1/completions", json=asked) for _ in range(100)]
                until(lambda: sum(reply.done() for reply in replies) >= 82)
                assert server.client.get("/health").status_code == 200
                gate.set()
                responses = [reply.result() for reply in replies]
        refused = [response for response in responses if response.status_code == 429]
        answered = [response for response in responses if response.status_code == 200]
        assert len(refused) + len(answered) == 100 and 16 <= len(answered) <= 18
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert {response.json()["error"]["message"] for response in refused} == {
            "The queue is full: at most 16 requests wait; ask again later."  # the limit, whatever is in it for a moment
        }
        assert len({response.json()["choices"][0]["text"] for response in answered}) == 1
        until(lambda: is_idle(server))


def test_snapshots_are_the_same_after_many_answers(loaded: LoadedModel) -> None:
    with running(loaded, PRESS) as server:
        snapshot = server.service.snapshots.get(server.add(text=CONTEXT)["id"])
        assert snapshot is not None
        before = digest(snapshot)

        def ask(number: int) -> str:
            body = {"prompt": QUESTIONS[number % 3], "snapshot": snapshot.id, "max_tokens": 4, "temperature": 0}
            return str(server.post("/v1/completions", body).json()["choices"][0]["text"])

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(ask, range(48)))
        assert digest(snapshot) == before and snapshot.uses == 48
        assert [len(set(texts[i::3])) for i in range(3)] == [1, 1, 1]


def test_nothing_is_left_of_answers(loaded: LoadedModel) -> None:
    def n_caches() -> int:
        return sum(type(one) is PressedCache for one in gc.get_objects())

    with running(loaded, PRESS) as server:
        made = server.add(text=CONTEXT)
        asked = {"prompt": QUESTIONS[0], "snapshot": made["id"], "max_tokens": 3, "n": 2}
        server.post("/v1/completions", asked)
        gc.collect()
        before = n_caches()
        gc.disable()  # what is in a circle would wait for it
        try:
            for number in range(10):
                server.post("/v1/completions", asked | {"stream": number % 2 == 0})
            assert n_caches() <= before
        finally:
            gc.enable()


class _Job:
    is_aside = is_reading = False

    def __init__(self, client: str, done: list[str], gate: threading.Event, steps: int = 1, ends_at: float = 1e9):
        self.client, self.done, self.gate, self.steps = client, done, gate, steps
        self.ends_at, self.is_cancelled, self.error = time.monotonic() + ends_at, False, None

    def step(self) -> bool:
        self.gate.wait()
        self.steps -= 1
        if not self.steps:
            self.done.append(self.client)
        return not self.steps

    def fail(self, error: Exception) -> None:
        self.error = error  # type: ignore[assignment]

    def end(self) -> None:
        self.gate = None  # type: ignore[assignment]


def test_clients_have_their_turns() -> None:
    desk, done, gate = Desk(1, 10), list[str](), threading.Event()
    first = _Job("first", done, gate)
    desk.submit(first)
    until(lambda: desk.n_running == 1)
    for client in ("many", "many", "many", "one", "other"):
        desk.submit(_Job(client, done, gate))
    late, left = _Job("late", done, gate, ends_at=-1), _Job("left", done, gate)
    desk.submit(late)
    desk.submit(left)
    desk.cancel(left)
    gate.set()
    until(lambda: desk.is_idle)
    assert done == ["first", "many", "one", "other", "many", "many"]
    assert isinstance(late.error, RequestError) and late.error.status == 503
    desk.close()
    with pytest.raises(RequestError, match="about to end"):
        desk.submit(first)


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    desk, done, gate = Desk(2, 10), list[str](), threading.Event()
    desk.submit(_Job("long", done, gate, steps=50))
    desk.submit(_Job("short", done, gate, steps=2))
    gate.set()
    until(lambda: desk.is_idle)
    assert done == ["short", "long"]
    desk.close()


def test_what_takes_too_long(loaded: LoadedModel, gate: threading.Event) -> None:
    with running(loaded, PRESS, Limits(running=1, time_s=0.2)) as server:
        gate.clear()
        threading.Timer(0.4, gate.set).start()
        response = server.post("/v1/completions", {"prompt": "Who?", "max_tokens": 100})
        assert response.status_code == 503 and response.json()["error"]["code"] == "timeout"
        assert response.headers["retry-after"]
        until(lambda: is_idle(server))


# Clients that leave, or do not read


@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_goes_away_frees_its_place(loaded: LoadedModel, gate: threading.Event, is_streamed: bool) -> None:
    with running(loaded, PRESS, Limits(running=1, waiting=1)) as server:
        asked = json.dumps({"prompt": "Who?", "max_tokens": 200, "stream": is_streamed}).encode()
        gate.clear()
        places = []
        for n in (1, 0):  # one runs, one waits
            at = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
            at.sendall(HEAD % len(asked) + asked)
            places.append(at)
            until(lambda n=n: (server.service.desk.n_running, server.service.desk.n_waiting) == (1, 1 - n))
        assert server.post("/v1/completions", {"prompt": "Who?"}).status_code == 429
        places[1].close()
        until(lambda: server.service.desk.n_waiting == 0)
        places[0].close()
        time.sleep(0.05)
        gate.set()
        until(lambda: is_idle(server), 2)  # long before 200 tokens are made
        assert server.post("/v1/completions", {"prompt": "Who?", "max_tokens": 2}).status_code == 200


def test_who_does_not_read_is_left(loaded: LoadedModel) -> None:
    with running(loaded, PRESS, Limits(running=1, idle_s=0.2)) as server:
        body = json.dumps({"prompt": "Who?", "max_tokens": 30, "stream": True, "logprobs": 0}).encode()
        sent: list[Any] = []

        from coldpress.serving.app import make_app

        async def receive() -> Any:
            if not sent:
                sent.append(None)
                return {"type": "http.request", "body": body}
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 5:  # the socket's buffer is full
                await asyncio.sleep(60)

        path = "/v1/completions"
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        begun = time.monotonic()
        asyncio.run(make_app(server.service)(scope, receive, send))
        assert len(sent) == 6 and time.monotonic() - begun < 5
        until(lambda: is_idle(server))
        assert server.post(path, {"prompt": "Who?", "max_tokens": 2}).status_code == 200


def test_a_snapshot_is_removed_while_it_answers(loaded: LoadedModel, gate: threading.Event) -> None:
    with running(loaded, PRESS) as server:
        made = server.add(text=CONTEXT)
        asked = {"prompt": QUESTIONS[0], "snapshot": made["id"], "max_tokens": 9, "temperature": 0}
        expected = server.post("/v1/completions", asked).json()["choices"][0]["text"]
        gate.clear()
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.post, "/v1/completions", asked)
            until(lambda: server.service.desk.n_running == 1)
            until(lambda: server.service.snapshots.hits == 2)
            assert server.client.delete(f"/v1/snapshots/{made['id']}").status_code == 200
            gate.set()
            assert reply.result().json()["choices"][0]["text"] == expected
        assert server.service.snapshots.memory_bytes == 0
        assert server.client.get(f"/v1/snapshots/{made['id']}").status_code == 404


# Bodies


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b"", JSON, 400, "invalid_json"),
        (b"\xff\xfe", JSON, 400, "invalid_json"),
        (b'{"prompt": NaN}', JSON, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 6000 + b"}", JSON, 400, "invalid_json"),
        (b"[" * 400_000, JSON, 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, 400, "invalid_value"),
        (b'{"a":' * 90_000, JSON, 400, "invalid_json"),
        (b"[1]", JSON, 400, "invalid_json"),
        (b'"text"', JSON, 400, "invalid_json"),
        (b" " * 1_000_001, JSON, 413, "body_too_large"),
        (b"{}", {"content-type": "text/plain"}, 415, "wrong_content_type"),
        (b"{}", {}, 415, "wrong_content_type"),
        (b'{"prompt": "' + b"a " * 499_000 + b'"}', JSON, 400, "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_bodies(server: Running, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = server.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status and response.json()["error"]["code"] == code, response.text
    assert len(response.text) < 500


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Running]:
    with running(loaded, PRESS, Limits(body_bytes=1_000_000, idle_s=0.5)) as found:
        yield found


def test_a_body_without_an_end(server: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # the connection may be closed under it
        response = server.client.post("/v1/completions", content=parts(), headers=JSON)
        assert response.status_code == 413
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as at:
        at.sendall(HEAD % 9 + b"{")
        assert b" 408 " in at.recv(100)
    assert server.client.get("/health").status_code == 200


def test_a_body_of_100_megabytes(server: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    headers = {**JSON, "content-length": "100000000"}
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # the connection may be closed under it
        assert server.client.post("/v1/completions", content=parts(), headers=headers).status_code == 413
    assert server.client.get("/health").status_code == 200


def told_early(url: str) -> bytes:
    """The beginning of the answer to a body that is said to be too large and of which nothing comes."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as at:
        at.sendall(HEAD % 1_000_001)
        return at.recv(100)


def test_what_is_said_to_be_too_large_is_refused_unread(server: Running) -> None:
    assert b" 413 " in told_early(server.url)


def test_who_leaves_while_sending_is_no_fault_of_ours(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """It had a traceback and counted as 500."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as at:
        at.sendall(HEAD % 500 + b'{"prompt"')
    counted = 'coldpress_requests_total{path="/v1/completions",status="499"}'
    until(lambda: counted in server.client.get("/metrics").text)
    assert 'status="500"' not in server.client.get("/metrics").text
    assert capsys.readouterr().err == ""


def test_the_front_of_replicas_reads_bodies_by_the_same_rules() -> None:
    """No replica is asked for what is too large, too slow or left in the middle."""
    from coldpress.serving.front import Front

    def asked(length: int, *messages: dict[str, Any]) -> list[Any]:
        sent, left = [], list(messages)

        async def receive() -> Any:
            return left.pop(0) if left else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        front = Front(None, (), Limits(body_bytes=10, idle_s=0.2), lambda: None)  # type: ignore[arg-type]
        asyncio.run(front(scope, receive, send))
        assert front.is_idle
        return [message["status"] for message in sent if message["type"] == "http.response.start"]

    part = {"type": "http.request", "body": b"12345", "more_body": True}
    assert asked(11, {"type": "http.disconnect"}) == [413]
    assert asked(9, *[part] * 5) == [413]
    assert asked(9, part) == [408]
    assert asked(9, part, {"type": "http.disconnect"}) == [499]


def test_its_own_faults_are_told_and_it_goes_on(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("made up")

    for where in (server.service.snapshots, server.service):
        monkeypatch.setattr(where, "fork" if where is server.service.snapshots else "completions", fail)
        response = server.post("/v1/completions", {"prompt": "Who?"})
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert "made up" not in response.text
        until(lambda: "ZeroDivisionError: made up" in capsys.readouterr().err)  # it is printed after the answer
        monkeypatch.undo()
    assert server.post("/v1/completions", {"prompt": "Who?", "max_tokens": 1}).status_code == 200


def test_a_fault_in_the_middle_of_a_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = answering.Answer._go_on, []

    def fail(self: Any, choice: Any) -> None:
        made.append(1)
        if len(made) > 3:
            raise RequestError("made up", 503)
        make(self, choice)

    monkeypatch.setattr(answering.Answer, "_go_on", fail)
    asked = {"prompt": "Who?", "max_tokens": 9, "stream": True, "logprobs": 0}
    with server.client.stream("POST", "/v1/completions", json=asked) as response:
        events = streamed(response)
    assert response.status_code == 200 and len(events) == 4
    assert events[-1]["error"]["message"] == "made up" and events[-1]["error"]["type"] == "server_error"


def test_files_of_one_folder_and_no_other(loaded: LoadedModel, server: Running, tmp_path: Path) -> None:
    folder, secret = tmp_path / "texts", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text(CONTEXT)
    (folder / "a.txt").write_text(CONTEXT)
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / "link.txt").symlink_to(secret)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with running(loaded, PRESS, files=folder) as allowing:
        made = allowing.add(file="a.txt")
        assert made["id"] == allowing.add(text=CONTEXT)["id"] == allowing.add(file=str(folder / "a.txt"))["id"]
        chat = allowing.add(file="a.txt", chat=True)
        assert chat["id"] == allowing.add(messages=[{"role": "user", "content": CONTEXT}])["id"] != made["id"]
        names = [
            "../secret.txt",
            str(secret),
            "link.txt",
            "loop",
            "pipe",
            ".",
            "binary",
            "no.txt",
            "a\0b",
            "/dev/zero",
            "a" * 999,
        ]
        for name in names:
            response = allowing.post("/v1/snapshots", {"file": name})
            assert response.status_code == 404 and response.json()["error"]["code"] == "file_not_found", name
            assert CONTEXT[:20] not in response.text
        assert allowing.post("/v1/snapshots", {"file": ""}).status_code == 400
    response = server.post("/v1/snapshots", {"file": "a.txt"})
    assert response.status_code == 403 and "--allow_files" in response.text


# Its end


def test_draining(loaded: LoadedModel, gate: threading.Event) -> None:
    with running(loaded, PRESS, Limits(running=1)) as server:
        gate.clear()
        with ThreadPoolExecutor(2) as pool:
            asked = {"prompt": "Who?", "max_tokens": 5}
            replies = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=asked) for _ in range(2)]
            until(lambda: (server.service.desk.n_running, server.service.desk.n_waiting) == (1, 1))
            server.listener.handle_exit(signal.SIGTERM, None)
            response = httpx.post(f"{server.url}/v1/completions", json=asked)
            assert response.status_code == 503 and response.json()["error"]["code"] == "server_draining"
            assert response.headers["retry-after"] == "5"
            assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
            gate.set()
            assert [reply.result().json()["usage"]["completion_tokens"] for reply in replies] == [5, 5]
        until(lambda: server.listener.should_exit)


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    command = [sys.executable, "-m", "coldpress.cli", "serve", "--port", "0", "--device", "cpu", *options]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert started.stdout is not None and started.stderr is not None
        lines = [started.stdout.readline() for _ in range(5)]
        found = re.search(r"http://127\.0\.0\.1:\d+", lines[0])
        assert found is not None, started.stderr.read()
        yield started, found[0], lines
    finally:
        started.kill()
        started.communicate()


def test_a_signal_ends_it_when_all_is_answered(tmp_path: Path) -> None:
    texts, held = tmp_path / "texts", tmp_path / "held"
    texts.mkdir()
    (texts / "a.txt").write_text(CONTEXT)
    held.mkdir()
    damaged = [held / f"{'0' * 32}.{ending}" for ending in ("json", "safetensors")]
    for file in damaged:
        file.write_text("{}")
    options = ("--folder", str(held), "--served_name", "mine", "--allow_files", str(texts))
    with process("--model", "demo", *options) as (started, url, lines):
        assert lines[0].startswith("coldpress serve: http://127.0.0.1:") and "mine in float32 on cpu" in lines[0]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
        assert [line.partition(":")[0] for line in lines[1:]] == ["holds", "allows", "ask", "end"]
        made = httpx.post(f"{url}/v1/snapshots", json={"file": "a.txt"}, timeout=30).json()
        asked = {"prompt": "Who?", "max_tokens": 60, "stream": True, "n": 2, "logprobs": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as response:
            parts = response.iter_lines()
            next(parts)
            started.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 503
            rest = [line for line in parts if line]
        assert rest[-1] == "data: [DONE]"
        assert started.wait(20) == 0
        assert started.stdout is not None and started.stdout.read() == ""
        assert started.stderr is not None and (
            f"\nnote: A snapshot is removed, and made again when it is declared again: {damaged[0]} is damaged.\n"
            in f"\n{started.stderr.read()}"
        )
        assert {file.name for file in held.iterdir()} == {f"{made['id']}.json", f"{made['id']}.safetensors"}


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running() -> None:
    with process("--model", "demo") as (started, url, _):
        started.send_signal(signal.SIGINT)
        assert started.wait(10) == 130
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines; give --api_key, or set COLDPRESS_API_KEY"),
        (["--api_key", ""], "The key must be ASCII"),
        (["--allow_files", "nowhere"], "--allow_files nowhere is no folder"),
        (["--disk_budget_bytes", "100"], "--disk_budget_bytes is of a folder; give --folder too."),
        (["--port", "70000"], "must be an integer of at most 65535"),
        (["--budget_bytes", "2 bananas"], "must be a number of bytes such as 2GiB or 500MB"),
        (["--press", "snapkw"], "Unknown press 'snapkw'"),
        (["--press", "decoding_knorm"], "decoding_knorm goes on while decoding and compresses nothing"),
        (["--press", "finch"], "finch chooses by the question at the end of a text"),
        (["--press", "no_press", "--budget_tokens", "5"], "no_press keeps every pair, and budget_tokens asks for less"),
        (["--compression_ratio", "0.5", "--budget_tokens", "5"], "both say how much is kept"),
        (["--host", "192.0.2.1", "--api_key", "a"], "cannot listen at 192.0.2.1:8000"),
    ],
)
def test_what_cannot_be_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLDPRESS_API_KEY", raising=False)
    try:
        code = main(["serve", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_port_that_is_taken(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "demo", "--port", server.url.rpartition(":")[2]]) == 2
    assert "Address already in use" in capsys.readouterr().err
