"""Continuous decoding: answers of many texts in one batch, each as if it were alone; snapshots are made meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.running import Running, running
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder

from coldpress import AdaKVPress, DecodingPress, KnormPress, PressedCache, QuestPress, SnapKVPress, Snapshots
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.joined import can_join
from coldpress.core.press import Press
from coldpress.loading.models import LoadedModel, load_model
from coldpress.serving import batch as batches
from coldpress.serving import reading
from coldpress.serving.aside import Aside
from coldpress.serving.batch import Batch, can_run_together
from coldpress.serving.reading import run, run_together
from coldpress.serving.service import Limits

PRESS = SnapKVPress(0.5, window_size=8)
TEXTS = [CONTEXT[: 150 + 60 * i] for i in range(4)]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    found = load_model(str(folder), device="cpu")
    found.model.generation_config.eos_token_id = []
    return found


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture
def rows(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each call of the model."""
    found: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        found.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[0])

    hook = loaded.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    hook.remove()


# The joined step


@pytest.mark.parametrize(
    ("press", "options"),
    [
        (None, {}),
        (SnapKVPress(0.5, window_size=8), {}),
        (AdaKVPress(SnapKVPress(0.6, window_size=8)), {}),  # heads that keep different numbers
        (KnormPress(0.5), {"kv_bits": 4}),
        (SnapKVPress(0.5, window_size=8), {"chunk_tokens": 16}),
        (QuestPress(page=4, read=0.25, dense_layers=0), {}),  # reads a part
    ],
    ids=["none", "snapkv", "adakv", "bits", "pieces", "quest"],
)
def test_rows_are_what_they_are_alone(loaded: LoadedModel, press: Press | None, options: dict[str, Any]) -> None:
    """Rows of different lengths that enter and leave, against each one decoded by itself."""
    model = loaded.model
    snapshots = Snapshots(model, loaded.tokenizer, press, **options)
    alone = [snapshots.add(text).fork() for text in TEXTS]
    joined = [cache.fork() for cache in alone]
    assert len({cache.seen_tokens for cache in joined}) == len(TEXTS)
    tokens = [3, 5, 7, 11]
    for there in ([0, 1], [0, 1, 2], [1, 2, 3], [3, 1], [0, 1, 2, 3]):
        expected = torch.cat([run(model, alone[i], [tokens[i]]) for i in there])
        found = run_together(model, [joined[i] for i in there], [tokens[i] for i in there])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        for i, logits in zip(there, expected, strict=True):
            tokens[i] = int(logits.argmax())
    assert [cache.seen_tokens for cache in joined] == [cache.seen_tokens for cache in alone]
    assert [cache.stored_lengths() for cache in joined] == [cache.stored_lengths() for cache in alone]


