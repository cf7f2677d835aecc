#!/usr/bin/env python3
"""Install the pinned torch into the environment that runs this script.

For Linux pip's default build of torch brings several gigabytes of CUDA libraries, useless without an NVIDIA
GPU. So:

    the pinned version is there                                      nothing to do
    an NVIDIA GPU is there, or pip would install no CUDA packages    pip installs torch
    otherwise                                                        uv installs the CPU build

``--build plain`` lets pip decide, ``--build cpu`` goes to the CPU build at once. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CUDA_PACKAGE = re.compile(r"(nvidia|cuda|triton|pytorch[-_]triton)\b", re.IGNORECASE)


class SetupError(Exception):
    """What stops the installation, in one line."""


def pinned(constraints: str) -> str:
    """The version of torch that the text of constraints.txt pins."""
    match = re.search(r"^torch==([^\s;#]+)", constraints, re.MULTILINE)
    if match is None:
        raise SetupError(f"{CONSTRAINTS.name} pins no torch")
    return match[1]


def installed() -> str | None:
    """The version of torch in this environment, without its local part (+cpu), or None."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_packages(report: dict) -> list[str]:
    """The CUDA packages among those that a ``pip install --report`` would install."""
    names = [item["metadata"]["name"] for item in report["install"]]
    return [name for name in names if CUDA_PACKAGE.match(name)]


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def call(command: list[str], what: str) -> str:
    """Run ``command`` and return its output; when it fails, raise ``what`` and its last line of complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise SetupError(f"{what}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def pip_plan(requirement: str) -> dict:
    """What pip would install, as its report says; downloads no packages."""
    command = [*PIP, "install", "-qq", "--dry-run", "--report", "-", "-c", str(CONSTRAINTS), requirement]
    return json.loads(call(command, f"pip finds no {requirement} for Python {sys.version.split()[0]}"))


def install_with_pip(requirement: str) -> None:
    command = [*PIP, "install", "-qq", "-c", str(CONSTRAINTS), requirement]
    call(command, f"pip could not install {requirement}")


def install_cpu_build(requirement: str) -> None:
    call([*PIP, "install", "-qq", "uv"], "pip could not install uv, which fetches the CPU build of torch")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    call(
        [*uv, "--torch-backend", "cpu", requirement],
        "the CPU build of torch could not be fetched; name a place that has it with PIP_FIND_LINKS or "
        "PIP_EXTRA_INDEX_URL, or accept the CUDA build with `make setup TORCH=plain`. uv says",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", choices=["auto", "plain", "cpu"], default="auto", help="default: auto")
    build = parser.parse_args(argv).build
    try:
        version = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
        if installed() == version:
            return 0
        requirement = f"torch=={version}"
        if build == "auto":
            cuda = cuda_packages(pip_plan(requirement))
            build = "cpu" if cuda and not has_nvidia_gpu() else "plain"
        print(f"setup: installing {requirement}{' (CPU build)' if build == 'cpu' else ''}", flush=True)
        (install_cpu_build if build == "cpu" else install_with_pip)(requirement)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
