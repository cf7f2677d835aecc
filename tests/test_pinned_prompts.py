"""Pins in the pipeline, ``coldpress compress`` and ``coldpress tasks``: a system prompt stays under any press."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_folder import CONTEXT
from tests.tiny_folder import folder as folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldpress import KnormPress, PressedCache, RandomPress
from coldpress.cli import main
from coldpress.commands import asking
from coldpress.errors import CacheError, InputError, PressError
from coldpress.eval import task_run
from coldpress.eval.material import Material
from coldpress.eval.tasks import find_task, make_example
from coldpress.models.pipeline import KVPressTextGenerationPipeline, _in_prompt

SYSTEM = "You answer in one word."
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"
)


@pytest.fixture
def pipe(folder: Path) -> KVPressTextGenerationPipeline:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=4)


def first_tokens(cache: PressedCache, n: int) -> bool:
    """Whether every layer and head still has the first ``n`` tokens."""
    return all((layer.positions()[..., :n] == torch.arange(n)).all() for layer in cache.pressed_layers())


def test_spans_of_the_context(pipe: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache(KnormPress(0.5), pin=[(3, 9)])
    expected = pipe(CONTEXT, question="Who?", cache=cache)
    assert pipe(CONTEXT, question="Who?", press=KnormPress(0.5), pin=[(3, 9)]) == expected
    assert all((layer.positions()[..., None] == torch.arange(3, 9)).any(-2).all() for layer in cache.pressed_layers())


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["alone", "system"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("span", [(0, 3), (19, 26)])
def test_what_stands_before_the_context_is_not_counted(
    pipe: KVPressTextGenerationPipeline, span: tuple[int, int], template: str | None, system: str | None
) -> None:
    pipe.tokenizer.chat_template = template
    pipe.tokenizer.bos_token = "<|endoftext|>"
    caches: list[PressedCache] = []
    keep = KVPressTextGenerationPipeline._prefill
    pipe._prefill = lambda ids, cache: (keep(pipe, ids, cache), caches.append(cache))  # type: ignore[method-assign, assignment, func-returns-value]
    pipe(CONTEXT, question="Who?", press=RandomPress(0.6, seed=1), pin=[span], pin_system=system)
    (cache,) = caches
    own = pipe.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    assert cache.token_ids is not None
    ids = cache.token_ids[0].tolist()
    assert ids[len(ids) - len(own) :] == own and len(ids) > len(own)
    place = torch.arange(*span) + len(ids) - len(own)
    assert all((layer.positions()[..., None] == place).any(-2).all() for layer in cache.pressed_layers())
    assert cache.achieved_ratio() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "span, expected",
    [((0, 1), (2, 5)), ((1, 2), (2, 5)), ((2, 3), (5, 6)), ((1, 3), (2, 6)), ((4, 9), (7, 12))],
)
def test_tokens_that_are_others_after_what_stands_before_them(span: tuple[int, int], expected: tuple[int, int]) -> None:
    """The context's first two tokens are three others in the prompt."""
    own, prompt, ahead = [10, 11, 12, 13], [1, 2, 7, 8, 9, 12, 13], [1, 2, 3]
    assert _in_prompt(span, *map(torch.tensor, (own, prompt, ahead))) == expected


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
def test_a_system_prompt_stays(pipe: KVPressTextGenerationPipeline, template: str | None) -> None:
    pipe.tokenizer.chat_template = template
    cache = PressedCache(RandomPress(0.6, seed=1))
    pipe(CONTEXT, question="Who?", cache=cache, pin_system=SYSTEM)
    bos = pipe.tokenizer.bos_token or ""
    opening = f"{bos}{SYSTEM}\n\n" if template is None else f"<|system|>{SYSTEM}<|end|><|user|>"
    ids = pipe.tokenizer(opening, add_special_tokens=False)["input_ids"]
    assert cache.token_ids is not None and cache.token_ids[0, : len(ids)].tolist() == ids
    assert cache.session.pins == (((0, len(ids)),),)
    assert pipe.tokenizer.decode(cache.token_ids[0, len(ids) :]) == CONTEXT
    assert first_tokens(cache, len(ids)) and cache.achieved_ratio() == pytest.approx(0.6, abs=0.02)
    before = [layer.positions() for layer in cache.pressed_layers()]
    pipe(question="When?", cache=cache)  # a later question is asked of the same pairs
    assert all(torch.equal(a, b.positions()) for a, b in zip(before, cache.pressed_layers(), strict=True))


