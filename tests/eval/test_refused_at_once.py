"""Options that cannot work together, or that would do nothing: refused before a model is loaded."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from tests.contract.architectures import tiny

from coldpress import ThinKPress
from coldpress.cli import main
from coldpress.commands import chatting, serving
from coldpress.errors import CacheError, ModelError
from coldpress.eval import evaluate, sweep, task_run
from coldpress.eval.jobs import make_jobs
from coldpress.eval.settings import Settings
from coldpress.eval.sweep_plan import SweepPlan
from coldpress.loading.datasets import Corpus
from coldpress.loading.models import load_model
from coldpress.models import compilable
from coldpress.serving.conversation import Conversation

DEMO = "--model demo --dataset demo"
NO_DECODING = "is for speed and memory, and neither is measured here"


class Loaded(Exception):
    """A model would be loaded now."""


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> NoReturn:
        raise Loaded

    for module in (chatting, serving, evaluate, task_run, sweep):
        monkeypatch.setattr(module, "load_model", load)


COMPILED = [
    ("ppl --kv_bits 4", "kv_bits=4 stores groups of tokens, .* give kv_bits k8v4 or k4v4, .* leave --compile out"),
    ("ppl --kv_bits k8v4 8 --press all", "kv_bits=8 stores groups"),
    ("speed --kv_bits 2", "kv_bits=2 stores groups"),
    ("ppl --press snapkv think --ppl_apply_press", r"fewer channels \(ThinK\) .* leave --compile out"),
    ("ppl --attn_implementation eager", "decodes with attention of its own; leave --attn_implementation eager out"),
]


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        *((f"{line} --compile", said) for line, said in COMPILED),
        ("ppl --ppl_only --max_new_tokens 8", f"--max_new_tokens {NO_DECODING}"),
        ("ppl --ppl_only --ppl_apply_press --context_limit 100", f"--context_limit {NO_DECODING}"),
        ("ppl --ppl_mode streaming --press knorm --budget_tokens 9 --warmup 2", f"--warmup {NO_DECODING}"),
        ("ppl --ppl_preset gptq --repetitions 2", f"--repetitions {NO_DECODING}"),
        ("ppl --compression_ratio 0.3", "--compression_ratio says how much a press keeps, and no_press keeps every"),
        ("ppl --press no_press --budget_tokens 30", "--budget_tokens says how much a press keeps"),
        ("tasks --press no_press --budget_bytes 9999", "--budget_bytes says how much a press keeps"),
        ("tasks --task repeat repeat_text --template chat", "--template means nothing to repeat and repeat_text"),
        ("tasks --task passkey --max_new_tokens 4", "--max_new_tokens means nothing to passkey"),
        ("tasks --task vt cwe --depths 0.5", "--depths means nothing to vt and cwe"),
        ("sweep --press snapkv --no_perplexity --max_windows 3", "--max_windows means nothing to speed"),
        ("sweep --press snapkv --no_speed --warmup 2", "--warmup means nothing to perplexity"),
        ("sweep --press no_press --budget_tokens 8", "--budget_tokens says how much a press keeps"),
    ],
)
def test_before_a_model_is_loaded(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, options = line.partition(" ")
    assert main([command, *shlex.split(f"{DEMO} {options}"), "--output_dir", str(tmp_path)]) == 2
    refused(said, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("chat --press think --kv_bits 4", "kv_bits needs keys in all their channels"),
        ("chat --press kvzip --chunk_tokens 64", "chunk_tokens needs a press that chooses again"),
        ("chat --top_p 0.5", "--top_p is for tokens that are drawn; add a --temperature above 0"),
        ("chat --seed 3", "--seed is for tokens that are drawn"),
        ("serve --press think --kv_bits 4 --port 0", "kv_bits needs keys in all their channels"),
        ("serve --press kvzip --chunk_tokens 64 --port 0", "chunk_tokens needs a press that chooses again"),
        ("chat --kv_bits mixed", "which is not given here: say k8v4"),
        ("serve --kv_bits mixed --port 0", "which is not given here: say k8v4"),
    ],
)
def test_before_a_conversation_begins(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette")
    assert main([*line.split(), "--model", "demo"]) == 2
    refused(said, capsys)


def refused(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and re.search(said, err), err


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    "line",
    [
        "ppl --kv_bits k8v4 --compile",
        "ppl --press all --compile",
        "ppl --compression_ratio 0 --max_new_tokens 8",
        "ppl --press snapkv no_press --compression_ratio 0.3",
        "tasks --task repeat vt --max_new_tokens 4 --depths 0.5",
        "sweep --press snapkv --max_windows 3 --warmup 2 --max_new_tokens 8",
        "sweep --press snapkv --no_perplexity --max_new_tokens 8",
    ],
)
def test_what_works_is_not_refused(line: str, tmp_path: Path) -> None:
    command, _, options = line.partition(" ")
    arguments = [command, *shlex.split(f"{DEMO} {options}"), "--output_dir", str(tmp_path)]
    with pytest.raises(Loaded):
        main(arguments)


def test_all_leaves_out_what_cannot_be_compiled() -> None:
    names = [{job.name for job in make_jobs(Settings(press=("all",), compile=on))} for on in (False, True)]
    assert names[0] - names[1] == {"think", "snap_think"} and names[1] < names[0]


def test_a_sweep_is_refused_when_it_is_planned() -> None:
    config = {"models": "demo", "texts": "demo", "press": ["knorm"], "speed": {"compile": True, "kv_bits": 4}}
    with pytest.raises(CacheError, match="kv_bits=4 stores groups"):
        SweepPlan.of(config)


def test_a_model_without_a_compiled_step_is_refused_before_its_text_is_read() -> None:
    loaded = replace(load_model("demo"), model=tiny("llama_dynamic"))
    settings, nothing = Settings(compile=True), cast("Corpus", None)
    with pytest.raises(ModelError, match="depend on the text"):
        evaluate.make_run(settings, make_jobs(settings), nothing, loaded, "")


def test_a_compiled_step_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def find() -> NoReturn:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler .* or leave --compile out"):
        make_jobs(Settings(compile=True))
    compilable.check_compiler(torch.device("cuda"))
    assert make_jobs(Settings())


def test_few_bits_on_a_device_have_no_compiled_step() -> None:
    (job,) = make_jobs(Settings(press=("knorm",), kv_bits=("k8v4",)))
    compilable.check_compilable(job.press, job.kv_bits, torch.device("cpu"))
    with pytest.raises(CacheError, match="on the CPU in RotatedBits"):
        compilable.check_compilable(job.press, job.kv_bits, torch.device("cuda"))


def test_a_conversation_changes_to_no_press_that_it_cannot_have() -> None:
    loaded = load_model("demo")
    conversation = Conversation(loaded.model, loaded.tokenizer, kv_bits=4)
    with pytest.raises(CacheError, match="keys in all their channels"):
        conversation.change_press(ThinKPress(0.5))
    assert conversation.press is None
