"""A cache belongs to a model with its adapters as they are: switched, scaled, merged, or on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from coldpress import PressedCache, SnapKVPress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.identity import model_facts
from coldpress.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
IDS = tokens(1, 30)


def weights(model: Any) -> str:
    return str(model_facts(model)["weights"])


@pytest.fixture
def adapted() -> Any:
    """A tiny Llama under the adapters ``default`` and ``other``, the first one on."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    how: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(BY_NAME["llama"].build(), peft.LoraConfig(**how)).eval()
    model.add_adapter("other", peft.LoraConfig(**how))
    return model


def saved(model: Any, path: Path) -> Path:
    past = PressedCache(SnapKVPress(0.5, window_size=4))
    with torch.no_grad():
        model(input_ids=IDS, **cache_argument(past))
    past.save(path, model)
    return path


def refused() -> Any:
    return pytest.raises(CacheError, match=r"same sizes and other weights.* its adapters and hooks as they were")


def test_a_cache_of_an_adapter_needs_the_adapter(adapted: Any, tmp_path: Path) -> None:
    path = saved(adapted, tmp_path / "a.safetensors")
    assert PressedCache.load(path, adapted).seen_tokens == 30
    assert PressedCache.load(path, adapted.base_model.model).seen_tokens == 30  # the model inside is the same
    with adapted.disable_adapter(), refused():
        PressedCache.load(path, adapted)
    adapted.set_adapter("other")
    with refused():
        PressedCache.load(path, adapted)
    assert PressedCache.load(path, adapted, check_model=False).seen_tokens == 30
    adapted.base_model.set_adapter(["default", "other"])
    with refused():
        PressedCache.load(path, adapted)
    adapted.set_adapter("default")
    assert PressedCache.load(path, adapted).seen_tokens == 30
    with refused():
        PressedCache.load(path, BY_NAME["llama"].build())


def test_a_cache_without_an_adapter_needs_none(adapted: Any, tmp_path: Path) -> None:
    path = saved(BY_NAME["llama"].build(), tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match="other weights"):
        PressedCache.load(path, adapted)
    with adapted.disable_adapter():
        assert PressedCache.load(path, adapted).seen_tokens == 30


def test_adapters_count_by_what_they_do(adapted: Any) -> None:
    plain, on = weights(BY_NAME["llama"].build()), weights(adapted)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    layer.scale_layer(0.5)
    assert weights(adapted) not in (plain, on)
    layer.unscale_layer()
    assert weights(adapted) == on
    adapted.delete_adapter("other")
    assert weights(adapted) == on
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] += 0.5
    assert weights(adapted) != on
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] -= 0.5
    adapted.merge_adapter()
    merged = weights(adapted)
    with adapted.disable_adapter():  # the next forward takes it out again
        off = weights(adapted)
    assert len({plain, on, merged, off}) == 4
    adapted.unmerge_adapter()
    merged = weights(adapted.base_model.merge_and_unload())
    assert merged == weights(adapted.base_model.model) and merged not in (plain, on, off)


def test_a_module_that_was_trained_whole_takes_the_place_of_its_own() -> None:
    peft = pytest.importorskip("peft")
    plain = weights(BY_NAME["llama"].build())
    how: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    torch.manual_seed(1)
    model = peft.get_peft_model(BY_NAME["llama"].build(), peft.LoraConfig(**how)).eval()
    on = weights(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight[0, 0] += 1
    assert len({plain, on, weights(model)}) == 3
    with model.disable_adapter():
        assert weights(model) == plain


def test_a_hook_that_may_change_numbers_counts() -> None:
    model = BY_NAME["llama"].build()
    plain = weights(model)

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 1

    handle = model.model.layers[0].mlp.register_forward_hook(shift)
    assert weights(model) != plain
    handle.remove()
    with SnapKVPress(0.5)(model):
        assert weights(model) == plain


@pytest.fixture
def offloaded(tmp_path: Path) -> PreTrainedModel:
    """The tiny Llama, its second layer and its head on the disk."""
    pytest.importorskip("accelerate")
    BY_NAME["llama"].build().save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", attn_implementation="coldpress"
    ).eval()


def test_a_model_whose_weights_are_on_the_disk(offloaded: PreTrainedModel, tmp_path: Path) -> None:
    assert offloaded.model.layers[0].self_attn.q_proj.weight.is_meta
    model = BY_NAME["llama"].build()
    path = saved(model, tmp_path / "a.safetensors")
    ours, theirs = (PressedCache.load(path, each) for each in (offloaded, model))
    with torch.no_grad():
        answers = [
            each(IDS[:, :5], **cache_argument(past)).logits for each, past in ((offloaded, ours), (model, theirs))
        ]
    assert torch.equal(*answers)
    assert saved(offloaded, tmp_path / "b.safetensors") and PressedCache.load(tmp_path / "b.safetensors", model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(CacheError, match="other weights"):
        PressedCache.load(saved(model, path), offloaded)
