"""Attention of one new token on the CPU, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coldpress import AdaKVPress, BasePress, KnormPress, KVBits, PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.attend import one_token
from coldpress.attend.one_token import attend_blocks, attend_once, attend_some, can_attend_once

BACKEND = ALL_ATTENTION_FUNCTIONS["coldpress"]


@pytest.mark.parametrize(("segments", "group"), [(1, 1), (8, 1), (1, 3), (6, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 300, 4097])
@pytest.mark.parametrize("hides", [False, True])
def test_softmax_of_one_query(segments: int, group: int, n: int, hides: bool) -> None:
    """Keys and values in a buffer with room to grow, whose empty slots are NaN, or as a slice of something else."""
    torch.manual_seed(n)
    query, buffers = torch.randn(segments, group, 16), torch.full((2, segments, n + 7, 16), torch.nan)
    buffers[:, :, :n] = torch.randn(2, segments, n, 16)
    key, value = buffers[:, :, :n]
    is_hidden = torch.rand(segments, 1, n) < 0.3 if hides else None
    if is_hidden is not None:
        is_hidden[..., -1] = False
    expected = formula(query, key, value, is_hidden)
    for k, v in ((key, value), (key.clone(), value.clone()), (wide(key), wide(value))):
        bias = None if is_hidden is None else torch.zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)
        actual = attend_once(query, k, v, bias, 0.25)
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("segments", "group"), [(1, 1), (8, 1), (1, 3), (6, 3)])
@pytest.mark.parametrize(("n", "m"), [(5, 1), (300, 40), (300, 299)])
def test_some_of_the_pairs(segments: int, group: int, n: int, m: int, dtype: torch.dtype) -> None:
    """As of a cache that stores these pairs alone, out of a buffer with room to grow or a slice of something else."""
    torch.manual_seed(n)
    query = torch.randn(segments, group, 16, dtype=dtype)
    buffers = torch.full((2, segments, n + 7, 16), torch.nan, dtype=dtype)
    buffers[:, :, :n] = torch.randn(2, segments, n, 16)
    key, value = buffers[:, :, :n]
    at = torch.stack([torch.randperm(n)[:m].sort().values for _ in range(segments)])
    bias = torch.randn(segments, m)
    own = [states.gather(1, at[..., None].expand(-1, -1, 16)) for states in (key, value)]
    expected = attend_once(query, own[0], own[1], bias[:, None], 0.25)
    for k, v in ((key, value), (key.clone(), value.clone()), (wide(key), wide(value))):
        rows = (states.unflatten(0, (-1, 2 if segments % 2 == 0 else 1)) for states in (query, k, v, at, bias))
        q, k, v, where, added = rows
        actual = attend_some(q.flatten(1, 2)[:, :, None], k, v, where, added, 0.25)
        assert actual.shape == (len(q), 1, q.shape[1] * group, 16)
        torch.testing.assert_close(
            actual.reshape(segments, group, 16), expected, atol=1e-6 if dtype is torch.float32 else 0.02, rtol=0
        )


@pytest.mark.parametrize("name", ["_by_rows", "_by_columns"])
@pytest.mark.parametrize(("segments", "group"), [(1, 1), (8, 1), (1, 3), (6, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 300])
def test_either_order_of_the_product(
    name: str, segments: int, group: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are right, and the one that was faster when both were tried is taken."""
    torch.manual_seed(n)
    query, key = torch.randn(segments, group, 16), torch.randn(segments, n, 16)
    own, asked = getattr(one_token, name), []

    def product(query: Tensor, key: Tensor) -> Tensor:
        asked.append(name)
        return own(query, key)

    monkeypatch.setattr(one_token, "_tried_orders", lambda: name == "_by_rows")
    monkeypatch.setattr(one_token, name, product)
    expected = (query.double() @ key.double().transpose(1, 2)).float()
    torch.testing.assert_close(one_token.products(query, key), expected, atol=1e-5, rtol=1e-5)
    assert asked == [name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("segments", "group"), [(1, 1), (8, 1), (1, 3), (6, 3)])
