"""Everything at once: random caches and random programs of what one does with them, against a slow twin.

The twin holds every pair that was ever made, and attends with a mask of what the cache says that it still holds. What a
press ought to keep is not its business; that is in the tests of presses, pieces and schedules.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import VERSION, WINDOW, tiny, tokens
from tests.oracles.all_pairs import AllPairs
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVBits,
    LagKVPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.attend import one_token
from coldpress.cache.layer import PressedLayer
from coldpress.cache.session import Session
from coldpress.errors import CacheError, ColdpressError
from coldpress.models.prompts import pieces

ATTENTION = {name: "model.layers.{}.self_attn" for name in ("llama", "mistral", "gemma3")}
ATTENTION["gpt_neox"] = "gpt_neox.layers.{}.attention"
LENGTHS = [1, 2, 5, 7, 12, 13, 24, 36, 45, 56]  # of prompts, some of them whole pieces of CHUNKS
CHUNKS = [None, None, 1, 7, 12]
BITS = [None, None, KVBits(8, 4, 8), KVBits(8, 8, 0), KVBits(8, 4, 3)]
N_PROGRAMS, N_BATCHES, N_ANSWERS = 90, 45, 45


def seeds(n: int) -> Any:
    """Parametrizes ``seed`` with ``n`` numbers, of which ``make test`` takes the first half."""
    return pytest.mark.parametrize(
        "seed", [*range(n // 2), *(pytest.param(i, marks=pytest.mark.slow) for i in range(n // 2, n))]
    )


# -- random caches --------------------------------------------------------------------------------------------------


def a_scorer(r: random.Random, **budget: Any) -> ScorerPress:
    return r.choice(
        [
            KnormPress(**budget),
            KeyDiffPress(**budget),
            SnapKVPress(window_size=4, **budget),
            TOVAPress(**budget),
            StreamingLLMPress(**budget),
            ExpectedAttentionPress(n_sink=2, **budget),
            LagKVPress(lag_size=5, n_sink=2, **budget),
        ]
    )


def a_press(r: random.Random) -> BasePress | None:
    budget: dict[str, Any] = r.choice([{"compression_ratio": 0.5}, {"compression_ratio": 0.2}, {"budget_tokens": 18}])
    often: dict[str, Any] = {
        "compression_interval": r.choice([1, 3, 8]),
        "hidden_states_buffer_size": r.choice([0, 4, 32]),
    }
    threshold = r.choice([-1.5, -2.0, -3.0])
    dms = DMSPress(KnormPress(), threshold, sliding_window_size=r.choice([1, 6]), decoding=True)
    inner: ScorerPress = r.choice([a_scorer(r), AdaKVPress(a_scorer(r), 0.0), RandomPress(seed=1)])
    schedule = DecodingPress(inner, target_size=r.choice([6, 16, 30]), **often)
    return r.choice(
        [
            None,
            a_scorer(r, **budget),
            AdaKVPress(a_scorer(r, **budget)),
            CriticalAdaKVPress(SnapKVPress(window_size=4, **budget)),
            PyramidKVPress(0.5, window_size=4),
            schedule,
            schedule,
            CompressionRatioDecodingPress(a_scorer(r), **often),
            DMSPress(KnormPress(), threshold, sliding_window_size=6),
            dms,
            PrefillDecodingPress(AdaKVPress(a_scorer(r, **budget)), schedule),
            PrefillDecodingPress(a_scorer(r, **budget), r.choice([schedule, dms])),
        ]
    )


def a_cache(r: random.Random) -> tuple[BasePress | None, dict[str, Any]]:
    """A press and the options of a cache that go together."""
    while True:
        press = a_press(r)
        options = {
            "chunk_tokens": r.choice(CHUNKS),
            "positions": r.choice(["original", "original", "rerotate"]),
            "kv_bits": r.choice(BITS),
        }
        try:
            PressedCache(press, **options)
        except ColdpressError:
            continue
        return press, options


def draw(r: random.Random, *shape: int) -> Tensor:
    return tokens(*shape, seed=r.randrange(2**31))


def places(mask: Tensor, n: int) -> Tensor:
    """Position ids of the last ``n`` tokens, as generate has them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -n:]


def is_local(name: str, index: int) -> bool:
    return name == "gemma3" and index % 2 == 0


# -- the twin -------------------------------------------------------------------------------------------------------


