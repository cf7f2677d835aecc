"""Tiny random models of every architecture that coldpress is tested on.

Weights are drawn larger than a trained model's, so that attention is uneven and a wrong mask, position or scale shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coldpress import BasePress, Kept, LayerView

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
GENERATES_IN_PIECES = VERSION != (5, 2)  # which gives all pieces but the first wrong positions, with any cache
N_VOCAB = 97
WINDOW = 24  # of the sliding layers: smaller than the contexts of the tests

_BASE = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_HYBRID = _GROUPED | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
_GPT2 = {
    "vocab_size": N_VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Rotary scaling in the words of the installed transformers."""
    name = "rope_parameters" if VERSION >= (5, 0) else "rope_scaling"
    theta = {"rope_theta": 10_000.0} if VERSION >= (5, 0) else {}
    return {name: {"rope_type": rope_type, **parameters, **theta}}


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build it, and what a test has to know about it.

    Attributes:
        name: how tests call it.
        model_type: what transformers calls it.
        config: its configuration.
        since: first version of transformers with which it runs on coldpress; ``why`` says what is in the way before.
        own: the backend that computes what the model means; not every one honours soft caps and attention sinks.
    """

    name: str
    model_type: str
    config: dict[str, Any] = field(hash=False)
    since: tuple[int, int] = (4, 56)
    why: str = ""
    own: str = "sdpa"

    def __str__(self) -> str:
        return self.name

    def build(
        self, attention: str = "coldpress", dtype: torch.dtype = torch.float32, **changes: Any
    ) -> PreTrainedModel:
        """A new model; the same weights every time."""
        config = AutoConfig.for_model(self.model_type, **(self.config | changes))
        with torch.random.fork_rng(devices=[]):  # some weights are drawn while the model is made
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.25)
            else:
                parameter.add_(noise * 0.1)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        model.generation_config.pad_token_id = 0
        for parameter in model.parameters():  # as from_pretrained(dtype=...) does: frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        return model.eval()


_OLD_ATTENTION = "has not moved to the attention interface"
_OLD_MASK = "makes a 4-D mask of its own"
_ALL = [
    Architecture("gpt_neox", "gpt_neox", _BASE | {"hidden_size": 64, "rotary_pct": 0.25}),
    Architecture("gpt_neox_full_rotary", "gpt_neox", _BASE | {"rotary_pct": 1.0, "use_parallel_residual": False}),
    Architecture("llama", "llama", _GROUPED),
    Architecture("mistral", "mistral", _GROUPED | {"sliding_window": WINDOW}),
    Architecture("mixtral", "mixtral", _GROUPED | {"num_local_experts": 3, "sliding_window": None}),
    Architecture("qwen2", "qwen2", _GROUPED),
    Architecture("qwen3", "qwen3", _GROUPED | {"head_dim": 16}),
    Architecture(
        "qwen3_moe",
        "qwen3_moe",
        _GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    Architecture("gemma", "gemma", _BASE | {"head_dim": 16, "num_key_value_heads": 1}),
    Architecture(
        "gemma2",
        "gemma2",
        _HYBRID | {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
        own="eager",
    ),
    Architecture("gemma3", "gemma3_text", _HYBRID | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    Architecture("phi", "phi", _GROUPED | {"hidden_size": 64, "partial_rotary_factor": 0.5}),
    Architecture("phi3", "phi3", _GROUPED),
    Architecture("glm", "glm", _GROUPED | {"head_dim": 16}),
    Architecture("gpt2", "gpt2", _GPT2),
    Architecture("opt", "opt", _BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, (5, 0), _OLD_MASK),
    Architecture("stablelm", "stablelm", _GROUPED | {"hidden_size": 64}, (5, 0), _OLD_ATTENTION),
    Architecture("olmo", "olmo", _GROUPED),
    Architecture("olmo2", "olmo2", _GROUPED),
    Architecture("granite", "granite", _GROUPED | {"attention_multiplier": 0.3}),
    Architecture("cohere", "cohere", _GROUPED | {"logit_scale": 1.0}),
    Architecture("cohere2", "cohere2", _HYBRID | {"logit_scale": 1.0}),
    Architecture("starcoder2", "starcoder2", _GROUPED),
    Architecture("gpt_bigcode", "gpt_bigcode", _GPT2),
    Architecture("gptj", "gptj", _GPT2 | {"rotary_dim": 4}, (5, 24), _OLD_ATTENTION),
    Architecture("codegen", "codegen", _GPT2 | {"rotary_dim": 4}, (5, 24), _OLD_ATTENTION),
    Architecture("apertus1p5", "apertus1p5_text", _GROUPED, (5, 24), "does not exist"),
    Architecture("persimmon", "persimmon", _BASE | {"hidden_size": 64}, (5, 0), _OLD_MASK),
    Architecture("exaone4", "exaone4", _HYBRID | {"sliding_window_pattern": 2}),
    Architecture(
        "lfm2",
        "lfm2",
        _GROUPED | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        (5, 23),  # or some version after 5.2
        "has a cache class of its own",
    ),
    Architecture(
        "qwen3_next",
        "qwen3_next",
        _GROUPED
        | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
        (5, 23),  # or some version after 5.2
        "has a cache class of its own",
    ),
    Architecture("ernie4_5", "ernie4_5", _GROUPED),
    Architecture("smollm3", "smollm3", _GROUPED | {"no_rope_layers": [1, 0]}),
    Architecture(
        "gpt_oss",
        "gpt_oss",
        _HYBRID | {"head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "rope_scaling": None},
        own="eager",
    ),
]
# Variants of the rotary embedding; with "dynamic" a model's answers depend on its longest input so far.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
_LONGROPE = (
    _scaled("longrope", original_max_position_embeddings=16, **_LONG)
    if VERSION >= (5, 0)
    else {"rope_scaling": {"type": "longrope", **_LONG}}
)
_ROTARY = [
    Architecture("llama_linear", "llama", _GROUPED | _scaled("linear", factor=4.0)),
    Architecture("llama_llama3", "llama", _GROUPED | _scaled("llama3", factor=8.0, **_LLAMA_3)),
    Architecture("llama_yarn", "llama", _GROUPED | _scaled("yarn", factor=4.0, original_max_position_embeddings=128)),
    Architecture("llama_dynamic", "llama", _GROUPED | {"max_position_embeddings": 32} | _scaled("dynamic", factor=4.0)),
    Architecture("phi3_longrope", "phi3", _GROUPED | {"original_max_position_embeddings": 16} | _LONGROPE),
]
ARCHITECTURES = [a for a in _ALL if a.since <= VERSION]
ROTARY_VARIANTS = [a for a in _ROTARY if a.since <= VERSION]
BY_NAME = {a.name: a for a in ARCHITECTURES + ROTARY_VARIANTS}


@cache
def _built(name: str, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    return BY_NAME[name].build(attention, dtype)


def tiny(name: str, attention: str = "coldpress", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model called ``name``, built once; tests that change a model take ``BY_NAME[name].build()``."""
    return _built(name, attention, dtype)


class Look(BasePress):
    """A press that keeps everything, and remembers what it was shown."""

    def __init__(self) -> None:
        self.views: list[LayerView] = []

    def compress(self, view: LayerView) -> Kept | None:
        self.views.append(view)
        return None


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def distinct_tokens(rows: int, n: int, seed: int = 0) -> Tensor:
    """Random token ids, none twice in a row: keys of one token tie up to rounding wherever positions do not count."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N_VOCAB - 3, generator=generator)[:n] + 3 for _ in range(rows)])