def test_in_16_bits(dtype: torch.dtype, segments: int, group: int) -> None:
    """As exact as fused attention in that dtype."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(segments, n, 16).to(dtype) for n in (group, 4097, 4097))
    expected = formula(query, key, value, None)
    fused = scaled_dot_product_attention(query, key, value, scale=0.25)
    for v in (value, wide(value)):
        error = (attend_once(query, key, v, None, 0.25).double() - expected).abs().max()
        assert error <= 1.5 * (fused.double() - expected).abs().max() + torch.finfo(dtype).eps * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3])
def test_segments_of_whole_blocks(dtype: torch.dtype, group: int) -> None:
    """Of 1 to 7 blocks that come in any order, the last ones with empty slots in them, and logits far apart."""
    torch.manual_seed(0)
    lengths, sizes, order = [5, 40, 112, 17], [2, 3, 7, 4], [2, 0, 3, 1]
    segment = torch.tensor(order).repeat_interleave(torch.tensor([sizes[i] for i in order]))
    query = torch.randn(4, group, 16).to(dtype) * torch.tensor([1.0, 30.0, 0.1, 1.0]).to(dtype)[:, None, None]
    key, value = torch.zeros(2, len(segment) * 16, 16, dtype=dtype)
    n_held, expected, start = [], torch.zeros(4, group, 16, dtype=torch.float64), 0
    for i in order:
        own = slice(start, start + lengths[i])
        key[own], value[own] = torch.randn(2, lengths[i], 16).to(dtype)
        expected[i] = formula(query[i : i + 1], key[own][None], value[own][None], None)[0]
        n_held += [lengths[i] - 16 * block for block in range(sizes[i])]
        start += 16 * sizes[i]
    actual = attend_blocks(query, key, value, segment, torch.tensor(n_held), 16, 0.25)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sink", [-torch.inf, 0.5, 60.0])
def test_blocks_with_soft_caps_and_sinks(dtype: torch.dtype, sink: float) -> None:
    """Of two segments, one block and two; a sink that is not there changes nothing."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 16).to(dtype), *torch.randn(2, 48, 16).to(dtype)
    segment, sinks = torch.tensor([0, 1, 1]), torch.full((2, 3), sink)
    found = attend_blocks(query, key, value, segment, torch.tensor([16, 20, 4]), 16, 0.25, None, 2.0, sinks)
    for i, own in enumerate((slice(0, 16), slice(16, 36))):
        logits = 2 * (query[i].double() @ key[own].double().T * 0.25 / 2).tanh()
        weights = torch.cat([logits, sinks[i, :, None].double()], dim=1).softmax(1)[:, :-1]
        wanted = weights @ value[own].double()
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-5 if dtype == torch.float32 else 2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.0, 0.3, 12.0])
def test_sums_stay_in_range(dtype: torch.dtype, spread: float) -> None:
    """E: values of 1,072 came to more than 65,504 in a block, which is infinite in float16. Far apart logits too."""
    torch.manual_seed(0)
    n = 16 * 300
    query, key = torch.randn(1, 2, 16).to(dtype) * spread, torch.randn(1, n, 16).to(dtype)
    value = torch.full((1, n, 16), 1072.0).to(dtype) * torch.linspace(1, 60, 16).round().to(dtype)
    expected = formula(query, key, value, None)
    segment, n_held = torch.zeros(n // 16, dtype=torch.long), torch.full((n // 16,), 16)
    blocks = attend_blocks(query, key[0], value[0], segment, n_held, 16, 0.25)
    for actual in (blocks, attend_once(query, key, value, None, 0.25)):
        tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, atol=0, rtol=tolerance)


