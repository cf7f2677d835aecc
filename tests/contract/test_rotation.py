"""What undoes a rotation or moves keys is refused where it would be wrong, by what the model does and not its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, N_VOCAB, Architecture, Look, tiny, tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from coldpress import (
    BasePress,
    CapPress,
    CompactorPress,
    DecodingPress,
    ExpectedAttentionPress,
    FinchPress,
    Kept,
    KeyRerotationPress,
    LayerView,
    PressedCache,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rotation import Steps
from coldpress.cache.session import Session
from coldpress.errors import ModelError
from coldpress.presses.leverage import LeverageScorePress

LENGTH = 40
GAP = torch.cat([torch.arange(20), torch.arange(200, 220)])[None]
SNAPKV, GOING_ON = SnapKVPress(0.5, window_size=4), DecodingPress(SnapKVPress(window_size=4), 4, 20)
UNROTATING: list[BasePress] = [
    KeyRerotationPress(StreamingLLMPress(0.5)),
    FinchPress(0.5, window_size=4),
    ExpectedAttentionPress(0.5),
    CapPress(0.5),
    LeverageScorePress(0.5),
    CompactorPress(0.5),
]
every_unrotating = pytest.mark.parametrize("press", UNROTATING, ids=lambda press: type(press).__name__)

_SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_DORY = _SIZES | {
    "num_hidden_layers": 6,
    "layer_types": ["full_attention", "mlp"] * 3,
    "n_input_layers": 2,
    "n_recurrent_layers": 2,
    "n_output_layers": 2,
    "num_experts": 2,
}
NORMS_LAST = [
    Architecture("hunyuan_dense", "hunyuan_v1_dense", _SIZES),
    Architecture("hunyuan_moe", "hunyuan_v1_moe", _SIZES | {"num_experts": 2, "moe_topk": 1}),
    Architecture("dory", "dory", _DORY | {"n_recurrent_loops": 1}),
]
MROPE = Architecture(
    "qwen3_vl_text",
    "qwen3_vl_text",
    _SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
)


def fill(model: Any, past: PressedCache, press: BasePress | None = None, **given: Any) -> PressedCache:
    """A prefill, in the press's own block where it needs one."""
    ids = tokens(1, LENGTH)
    if press is None:
        model(ids, **cache_argument(past), **given)
    else:
        with press(model):
            model(ids, **cache_argument(past), **given)
    return past


@pytest.mark.parametrize("architecture", [a for a in NORMS_LAST if a.model_type in CONFIG_MAPPING], ids=str)
def test_a_rotation_that_is_not_the_last(architecture: Architecture) -> None:
    model = architecture.build()
    for press in UNROTATING:
        with pytest.raises(ModelError, match="rotation at the end"):
            fill(model, PressedCache(), press)
    with pytest.raises(ModelError, match="rotation at the end"):
        fill(model, PressedCache(SNAPKV, positions="rerotate"))
    assert fill(model, PressedCache(SNAPKV)).achieved_ratio() == 0.5


@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="does not exist")
@pytest.mark.parametrize("mode", ["per_loop", "last_loop"])
def test_layers_that_run_in_loops(mode: str) -> None:
    """With caches of their own they are layers as others are; what reads another loop's cache is refused."""
    architecture = Architecture("dory", "dory", _DORY | {"n_recurrent_loops": 2, "recurrent_kv_cache_mode": mode})
    model, ids = architecture.build(), tokens(1, LENGTH)
    own, ours = DynamicCache(config=model.config), PressedCache()
    model(ids[:, :-8], **cache_argument(own))
    model(ids[:, :-8], **cache_argument(ours))
    expected = model(ids[:, -8:], **cache_argument(own)).logits
    if mode == "per_loop":
        torch.testing.assert_close(model(ids[:, -8:], **cache_argument(ours)).logits, expected, atol=1e-4, rtol=0)
        return
    with pytest.raises(ModelError, match="keys that its cache did not give it"):
        model(ids[:, -8:], **cache_argument(ours))