class Twin(AllPairs):
    """Follows a cache: holds what that says it holds, and checks its keys and values."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.stays: dict[int, Tensor] = {}  # bool [B, Hkv, T], what a press that judges tokens has said of them

    def each(self, change: Any) -> None:
        super().each(change)
        self.stays = {i: change(stays) for i, stays in self.stays.items()}

    def hear(self, verdicts: dict[int, Tensor]) -> None:
        """Note what the press has said of the newest tokens; those that it was not asked about stay."""
        for i, held in self.held.items():
            before = self.stays.get(i, held[..., :0])
            unasked = torch.ones(*held.shape[:2], held.shape[2] - before.shape[2], dtype=torch.bool)
            self.stays[i] = torch.cat([before, verdicts.get(i, unasked)], 2)

    def hidden(self, i: int, n_waiting: int) -> Tensor:
        """Which tokens a row alone would have freed, bool ``[B, Hkv, T]``: they may be held for other rows' sake."""
        n_since = self.mask.flip(-1).cumsum(-1).flip(-1)  # real tokens from each one on
        return ~self.stays[i] & (n_since > n_waiting)[:, None]

    def follow(self, past: PressedCache) -> None:
        """Hold what ``past`` says it holds; its keys and values have to be those that were made, or near to them."""
        for i, layer in enumerate(past.pressed_layers()):
            at = layer.positions()
            is_held = at >= 0
            if past.press is not None and past.press.n_waiting:
                is_held &= ~self.hidden(i, past.press.n_waiting).gather(2, at.clamp(min=0))
            n = self.keys[i].shape[2]
            held = torch.zeros(*at.shape[:2], n + 1, dtype=torch.bool).scatter_(2, at.where(is_held, n), True)[..., :n]
            assert not (held & ~self.held[i]).any()  # nothing comes back
            assert (held.sum(-1) == is_held.sum(-1)).all()  # nothing is there twice
            assert all((own[own >= 0].diff() > 0).all() for row in at for own in row)
            if past.session.rerotates and not is_local(self.name, i):
                self._close_up(i, held)
            self.held[i] = held
            assert layer.keys is not None and layer.values is not None
            is_real = is_held & self.mask[:, None].expand(*at.shape[:2], -1).gather(2, at.clamp(min=0))
            for own, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
                index = at.clamp(min=0)[..., None].expand(-1, -1, -1, theirs.shape[3])
                off = (own[i].gather(2, index) - theirs)[is_real].abs()
                limit = 1e-4 if past.kv_bits is None else 0.02 * float(own[i].abs().max())
                assert off.numel() == 0 or off.max() < (2e-3 if past.session.rerotates else 0) + limit
            self._take(i, layer, is_real)

    def _close_up(self, i: int, held: Tensor) -> None:
        rope = Session().rope(tiny(self.name).get_submodule(ATTENTION[self.name].format(i)), torch.device("cpu"))
        assert rope is not None
        gone = self.held[i] & ~held & self.mask[:, None]
        moves = (gone.flip(-1).cumsum(-1).flip(-1) - gone.long()) * held
        self.keys[i] = rope.turn(self.keys[i], moves).where((moves > 0)[..., None], self.keys[i])

    def _take(self, i: int, layer: PressedLayer, is_real: Tensor) -> None:
        """From here on with the very numbers that are held, which may be rounded."""
        assert layer.keys is not None and layer.values is not None
        rows, heads, slots = is_real.nonzero(as_tuple=True)
        at = layer.positions()[rows, heads, slots]
        for own, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            own[i] = own[i].clone()
            own[i][rows, heads, at] = theirs[rows, heads, slots]


def content(past: PressedCache) -> list[Any]:
    """What a cache holds, and how far it has read. What it remembers beside that shows in what it does next."""
    found: list[Any] = []
    for layer in past.pressed_layers():
        for tensor in (layer.positions(), layer.keys, layer.values):
            assert tensor is not None
            found.append(tensor.clone())
    return [*found, past.seen_tokens, past.achieved_ratio()]


def check_same(actual: list[Any], expected: list[Any], atol: float = 0.0) -> None:
    for own, other in zip(actual, expected, strict=True):
        if isinstance(own, Tensor):
            torch.testing.assert_close(own, other, atol=atol, rtol=0)
        assert isinstance(own, Tensor) or own == other


# -- random programs ------------------------------------------------------------------------------------------------


