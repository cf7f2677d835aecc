"""A mask hides what it says it hides, kept pairs included: against attention by hand over the pairs that are held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import WINDOW, tiny, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    KVBits,
    PressedCache,
    SnapKVPress,
    StreamingLLMPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.attend import one_token
from coldpress.errors import CacheError

PRESSES: list[BasePress | None] = [
    None,
    KnormPress(0.5),
    SnapKVPress(0.6, window_size=4),
    StreamingLLMPress(budget_tokens=9),
    AdaKVPress(KnormPress(0.6), 0.0),
    AdaKVPress(SnapKVPress(0.3, window_size=3), 0.1),
    DecodingPress(KnormPress(), 2, 12, 4),
    DecodingPress(AdaKVPress(SnapKVPress(window_size=2)), 3, 9, 6),
]
ALLOWED: dict[int, Tensor] = {}  # by layer: bool [B, Hkv, Q, T], what the slow twin's queries see


def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any) -> Any:
    group = query.shape[1] // key.shape[1]
    key, value, allowed = (each.repeat_interleave(group, dim=1) for each in (key, value, ALLOWED[module.layer_idx]))
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("by_hand", by_hand)
AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)


class Twins:
    """A PressedCache, and a DynamicCache whose attention sees of each head the pairs that the other one holds."""

    def __init__(self, model: str, past: PressedCache, rows: int):
        self.model, self.past, self.slow = model, past, DynamicCache()
        self.shown = torch.ones(rows, 0, dtype=torch.bool)  # tokens that some call was shown: they have a place

    @property
    def n(self) -> int:
        return self.shown.shape[1]

    def allow(self, n_new: int, mask: Tensor) -> None:
        """Let the twin's next ``n_new`` queries see what is held and neither hidden nor out of the window."""
        n, total = self.n, self.n + n_new
        self.shown = torch.cat([self.shown | mask[:, :n], mask[:, n:]], 1)
        window = WINDOW if self.model == "mistral" else total
        column = torch.arange(total)
        rank = self.shown.cumsum(1) - 1
        near = rank[:, None, :] > rank[:, n:, None] - window  # [B, Q, T]
        visible = mask[:, None] & near & (column <= column[n:, None])
        for i in range(2):
            held = torch.ones(*visible.shape[:1], 1, n, dtype=torch.bool)
            if n:
                at = self.past.positions(i)
                held = torch.zeros(*at.shape[:2], n + 1, dtype=torch.bool).scatter(2, at % (n + 1), True)[..., :n]
            held = torch.cat([held, held.new_ones(*held.shape[:2], n_new)], 2)
            seen = visible[:, None] & held[:, :, None]
            seen = seen | (~seen.any(-1, keepdim=True) & (column == column[n:, None]))
            ALLOWED[i] = seen.expand(-1, tiny(self.model).model.config.num_key_value_heads, -1, -1)

    def add(self, ids: Tensor, mask: Tensor | None) -> None:
        """Feed both, and compare what they say of the tokens that are not padding."""
        given = {} if mask is None else {"attention_mask": mask.long()}
        mask = torch.ones(ids.shape[0], self.n + ids.shape[1], dtype=torch.bool) if mask is None else mask
        self.allow(ids.shape[1], mask)
        expected = tiny(self.model, "by_hand")(ids, **cache_argument(self.slow)).logits
        actual = tiny(self.model)(ids, **given, **cache_argument(self.past)).logits
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)

    def turn(self, rows: Tensor) -> None:
        self.past.reorder_cache(rows)
        self.slow.reorder_cache(rows)
        self.shown = self.shown[rows]


@dataclass(frozen=True)
class Run:
    """Calls of one batch: how many tokens each brings, and a mask of what it sees of all tokens so far."""

    model: str
    press: BasePress | None
    kv_bits: KVBits | None
    calls: list[int]
    masks: list[Tensor | None]
    forks: bool
    rows: list[int]  # the order of the rows after the second call
    fewest: int  # pairs from which on one token goes the way of one_token.py


