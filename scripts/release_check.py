"""Check of a release: what the sdist and the wheel hold, and that the README's eight lines run from the wheel.

    python scripts/release_check.py DIST PYTHON

DIST holds one sdist and one wheel; PYTHON is of a fresh environment in which the wheel is installed. There need not be
a model hub: the eight lines are run on the embedded model in the place of the one that they name. ``make
release-check`` does all of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LEFT_OUT = (".ci/",)  # of the sdist
RUN = """
import re, sys
from importlib.resources import files
from coldpress.architecture.cache_argument import argument_name
code = sys.stdin.read().replace("EleutherAI/pythia-70m", str(files("coldpress") / "assets" / "demo" / "model"))
exec(code.replace("cache=cache", f"{argument_name()}=cache"))
"""


def problems(sdist: Path, wheel: Path) -> list[str]:
    """What the two files lack."""
    found = []
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    missing = [name for name in tracked if name and name not in held and not name.startswith(LEFT_OUT)]
    if missing:
        found.append(f"{sdist.name} lacks {len(missing)} files, such as {', '.join(missing[:5])}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        )
    package = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "coldpress").rglob("*") if path.is_file()
    }
    missing = [name for name in sorted(package - {*names}) if "__pycache__" not in name]
    if missing or "coldpress/py.typed" not in names:
        found.append(f"{wheel.name} lacks {', '.join(missing[:5]) or 'py.typed'}")
    classifiers = metadata.get_all("Classifier", [])
    found += [
        f"no classifier names Python {version}"
        for version in PYTHONS
        if f"Programming Language :: Python :: {version}" not in classifiers
    ]
    found += [
        f"{what} is not in {wheel.name}" for what in ("LICENSE", "NOTICE") if not any(n.endswith(what) for n in names)
    ]
    if not metadata.get_all("Project-URL"):
        print("note: [project.urls] of pyproject.toml is empty: name the repository there before an upload")
    return found


def main() -> int:
    dist, python = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    found = problems(sdist, wheel)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    with tempfile.TemporaryDirectory() as elsewhere:  # so that nothing of the checkout is imported
        print("the README's eight lines, on the embedded model in the place of EleutherAI/pythia-70m:", flush=True)
        for arguments in (
            ["-c", RUN],
            ["-m", "coldpress.cli", "--version"],
            ["-m", "coldpress.cli", "presses", "snapkv"],
        ):
            done = subprocess.run([python, "-I", *arguments], cwd=elsewhere, input=code, text=True, capture_output=True)
            if done.returncode:
                found.append(f"{' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
            elif arguments[0] == "-c":
                print(f"    {' '.join(done.stdout.split())[-100:]}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{'not ready' if found else 'ready'}: {sdist.name}, {wheel.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
