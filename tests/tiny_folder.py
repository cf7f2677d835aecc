"""A tiny model with a tokenizer in a folder, and a text to ask it about."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import coldpress

DEMO = Path(coldpress.__file__).parent / "assets" / "demo" / "model"
CONTEXT = "The miller weighed the olives, washed them, and laid them between mats of woven grass. " * 4
QUESTIONS = ["What did the miller weigh?", "Where?", "Who came in the autumn with wooden carts?"]
POSITIONS = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-NeoX with the demo's tokenizer, whose answers depend on all they see."""
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=POSITIONS, rotary_pct=0.25, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    GPTNeoXForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return path