@st.composite
def runs(draw: st.DrawFn) -> Run:
    rows, press = draw(st.integers(1, 3)), draw(st.sampled_from(PRESSES))
    can_be_coded = press is None or not press.evicts_while_decoding
    calls = [draw(st.integers(8, 40)), *draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5]), min_size=2, max_size=7))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    real, masks, n = torch.ones(rows, sum(calls), dtype=torch.bool), [], 0
    for row in range(rows):
        before, after = draw(st.sampled_from([(0, 0), (0, 0), (5, 0), (0, 6), (2, 3)]))
        real[row, :before] = real[row, calls[0] - after : calls[0]] = False
    for n_new in calls:
        n += n_new
        kind = draw(
            st.sampled_from(["padding", "padding", "hides", "hides more", "none"] if n > n_new else ["padding"])
        )
        kept = {"padding": 1.0, "hides": 0.8, "hides more": 0.2, "none": 1.0}[kind]
        chosen = torch.rand(rows, n, generator=generator) < kept
        masks.append(None if kind == "none" else real[:, :n] & chosen)
    return Run(
        model=draw(st.sampled_from(["llama", "mistral"])),
        press=press,
        kv_bits=KVBits(8, residual_tokens=999) if can_be_coded and draw(st.booleans()) else None,
        calls=calls,
        masks=masks,
        forks=draw(st.booleans()),
        rows=draw(st.permutations(list(range(rows)))),
        fewest=draw(st.sampled_from([1, 256])),
    )


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@settings(max_examples=40)
@given(run=runs())
def test_masks_hide_what_they_say(run: Run) -> None:
    twins = Twins(run.model, PressedCache(run.press, kv_bits=run.kv_bits), len(run.rows))
    order = torch.arange(len(run.rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_token, "_FEWEST", run.fewest)
        for i, (n, mask) in enumerate(zip(run.calls, run.masks, strict=True)):
            if i == 2:
                order = torch.tensor(run.rows)
                twins.turn(order)
            if run.forks:
                twins.past = twins.past.fork()
            twins.add(tokens(len(run.rows), n, seed=i), None if mask is None else mask[order])


@pytest.mark.parametrize("model", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("pieces", [[1] * 12, [9, 1, 2]])
def test_without_a_press_masks_do_what_they_do_to_a_dynamic_cache(
    model: str, dtype: torch.dtype, rows: int, pieces: list[int]
) -> None:
    """From the very first token on, whatever the dtype of the mask; new tokens may be hidden too."""
    past, own, end = PressedCache(), DynamicCache(), 0
    hides = torch.rand(rows, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    hides[:, 0] = False  # a query that sees nothing is of no account
    for piece in pieces:
        ids, end = tokens(rows, piece, seed=end), end + piece
        mask = (~hides[:, :end]).to(dtype)
        expected = tiny(model, "sdpa")(ids, attention_mask=mask, **cache_argument(own)).logits
        actual = tiny(model)(ids, attention_mask=mask, **cache_argument(past)).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_padded_prompt_token_by_token(rows: int) -> None:
    """Read in pieces of one token, and by hand: what the row without its padding gives."""
    ids, mask = tokens(rows, 20), torch.ones(rows, 20, dtype=torch.long)
    mask[0, :7] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for chunk, press in ((None, None), (1, None), (1, KnormPress(budget_tokens=6))):
        past, alone = (PressedCache(press, chunk_tokens=chunk) for _ in range(2))
        expected = prefill(tiny("llama"), ids[:1, 7:], alone).logits[0, -1]
        if chunk is None:
            for i in range(20):
                out = tiny("llama")(
                    ids[:, i : i + 1],
                    attention_mask=mask[:, : i + 1],
                    position_ids=at[:, i : i + 1],
                    **cache_argument(past),
                )
        else:
            out = prefill(tiny("llama"), ids, past, mask)
        torch.testing.assert_close(out.logits[0, -1], expected, atol=1e-4, rtol=0)


def test_a_mask_that_hides_kept_pairs_of_a_prompt_in_pieces() -> None:
    past, n = PressedCache(AdaKVPress(KnormPress(0.5), 0.0), chunk_tokens=8), 30
    prefill(tiny("llama"), tokens(1, n), past)
    twin, mask = past.fork(), torch.ones(1, n + 1, dtype=torch.long)
    mask[0, : n // 2] = 0
    for layer in twin.pressed_layers():
        at = layer.positions()
        slots = [(row >= n // 2).nonzero()[:, 0] for row in at[0]]
        longest = max(len(own) for own in slots)
        layer.keep(
            torch.stack([torch.nn.functional.pad(own, (0, longest - len(own)), value=-1) for own in slots])[None]
        )
    actual, expected = (
        tiny("llama")(tokens(1, 1), attention_mask=given, **cache_argument(cache)).logits
        for cache, given in ((past, mask), (twin, None))
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_mask_that_changes_in_place() -> None:
    """What was shown is remembered, not the tensor that said so."""
    past, mask = PressedCache(KnormPress(0.5)), torch.ones(1, 26, dtype=torch.bool)
    mask[0, 3] = False
    for end in (24, 25):
        tiny("llama")(tokens(1, 1 if end > 24 else 24), attention_mask=mask[:, :end], **cache_argument(past))
    shown = tiny("llama")(tokens(1, 1), attention_mask=mask, **cache_argument(past.fork())).logits
    mask[0, 5:20] = False
    assert not torch.allclose(tiny("llama")(tokens(1, 1), attention_mask=mask, **cache_argument(past)).logits, shown)


def test_a_loaded_cache_knows_its_padding(tmp_path: Any) -> None:
    """What a mask hides after loading, and what it only leaves out because it always was padding."""
    model, past, mask = tiny("llama"), PressedCache(KnormPress(0.5)), torch.ones(2, 25, dtype=torch.long)
    mask[1, :9] = 0
    model(tokens(2, 24), attention_mask=mask[:, :24], **cache_argument(past))
    past.save(tmp_path / "cache", model, mask[:, :24])
    loaded = PressedCache.load(tmp_path / "cache", model)
    for hides in (False, True):
        mask[:, 10:20] = int(not hides)
        answers = [
            model(tokens(2, 1), attention_mask=mask, **cache_argument(cache.fork())).logits for cache in (past, loaded)
        ]
        assert torch.equal(*answers)
    assert not torch.equal(answers[0], model(tokens(2, 1), **cache_argument(past)).logits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 6), "has 1 rows and the call 2"),
        (torch.ones(3, 6), "has 3 rows and the call 2"),
        (torch.ones(6), r"2-D attention masks.*\(6,\)"),
        (torch.ones(2, 1, 6), r"2-D attention masks.*\(2, 1, 6\)"),
        (torch.ones(2, 1, 6, 6), "2-D attention masks"),
        (torch.ones(2, 1, 6, 6, dtype=torch.uint8), "2-D attention masks"),
    ],
)
def test_masks_of_other_shapes_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        tiny("llama")(tokens(2, 6), attention_mask=mask, **cache_argument(PressedCache()))
