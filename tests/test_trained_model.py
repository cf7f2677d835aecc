"""The embedded model, which is trained: what it computes, and how presses rank on its own text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from coldpress import PressedCache, make_press
from coldpress.architecture.cache_argument import cache_argument
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import LoadedModel, load_model

ROWS, CONTEXT, SCORED = 12, 320, 80
INFORMED = ("snapkv", "expected_attention", "tova")
RECORDED = [
    [-2.52007, -4.51742, -3.63513, -1.73018],
    [-5.00905, -3.33454, -0.00022, -2.71092],
    [-5.42861, -3.41080, -0.24249, -3.05126],
]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def text(demo: LoadedModel) -> Tensor:
    """Consecutive pieces of the embedded text, int64 ``[ROWS, CONTEXT + SCORED]``."""
    ids: list[int] = []
    for line in load_corpus("demo").documents[0].text.splitlines(keepends=True):
        ids += demo.tokenizer(line)["input_ids"]
        if len(ids) >= ROWS * (CONTEXT + SCORED):
            break
    return torch.tensor(ids[: ROWS * (CONTEXT + SCORED)]).view(ROWS, -1)


@torch.inference_mode()
def test_logits_are_those_that_were_recorded(demo: LoadedModel) -> None:
    """In float32, of a text in one piece and after half of it is gone; a change of these changes every figure."""
    ids = torch.arange(100, 148)[None]
    past = PressedCache(make_press("snapkv", 0.5, window_size=8))
    whole = demo.model(ids, use_cache=False).logits[0]
    demo.model(ids[:, :40], **cache_argument(past))
    pressed = demo.model(ids[:, 40:], **cache_argument(past)).logits[0]
    found = torch.stack([whole[20], whole[-1], pressed[-1]])[:, [3, 50, 500, 4000]]
    torch.testing.assert_close(found, torch.tensor(RECORDED), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def lost(demo: LoadedModel, text: Tensor) -> dict[str, float]:
    """What each press adds at ratio 0.5 to the mean loss of the tokens after the context, in nats."""
    names = ["no_press", "random", "streaming_llm", "knorm", *INFORMED]
    presses = [make_press(name, 0.5, **({"seed": 0} if name == "random" else {})) for name in names]
    full, losses, targets = PressedCache(), {}, text[:, CONTEXT + 1 :].flatten()
    caches = full.branches(presses)
    with torch.inference_mode():
        demo.model(text[:, :CONTEXT], **cache_argument(full), logits_to_keep=1)
        for name, past in zip(names, caches, strict=True):
            logits = demo.model(text[:, CONTEXT:-1], **cache_argument(past)).logits
            losses[name] = float(cross_entropy(logits.flatten(0, 1), targets))
    return {name: loss - losses["no_press"] for name, loss in losses.items()}


@pytest.mark.parametrize("name", INFORMED)
def test_what_is_looked_at_is_worth_more_than_chance(name: str, lost: dict[str, float]) -> None:
    """Measured: 0.010, 0.010 and 0.014 nats, against 0.081."""
    assert -0.01 < lost[name] < lost["random"] - 0.05


def test_the_newest_tokens_are_between_them_and_small_keys_are_worse(lost: dict[str, float]) -> None:
    """Measured: 0.025 for StreamingLLM; 0.143 for Knorm, whose small norms mean nothing to this model."""
    assert max(lost[name] for name in INFORMED) < lost["streaming_llm"] - 0.005
    assert lost["streaming_llm"] < lost["random"] - 0.04
    assert lost["random"] < lost["knorm"] - 0.04
