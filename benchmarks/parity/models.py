"""The models and texts that both libraries run: tiny random ones of five architectures, and SmolLM2-135M from a file.

Nothing here imports coldpress or kvpress; the same seeds give both processes the same weights and tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

DEMO = Path(__file__).resolve().parents[2] / "src" / "coldpress" / "assets" / "demo"
N_SCORED, N_SCORED_LONG = 32, 64  # tokens whose loss is taken against the compressed cache
TINY = ("llama", "qwen2", "qwen3", "mistral", "phi3")
SMOLLM2 = "SmolLM2-135M"
SHORT = (*TINY, SMOLLM2)
LONG = ("SmolLM2-135M, 767 tokens", "SmolLM2-135M, 1536 tokens")  # an odd number, and one with room for any default
LONGEST = LONG[-1:]
MODELS = (*TINY, SMOLLM2, *LONG)

_CHAT = "A reader asks, and a scholar answers.\n\nReader: {{ messages[0].content }}\n\nScholar:"
_TINY_TOKENS = 160
_SMOLLM2_TOKENS = 320
_LONG_TOKENS = (767, 1536)
_TINY_CONFIG = {
    "vocab_size": 4096,  # that of the embedded tokenizer, which KVzip asks for
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Setting:
    """One model with its text.

    Attributes:
        name: how the tables call the model.
        model: float32, on the CPU, on sdpa.
        ids: int64 ``[2, n_context + more]``: two texts of equal length; one where the context is long.
        n_context: how many of the tokens are prefilled.
        n_scored: how many of those after them have their loss taken.
    """

    name: str
    model: PreTrainedModel
    ids: Tensor
    n_context: int
    n_scored: int = N_SCORED


@contextmanager
def as_chat(setting: Setting) -> Iterator[Setting]:
    """The setting with a chat template, and with a text that begins with what that puts there."""
    config = setting.model.config
    name, ids, tokenizer = config.name_or_path, setting.ids.clone(), AutoTokenizer.from_pretrained(config.name_or_path)
    before = tokenizer.encode(_CHAT.partition("{{")[0], add_special_tokens=False)
    ids[:, : len(before)] = torch.tensor(before)
    tokenizer.chat_template = _CHAT
    with TemporaryDirectory(prefix="parity-") as folder:
        tokenizer.save_pretrained(folder)
        config.name_or_path = folder
        try:
            yield replace(setting, ids=ids)
        finally:
            config.name_or_path = name


def settings(smollm2: Path | None) -> Iterator[Setting]:
    """The models, one after the other so that only one is held."""
    for name in TINY:
        # no token twice: two equal tokens have equal values in the first layer, and could not be told apart there
        order = torch.randperm(_TINY_CONFIG["vocab_size"] - 8, generator=torch.Generator().manual_seed(7)) + 8
        ids = order[: 2 * (_TINY_TOKENS + 96)].view(2, -1)
        yield Setting(name, _tiny(name), ids, _TINY_TOKENS)
    if smollm2 is not None:
        model = AutoModelForCausalLM.from_pretrained(
            smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
        text = (DEMO / "text" / "theophrastus.txt").read_text(encoding="utf-8")
        tokens = torch.tensor(tokenizer(text[:20_000])["input_ids"])
        ids = tokens[: 2 * (_SMOLLM2_TOKENS + 96)].view(2, -1)
        tokenizer.chat_template = None  # the text is no chat
        with TemporaryDirectory(prefix="parity-") as folder:
            tokenizer.save_pretrained(folder)
            model.config.name_or_path = model.name_or_path = folder
            yield Setting(SMOLLM2, _ready(model), ids, _SMOLLM2_TOKENS)
            for name, n_tokens in zip(LONG, _LONG_TOKENS, strict=True):
                yield Setting(name, model, tokens[None], n_tokens, N_SCORED_LONG)


def _tiny(name: str) -> PreTrainedModel:
    """A random model whose weights are larger than a trained model's, so that attention is uneven."""
    changes = {"sliding_window": None} if name in ("mistral", "phi3") else {}
    config = AutoConfig.for_model(name, **(_TINY_CONFIG | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.25)
            else:
                parameter.add_(noise * 0.1)
    model.config.name_or_path = model.name_or_path = str(DEMO / "model")  # where KVzip looks for a tokenizer
    return _ready(model)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)
