"""Plain perplexity is what a direct computation with transformers gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldpress.errors import SelfCheckError
from coldpress.eval import perplexity as module
from coldpress.eval.perplexity import plain_perplexity, token_losses


def direct(model: PreTrainedModel, ids: Tensor, length: int, stride: int) -> tuple[float, int]:
    """The strided loop of transformers' documentation, with the loss of each token by itself."""
    losses: list[float] = []
    previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        n_targets = end - previous_end
        window = ids[None, begin:end]
        labels = window.clone()
        labels[:, :-n_targets] = -100
        with torch.no_grad():
            logits = model(window).logits
        loss = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100
        )  # [end - begin - 1]
        losses += loss[labels[0, 1:] != -100].tolist()
        previous_end = end
        if end == len(ids):
            break
    return math.fsum(losses), len(losses)


@pytest.mark.parametrize(
    ("length", "stride"), [(128, 64), (128, 128), (128, 1), (64, 48), (500, 500), (2048, 512), (2, 1), (2, 2)]
)
def test_it_equals_a_direct_computation(
    model: PreTrainedModel, plain: PreTrainedModel, text: Tensor, length: int, stride: int
) -> None:
    ids = text[:150] if stride == 1 else text
    nll, scored = direct(plain, ids, length, stride)
    result = plain_perplexity(model, [ids], max_length=length, stride=stride)
    assert result["scored_tokens"] == scored
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["loss"] == pytest.approx(nll / scored, rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(nll / scored), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batches_change_nothing(model: PreTrainedModel, text: Tensor, batch_size: int) -> None:
    documents = [text[:300], text[:10], text[200:]]
    one = plain_perplexity(model, documents, max_length=64, stride=32)
    many = plain_perplexity(model, documents, max_length=64, stride=32, batch_size=batch_size)
    assert many["scored_tokens"] == one["scored_tokens"] == 299 + 9 + 299
    assert many["nll"] == pytest.approx(one["nll"], rel=1e-6)


def test_documents_do_not_mix(model: PreTrainedModel, text: Tensor) -> None:
    parts = [plain_perplexity(model, [ids], max_length=64, stride=32) for ids in (text[:90], text[90:300])]
    both = plain_perplexity(model, [text[:90], text[90:300]], max_length=64, stride=32)
    assert both["nll"] == pytest.approx(parts[0]["nll"] + parts[1]["nll"], rel=1e-6)
    assert both["scored_tokens"] == 89 + 209
    assert both["windows"] == parts[0]["windows"] + parts[1]["windows"]


def test_losses_are_taken_in_float32_and_in_blocks() -> None:
    logits = torch.randn(2, 300, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(11, (2, 300), generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.flatten(), expected)


def test_the_number_of_scored_tokens_is_checked(
    model: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "strided_scored_tokens", lambda *sizes: 498)
    with pytest.raises(SelfCheckError, match="499 tokens were scored, the windows' formula says 498"):
        plain_perplexity(model, [text], max_length=64, stride=32)


def test_losses_that_are_not_finite_are_an_error(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(SelfCheckError, match=r"not finite in torch\.float32"):
        plain_perplexity(model, [text], max_length=64, stride=32)
