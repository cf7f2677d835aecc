"""docs/from-kvpress.md says what is so: its code runs, its names exist, what it calls refused is refused."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.snippets import for_installed
from transformers import DynamicCache

import coldpress
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.bases.press import BasePress
from coldpress.bases.registry import NO_PRESS, press_names
from coldpress.bases.scorer import ScorerPress
from coldpress.cli import main
from coldpress.core.counts import keep_count
from coldpress.errors import ColdpressError, PressError
from coldpress.presses.decoding import DecodingPress

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
    assert len(blocks) == 10
    found: dict[str, Any] = {}
    for block in blocks:
        exec(for_installed(block).replace("EleutherAI/pythia-70m", DEMO), found)
    return found


def test_the_code_runs(names: dict[str, Any]) -> None:
    assert isinstance(names["answer"], str) and len(names["answers"]) == 2
    n = names["inputs"].input_ids.shape[1]
    assert names["following"].logits.shape[1] == 1
    assert names["small"].budget_tokens == 128
    assert names["cache"].kv_bits == coldpress.KVBits(4)
    assert names["output"].shape[1] > n


def test_presses_of_the_page_keep_what_they_say(names: dict[str, Any]) -> None:
    ids, model = names["inputs"].input_ids, names["model"]
    with torch.no_grad():
        values = model(ids, **cache_argument(full := DynamicCache())) and full.layers[1].values
    by_norm, by_hidden, every_other = names["caches"]
    n_keep = keep_count(ids.shape[1], 0.5)
    expected = values.float().norm(dim=-1).topk(n_keep, dim=-1).indices.sort(-1).values
    assert torch.equal(by_norm.positions(1), expected)
    kept = by_hidden.positions(1)
    assert kept.shape[2] == n_keep and (kept == kept[:, :1]).all() and (kept.diff(dim=-1) != 1).any()
    assert (every_other.positions(1) == torch.arange(0, ids.shape[1], 2)).all()


def _kvpress_score(
    self: Any, module: Any, hidden_states: Any, keys: torch.Tensor, values: Any, attentions: Any, kwargs: Any
) -> torch.Tensor:
    return keys.norm(dim=-1)


def _kvpress_compress(
    self: Any,
    module: Any,
    hidden_states: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    attentions: Any,
    kwargs: Any,
) -> Any:
    return keys[:, :, ::2], values[:, :, ::2]


def _its_own(self: Any, *given: Any, **named: Any) -> Any:
    return self


ARGUMENTS = "takes (module, hidden_states, keys, values, attentions, kwargs); here it takes (view)"


@pytest.mark.parametrize(
    ("bases", "methods", "sentence"),
    [
        ((ScorerPress,), {"score": _kvpress_score}, f"Mine.score {ARGUMENTS}"),
        ((coldpress.SnapKVPress,), {"score": _kvpress_score}, f"Mine.score {ARGUMENTS}"),
        ((type("Mixin", (), {"score": _kvpress_score}), ScorerPress), {}, f"Mine.score {ARGUMENTS}"),
        ((BasePress,), {"compress": _kvpress_compress}, f"Mine.compress {ARGUMENTS}"),
        ((ScorerPress,), {"compress": _kvpress_compress}, f"Mine.compress {ARGUMENTS}"),
        ((BasePress,), {"forward_hook": _its_own}, "nothing here calls it; in its place there is compress(self, view)"),
        ((ScorerPress,), {"post_init_from_model": _its_own}, "in its place there is prepared(self, model,"),
        ((BasePress,), {"__call__": _its_own}, "is asked in prepared(self, model,"),
        ((ScorerPress,), {"__init__": _its_own}, "make its parameters fields under @dataclass(frozen=True)"),
    ],
)
def test_a_class_in_kvpress_s_form_is_refused_when_it_is_defined(
    bases: tuple[type, ...], methods: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PressError, match=re.escape(sentence)) as error:
        type(BasePress)("Mine", bases, methods)
    page = str(error.value).rpartition("docs/")[2].partition(" ")[0]
    assert (ROOT / "docs" / page).read_text(encoding="utf-8").count("## A press of your own") == 1


def test_a_plain_dataclass_is_refused() -> None:
    with pytest.raises(PressError, match=r"Mine: .* write @dataclass\(frozen=True\)"):

        @dataclass
        class Mine(ScorerPress):
            alpha: float = 1.0


def test_what_coldpress_has_its_own_way_for_may_be_defined() -> None:
    """Any number of arguments, other names, and what dataclass makes of a class with slots."""

    @dataclass(frozen=True, slots=True)
    class Mine(ScorerPress):
        alpha: float = 1.0

        def score(self, v: Any, *more: Any, scale: float = 2.0) -> Any:
            return scale * self.alpha * v

    assert Mine(0.5, alpha=3.0).score(1.0) == 6.0
    assert Mine(0.5).with_ratio(0.25) == Mine(0.25)

    class Counts(BasePress):  # no dataclass: nothing copies it
        def __init__(self, n: int):
            self.n = n

    assert Counts(3).n == 3


def test_assigning_to_a_press_says_how_to_get_another_one() -> None:
    for press in (
        coldpress.SnapKVPress(0.5),
        coldpress.AdaKVPress(coldpress.SnapKVPress(0.5)),
        coldpress.KVzipPress(0.5),
        type("Plain", (coldpress.KnormPress,), {})(0.5),
    ):
        with pytest.raises(PressError, match=r"write press = press\.with_ratio\(0\.25\)") as error:
            press.compression_ratio = 0.25
        assert isinstance(error.value, FrozenInstanceError)
        assert press.with_ratio(0.25).compression_ratio == 0.25
    with pytest.raises(PressError, match=r"press\.with_budget\(budget_tokens=9\)"):
        coldpress.KnormPress(0.5).budget_tokens = 9  # type: ignore[misc]
    think = coldpress.ThinKPress(0.5)
    with pytest.raises(PressError, match=r"dataclasses\.replace\(press, key_channel_compression_ratio=0\.25\)"):
        think.key_channel_compression_ratio = 0.25  # type: ignore[misc]
    with pytest.raises(PressError, match=r"DecodingPress has no parameter 'compression_ratio'.*takes base_press"):
        DecodingPress(coldpress.KnormPress()).compression_ratio = 0.25  # type: ignore[misc]


def test_what_kvpress_calls_on_a_press_is_named() -> None:
    press = coldpress.SnapKVPress(0.5)
    for name in ("post_init_from_model", "forward_hook"):
        assert not hasattr(press, name)
        with pytest.raises(AttributeError, match="nothing here calls it"):
            getattr(press, name)
    with pytest.raises(AttributeError, match="'SnapKVPress' object has no attribute 'ratio'"):
        press.ratio  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "use",
    [
        coldpress.PressedCache,
        coldpress.AdaKVPress,
        DecodingPress,
        lambda press: coldpress.ComposedPress([press]),
        lambda press: coldpress.PrefillDecodingPress(prefilling_press=press),
    ],
)
def test_a_press_of_kvpress_itself_is_called_that(use: Any) -> None:
    theirs = type("KnormPress", (), {"__module__": "kvpress.presses.knorm_press", "__repr__": lambda _: "KnormPress()"})
    mine = type("Mine", (theirs,), {"__module__": "__main__"})
    with pytest.raises(PressError, match=r"KnormPress\(\), a press of kvpress; import Mine from coldpress, or"):
        use(mine())
    with pytest.raises(PressError, match="got the class KnormPress; call it"):
        use(coldpress.KnormPress)


class Tuple(BasePress):
    def compress(self, view: coldpress.LayerView) -> Any:
        return view.keys[:, :, ::2], view.values[:, :, ::2]


@dataclass(frozen=True)
class OneHead(ScorerPress):
    def score(self, view: coldpress.LayerView) -> torch.Tensor:
        return view.keys.norm(dim=-1).mean(1)


@dataclass(frozen=True)
class Later(DecodingPress):
    def compress_again(self, view: coldpress.LayerView) -> Any:
        return view.keys, view.values


@pytest.mark.parametrize(
    ("press", "sentence"),
    [
        (Tuple(), "Tuple.compress returned a tuple, and has to return view.take(positions)"),
        (OneHead(0.5), "OneHead.score returned [1, 40], and has to return a number for each KV head and token"),
        (coldpress.AdaKVPress(OneHead(0.5)), "OneHead.score returned [1, 40]"),
        (Later(coldpress.KnormPress(), compression_interval=1, target_size=8), "Later.compress returned a tuple"),
    ],
)
def test_what_a_press_returns_is_looked_at(press: BasePress, sentence: str) -> None:
    model = tiny("llama")
    with pytest.raises(PressError, match=re.escape(sentence)), press(model):
        past = cache_of(model(tokens(1, 40), use_cache=True))
        model(tokens(1, 1), **cache_argument(past))


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


def test_the_notes_on_the_command_line_name_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    table = PAGE.split("## The evaluation's command line")[1].split("## Names")[0]
    for line in table.splitlines():
        if line.startswith("|"):
            assert set(re.findall(r"--\w+", line.split("|")[2])) <= known, line