def test_a_system_prompt_beside_pins_of_the_cache(pipe: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache(KnormPress(0.5), pin=[(30, 34)])
    pipe(CONTEXT, cache=cache, pin_system=SYSTEM)
    ((last, first),) = cache.session.pins
    assert last == (30, 34) and first[0] == 0 and first_tokens(cache, first[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pin": [(4, 2)]}, CacheError, "pin must be spans of tokens"),
        ({"pin": [[(0, 2)], [(0, 3)]]}, InputError, "A context is one row"),
        ({"pin": [(0, 2)], "cache": PressedCache()}, CacheError, "give pin to the PressedCache"),
        ({"pin_system": " "}, InputError, "pin_system must be a text"),
        ({"pin_system": 5}, InputError, "pin_system must be a text"),
        ({"pin_system": SYSTEM, "cache": PressedCache(pin=[[(0, 2)], [(0, 3)]])}, CacheError, "pins for several rows"),
        ({"pin": [(0, 20)], "press": KnormPress(0.99)}, PressError, "must stay"),
        (
            {"pin_system": SYSTEM, "max_context_length": 2},
            InputError,
            "context: max_context_length is 2, and ",
        ),
    ],
)
def test_refusals(
    pipe: KVPressTextGenerationPipeline, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe(CONTEXT, question="Who?", **options)


def test_a_reset_cache_has_the_pins_that_it_was_made_with(pipe: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache(KnormPress(budget_tokens=20), pin=[(3, 5)])
    pipe(CONTEXT, cache=cache, pin_system=SYSTEM)
    assert cache.session.pins[0][0] == (3, 5) and len(cache.session.pins[0]) == 2
    cache.reset()
    assert cache.session.pins == (((3, 5),),)
    pipe(CONTEXT, cache=cache, pin_system="Be.")
    alone = PressedCache(KnormPress(budget_tokens=20), pin=[(3, 5)])
    pipe(CONTEXT, cache=alone, pin_system="Be.")
    assert [layer.positions().tolist() for layer in cache.pressed_layers()] == [
        layer.positions().tolist() for layer in alone.pressed_layers()
    ]


def test_a_context_that_is_there_gets_no_system_prompt(pipe: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache(KnormPress(0.5))
    pipe(CONTEXT, cache=cache)
    with pytest.raises(CacheError, match="stores a context already"):
        pipe(question="Who?", cache=cache, pin_system=SYSTEM)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the prompt: no system role"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "drops the system's turn"),
        ("{{ messages[-1]['content'] }}{{ messages[0]['content'] }}", "as it is|drops|elsewhere"),
    ],
)
def test_templates_without_a_system_turn(pipe: KVPressTextGenerationPipeline, template: str, message: str) -> None:
    pipe.tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        pipe(CONTEXT, pin_system=SYSTEM)


def test_compress(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(CONTEXT)
    given = ["--model", str(folder), "--device", "cpu", "--text_file", "text.txt", "--output", "a.safetensors"]
    options = ["--press", "knorm", "--pin_system", SYSTEM, "--chunk_tokens", "32", "--kv_bits", "8"]
    assert main(["compress", *given, *options]) == 0
    cache = PressedCache.load("a.safetensors", AutoModelForCausalLM.from_pretrained(folder))
    assert cache.kv_bits is not None and cache.kv_bits.bits == 8 and cache.chunk_tokens == 32
    (((start, stop),),) = cache.session.pins
    assert start == 0 and stop > 3 and first_tokens(cache, stop)
    capsys.readouterr()
    assert main(["ask", "a.safetensors", "Who?", "--device", "cpu", "--max_new_tokens", "3"]) == 0
    assert main(["compress", *given, "--pin_system", " "]) == 2
    assert "pin_system must be a text" in capsys.readouterr().err
    assert asking.compress.__doc__ is not None and "pin_system" in asking.compress.__doc__


def test_every_context_of_a_task_begins_with_the_system_prompt(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = find_task("niah_single")
    plain = make_example(task, Material(tokenizer), 120, 0.5, 0, 0)
    example = make_example(task, Material(tokenizer, system=SYSTEM), 120, 0.5, 0, 0)
    assert plain.n_pinned == 0 < example.n_pinned and len(example.context_ids) == 120
    assert tokenizer.decode(example.context_ids[: example.n_pinned], skip_special_tokens=True) == f"{SYSTEM}\n\n"
    assert example.fingerprint != plain.fingerprint


def test_tasks_pin_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, bool]] = []
    sizes = task_run.sizes_of

    def looked_at(cache: PressedCache, with_hash: bool) -> dict[str, Any]:
        ((span,),) = cache.session.pins
        seen.append((cache.press, first_tokens(cache, span[1])))
        return sizes(cache, with_hash)

    monkeypatch.setattr(task_run, "sizes_of", looked_at)
    few = ["--task", "niah_single", "--task_tokens", "96", "--task_examples", "2", "--press", "random"]
    given = ["tasks", "--model", "demo", "--device", "cpu", "--output_dir", str(tmp_path), *few]
    for more in ([], ["--chunk_tokens", "64"]):
        assert main([*given, "--pin_system", SYSTEM, "--compression_ratio", "0.5", *more]) == 0
    assert {type(press).__name__ for press, _ in seen} == {"NoneType", "RandomPress"} and all(ok for _, ok in seen)
    (record, *_) = [path.read_text() for path in sorted(tmp_path.glob("*.json"))]
    assert SYSTEM in record and "-pinned" in record
