"""Models that see images: what is compressed of them, and what is refused where images have positions of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.architectures import VERSION, tokens
from tests.presses.words import Words
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache

from coldpress import ExpectedAttentionPress, KeyRerotationPress, KVzipPress, PressedCache, SnapKVPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.errors import ColdpressError, ModelError, PressError

IMAGE, START, END = 3, 5, 6
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VIT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = VIT | {"image_size": 28, "patch_size": 14}  # four patches
GRID = {
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "depth": 1,
}
IDS = tokens(1, 30).clamp(min=10)
IDS[:, 4:10] = torch.tensor([START, *[IMAGE] * 4, END])
PIXELS = {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
PATCHES = {
    "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
if VERSION >= (5, 3):
    PATCHES["mm_token_type_ids"] = (IDS == IMAGE).long()
_SPECIAL = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": START, "vision_end_token_id": END}


def _rope(*sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"rope_parameters" if VERSION >= (5, 0) else "rope_scaling": rope}


# model type -> text, vision, the rest of the configuration, and what comes with the text
ONE_LINE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"model_type": "llama"} | TEXT,
        {"model_type": "clip_vision_model", "projection_dim": 32} | SQUARE,
        {"image_token_id": IMAGE, "image_token_index": IMAGE, "vision_feature_layer": -1},
        PIXELS,
    ),
    "idefics3": (
        {"model_type": "llama"} | TEXT,
        SQUARE,
        {"image_token_id": IMAGE, "scale_factor": 1},
        {"pixel_values": PIXELS["pixel_values"][None]},
    ),
}
IN_SPACE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (TEXT | _rope(2, 1, 1), GRID | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, _SPECIAL, PATCHES),
    "qwen2_5_vl": (
        TEXT | _rope(2, 1, 1),
        GRID | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [0]},
        _SPECIAL,
        PATCHES,
    ),
    "qwen3_vl": (
        TEXT | {"head_dim": 16} | _rope(4, 2, 2),
        GRID
        | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0]},
        _SPECIAL,
        PATCHES,
    ),
}
BOTH = {name: made for name, made in (ONE_LINE | IN_SPACE).items() if name in CONFIG_MAPPING}
every_model = pytest.mark.parametrize("name", BOTH)


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what comes with the text."""
    text, vision, rest, given = BOTH[name]
    config = CONFIG_MAPPING[name](text_config=text, vision_config=vision, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.12)
    use_coldpress(model)
    return model, given


def generated(model: Any, press: Any, ids: Tensor = IDS, **given: Any) -> Any:
    with press(model):
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            **given,
        )  # fmt: skip
    return output


@every_model
def test_an_image_and_a_text(name: str) -> None:
    """Presses that go by keys, values and queries take image tokens as they take others."""
    model, given = built(name)
    past = PressedCache()
    expected = model(IDS, **cache_argument(DynamicCache(), model), **given).logits
    torch.testing.assert_close(model(IDS, **cache_argument(past, model), **given).logits, expected)
    whole = generated(model, SnapKVPress(0.0), **given)
    own = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, **given)
    assert torch.equal(whole.sequences, own)
    half = cache_of(generated(model, SnapKVPress(0.5, window_size=8), **given))
    assert [layer.stored_length for layer in half.layers] == [15 + 3] * 2


@every_model
@pytest.mark.parametrize("press", [ExpectedAttentionPress(0.5), KeyRerotationPress(SnapKVPress(0.5, window_size=8))])
def test_images_in_space(name: str, press: Any) -> None:
    """Where an image has positions of its own, what undoes rotations is refused; a text alone is like others."""
    model, given = built(name)
    if name in ONE_LINE:
        generated(model, press, **given)
        return
    with pytest.raises(ModelError, match=r"not at consecutive positions|cannot undo"):
        generated(model, press, **given)


@every_model
def test_presses_that_read_the_text_again(name: str) -> None:
    """They would read a sign in the place of the image."""
    model, given = built(name)
    press: Any = KVzipPress(0.5).prepared(model, Words())
    with pytest.raises(PressError, match="such as an image"):
        generated(model, press, **given)
    past = cache_of(generated(model, press, ids=tokens(1, 30, seed=4).clamp(min=10)))
    positions = [layer.positions() for layer in past.layers]
    assert sum(int(((at >= 0) & (at < 30)).sum()) for at in positions) == 15 * 2 * 2


def test_a_prefix_that_sees_itself_is_refused() -> None:
    """PaliGemma's image and question see each other whole."""
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | SQUARE
    text = {"model_type": "gemma", "head_dim": 16} | TEXT
    config = CONFIG_MAPPING["paligemma"](text_config=text, vision_config=vision, projection_dim=32, hidden_size=32)
    model: Callable[..., Any] = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    use_coldpress(model)
    with pytest.raises(ColdpressError, match=r"causal decoder|custom attention mask|4-D"):
        model(tokens(1, 9), **cache_argument(PressedCache(), model))