def test_snapshots_are_left_alone(loaded: LoadedModel) -> None:
    """Rows that fork one snapshot write to none of its tensors, and not to each other's."""
    snapshot = Snapshots(loaded.model, loaded.tokenizer, PRESS).add(CONTEXT)
    first = snapshot.fork()
    before = [tensor.clone() for layer in first.pressed_layers() for tensor in layer.tensors()]
    rows = [snapshot.fork() for _ in range(3)]
    for _ in range(3):
        run_together(loaded.model, rows, [1, 2, 3])
    after = [tensor for layer in first.pressed_layers() for tensor in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(rows[0].layer(0).keys[:, :, -1], rows[1].layer(0).keys[:, :, -1])  # type: ignore[index]


def test_what_cannot_be_joined(loaded: LoadedModel) -> None:
    ids = torch.arange(1, 40)[None]
    decoding, padded, empty = PressedCache(DecodingPress(KnormPress(), target_size=30)), PressedCache(), PressedCache()
    loaded.model(ids, **cache_argument(decoding))
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    loaded.model(ids, attention_mask=mask, **cache_argument(padded))
    assert not any(map(can_join, (decoding, padded, empty)))
    moved = PressedCache(positions="rerotate")
    loaded.model(ids, **cache_argument(moved))
    assert not can_join(moved)


def test_a_model_that_takes_no_positions_is_left_alone(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_run_together(loaded.model)

    def wrong(model: Any, caches: Any, tokens: Any) -> torch.Tensor:
        return reading.run_together(model, caches, tokens).roll(1, 0)

    monkeypatch.setattr(batches, "run_together", wrong)
    assert not can_run_together(loaded.model) and not Batch(loaded.model).is_joined
    monkeypatch.undo()
    part = next(part for part in loaded.model.modules() if hasattr(part, "rope_type"))
    monkeypatch.setattr(part, "rope_type", "dynamic")
    assert not can_run_together(loaded.model)


# Served


def ask(server: Running, **options: Any) -> dict[str, Any]:
    response = server.post("/v1/completions", options)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_answers_in_a_batch_are_those_alone(demo: LoadedModel) -> None:
    """Greedy and drawn, with stop texts and probabilities: the same, whoever else is served."""
    with running(demo, SnapKVPress(0.5), Limits(running=8)) as server:
        made = [server.add(text=text)["id"] for text in TEXTS]
        asked: list[dict[str, Any]] = []
        for i, snapshot in enumerate(made):
            more = {"snapshot": snapshot, "prompt": f" {QUESTIONS[i % 3]}", "max_tokens": 12 + 5 * i}
            asked.append({**more, "temperature": 0, "logprobs": 2})
            asked.append({**more, "seed": i, "n": 2, "stop": [" the", "\n"], "temperature": 0.7})
        alone = [ask(server, **one) for one in asked]
        n_rows: list[int] = []
        joined = batches.run_together

        def counted(model: Any, caches: Any, tokens: Any) -> torch.Tensor:
            n_rows.append(len(caches))
            return joined(model, caches, tokens)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
            patch.setattr(batches, "run_together", counted)
            together = list(pool.map(lambda one: ask(server, **one), asked))
    assert max(n_rows) > 4
    for own, found in zip(alone, together, strict=True):
        assert found["usage"] == own["usage"]
        for a, b in zip(own["choices"], found["choices"], strict=True):
            assert (a["text"], a["finish_reason"]) == (b["text"], b["finish_reason"])
            if a["logprobs"] is not None:
                assert b["logprobs"]["tokens"] == a["logprobs"]["tokens"]
                assert b["logprobs"]["token_logprobs"] == pytest.approx(a["logprobs"]["token_logprobs"], abs=1e-4)


def test_who_leaves_frees_a_row_at_once(loaded: LoadedModel, rows: list[int]) -> None:
    with running(loaded, PRESS, Limits(running=4)) as server:
        made = server.add(text=CONTEXT)["id"]
        long = {"snapshot": made, "prompt": " Who?", "max_tokens": 90, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=long) as first:
            parts = first.iter_lines()
            next(parts)
            with server.client.stream("POST", "/v1/completions", json=long) as second:
                next(second.iter_lines())
                ends = time.monotonic() + 10
                while 2 not in rows:
                    assert time.monotonic() < ends
                    time.sleep(0.002)
            del rows[:]
            list(parts)
        assert rows.count(1) > 0 and server.service.desk.n_running <= 1


def test_an_error_of_the_batch_ends_its_answers_and_no_other(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = batches.run_together

    def fails(model: Any, caches: Any, tokens: Any) -> torch.Tensor:
        joined(model, caches, tokens)
        raise RuntimeError("made up")

    with running(loaded, PRESS, Limits(running=4)) as server:
        monkeypatch.setattr(batches, "run_together", fails)
        asked = {"prompt": "Who?", "max_tokens": 60}
        with ThreadPoolExecutor(3) as pool:
            replies = [pool.submit(server.post, "/v1/completions", asked) for _ in range(3)]
            assert 500 in {reply.result().status_code for reply in replies}
        monkeypatch.undo()
        assert len(ask(server, **asked)["choices"]) == 1


# Aside


def test_answers_go_on_while_a_snapshot_is_made(demo: LoadedModel) -> None:
    """A snapshot whose press wants the whole text in one call is left between its layers."""
    with running(demo, SnapKVPress(0.5), Limits(running=2)) as server:
        order: list[str] = []
        with ThreadPoolExecutor(1) as pool:
            parts = {"prompt": "Who?", "max_tokens": 300, "stream": True, "temperature": 0.5}
            with server.client.stream("POST", "/v1/completions", json=parts) as response:
                lines = response.iter_lines()
                next(lines)
                making = pool.submit(server.add, text=CONTEXT)
                making.add_done_callback(lambda _: order.append("made"))
                for _ in lines:
                    order.append("token")
                made = making.result()
        first, last = order.index("token"), order.index("made")
        assert first < last and made["tokens"] > 100
        expected = Snapshots(demo.model, demo.tokenizer, SnapKVPress(0.5)).add(CONTEXT)
        own = server.service.snapshots.get(made["id"])
        assert own is not None and own.id == expected.id
        for a, b in zip(own.fork().pressed_layers(), expected.fork().pressed_layers(), strict=True):
            assert a.keys is not None and b.keys is not None and torch.equal(a.keys, b.keys)


def test_a_task_is_left_between_layers_and_can_be_given_up(demo: LoadedModel) -> None:
    aside = Aside(demo.model)
    snapshots = Snapshots(demo.model, demo.tokenizer, KnormPress(0.5))
    names: list[str] = []
    task = aside.submit(lambda: (names.append(threading.current_thread().name), snapshots.add(CONTEXT)))
    n_steps = 0
    while not task.is_done:
        aside.go_on()
        n_steps += 1
        run(demo.model, PressedCache(), [1, 2, 3])  # in the middle of the other one's text
    n_layers = demo.model.config.num_hidden_layers
    assert names == ["coldpress-aside"] and n_steps == 2 * n_layers + 1
    assert task.taken()[1].tier == "memory"
    second = aside.submit(lambda: snapshots.add(CONTEXT + " More."))
    third = aside.submit(lambda: 7)
    aside.go_on()
    aside.drop(second)
    assert second.is_done and second.result is None and len(snapshots) == 1  # and no lock is held
    assert snapshots.add(CONTEXT + " More.").tier == "memory"
    aside.go_on()
    assert third.taken() == 7
    begun = aside.submit(lambda: snapshots.add(CONTEXT + " Most."))
    aside.go_on()
    aside.close()
    assert begun.is_done and not aside._thread.is_alive()
    failing = Aside(demo.model)
    failed = failing.submit(lambda: [][0])
    failing.go_on()
    with pytest.raises(IndexError):
        failed.taken()
    failing.close()


def test_it_rests_while_tokens_are_made(demo: LoadedModel) -> None:
    aside, done = Aside(demo.model), list[int]()
    for i in range(2):
        aside.submit(lambda i=i: (time.sleep(0.1), done.append(i)))
    aside.go_on(is_alone=False)
    aside.go_on(is_alone=False)
    assert done == [0]
    time.sleep(0.15)
    aside.go_on(is_alone=False)
    assert done == [0, 1]
    aside.close()
