"""Which transformers is tested is said in one place, and of a newer one, once, what to do."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import transformers

from coldpress import KnormPress, PressedCache
from coldpress.architecture.versions import TESTED, check_versions, untested
from coldpress.errors import UntestedVersionWarning
from coldpress.loading.models import load_model

ROOT = Path(__file__).parents[1]


def parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> str:
    """As under a transformers that was published later, in a process that has said nothing yet."""
    major, minor = parts(TESTED[-1])
    version = f"{major}.{minor + 1}.0"
    monkeypatch.setattr(transformers, "__version__", version)
    check_versions.cache_clear()
    yield version
    check_versions.cache_clear()


def test_tested_versions_are_said_in_the_same_way_everywhere() -> None:
    assert list(TESTED) == sorted(TESTED, key=parts)
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = re.findall(r"^transformers==([\d.]+)", constraints, re.MULTILINE)
    assert max(parts(version) for version in pinned) == parts(TESTED[-1])
    said = dict(
        re.findall(r'^    "(\w+)[><=].+", # tested: (.+)$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    )
    torch = re.search(r"^torch==([\d.]+)$", constraints, re.MULTILINE)
    old = re.search(r"^OLD := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert old is not None and tuple(old[1].split()) == TESTED[:-1]
    assert torch is not None and said == {"torch": "{}.{}".format(*parts(torch[1])), "transformers": ", ".join(TESTED)}


@pytest.mark.parametrize(
    ("version", "is_newer"),
    [
        (f"{TESTED[0]}.0", False),
        (f"{TESTED[-1]}.0", False),
        (f"{TESTED[-1]}.9", False),
        ("6.0.0.dev0", True),
        ("?", False),
    ],
)
def test_only_newer_versions_are_spoken_of(version: str, is_newer: bool) -> None:
    assert (untested(version) is not None) == is_newer


def test_nothing_is_said_of_this_version() -> None:
    check_versions.cache_clear()
    PressedCache(KnormPress(0.5))  # warnings are errors


def test_a_newer_version_is_spoken_of_once(newer: str) -> None:
    with pytest.warns(UntestedVersionWarning) as said:
        PressedCache(KnormPress(0.5))
        PressedCache()
    (message,) = [str(warning.message) for warning in said]
    assert message.startswith(f"transformers {newer} is newer than {TESTED[-1]}, ") and "\n" not in message
    assert message.endswith(f"pip install 'transformers<{newer.removesuffix('.0')}'.")


def test_it_can_be_silenced(newer: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UntestedVersionWarning)
        PressedCache(KnormPress(0.5))


def test_commands_say_it_in_one_line(newer: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        load_model("demo", device="cpu")
    PressedCache()
    lines = [line for line in capsys.readouterr().err.splitlines() if "transformers" in line]
    assert lines == [f"note: {untested(newer)}"]
