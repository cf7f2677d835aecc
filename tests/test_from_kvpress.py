"""docs/from-kvpress.md says what is so: its code runs, its names exist, what it calls refused is refused."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ColdpressError
from coldpress.presses.base import BasePress
from coldpress.presses.registry import NO_PRESS, press_names

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "from-kvpress.md").read_text(encoding="utf-8")
DEMO = str(ROOT / "src" / "coldpress" / "assets" / "demo" / "model")
SIGNATURES = json.loads((ROOT / "tests" / "kvpress_signatures.json").read_text(encoding="utf-8"))


def rows(mark: str) -> list[list[str]]:
    """The cells of the table after a comment that begins so, without its head."""
    table = PAGE.split(f"<!-- tested: {mark}")[1].split("\n\n")[0].splitlines()[3:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks of code leave behind, each going on from the one before."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 7
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("EleutherAI/pythia-70m", DEMO).replace(', device_map="auto"', ""), found)
    return found


def test_the_code_runs(names: dict[str, Any]) -> None:
    assert isinstance(names["answer"], str) and len(names["answers"]) == 2
    n = names["inputs"].input_ids.shape[1]
    assert names["following"].logits.shape[1] == 1
    assert names["small"].budget_tokens == 128
    assert names["cache"].kv_bits == coldpress.KVBits(4)
    assert names["output"].shape[1] > n


def test_what_is_refused_is_refused(names: dict[str, Any]) -> None:
    cells = rows("each cell of the first column raises")
    assert len(cells) == 9
    for code, why in cells:
        assert why
        with pytest.raises(ColdpressError):
            eval(code.strip("`"), names)


def test_names_and_presses_exist(names: dict[str, Any]) -> None:
    seen = set()
    for theirs, ours, _ in rows("names and presses exist"):
        called = re.findall(r"`([^`]+)`", theirs)
        assert called
        if ours == "the same":
            assert set(called) <= set(press_names()), theirs
        else:
            for own in re.findall(r"`([^`]+)`", ours):
                made = own in press_names() or eval(own, {**vars(coldpress.public), **names})
                assert made is True or isinstance(made, BasePress)
        assert not seen & set(called)
        seen |= set(called)
    for code in re.findall(r"`(\w+Press\([^`]*\))`", PAGE):
        if code.strip("`") not in {cell[0].strip("`") for cell in rows("each cell")}:
            assert isinstance(eval(code, {**vars(coldpress.public), **names}), BasePress), code
    assert NO_PRESS not in seen


def test_every_class_parameter_and_default_of_kvpress_is_valid() -> None:
    """tests/kvpress_signatures.json: ``inspect.signature`` of each press in kvpress 0.5.5; null: no default."""
    assert len(SIGNATURES) == 46
    for name, parameters in SIGNATURES.items():
        own = inspect.signature(getattr(coldpress, name)).parameters
        for parameter, default in parameters.items():
            assert parameter in own, f"{name} has no {parameter}"
            is_needed = default == "None" and parameter == "press"  # kvpress has a default there that it cannot use
            if default == "<factory>":
                assert own[parameter].default is not inspect.Parameter.empty
            elif default is not None and not is_needed:
                assert eval(default, vars(coldpress.public)) == own[parameter].default, f"{name}: {parameter}"


def test_the_notes_on_the_command_line_name_options_that_exist() -> None:
    from coldpress.cli import _parser

    commands = next(action for action in _parser(None)._actions if isinstance(action.choices, dict))
    known = {option for action in commands.choices["ppl"]._actions for option in action.option_strings}
    table = PAGE.split("## The evaluation's command line")[1].split("## Names")[0]
    for line in table.splitlines():
        if line.startswith("|") and "lm_eval" not in line:
            assert set(re.findall(r"--\w+", line.split("|")[2])) <= known, line
