"""PressedCache: growth, bytes, cropping, forks and branches."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, block, other_press, small_press
from tests.presses.words import Words
from torch import Tensor
from transformers import DynamicCache

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    ExpectedAttentionPress,
    Kept,
    KnormPress,
    LayerView,
    PerLayerCompressionPress,
    PressedCache,
    RandomPress,
    SnapKVPress,
    ThinKPress,
    make_press,
    prefill,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError, ModelError, PressError

N = 53  # tokens of the prompt
PRESS = SnapKVPress(0.5, window_size=8)
IDS = tokens(1, N)
FURTHER = tokens(1, 90, seed=1)


def prefilled(press: BasePress | None = None, name: str = "llama", ids: Tensor = IDS) -> PressedCache:
    past = PressedCache(press)
    tiny(name)(ids, **cache_argument(past))
    return past


def add(past: PressedCache, ids: Tensor, name: str = "llama") -> Tensor:
    return tiny(name)(ids, **cache_argument(past)).logits


# -- growth and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("press", [None, PRESS])
def test_new_tokens_go_into_the_buffer_in_place(press: BasePress | None) -> None:
    past, buffers = prefilled(press), []
    for t in range(FURTHER.shape[1]):
        add(past, FURTHER[:, t : t + 1])
        buffers.append(past.layer(0).keys.data_ptr())
    assert buffers[:60] == buffers[:1] * 60  # room for at least 64 tokens at a time
    assert len(set(buffers)) == 2


def test_holds_what_a_dynamic_cache_holds() -> None:
    past, own = prefilled(), DynamicCache()
    tiny("llama")(IDS, **cache_argument(own))
    for t in range(FURTHER.shape[1]):
        add(past, FURTHER[:, t : t + 1])
        tiny("llama")(FURTHER[:, t : t + 1], **cache_argument(own))
    for ours, theirs in zip(past.pressed_layers(), own.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=0)
        assert torch.equal(ours.positions(), torch.arange(N + 90).expand(1, 2, -1))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_bytes_are_those_of_the_pairs(name: str) -> None:
    """Also where keys and values are views of a fused projection, which would keep the queries alive."""
    config = tiny(name).config
    n_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    pair = 2 * 4 * n_heads * config.hidden_size // config.num_attention_heads * config.num_hidden_layers
    assert prefilled(None, name).kv_bytes() == N * pair
    past = prefilled(PRESS, name)
    assert past.stored_lengths() == [26, 26]
    assert past.kv_bytes() == 26 * pair
    assert past.achieved_ratio() == 1 - 26 / N
    fork = past.fork()
    assert fork.kv_bytes() == past.kv_bytes()
    assert fork.layer(0).keys.data_ptr() == past.layer(0).keys.data_ptr()
    add(past, FURTHER[:, :1], name)
    assert past.kv_bytes() == (27 + 64) * pair and fork.kv_bytes() == 26 * pair


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize(
    ("name", "press"),
    [
        *(("llama", press) for press in ("snapkv", *IN_BLOCK, *OTHERS)),
        ("gpt_neox", "snapkv"),
        ("gpt2", "snapkv"),
        ("gpt_neox", "kvzip"),
    ],
)
def test_nothing_keeps_the_evicted_pairs_alive(name: str, press: str) -> None:
    """A: what was evicted stayed in memory."""
    past, made = PressedCache(), small_press(press, name).prepared(tiny(name), Words())
    gc.collect()
    gc.freeze()  # what there is of other tests is not looked at
    with torch.no_grad(), made(tiny(name)):
        tiny(name)(IDS, **cache_argument(past))
    assert past.achieved_ratio() > 0.1
    gc.collect()
    held = {tensor.untyped_storage().data_ptr() for layer in past.pressed_layers() for tensor in layer.tensors()}
    tensors = [x for x in gc.get_objects() if type(x) is Tensor]
    tensors = [x for x in tensors if x.dim() == 4 and N <= x.shape[2] < 3 * N]
    assert [x.shape for x in tensors if x.untyped_storage().data_ptr() not in held] == []


def test_no_reference_cycles() -> None:
    """A cache is freed when its last name goes, without waiting for the garbage collector."""

    def pairs() -> list[Tensor]:
        return [x for x in gc.get_objects() if type(x) is Tensor and x.dim() == 4 and x.shape[2] in (30, 61)]

    gc.collect()
    gc.disable()
    try:
        before = {id(x) for x in pairs()}  # what other tests hold
        prefilled(PRESS, ids=tokens(1, 61))
        assert [x.shape for x in pairs() if id(x) not in before] == []
    finally:
        gc.enable()


def test_gradients_are_those_of_a_dynamic_cache() -> None:
    gradients = []
    for past in (DynamicCache(), PressedCache(), PressedCache(KnormPress(0.0))):
        model = BY_NAME["llama"].build().requires_grad_(True)
        logits = [model(ids, **cache_argument(past)).logits for ids in (IDS, FURTHER[:, :3], FURTHER[:, 3:4])]
        torch.cat(logits, dim=1).logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    for ours in gradients[1:]:
        torch.testing.assert_close(ours, gradients[0], atol=1e-3, rtol=1e-3)


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    past, other = prefilled(PRESS), PressedCache(PRESS)
    with torch.inference_mode():
        add(other, IDS)
        add(other, FURTHER[:, :3])
    add(past, FURTHER[:, :3])
    assert torch.equal(add(past, FURTHER[:, 3:5]), add(other, FURTHER[:, 3:5]))


# -- crop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("press", [None, PRESS])
@pytest.mark.parametrize("argument", [-4, N + 6])
def test_crop_takes_the_newest_tokens_back(press: BasePress | None, argument: int) -> None:
    past, other = prefilled(press), prefilled(press)
    add(past, FURTHER[:, :10])
    past.crop(argument)
    assert past.seen_tokens == N + 6
    add(other, FURTHER[:, :6])
    assert past.stored_lengths() == other.stored_lengths()
    assert torch.equal(past.positions(), other.positions())
    torch.testing.assert_close(add(past, FURTHER[:, 20:23]), add(other, FURTHER[:, 20:23]), atol=1e-5, rtol=0)


def test_crop_that_changes_nothing() -> None:
    past = prefilled(PRESS)
    for argument in (0, N, N + 100):
        past.crop(argument)
        assert past.seen_tokens == N and past.stored_lengths() == [26, 26]


@pytest.mark.parametrize("argument", [-4, N - 1, 5])
def test_crop_into_what_was_compressed(argument: int) -> None:
    past = prefilled(PRESS)
    add(past, FURTHER[:, :3])
    with pytest.raises(CacheError, match=f"Crop to {N} or more"):
        past.crop(argument)
    assert past.seen_tokens == N + 3 and past.stored_lengths() == [29, 29]


def test_crop_of_an_uncompressed_cache_into_the_prompt() -> None:
    past = prefilled()
    past.crop(-10)
    expected = tiny("llama")(torch.cat([IDS[:, :-10], FURTHER[:, :3]], dim=1)).logits[:, -3:]
    torch.testing.assert_close(add(past, FURTHER[:, :3]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("press", [None, SnapKVPress(0.0)])
@pytest.mark.parametrize("chunk", [None, 12])
def test_a_cache_cropped_to_nothing_is_as_good_as_new(press: BasePress | None, chunk: int | None) -> None:
    """It takes another number of rows, and its next call is a prefill."""
    past, ids = PressedCache(press, chunk_tokens=chunk), tokens(2, N)
    mask = torch.ones_like(ids)
    mask[0, : 4 if press is None else 0] = 0  # a press takes padding out, and then there is no way back
    prefill(tiny("llama"), ids, past, attention_mask=mask)
    past.crop(-N)
    assert past.seen_tokens == past.kv_bytes() == 0 and past.stored_lengths() == []
    past.session.press = None if press is None else PRESS
    prefill(tiny("llama"), IDS, past)
    new = PressedCache(past.press, chunk_tokens=chunk)
    prefill(tiny("llama"), IDS, new)
    assert past.stored_lengths() == new.stored_lengths() and not past.layer(0).has_padding
    assert torch.equal(add(past, FURTHER[:, :3]), add(new, FURTHER[:, :3]))


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("press", [None, PRESS])
@pytest.mark.parametrize("split", [PressedCache.fork, copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(press: BasePress | None, split: object) -> None:
    parent = prefilled(press)
    add(parent, FURTHER[:, :2])  # the buffer has room: both could write to the same place
    child = split(parent)  # type: ignore[operator]
    grandchild = split(child)  # type: ignore[operator]
    endings = [FURTHER[:, 10:14], FURTHER[:, 20:24], FURTHER[:, 30:34]]
    family = [parent, child, grandchild]
    answers = [[], [], []]
    for t in range(4):
        for past, ending, answer in zip(family, endings, answers, strict=True):
            answer.append(add(past, ending[:, t : t + 1]))
    for past, ending, answer in zip(family, endings, answers, strict=True):
        alone = prefilled(press)
        add(alone, FURTHER[:, :2])
        expected = torch.cat([add(alone, ending[:, t : t + 1]) for t in range(4)], dim=1)
        assert torch.equal(torch.cat(answer, dim=1), expected)
        assert past.press == press and past.achieved_ratio() == alone.achieved_ratio()
        assert torch.equal(past.positions(1), alone.positions(1))


def through_a_file(past: PressedCache) -> PressedCache:
    return pickle.loads(pickle.dumps(past))


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", press_names(at_prefill=True))
def test_a_cache_of_every_press_can_be_copied_and_pickled(name: str) -> None:
    """What presses had computed was remembered in local functions, which no file can hold."""
    press = small_press(name, "llama")
    past, question = PressedCache(press), tokens(1, 3, seed=5)
    with torch.no_grad():
        with block(tiny("llama"), press):
            tiny("llama")(IDS, **cache_argument(past))
        for split in (copy.deepcopy, through_a_file):
            other = split(past)
            assert other.press == past.press and other.achieved_ratio() == past.achieved_ratio() > 0
            assert other.layer(1).session is other.session is not past.session
            expected = add(past.fork(), question)
            assert torch.equal(add(other, question), expected)
            assert torch.equal(add(split(other), question), add(other.fork(), question))


@pytest.mark.parametrize("split", [copy.deepcopy, through_a_file])
def test_copies_in_the_middle_of_things(split: Any) -> None:
    """A schedule goes on in a copy; branches of a shared prefill, and a DynamicCache that holds our layers."""
    press = DecodingPress(ExpectedAttentionPress(n_future_positions=8), 4, 20)
    past = prefilled(press)
    add(past, FURTHER[:, :6])
    other = split(past)
    assert torch.equal(add(other, FURTHER[:, 6:12]), add(past, FURTHER[:, 6:12]))
    assert other.stored_lengths() == past.stored_lengths() == [20, 20]
    full = PressedCache()
    (branch,) = full.branches([ExpectedAttentionPress(0.5)])
    tiny("llama")(IDS, **cache_argument(full))
    assert torch.equal(add(split(full), FURTHER), add(full.fork(), FURTHER))
    assert torch.equal(add(split(branch), FURTHER), add(branch.fork(), FURTHER))
    theirs = DynamicCache()
    with ExpectedAttentionPress(0.5)(tiny("llama")):
        tiny("llama")(IDS, **cache_argument(theirs))
    ours = split(theirs)
    assert ours.get_seq_length() == N and ours.layers[0].stored_length == N // 2
    assert torch.equal(add(ours, FURTHER), add(theirs, FURTHER))


@pytest.mark.parametrize("is_child", [True, False])
def test_cropping_one_of_two_leaves_the_other_alone(is_child: bool) -> None:
    parent, alone = prefilled(), prefilled()
    for past in (parent, alone):
        add(past, FURTHER[:, :2])
    child = parent.fork()
    cropped, other = (child, parent) if is_child else (parent, child)
    cropped.crop(-20)
    add(cropped, FURTHER[:, 50:60])
    assert torch.equal(add(other, FURTHER[:, 2:5]), add(alone, FURTHER[:, 2:5]))


def test_a_fork_goes_on_with_the_seed_of_its_original() -> None:
    """As a copy and a saved cache do: what a press draws once per cache is drawn."""
    torch.manual_seed(0)
    past = PressedCache(DecodingPress(RandomPress(), 4, 20))
    add(past, IDS)
    add(past, FURTHER[:, :4])  # the seed is drawn
    fork, copied = past.fork(), copy.deepcopy(past)
    for each in (past, fork, copied):
        add(each, FURTHER[:, 4:20])
    assert torch.equal(fork.positions(), past.positions()) and torch.equal(copied.positions(), past.positions())


def test_reset_and_reuse() -> None:
    past = prefilled(PRESS)
    add(past, FURTHER[:, :5])
    past.reset()
    assert past.seen_tokens == 0 and past.stored_lengths() == [] and past.kv_bytes() == 0
    assert past.achieved_ratio() == 0
    other = tokens(2, 31, seed=5)  # of another shape
    tiny("llama")(other, **cache_argument(past))
    assert past.stored_lengths() == [15, 15]
    new = prefilled(PRESS, ids=other)
    assert torch.equal(add(past, other[:, :4]), add(new, other[:, :4]))


@pytest.mark.parametrize("press", [None, PRESS])
def test_rows_can_be_repeated_and_selected(press: BasePress | None) -> None:
    ids, new = tokens(2, N), tokens(6, 3, seed=4)
    past = prefilled(press, ids=ids)
    past.batch_repeat_interleave(3)
    logits = add(past, new)
    assert torch.equal(past.positions()[0], past.positions()[2])
    past.batch_select_indices(torch.tensor([4, 1]))
    past.reorder_cache(torch.tensor([1, 0, 0]))
    last = add(past, new[:3])
    for row, (source, first) in enumerate([(0, 1), (1, 4), (1, 4)]):
        alone = prefilled(press, ids=ids[source : source + 1])
        torch.testing.assert_close(logits[first], add(alone, new[first : first + 1])[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(last[row], add(alone, new[row : row + 1])[0], atol=1e-4, rtol=0)


FAST_BRANCHES = (("gpt_neox", True), ("gemma3", False))


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize(
    ("name", "is_padded"),
    [
        pytest.param(
            name,
            is_padded,
            marks=() if (name, is_padded) in FAST_BRANCHES else pytest.mark.slow,
        )
        for name in ("gpt_neox", "llama", "mistral", "gemma3", "lfm2", "qwen3_next")
        if name in BY_NAME
        for is_padded in (False, True)
    ],
)
@pytest.mark.thinned(2)
def test_branches_are_separate_prefills(name: str, is_padded: bool) -> None:
    own = {"random": {"seed": 1}, "snapkv": {"window_size": 8}, "pyramidkv": {"window_size": 4}}
    presses = [make_press(press, ratio, **own.get(press, {})) for press in WITH_RATIO for ratio in (0.0, 0.6)]
    presses += [*(other_press(press, name) for press in OTHERS), None]
    ids, mask = tokens(2, N), torch.ones(2, N, dtype=torch.long)
    if is_padded:
        mask[1, :20] = 0
    source = PressedCache()
    branches = source.branches(presses)
    tiny(name)(ids, attention_mask=mask, **cache_argument(source))
    more = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    tiny(name)(tokens(2, 4, seed=3), attention_mask=more, **cache_argument(source))  # no longer concerns the branches
    for press, branch in zip(presses, branches, strict=True):
        alone = PressedCache(press)
        tiny(name)(ids, attention_mask=mask, **cache_argument(alone))
        assert branch.press == press
        assert branch.stored_lengths() == alone.stored_lengths()
        assert branch.achieved_ratio() == alone.achieved_ratio()
        for ours, theirs in zip(branch.pressed_layers(), alone.pressed_layers(), strict=True):
            assert torch.equal(ours.positions(), theirs.positions())
        question, model = tokens(2, 4, seed=8), tiny(name)
        answers = [model(question, attention_mask=more, **cache_argument(past)).logits for past in (branch, alone)]
        assert torch.equal(*answers)


def test_branches_share_until_written_to() -> None:
    source = PressedCache()
    whole, compressed = source.branches([None, PRESS])
    tiny("gpt_neox")(IDS, **cache_argument(source))
    assert whole.kv_bytes() == source.kv_bytes() > compressed.kv_bytes()
    assert whole.layer(1).keys.data_ptr() == source.layer(1).keys.data_ptr()
    add(source, FURTHER[:, :1], "gpt_neox")
    assert whole.layer(1).keys.data_ptr() != source.layer(1).keys.data_ptr()


def test_a_branch_that_nobody_wants_is_not_kept() -> None:
    source = PressedCache()
    branches = source.branches([KnormPress(0.2), PRESS])
    tiny("llama")(tokens(1, 67), **cache_argument(source))
    assert branches.pop(0).stored_lengths() == [53, 53]
    gc.collect()
    assert [x for x in gc.get_objects() if type(x) is Tensor and x.dim() == 4 and x.shape[2] == 53] == []


def test_branches_are_filled_by_one_prefill_only() -> None:
    source = PressedCache()
    (branch,) = source.branches([PRESS])
    tiny("llama")(IDS, **cache_argument(source))
    kept = branch.positions()
    add(source, FURTHER[:, :2])
    source.reset()
    add(source, IDS[:, :20])
    assert branch.seen_tokens == N and torch.equal(branch.positions(), kept)


class Broken(BasePress):
    """Fails in the second layer."""

    def compress(self, view: LayerView) -> Kept | None:
        if view.layer_idx == 1:
            raise ZeroDivisionError("on purpose")
        return KnormPress(0.5).compress(view)


def test_a_press_that_fails_breaks_its_own_branch_only() -> None:
    source = PressedCache()
    broken, sound = source.branches([Broken(), PRESS])
    tiny("llama")(IDS, **cache_argument(source))
    assert sound.stored_lengths() == [26, 26] and source.stored_lengths() == [N, N]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        add(broken, FURTHER[:, :1])


def test_branches_need_an_empty_cache_without_a_press() -> None:
    for past in (PressedCache(PRESS), prefilled()):
        with pytest.raises(CacheError, match="empty cache without a press"):
            past.branches([PRESS])


# -- what cannot work -------------------------------------------------------------------------------------------------


def test_another_number_of_rows() -> None:
    past = prefilled(PRESS)
    with pytest.raises(CacheError, match=r"holds 1 rows and the call has 2.*batch_repeat_interleave"):
        add(past, tokens(2, 3))
    assert torch.isfinite(add(past, FURTHER[:, :3])).all()  # and goes on working


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}], ids=str)
@pytest.mark.parametrize(
    "press", [None, PRESS, AdaKVPress(KnormPress(0.5), 0.0), make_press("snap_think", 0.5)], ids=repr
)
def test_another_dtype_or_autocast(press: BasePress | None, options: dict[str, Any], n: int) -> None:
    """A cache that was filled in one dtype is not gone on with in another, and stays as it is."""
    if isinstance(press, ThinKPress) and options:
        pytest.skip("they do not go together")
    model = BY_NAME["llama"].build()
    past = PressedCache(press, **options)
    model(IDS, **cache_argument(past))
    stored = past.stored_lengths()
    with pytest.raises(CacheError, match="in float32 on cpu and the call brings them in bfloat16 on cpu: the model's"):
        BY_NAME["llama"].build(dtype=torch.bfloat16)(FURTHER[:, :n], **cache_argument(past))
    with torch.autocast("cpu"), pytest.raises(CacheError, match="or autocast, is not what it was"):
        model(FURTHER[:, :n], **cache_argument(past))
    with torch.device("meta"):
        away = torch.empty(1, 2, n, 8)
    with pytest.raises(CacheError, match="float32 on cpu and the call brings them in float32 on meta"):
        past.layer(0).update(away, away)
    assert past.stored_lengths() == stored
    assert torch.isfinite(model(FURTHER[:, :n], **cache_argument(past)).logits).all()
    with torch.autocast("cpu"):
        same = PressedCache(press, **options)
        for ids in (IDS, FURTHER[:, :n]):
            assert torch.isfinite(model(ids, **cache_argument(same)).logits).all()


@pytest.mark.parametrize("width", [3, N, N + 2])
def test_an_attention_mask_of_the_wrong_width(width: int) -> None:
    past = prefilled(PRESS)
    with pytest.raises(CacheError, match=rf"{width} columns; .* seen {N + 3} tokens"):
        tiny("llama")(FURTHER[:, :3], attention_mask=torch.ones(1, width), **cache_argument(past))


def test_a_4d_attention_mask() -> None:
    mask = torch.zeros(1, 1, N, N)
    with pytest.raises(CacheError, match="2-D attention masks"):
        tiny("llama")(IDS, attention_mask=mask, **cache_argument(PressedCache()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_backend(attention: str) -> None:
    past = PressedCache(PRESS)
    with pytest.raises(ModelError, match="attn_implementation='coldpress'"):
        tiny("llama", attention)(IDS, **cache_argument(past))
    with pytest.raises(ModelError, match="attn_implementation='coldpress'"):
        add(past, IDS)
    past.reset()
    add(past, IDS)
    assert past.stored_lengths() == [26, 26]


def test_a_press_that_fails() -> None:
    past = PressedCache(Broken())
    for use in (lambda: add(past, IDS), lambda: add(past, IDS), past.fork, past.get_seq_length):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            use()
    past.reset()
    assert past.get_seq_length() == 0


def test_a_call_that_failed_half_way() -> None:
    model, past = BY_NAME["llama"].build(), prefilled()
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(FURTHER[:, :2], **cache_argument(past))
    hook.remove()
    with pytest.raises(CacheError, match="half-way"):
        add(past, FURTHER[:, :3])
    past.reset()
    assert torch.equal(add(past, FURTHER[:, :3]), add(PressedCache(), FURTHER[:, :3]))


def test_something_else_than_a_press() -> None:
    with pytest.raises(PressError, match="SnapKVPress"):
        PressedCache(0.5)  # type: ignore[arg-type]


def test_describes_itself() -> None:
    assert repr(prefilled(KnormPress(0.5))) == (
        f"PressedCache(press=KnormPress(compression_ratio=0.5), seen={N}, stored=[26, 26])"
    )


@pytest.mark.parametrize("is_branch", [False, True])
def test_layers_that_keep_everything_count_too(is_branch: bool) -> None:
    """Half of one of two layers is a quarter, rounded up to whole tokens."""
    press = PerLayerCompressionPress(KnormPress(), [0.5, 0.0])
    past = PressedCache(press)
    source = PressedCache() if is_branch else past
    if is_branch:
        (past,) = source.branches([press])
    tiny("llama")(tokens(2, N), **cache_argument(source))
    assert past.achieved_ratio() == pytest.approx((N - N // 2) / (2 * N))
    assert past.fork().achieved_ratio() == past.achieved_ratio()
    assert [layer.was_compressed for layer in past.pressed_layers()] == [True, False]
    before = past.achieved_ratio()
    tiny("llama")(tokens(2, 3, seed=4), **cache_argument(past))
    assert past.achieved_ratio() == before


def test_the_tokens_that_are_known_follow_the_rows() -> None:
    model, ids, more = tiny("llama"), tokens(2, 12), tokens(2, 3, seed=1)
    past = PressedCache(KnormPress(0.5))
    assert past.token_ids is None
    prefill(model, ids, past)
    assert torch.equal(past.token_ids, ids)
    fork = past.fork()
    with KnormPress(0.5)(model):
        model(more, **cache_argument(past))
    assert torch.equal(past.token_ids, torch.cat([ids, more], dim=1))
    assert torch.equal(fork.token_ids, ids)
    model(more, **cache_argument(fork))  # nobody says what these are
    assert fork.token_ids is None
    fork.crop(-3)
    assert torch.equal(fork.token_ids, ids)
    past.crop(-2)
    assert torch.equal(past.token_ids, torch.cat([ids, more[:, :1]], dim=1))
    past.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(past.token_ids[0], past.token_ids[1]) and past.token_ids[0, 0] == ids[1, 0]
    past.batch_repeat_interleave(2)
    assert past.token_ids.shape == (4, 13)
    past.batch_select_indices(torch.tensor([0]))
    assert past.token_ids.shape == (1, 13)
    past.reset()
    assert past.token_ids is None
