"""coldpress serve without the packages of coldpress[serve]."""

from __future__ import annotations

import sys

import pytest

from coldpress.cli import main


def test_it_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("coldpress.serving.app", "coldpress.serving.repl"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--model", "demo", "--port", "0"]) == 2
    said = 'coldpress serve needs a package that is not installed (fastapi): pip install "coldpress[serve]".'
    assert capsys.readouterr().err == f"error: {said}\n"
