"""What two processes that share a model's heads make of every press; started by torchrun in test_placement.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig

from coldpress import BasePress, KnormPress, PressedCache, SnapKVPress, ThinKPress, make_press, press_names
from coldpress.bases.registry import parameters_of
from coldpress.core.press import parts
from coldpress.errors import PressError
from coldpress.eval.losses import forward
from coldpress.models.block import prefilling

SMALL = {"window_size": 8, "chunk_length": 10, "block_size": 10, "lag_size": 5}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def models(folder: Path) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4))
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4, rotary_pct=0.25))
    if dist.get_rank() == 0:
        llama.save_pretrained(folder / "llama")
        neox.save_pretrained(folder / "gpt_neox")
    dist.barrier()
    return {"llama": llama, "gpt_neox": neox}


@torch.inference_mode()
def logits(model: PreTrainedModel, press: BasePress, ids: torch.Tensor) -> torch.Tensor:
    cache = PressedCache(press)
    with prefilling(model, cache):
        forward(model, ids[:, :60], cache, keep=1)
    return forward(model, ids[:, 60:], cache)


def presses() -> dict[str, BasePress]:
    found: dict[str, BasePress] = {"budget_bytes": KnormPress(budget_bytes=4000)}
    for name in press_names(has_ratio=True, at_prefill=True):
        press = make_press(name, 0.5, **{k: v for k, v in SMALL.items() if k in parameters_of(name)})
        assert press is not None
        if not any(
            part.needs_model or part.needs_hidden_states or part.kind != "training-free" for part in parts(press)
        ):
            found[name] = press
    found["think"] = ThinKPress(0.5, 8, press=SnapKVPress(0.3, window_size=8))
    press = make_press("simlayerkv", 0.0, n_recent=12, n_initial=3)
    assert press is not None
    return {**found, "simlayerkv": press}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(1))[None, :90]  # no token twice: keys would tie
    found: dict[str, dict[str, float | str]] = {}
    for kind, whole in models(folder).items():
        options = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
        shared = AutoModelForCausalLM.from_pretrained(folder / kind, attn_implementation="coldpress", **options).eval()
        whole.set_attn_implementation("coldpress")
        results = found.setdefault(kind, {})
        for name, press in presses().items():
            try:
                own = logits(shared, press, ids)
                results[name] = float((own - logits(whole.eval(), press, ids)).abs().max())
            except PressError as error:
                results[name] = str(error)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
