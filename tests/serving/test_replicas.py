"""Several replicas behind one address: a request goes where its snapshot is, and a lost replica costs one retry."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serving.running import httpx, openai
from tests.tiny_folder import CONTEXT, QUESTIONS

from coldpress.cli import main

pytest.importorskip("ray.serve")
ASKED: dict[str, Any] = {"prompt": f" {QUESTIONS[0]}", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "coldpress.cli", "serve", "--model", "demo", "--device", "cpu", "--port", "0"]
    command += ["--engine", "ray", "--replicas", "2", "--folder", str(folder)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    errors = (folder.parent / "errors").open("w+")
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    try:
        assert started.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", started.stdout.readline())
        errors.seek(0)
        assert found is not None, errors.read()
        yield found[0], started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        try:
            started.wait(60)
        finally:
            started.kill()
            started.communicate()
            errors.close()


def replicas_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the replicas and the snapshots' hits of each, by what they say of themselves."""
    import psutil

    pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True) if _is_replica(child)]
    return dict.fromkeys(pids, 0)


def _is_replica(process: Any) -> bool:
    import psutil

    try:
        return "ServeReplica" in " ".join(process.cmdline()) or "ServeReplica" in process.name()
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_lost_replica_costs_one_retry(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = server
    with httpx.Client(base_url=url, timeout=120) as client:
        made = [
            client.post("/v1/snapshots", json={"text": f"{n} {CONTEXT}"}).json() for n in ("One.", "Two.", "Three.")
        ]
        keys = [one["id"] for one in made]

        def ask(key: str) -> Any:
            return client.post("/v1/completions", json=ASKED | {"snapshot": key})

        first = [ask(key).json() for key in keys]
        assert all("usage" in answer for answer in first), first
        assert all(
            answer["usage"]["prompt_tokens_details"]["cached_tokens"] == one["tokens"]
            for answer, one in zip(first, made, strict=True)
        )
        # a snapshot stays where it is: one replica answers for it, which reads it once at most
        for key in keys:
            for _ in range(4):
                assert ask(key).json()["choices"] == first[keys.index(key)]["choices"]
            assert client.get(f"/v1/snapshots/{key}").json()["uses"] >= 4
        named = {"prompt": f"One. {CONTEXT} {QUESTIONS[0]}", "max_tokens": 3}
        assert (
            client.post("/v1/completions", json=named).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        )
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as own:
            stream = own.completions.create(model="demo", stream=True, extra_body={"snapshot": keys[0]}, **ASKED)
            assert "".join(part.choices[0].text for part in stream) == first[0]["choices"][0]["text"]
            before = replicas_of(process)
            assert len(before) == 2
            os.kill(next(iter(before)), signal.SIGKILL)
            for i in range(6):  # with one retry of the client at most
                key = keys[i % 3]
                answer = own.completions.create(model="demo", extra_body={"snapshot": key}, **ASKED)
                assert answer.choices[0].text == first[keys.index(key)]["choices"][0]["text"]
        ends = time.monotonic() + 90
        while len(now := replicas_of(process)) < 2 or set(now) == set(before):
            assert time.monotonic() < ends
            time.sleep(0.5)
        assert client.delete(f"/v1/snapshots/{keys[2]}").json()["deleted"]
        assert ask(keys[2]).status_code == 404
        assert (
            client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code
            == 400
        )


def test_what_ray_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "demo", "--engine", "ray", "--port", "0"]) == 2
    assert "--engine ray needs a --folder that all replicas share" in capsys.readouterr().err
    assert main(["serve", "--model", "demo", "--replicas", "3", "--port", "0"]) == 2
    assert "--replicas and --ray_address are of --engine ray" in capsys.readouterr().err
