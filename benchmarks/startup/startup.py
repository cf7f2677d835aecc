"""What commands that compute nothing cost, and an import of the package: CPU seconds of a process, before and after.

    python -m benchmarks.startup.startup --before OTHER/src --output FILE.json

Both source trees run under the interpreter that runs this file, in turns. A sample is user and system time of one whole
process, as the operating system counts it; what counts is the smallest, since other work on a machine only adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[2] / "src"
COMMANDS = ["ppl", "speed", "sweep", "tasks", "calibrate", "compress", "ask", "inspect", "report", "presses"]
CASES = {
    "coldpress": ["-m", "coldpress_command"],
    "coldpress --version": ["-m", "coldpress_command", "--version"],
    "coldpress --help": ["-m", "coldpress_command", "--help"],
    **{f"coldpress {name} --help": ["-m", "coldpress_command", name, "--help"] for name in COMMANDS},
    "import coldpress": ["-c", "import coldpress"],
    "from coldpress import SnapKVPress": ["-c", "from coldpress import SnapKVPress"],
    "import coldpress; from transformers import pipeline": [
        "-c",
        "import coldpress; from transformers import pipeline",
    ],
    "import torch, transformers.modeling_utils": ["-c", "import torch, transformers.modeling_utils"],
}


def cpu_s(arguments: list[str], src: Path) -> tuple[float, int]:
    """CPU seconds and exit code of one process."""
    env = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return round(usage.ru_utime + usage.ru_stime, 3), process.returncode


def measure(trees: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    samples = []
    for i in range(rounds + 1):  # the first one writes byte code
        for case, arguments in CASES.items():
            for tree, src in trees.items():
                seconds, code = cpu_s(arguments, src)
                if i:
                    samples.append({"case": case, "tree": tree, "cpu_s": seconds, "exit_code": code})
        print(f"round {i}/{rounds}", file=sys.stderr, flush=True)
    return samples


def _least(record: dict[str, Any], case: str, tree: str) -> float | None:
    found = [s["cpu_s"] for s in record["samples"] if (s["case"], s["tree"]) == (case, tree)]
    return min(found, default=None)


def table(record: dict[str, Any]) -> str:
    """Markdown: a line for each case."""
    lines = ["| | before, CPU s | after, CPU s | before / after |", "|---|---:|---:|---:|"]
    for case in dict.fromkeys(s["case"] for s in record["samples"]):
        before, after = _least(record, case, "before"), _least(record, case, "after")
        ratio = "" if before is None or after is None else f"{before / after:.1f}"
        cells = ["" if s is None else f"{s:.2f}" for s in (before, after)]
        lines.append(f"| `{case}` | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="src folder of another version; measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    trees = {"before": args.before, "after": SRC} if args.before else {"after": SRC}
    record = {
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "platform": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "samples": measure(trees, args.rounds),
    }
    print(table(record))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