class Program:
    """One cache, its twin, and what may be done with them."""

    def __init__(self, seed: int, folder: Path):
        self.r, self.folder = random.Random(seed), folder
        self.name = self.r.choice(list(ATTENTION))
        self.model, self.twin = tiny(self.name), Twin(self.name)
        press, options = a_cache(self.r)
        self.past = PressedCache(press, **options)
        self.mask = torch.ones(0)

    def run(self) -> None:
        with self.r.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
            self.prompt()
            for _ in range(self.r.randrange(4, 10)):
                getattr(self, self.r.choice(["turn", "turn", "answer", "answer", "split", "split", *OTHER_STEPS]))()
                self.check_bytes()

    def read(self, ids: Tensor, mask: Tensor, past: PressedCache | None = None) -> Tensor:
        logits: Tensor = self.model(
            ids,
            attention_mask=mask,
            position_ids=places(mask, ids.shape[1]),
            **cache_argument(self.past if past is None else past),
        ).logits
        return logits

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask
        VERDICTS.clear()
        logits, verdicts = self.read(ids, mask), dict(VERDICTS)
        off = logits - self.twin.read(ids, mask)
        self.twin.hear(verdicts)
        off = off[mask[:, -ids.shape[1] :].bool()].abs()  # NaN is no smaller than anything
        assert off.numel() == 0 or off.max() < (5e-3 if self.past.session.rerotates else 1e-3)
        self.twin.follow(self.past)
        return logits

    def longer(self, n: int, rows: int) -> Tensor:
        """The mask with ``n`` more tokens, some of which may be padding."""
        new = torch.ones(rows, n, dtype=torch.long)
        side = self.r.choice(["none", "left", "right"]) if n > 1 else "none"
        for row in new[1:] if side != "none" else ():
            n_padding = self.r.randrange(n)
            row[slice(n_padding) if side == "left" else slice(n - n_padding, None)] = 0
        return torch.cat([self.mask.long(), new], 1) if self.mask.numel() else new

    def prompt(self) -> None:
        self.twin, self.mask = Twin(self.name), torch.ones(0)
        ids = draw(self.r, self.r.choice([1, 3]), self.r.choice(LENGTHS))
        mask = self.longer(ids.shape[1], ids.shape[0])
        self.past.session.prefill_end = ids.shape[1]  # as prefill() does, so that the twin can follow each piece
        for start, stop in pieces(ids.shape[1], self.past.chunk_tokens):
            self.step(ids[:, start:stop], mask[:, :stop])
        self.past.session.prefill_end = None

    def turn(self, n: int | None = None) -> None:
        n = self.r.randrange(2, 9) if n is None else n
        self.step(draw(self.r, len(self.mask), n), self.longer(n, len(self.mask)))

    def answer(self) -> None:
        for _ in range(self.r.randrange(1, 12)):
            self.turn(1)

    def split(self) -> None:
        """A copy goes on as the original does, and neither sees what the other reads."""
        how = self.r.choice(["fork", "file", "pickle", "copy"])
        if how == "fork":
            other = self.past.fork()
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(self.past))
        elif how == "copy":
            other = copy.deepcopy(self.past)
        else:
            self.past.save(self.folder / "cache", self.model, attention_mask=self.mask)
            other = PressedCache.load(self.folder / "cache", self.model)
        check_same(content(other), content(self.past))
        aside, before = other.fork(), content(other)
        n = self.r.choice([1, 3, 5])
        for _ in range(3):  # most schedules come due once
            ids, mask = draw(self.r, len(self.mask), n), self.longer(n, len(self.mask))
            logits = self.read(ids, mask, other)
            torch.testing.assert_close(self.step(ids, mask), logits, atol=1e-4, rtol=0)
            check_same(content(other), content(self.past), atol=1e-4)  # heads may be laid out otherwise in memory
        check_same(content(aside), before)
        self.past = self.r.choice([self.past, other])

    def crop(self) -> None:
        n, before = self.r.choice([1, 2, 5, 20]), content(self.past)
        seen = self.past.seen_tokens
        try:
            self.past.crop(-n)
        except CacheError:
            check_same(content(self.past), before)
            return
        assert self.past.seen_tokens == seen - n
        if n == seen:
            self.prompt()
            return
        self.mask = self.mask[:, : seen - n]
        self.twin.each(lambda states: states[:, :, : seen - n])
        self.twin.mask = self.mask.bool()
        self.twin.follow(self.past)
        self.turn(self.r.choice([1, 4]))

    def rows(self) -> None:
        rows = torch.tensor([self.r.randrange(len(self.mask)) for _ in range(self.r.randrange(1, 5))])
        how = self.r.choice([self.past.reorder_cache, self.past.batch_select_indices, None])
        if how is not None:
            how(rows)
        elif len(self.mask) <= 3:
            rows = torch.arange(len(self.mask)).repeat_interleave(2)
            self.past.batch_repeat_interleave(2)
        else:
            return
        self.mask = self.mask[rows]
        self.twin.each(lambda states: states[rows])
        self.twin.mask = self.mask.bool()
        self.twin.follow(self.past)
        self.turn(self.r.choice([1, 4]))

    def refused(self) -> None:
        before, n = content(self.past), len(self.mask)
        with pytest.raises(CacheError, match=r"holds .* rows|attention_mask has"):
            if self.r.random() < 0.5:
                self.model(tokens(n + 1, 2), **cache_argument(self.past))
            else:
                ones = torch.ones(n, self.past.seen_tokens + 3)
                self.model(tokens(n, 2), attention_mask=ones, **cache_argument(self.past))
        check_same(content(self.past), before)
        self.turn(self.r.choice([1, 4]))

    def reset(self) -> None:
        self.past.reset()
        assert self.past.seen_tokens == self.past.kv_bytes() == 0
        self.prompt()

    def check_bytes(self) -> None:
        """What is held, and room for no more than some tokens."""
        n_bytes = 0
        for layer in self.past.pressed_layers():
            assert layer.keys is not None and layer.values is not None
            n_rows, n_heads, _, dim = layer.keys.shape
            per_pair = (dim + layer.values.shape[3]) * 4
            n_bytes += (int((layer.positions() >= 0).sum()) * 5 // 4 + n_rows * n_heads * 200) * per_pair
        assert self.past.kv_bytes() <= n_bytes


OTHER_STEPS = ["crop", "rows", "refused", "reset"]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Single tokens go through the products of one_token.py, which are else for more pairs than a test holds."""
    monkeypatch.setattr(one_token, "_FEWEST", 1)
    yield monkeypatch


VERDICTS: dict[int, Tensor] = {}  # by layer of the model, of the call that is running


@pytest.fixture
def overheard() -> Iterator[None]:
    """What a press that judges tokens says of them is noted."""
    judge = DMSPress.judge

    def heard(press: DMSPress, view: LayerView) -> Tensor:
        VERDICTS[view.module.layer_idx] = judge(press, view)  # type: ignore[index]
        return VERDICTS[view.module.layer_idx]  # type: ignore[index]

    with pytest.MonkeyPatch.context() as patch:  # one of its own: at_once may be undone
        patch.setattr(DMSPress, "judge", heard)
        yield


@pytest.mark.usefixtures("overheard")
@seeds(N_PROGRAMS)
@pytest.mark.thinned(7)
def test_programs(seed: int, tmp_path: Path, at_once: pytest.MonkeyPatch) -> None:
    if seed % 2:
        at_once.undo()
    torch.manual_seed(seed)
    Program(seed, tmp_path).run()


# -- rows of a batch ------------------------------------------------------------------------------------------------


def positions_of(past: PressedCache, mask: Tensor, row: int, index: int, first: int) -> list[list[int]]:
    """What each head of a row holds, counted in its real tokens, from the ``first`` of them on."""
    rank = mask[row].cumsum(-1) - 1
    heads = [own[own >= 0] for own in past.positions(index)[row]]
    return [[p for p in rank[own[mask[row][own] > 0]].tolist() if p >= first] for own in heads]


@seeds(N_BATCHES)
@torch.no_grad()
@pytest.mark.thinned(5)
def test_rows_with_padding_are_what_they_are_alone(seed: int, at_once: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    if seed % 2:
        at_once.undo()
    name = r.choice(list(ATTENTION))
    model = tiny(name)
    press, options = a_cache(r)
    while "KeyDiff" in repr(press):  # two keys are equally far from their mean
        press, options = a_cache(r)
    if press is None and options["kv_bits"]:  # in pieces, padding would be quantised along with the rest
        options["chunk_tokens"] = None
    n = r.choice(LENGTHS)
    lengths = [n, r.randrange(1, n + 1), r.randrange(1, n + 1)]
    ids = draw(r, 3, n)
    mask = torch.stack([torch.arange(n) >= n - length for length in lengths]).long()
    past, *alone = (PressedCache(press, **options) for _ in range(4))
    limit = 5e-4
    if options["kv_bits"]:  # a number between two codes may get either, and what a window forgets moves the groups
        limit = 0.6 if name in ("mistral", "gemma3") else 0.05
    elif options["positions"] == "rerotate":
        limit = 5e-3
    logits = prefill(model, ids, past, attention_mask=mask).logits[:, -1]
    for row, own in enumerate(alone):
        assert (
            logits[row] - prefill(model, ids[row : row + 1, n - lengths[row] :], own).logits[0, -1]
        ).abs().max() < limit
    for _ in range(r.randrange(1, 12)):
        n = r.choice([1, 1, 1, 6])
        ids, new = draw(r, 3, n), torch.ones(3, n, dtype=torch.long)
        if (
            n > 1 and not options["kv_bits"] and (press is None or not press.evicts_while_decoding)
        ):  # these count padding too
            new[1, : r.randrange(n)] = 0
        mask = torch.cat([mask, new], 1)
        logits = model(ids, attention_mask=mask, position_ids=places(mask, n), **cache_argument(past)).logits
        for row, own in enumerate(alone):
            is_real = new[row].bool()
            expected = model(ids[row : row + 1, is_real], **cache_argument(own)).logits[0]
            assert (logits[row, is_real] - expected).abs().max() < limit
            for layer in past.pressed_layers():
                i, ones = layer.index, torch.ones(1, own.seen_tokens, dtype=torch.long)
                first = own.seen_tokens - WINDOW + 1 if name == "mistral" or is_local(name, i) else 0
                assert positions_of(past, mask, row, i, first) == positions_of(own, ones, 0, i, first)


# -- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@seeds(N_ANSWERS)
def test_answers(seed: int, at_once: pytest.MonkeyPatch) -> None:
    """A fork generates what its original does, and greedy generation is a loop."""
    r = random.Random(seed)
    if seed % 2:
        at_once.undo()
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16])
    model = tiny(r.choice(list(ATTENTION)), r.choice(["coldpress", "coldpress_eager"]), dtype)
    press, cache = a_cache(r)
    chunk = cache["chunk_tokens"]
    n_rows, n = r.choice([1, 3]), r.choice(LENGTHS)
    ids, mask = draw(r, n_rows, n), torch.ones(n_rows, n, dtype=torch.long)
    for row in mask[1:] if r.random() < 0.5 else ():
        row[: r.randrange(n)] = 0
    how = r.choice(["greedy", "greedy", "beams", "sampled", "several"])
    options: dict[str, Any] = {
        "max_new_tokens": r.choice([1, 2, 14]),
        "do_sample": how in ("sampled", "several"),
        "num_beams": 2 if how == "beams" else 1,
        "num_return_sequences": 2 if how == "several" else 1,
        "attention_mask": mask,
        "use_cache": True,
    }
    is_prefilled = n > 1 and r.random() < 0.5
    if chunk is not None and VERSION < (5, 0):  # whose beams ignore prefill_chunk_size, and whose pieces have padding
        is_prefilled = n > 1
    elif chunk is not None and not is_prefilled:
        options["prefill_chunk_size"] = chunk
    past, again = PressedCache(press, **cache), PressedCache(press, **cache)
    if press is not None and chunk is not None and not is_prefilled and min(n, chunk) == 1:
        with pytest.raises(CacheError, match="a single token first"):
            model.generate(ids, **cache_argument(past), **options)
        return
    with r.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
        for each in (past, again) if is_prefilled else ():
            prefill(model, ids[:, :-1], each, attention_mask=mask[:, :-1])
        fork = past.fork()
        for each in (past, fork) if is_prefilled and how in ("beams", "several") else ():
            each.batch_repeat_interleave(2)
        torch.manual_seed(seed)
        said = model.generate(ids, **cache_argument(past), **options)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(ids, **cache_argument(fork), **options), said)
        assert said.shape == (n_rows * options["num_return_sequences"], n + options["max_new_tokens"])
        if how == "greedy" and dtype == torch.float32:
            starts = [n - 1] if is_prefilled else range(0, n, chunk or n)
            for start, stop in zip(starts, [*starts[1:], n], strict=True):
                given = {"attention_mask": mask[:, :stop], "position_ids": places(mask, n)[:, start:stop]}
                logits = model(ids[:, start:stop], **cache_argument(again), **given).logits[:, -1]
            for _ in range(options["max_new_tokens"]):
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                given = {"attention_mask": mask, "position_ids": places(mask, 1)}
                logits = model(ids[:, -1:], **cache_argument(again), **given).logits[:, -1]
            assert torch.equal(ids, said)