def test_one_token_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].build()
    runs = []
    for i, layer in enumerate(model.model.layers):
        forward = layer.self_attn.forward
        watched = lambda *args, i=i, forward=forward, **kwargs: runs.append(i) or forward(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(layer.self_attn, "forward", watched)
    fill(model, PressedCache(SNAPKV))
    assert runs == [0, 1]
    for n in (3, 4, 5):  # the first prefill that undoes rotations is two runs
        fill(model, PressedCache(ExpectedAttentionPress(0.5)))
        assert runs.count(0) == runs.count(1) == n


class Told(LlamaAttention):
    """An attention layer that is told from outside whether to rotate."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        rotates: bool | Tensor = True,
        **kwargs: Any,
    ) -> Any:
        rotation = position_embeddings
        if rotation is None or not rotates:
            angles = torch.zeros(1, hidden_states.shape[1], self.head_dim)
            rotation = angles.cos(), angles.sin()
        return super().forward(hidden_states, rotation, attention_mask, **kwargs)


Told.__module__ = LlamaAttention.__module__  # where its rotary embedding is


@pytest.mark.parametrize(
    "told", [{"rotates": False}, {"position_embeddings": None}, {"rotates": torch.tensor(False)}, {}], ids=str
)
def test_a_layer_that_is_told_whether_to_rotate(told: dict[str, Any]) -> None:
    """By a flag, or by what it is not given, is seen; by anything else is refused."""
    model = BY_NAME["llama"].build()
    modules = [layer.self_attn for layer in model.model.layers]
    for module in modules:
        module.__class__ = Told
    modules[1].register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | told), with_kwargs=True)
    is_same = []

    class Asks(Look):
        def compress(self, view: LayerView) -> Kept | None:
            is_same.append(torch.equal(view.unrotated_queries(), view.queries))
            return super().compress(view)

    if isinstance(told.get("rotates"), Tensor):
        with pytest.raises(ModelError, match="Told is given 'rotates'"):
            fill(model, PressedCache(Asks()))
        assert is_same == [False]
        assert fill(model, PressedCache(SNAPKV)).achieved_ratio() == 0.5
    else:
        fill(model, PressedCache(Asks()))
        assert is_same == [False, bool(told)]


def test_a_layer_that_cannot_be_run_alone() -> None:
    """What whether it rotates depends on is something that only its model has."""
    model = BY_NAME["llama"].build()

    class Needs(LlamaAttention):
        def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, plan: list[int]) -> Any:
            raise AssertionError

    Needs.__module__ = LlamaAttention.__module__
    model.model.layers[0].self_attn.__class__ = Needs
    with pytest.raises(ModelError, match=r"Needs cannot be run on one token.*plan"):
        Session().rope(model.model.layers[0].self_attn, torch.device("cpu"))


@every_unrotating
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
@pytest.mark.parametrize("positions", [GAP, torch.arange(LENGTH)[None] * 2, torch.arange(LENGTH).flip(0)[None]])
def test_positions_that_are_not_consecutive(press: BasePress, name: str, positions: Tensor) -> None:
    with pytest.raises(ModelError, match="not at consecutive positions"):
        fill(tiny(name), PressedCache(), press, position_ids=positions)
    assert fill(tiny(name), PressedCache(SNAPKV), position_ids=positions).achieved_ratio() == 0.5


@every_unrotating
def test_positions_that_begin_elsewhere(press: BasePress) -> None:
    """Only distances count."""
    model = tiny("llama")
    kept = fill(model, PressedCache(), press)
    moved = fill(model, PressedCache(), press, position_ids=torch.arange(100, 100 + LENGTH)[None])
    assert type(kept) is type(moved) is PressedCache
    for layer, other in zip(kept.pressed_layers(), moved.pressed_layers(), strict=True):
        assert torch.equal(layer.positions(), other.positions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gap_between_two_calls(dtype: torch.dtype) -> None:
    """A press that goes on sees it at its next turn; one that was done at the prefill does not mind."""
    model, ids = tiny("llama", dtype=dtype), tokens(1, LENGTH + 8)
    done = fill(model, PressedCache(KeyRerotationPress(StreamingLLMPress(0.5))))
    going_on = fill(model, PressedCache(GOING_ON, positions="rerotate"))
    for past in (done, going_on):
        model(ids[:, LENGTH:-4], **cache_argument(past))
    at = torch.arange(LENGTH + 5, LENGTH + 9)[None]
    model(ids[:, -4:], **cache_argument(done), position_ids=at)
    with pytest.raises(ModelError, match="not at consecutive positions"):
        model(ids[:, -4:], **cache_argument(going_on), position_ids=at)


def test_a_gap_between_two_pieces_of_a_prompt() -> None:
    past = PressedCache(ExpectedAttentionPress(0.5), chunk_tokens=20)
    model, ids = tiny("llama"), tokens(1, LENGTH)
    model(ids[:, :20], **cache_argument(past))
    with pytest.raises(ModelError, match="not at consecutive positions"):
        model(ids[:, 20:], **cache_argument(past), position_ids=GAP[:, 20:])


def test_rows_with_padding_may_begin_anywhere() -> None:
    """Padding has positions of its own, which do not count."""
    model, ids, mask = tiny("llama"), tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    given = {"attention_mask": mask}
    for positions in (None, _ranks(mask)):
        past = PressedCache(ExpectedAttentionPress(0.5))
        model(ids, **cache_argument(past), **given, position_ids=positions)
        assert past.achieved_ratio() > 0.4
    mask[1, 20:23] = 0  # in the middle; by column, the row has a gap there
    model(ids, **cache_argument(PressedCache(ExpectedAttentionPress(0.5))), **given, position_ids=_ranks(mask))
    with pytest.raises(ModelError, match="not at consecutive positions"):
        model(ids, **cache_argument(PressedCache(ExpectedAttentionPress(0.5))), **given)


def _ranks(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


@pytest.mark.skipif(MROPE.model_type not in CONFIG_MAPPING, reason="does not exist")
@every_unrotating
def test_positions_in_three_dimensions(press: BasePress) -> None:
    """As images have them; what the model hands on to attention is the first of four, which is consecutive."""
    model = text_model()
    text = torch.arange(LENGTH)
    image = torch.stack([text, text.clone(), text.clone(), text.clone()])[:, None]
    image[1:, :, 10:26] = torch.stack([torch.full((16,), 10), 10 + torch.arange(16) // 4, 10 + torch.arange(16) % 4])[
        :, None
    ]
    image[1:, :, 26:] = torch.arange(14, 14 + LENGTH - 26)
    with pytest.raises(ModelError, match="not at consecutive positions"):
        fill(model, PressedCache(), press, position_ids=image)
    assert fill(model, PressedCache(SNAPKV), position_ids=image).achieved_ratio() == 0.5
    assert fill(model, PressedCache(), press).achieved_ratio() > 0.4


def text_model() -> Any:
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[MROPE.model_type](**MROPE.config)
        return AutoModel.from_config(config, attn_implementation="coldpress").eval().requires_grad_(False)


def test_frequencies_that_are_not_those_of_the_configuration() -> None:
    """A longer text may have left them ("dynamic"); nobody knows them outside of a block, but one sees it."""
    model = BY_NAME["llama"].build()
    model.model.rotary_emb.inv_freq /= 2
    with pytest.raises(ModelError, match="other frequencies"):
        fill(model, PressedCache(ExpectedAttentionPress(0.5)))
    fill(model, PressedCache(), ExpectedAttentionPress(0.5))


def test_frequencies_that_were_rounded_with_the_model() -> None:
    """Too little to show from a token to the next, and wrong by radians at the end of a text."""
    model, ids = BY_NAME["llama"].build(head_dim=32).to(torch.bfloat16), tokens(1, 1500)
    with pytest.raises(ModelError, match=r"rounded by \.to\(\)"):
        model(ids, **cache_argument(PressedCache(ExpectedAttentionPress(0.5))))
    with ExpectedAttentionPress(0.5)(model):
        model(ids, **cache_argument(PressedCache()))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model(ids, **cache_argument(PressedCache(ExpectedAttentionPress(0.5))))


def test_a_part_of_a_long_text_is_no_short_one() -> None:
    """longrope has other frequencies up to some length."""
    model, look = BY_NAME["phi3_longrope"].build(), Look()
    fill(model, PressedCache(look))
    for view in look.views:
        torch.testing.assert_close(view.part(0, 12).unrotated_queries(), view.unrotated_queries()[:, :, :12])
        torch.testing.assert_close(view.part(0, 12).unrotated_keys(), view.unrotated_keys()[:, :, :12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(dtype: torch.dtype) -> None:
    """Against a loop over rows and tokens, in calls of different lengths."""
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    generator = torch.Generator().manual_seed(0)
    verdicts = set()

    def turn(n: Tensor) -> Tensor:
        return torch.stack([(n[:, None] * frequencies).cos(), (n[:, None] * frequencies).sin()], 1)

    for trial in range(60):
        padding = torch.rand(2, 12, generator=generator) > 0.3
        positions = (padding.cumsum(-1) - 1).clamp(min=0) + torch.tensor([[3], [50]])
        if trial % 2:
            row, at = divmod(int(torch.randint(24, (1,), generator=generator)), 12)
            positions[row, at:] += 1
        right = all(bool((own[real].diff() == 1).all()) for own, real in zip(positions, padding, strict=True))
        steps, start = Steps(), 0
        for stop in (5, 6, 7, 12):
            angles = positions[:, start:stop, None] * frequencies
            rotation = angles.cos().to(dtype), angles.sin().to(dtype)
            steps.note(rotation, stop - start, stop, padding[:, :stop])
            start = stop
        verdicts.add(right)
        if right:
            steps.check("A", turn)
        else:
            with pytest.raises(ModelError, match="not at consecutive positions"):
                steps.check("A", turn)
    assert verdicts == {True, False}
