"""A tiny random GPT-NeoX for the tests of the measurements; its logits are uneven, so that a mistake shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

VOCABULARY = 61


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as ``save_pretrained`` writes it."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        rotary_pct=0.25,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-neox")
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    """On coldpress's backend; a fresh one for each test."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="coldpress").eval()


@pytest.fixture
def plain(folder: Path) -> PreTrainedModel:
    """The same weights on transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture
def text() -> Tensor:
    """Token ids, int64 ``[500]``, with repetitions."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (500,), generator=generator)
    ids[100:140] = ids[60:100]
    ids[300:350] = ids[200:250]
    return ids
