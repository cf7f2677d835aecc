"""The guide's commands and programs run as they stand there, against a server of the embedded model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving.running import Running, running
from tests.snippets import for_installed
from tests.tiny_folder import DEMO

from coldpress import SnapKVPress
from coldpress.cli import _parser
from coldpress.commands.serve_options import byte_count
from coldpress.loading.models import load_model

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "serve.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.M | re.S)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(load_model("demo", device="cpu"), SnapKVPress(0.5), name="demo") as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Running, tmp_path: Path) -> None:
    start, declare, *rest, chat = blocks("bash")
    assert chat.startswith("coldpress chat --model demo")
    assert "coldpress serve --model demo" in start
    script = "set -eu\n" + "\necho\necho =====\n".join([declare, *rest])
    script = script.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    made, answer, stream, snapshots = done.stdout.split("\n=====\n")
    id_, n_tokens = json.loads(made)["id"], json.loads(made)["tokens"]
    usage = json.loads(answer)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == n_tokens > 20
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] <= 5
    listed, shown, gone = re.findall(r"\{.*?\}(?=\{|\s*$)", snapshots.replace("}{", "}\n{"), re.M)
    assert json.loads(listed)["data"][0] == json.loads(shown) and json.loads(shown)["id"] == id_
    assert json.loads(gone) == {"id": id_, "object": "snapshot", "deleted": True}


def test_the_openai_client(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    program = blocks("python")[0].replace("http://127.0.0.1:8000", server.url)
    names: dict[str, Any] = {}
    exec(compile(program, "serve.md", "exec"), names)
    names["client"].close()
    out = capsys.readouterr().out
    found = re.search(r"^(\d+) of (\d+) tokens were there$", out, re.M)
    assert found is not None and 0 < int(found[2]) - int(found[1]) < 20
    assert len(out[found.end() :].strip()) > 10
    listed = server.client.get("/v1/snapshots").json()["data"]
    assert "KnormPress(compression_ratio=0.75)" in [one["press"] for one in listed]


def test_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(for_installed(blocks("python")[1]), "serve.md", "exec"), {"MODEL": str(DEMO)})
    assert "'hits': 1, 'misses': 0" in capsys.readouterr().out


def test_the_commands_of_the_guide_are_understood() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("coldpress ")]
    assert len(commands) == 2
    for command in commands:
        _parser(None).parse_args(shlex.split(command)[1:])  # exits if it does not understand


def test_numbers_of_bytes() -> None:
    assert [byte_count(text) for text in ("2GiB", "500 MB", "1.5kib", "7")] == [2 << 30, 500_000_000, 1536, 7]
