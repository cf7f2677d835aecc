"""Plain perplexity is what a direct computation with transformers gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldpress.errors import SelfCheckError
from coldpress.eval import evaluate as module
from coldpress.eval.evaluate import plain_perplexity
from coldpress.eval.losses import token_losses
from coldpress.records.metrics import paired_difference


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


def test_error_bars_take_windows_for_independent(model: PreTrainedModel, text: Tensor) -> None:
    result = plain_perplexity(model, [text], max_length=64, stride=64)
    counts, sums, squares = [], [], 0.0
    for begin in range(0, 500, 64):
        with torch.no_grad():
            logits = model(text[None, begin : begin + 64], use_cache=False).logits[0, :-1].double()
        losses = -logits.log_softmax(-1)[range(len(logits)), text[begin + 1 : begin + 64]]
        counts.append(len(losses))
        sums.append(float(losses.sum()))
        squares += float((losses**2).sum())
    mean, _, ci = paired_difference(counts, sums)
    assert ci is not None
    assert result["ppl_ci95"] == pytest.approx([math.exp(ci[0]), math.exp(ci[1])], rel=1e-4)
    n = sum(counts)
    assert result["ppl_se"] == pytest.approx(math.exp(mean) * math.sqrt((squares / n - mean**2) / (n - 1)), rel=1e-3)
    low, high = result["ppl_bootstrap_ci95"]
    assert result["ppl_ci95"][0] < low < result["ppl"] < high < result["ppl_ci95"][1]
    assert "ppl_bootstrap_ci95" not in plain_perplexity(model, [text], max_length=16, stride=16)  # 32 windows
    assert plain_perplexity(model, [text], max_length=500, stride=500)["ppl_ci95"] is None


def test_bits_per_byte_are_of_the_scored_tokens(model: PreTrainedModel, text: Tensor) -> None:
    documents, sizes = [text[:100], text[100:150]], [torch.arange(100), torch.arange(50) % 3]
    result = plain_perplexity(model, documents, max_length=40, stride=40, token_bytes=sizes)
    n_bytes = sum(range(100)) - 0 - 40 - 80 + int(sizes[1].sum()) - 0 - 40 % 3
    assert result["scored_bytes"] == n_bytes
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2) / n_bytes)
    for unknown in ((), (sizes[0], None)):
        result = plain_perplexity(model, documents, max_length=40, stride=40, token_bytes=unknown)
        assert result["scored_bytes"] is result["bits_per_byte"] is None


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
    monkeypatch.setattr(module, "STRIDED", module.STRIDED._replace(scored=lambda *sizes: 498))
    with pytest.raises(SelfCheckError, match="499 tokens were scored, the windows' formula says 498"):
        plain_perplexity(model, [text], max_length=64, stride=32)


def test_losses_that_are_not_finite_are_an_error(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(SelfCheckError, match=r"not finite in torch\.float32"):
        plain_perplexity(model, [text], max_length=64, stride=32)