@pytest.mark.parametrize("options", [{}, {"kv_bits": KVBits(8, 4, 8)}], ids=str)
@pytest.mark.parametrize("press", [None, KnormPress(0.5), AdaKVPress(KnormPress(0.5), 0.0)], ids=repr)
@pytest.mark.parametrize("n_new", [1, 2])
def test_large_values_in_half_precision(
    press: BasePress | None, options: dict[str, Any], n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every store, with attention of one token and of several: as in float32, over the same pairs."""
    monkeypatch.setattr(one_token, "_FEWEST", 1)
    model, past = tiny("llama"), PressedCache(press, **options)
    model(tokens(1, 90), **cache_argument(past))
    layer, module = past.layer(0), model.model.layers[0].self_attn
    query, new = torch.randn(1, 4, n_new, 8), torch.randn(1, 2, n_new, 8)
    answers = []
    for dtype in (torch.float16, torch.float32):
        own = PressedCache(**options)
        at = torch.arange(90).expand(1, 2, -1) if press is None else layer.positions()
        keys, values = (
            torch.randn(1, 2, 90, 8, generator=torch.Generator().manual_seed(1)),
            torch.full((1, 2, 90, 8), 6e4),
        )
        store = own.layer(0)
        store.update(keys.to(dtype), values.to(dtype))
        own.session.unclaimed = None
        store.keep(at)
        store.encode()
        pair = store.update(new.to(dtype), torch.full_like(new, 6e4).to(dtype))
        out, _ = BACKEND(module, query.to(dtype), *pair, None, scaling=0.3)
        answers.append(out.float())
    assert torch.isfinite(answers[0]).all()
    torch.testing.assert_close(*answers, atol=0, rtol=4e-3)


def formula(query: Tensor, key: Tensor, value: Tensor, is_hidden: Tensor | None) -> Tensor:
    logits = torch.einsum("sgd,snd->sgn", query.double(), key.double()) / 4
    if is_hidden is not None:
        logits = logits.masked_fill(is_hidden, -torch.inf)
    return torch.einsum("sgn,snd->sgd", logits.softmax(-1), value.double())


def wide(states: Tensor) -> Tensor:
    """The same, as a slice of wider rows that come in another order."""
    padded = torch.cat([states, torch.full_like(states, torch.nan)], dim=-1)
    return padded.transpose(0, 1).contiguous().transpose(0, 1)[..., : states.shape[-1]]


def test_who_is_served() -> None:
    one, two = torch.randn(2, 8, 1, 16), torch.randn(2, 8, 2, 16)
    pairs, few = torch.randn(2, 8, 300, 16), torch.randn(2, 8, 30, 16)
    assert can_attend_once(one, pairs, pairs)
    assert not can_attend_once(two, pairs, pairs) and not can_attend_once(one, few, few)
    assert can_attend_once(one.half(), pairs.half(), pairs.half())
    assert not can_attend_once(one.double(), pairs.double(), pairs.double())
    assert not can_attend_once(one.requires_grad_(), pairs, pairs)
    with torch.no_grad():
        assert can_attend_once(one, pairs, pairs)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
@pytest.mark.parametrize("press", [None, KnormPress(0.5), AdaKVPress(KnormPress(0.5), 0.0)])
@pytest.mark.parametrize("inference", [False, True])
def test_models_answer_as_with_fused_attention(name: str, press: BasePress | None, inference: bool) -> None:
    model, ids, later = tiny(name), tokens(2, 90), tokens(2, 8, seed=1)
    mask = torch.ones(2, 98, dtype=torch.long)
    mask[1, :30] = 0
    answers = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode() if inference else torch.no_grad():
        for fewest in (10_000, 1):
            patch.setattr(one_token, "_FEWEST", fewest)
            past, logits = PressedCache(press), []
            model(ids, attention_mask=mask[:, :90], **cache_argument(past))
            for i in range(8):
                position = mask[:, : 91 + i].sum(-1)[:, None] - 1
                logits.append(
                    model(
                        later[:, i : i + 1],
                        attention_mask=mask[:, : 91 + i],
                        position_ids=position,
                        **cache_argument(past),
                    ).logits
                )
            answers.append(torch.cat(logits, dim=1))
    assert not torch.equal(*answers)  # they were computed in two ways
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)
