"""Tasks under presses: equal to a slow computation, paired, resumed, and alarmed."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    BasePress,
    Kept,
    KeyDiffPress,
    KnormPress,
    KVBits,
    LayerView,
    PressedCache,
    RandomPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import make_press
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Ledger
from coldpress.eval.material import Material
from coldpress.eval.task_run import ExampleWork, TaskRun, match
from coldpress.eval.tasks import Example, make_examples
from coldpress.loading.models import LoadedModel, load_model
from coldpress.records.metrics import paired_difference

LENGTH = 96
Result = dict[str, Any]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def examples(demo: LoadedModel) -> list[Example]:
    return make_examples(Material(demo.tokenizer), ["niah_single", "vt", "repeat"], [LENGTH, 112], [0.0, 1.0], 2)


def measured(demo: LoadedModel, points: list[Point], examples: list[Example], **options: Any) -> list[Any]:
    run = TaskRun(demo.model, demo.tokenizer, points, examples, **options)
    run.run()
    assert run.is_complete
    return [result for _, result in run.results()]


def slowly(demo: LoadedModel, press: BasePress | None, example: Example) -> tuple[float, str]:
    """Nats a token of the answer, and what is answered, token by token, from a cache of its own for each of the two."""
    model, answers = demo.model, []
    question, answer = list(example.question_ids), list(example.answer_ids)
    for forced in (answer, None):
        cache = PressedCache(press)
        with torch.no_grad():
            if press is None:
                model(torch.tensor([example.context_ids]), **cache_argument(cache))
            else:
                with press(model):
                    model(torch.tensor([example.context_ids]), **cache_argument(cache))
            logits = model(torch.tensor([question]), **cache_argument(cache)).logits[0, -1]
            losses, said = [], []
            for i in range(len(answer) if forced else example.answer_tokens or 0):
                token = forced[i] if forced else int(logits.argmax())
                losses.append(-float(logits.log_softmax(-1)[token]))
                said.append(token)
                if not forced and len(example.references) == 1 and "\n" in demo.tokenizer.decode(said).lstrip("\n"):
                    break
                if token == 0:
                    break
                logits = model(torch.tensor([[token]]), **cache_argument(cache)).logits[0, -1]
        answers.append((sum(losses) / max(len(losses), 1), demo.tokenizer.decode(said, skip_special_tokens=True)))
    return answers[0][0], answers[1][1].strip()


@pytest.mark.parametrize("name", ["knorm", "adakv_snapkv", "kvzip", "compactor"])
@pytest.mark.thinned(5)
def test_a_press_answers_like_a_prefill_and_a_decoding_of_its_own(
    demo: LoadedModel, examples: list[Example], name: str
) -> None:
    few = [examples[4 if name == "knorm" else 0], examples[8]]
    press = make_press(name, 0.5)
    assert press is not None
    baseline, result = measured(demo, [Point(press)], few)
    prepared = press.prepared(demo.model, demo.tokenizer)
    for i, example in enumerate(few):
        for record, own in ((baseline, None), (result, prepared)):
            row = record["per_example"][i]
            nll, text = slowly(demo, own, example)
            assert row["answer_nll"] == pytest.approx(nll, rel=1e-4)
            assert row["n_tokens"] == len(example.answer_ids)
            if example.references:
                assert row["answer"] == (text if len(example.references) > 1 else text.partition("\n")[0])[:80]
        assert result["per_example"][i]["answer_nll_base"] == baseline["per_example"][i]["answer_nll"]
        assert result["per_example"][i]["answer_nll"] != baseline["per_example"][i]["answer_nll"]
    assert result["effective_compression_ratio"] == pytest.approx(0.5)
    assert result["kv_bytes_baseline"] == baseline["kv_bytes"] == 2 * 6 * 256 * 4 * LENGTH
    assert result["kv_len_before"] == LENGTH
    assert baseline["tasks"][0]["delta_answer_nll"] is None


def test_a_record_sums_up_its_examples(demo: LoadedModel, examples: list[Example]) -> None:
    _, result = measured(demo, [Point(RandomPress(0.5, seed=3))], examples)
    assert [(t["task"], t["length"], t["n"]) for t in result["tasks"]] == [
        (task, length, 2) for task in ("niah_single", "repeat", "vt") for length in (LENGTH, 112)
    ]
    for found in result["tasks"]:
        rows = [r for r in result["per_example"] if (r["task"], r["length"]) == (found["task"], found["length"])]
        counts = [row["n_tokens"] for row in rows]
        own, base = (
            [row[key] * n for row, n in zip(rows, counts, strict=True)] for key in ("answer_nll", "answer_nll_base")
        )
        assert found["answer_nll"] == pytest.approx(sum(own) / sum(counts))
        assert found["answer_nll_base"] == pytest.approx(sum(base) / sum(counts))
        paired = paired_difference(counts, own, base)
        assert found["delta_answer_nll"] == pytest.approx(paired.delta)
        assert found["delta_answer_nll_ci95"] == pytest.approx(paired.ci95)
        depths = [] if found["task"] == "vt" else [0.0, 1.0]
        assert [(d["depth"], d["n"]) for d in found["by_depth"]] == [(depth, 1) for depth in depths]
        for part in found["by_depth"]:
            (row,) = (row for row in rows if row["depth"] == part["depth"])
            assert part["answer_nll"] == pytest.approx(row["answer_nll"])
        is_probe = found["task"] == "repeat"
        assert is_probe == (found["score"] is None) == (found["delta_score_ci95"] is None)
        assert is_probe == (rows[0]["answer"] is None)


def test_scores_are_the_fraction_of_the_references_that_are_found() -> None:
    assert match(" It is 123, I think", ["123"]) == 1
    assert match("it is 12 3", ["123"]) == 0
    assert match("magnet, INK and candles", ["Magnet", "ink", "lamp", "candle"]) == 0.75


def test_a_model_that_answers_is_given_its_score(demo: LoadedModel, examples: list[Example]) -> None:
    """The baseline gets all right, and what it says after the first line does not count."""
    one, chain = examples[0], examples[4]
    run = TaskRun(demo.model, demo.tokenizer, [Point(KnormPress(0.5))], [one, chain])
    run.run()
    newline = demo.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for i, (example, key) in enumerate((e, k) for e in (one, chain) for k in (BASELINE.key, run.points[0].key)):
        index = i // 2
        said = [*newline, *example.answer_ids, *newline] if key == BASELINE.key else [*newline, *newline]
        run.done[index][key] = dataclasses.replace(run.done[index][key], answer_ids=said)
    (_, baseline), (_, result) = run.results()
    assert [row["score"] for row in baseline["per_example"]] == [1, 1]
    assert [(row["score"], row["score_base"]) for row in result["per_example"]] == [(0, 1), (0, 1)]
    assert baseline["per_example"][0]["answer"] == one.references[0]


def test_generation_ends_with_the_line_the_text_or_the_limit(demo: LoadedModel, examples: list[Example]) -> None:
    (example, *_), (chain,) = examples, [examples[4]]
    work = TaskRun(demo.model, demo.tokenizer, [], examples).work

    def answers(own: Example, tokens: list[int], limit: int | None = None) -> list[int]:
        feed = iter([*tokens, *[tokens[-1]] * 100])

        class Fake(torch.nn.Module):
            def forward(self, ids: Tensor, cache: Any = None, logits_to_keep: int = 0) -> Any:
                hot = torch.zeros(1, 1, 4096)
                hot[0, 0, next(feed)] = 1
                return type("Output", (), {"logits": hot})

        fake: Any = Fake()
        start = fake(torch.zeros(1, 1)).logits
        return dataclasses.replace(work, max_new_tokens=limit)._generate(fake, PressedCache(), own, start)

    (newline,) = demo.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert newline in work.newlines
    assert work.ends == {0}
    assert answers(example, [newline, 70, 71, newline, 72]) == [newline, 70, 71, newline]
    assert answers(example, [70, 0, 71]) == [70, 0]
    assert answers(example, [70]) == [70] * 16
    assert answers(example, [70], limit=3) == [70] * 3
    assert answers(chain, [70, newline, 71, 0]) == [70, newline, 71, 0]  # a list may have lines


def test_a_kept_span_is_copied_and_a_lost_one_is_not(demo: LoadedModel) -> None:
    """StreamingLLM keeps the newest half: a span at the end is still there, one at 0.3 is gone."""
    examples = make_examples(Material(demo.tokenizer), ["repeat_text"], [256], [0.3, 1.0], 12)
    baseline, result = measured(demo, [Point(StreamingLLMPress(0.5))], examples)
    by_depth = {part["depth"]: part for part in result["tasks"][0]["by_depth"]}
    assert by_depth[1.0]["answer_nll"] < by_depth[1.0]["answer_nll_base"] + 0.3
    assert by_depth[0.3]["answer_nll"] > by_depth[0.3]["answer_nll_base"] + 1
    assert baseline["tasks"][0]["answer_nll"] < 3


def test_prompts_in_pieces(demo: LoadedModel, examples: list[Example]) -> None:
    one = measured(demo, [Point(KeyDiffPress(0.5))], examples[:1])
    baseline, pieces = measured(demo, [Point(KeyDiffPress(0.5))], examples[:1], chunk_tokens=32)
    assert baseline["per_example"][0]["answer_nll"] == pytest.approx(one[0]["per_example"][0]["answer_nll"], abs=1e-4)
    assert pieces["per_example"][0]["answer_nll"] != pytest.approx(one[1]["per_example"][0]["answer_nll"], abs=1e-4)


def test_bits_are_measured_beside_presses(demo: LoadedModel, examples: list[Example]) -> None:
    points = [Point(None, KVBits(2, residual_tokens=0)), Point(KnormPress(0.5))]
    _, bits, knorm = measured(demo, points, examples[:2])
    assert bits["kv_bytes"] < knorm["kv_bytes"] < bits["kv_bytes_baseline"]
    assert bits["tasks"][0]["delta_answer_nll"] != 0


# What goes wrong


@dataclass(frozen=True)
class Lazy(KnormPress):
    """Says it has compressed, and keeps all."""

    def compress(self, view: LayerView) -> Kept | None:
        return None


@dataclass(frozen=True)
class Failing(BasePress):
    calls: ClassVar[list[int]] = []

    def compress(self, view: LayerView) -> Kept | None:
        self.calls.append(1)
        raise RuntimeError("it broke")


@dataclass(frozen=True)
class FailingLater(KnormPress):
    """Fails after as many calls as ``calls`` had."""

    calls: ClassVar[list[int]] = []

    def score(self, view: LayerView) -> Tensor:
        if not self.calls:
            raise RuntimeError("it broke")
        self.calls.pop()
        return super().score(view)


def test_a_press_that_does_nothing_is_an_error(demo: LoadedModel, examples: list[Example]) -> None:
    _, result = measured(demo, [Point(Lazy(0.5))], examples[:2])
    assert isinstance(result, SelfCheckError)
    assert "pairs should have been stored" in str(result)


def test_losses_that_are_bit_for_bit_the_baseline_s_are_an_error(demo: LoadedModel, examples: list[Example]) -> None:
    run = TaskRun(demo.model, demo.tokenizer, [Point(KnormPress(0.5))], examples[:2])
    run.run()
    (point,) = run.points
    for done in run.done[:1]:
        done[point.key] = dataclasses.replace(done[point.key], losses=done[BASELINE.key].losses)
    _, (_, fine) = run.results()  # one answer of two may happen to agree
    assert not isinstance(fine, Exception)
    done = run.done[1]
    done[point.key] = dataclasses.replace(done[point.key], losses=done[BASELINE.key].losses)
    _, (_, error) = run.results()
    assert isinstance(error, SelfCheckError)
    assert "bit for bit" in str(error)


def test_a_press_that_fails_leaves_the_others_alone(demo: LoadedModel, examples: list[Example]) -> None:
    Failing.calls.clear()
    alone = measured(demo, [Point(KnormPress(0.5))], examples[:3])
    baseline, failed, fine = measured(demo, [Point(Failing()), Point(KnormPress(0.5))], examples[:3])
    assert str(failed) == "it broke"
    assert [baseline, fine] == alone
    assert len(Failing.calls) == 1  # and not asked again


def test_what_was_measured_before_a_failure_can_be_asked_for(demo: LoadedModel, examples: list[Example]) -> None:
    n_layers = demo.model.config.num_hidden_layers
    FailingLater.calls[:] = [1] * (2 * n_layers)
    run = TaskRun(demo.model, demo.tokenizer, [Point(FailingLater(0.5)), Point(KnormPress(0.5))], examples[:3])
    run.run()
    (baseline,), (found, error), (fine,) = run.parts().values()
    assert str(error) == "it broke"
    assert isinstance(found, dict) and len(found["per_example"]) == 2
    assert isinstance(baseline, dict) and isinstance(fine, dict)


def test_a_wrong_baseline_is_an_error(
    demo: LoadedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    import coldpress.eval.task_run as module

    whole = module.forward

    def shifted(model: PreTrainedModel, ids: Tensor, cache: PressedCache | None, keep: int = 0) -> Tensor:
        logits = whole(model, ids, cache, keep)
        return logits if cache is None else logits * 1.01

    monkeypatch.setattr(module, "forward", shifted)
    with pytest.raises(SelfCheckError, match="without a cache differ"):
        measured(demo, [], examples[:1])


# Resuming


class Killed(Exception):
    pass


class Counting:
    """An engine that counts what it does, and dies after so many items."""

    def __init__(self, model: PreTrainedModel, dies_after: int = 99):
        self.model, self.dies_after, self.done = model, dies_after, []

    def map(self, work: Any, items: Any) -> Iterator[Any]:
        for item in items:
            if len(self.done) == self.dies_after:
                raise Killed
            self.done.append((item.index, len(item.points)))
            yield item, pickle.loads(pickle.dumps(work))(self.model, pickle.loads(pickle.dumps(item)))


def test_an_interrupted_run_goes_on_where_it_was(demo: LoadedModel, examples: list[Example], tmp_path: Path) -> None:
    points, ledger = [Point(KnormPress(0.5)), Point(RandomPress(0.5))], Ledger(tmp_path / "all" / "one")
    expected = measured(demo, points, examples[:4])
    first = TaskRun(demo.model, demo.tokenizer, points[:1], examples[:4], ledger=ledger)
    with pytest.raises(Killed):
        first.run(engine=Counting(demo.model, 2))
    assert not first.is_complete
    assert [len(result["per_example"]) for _, result in first.results()] == [2, 2]
    second, engine = TaskRun(demo.model, demo.tokenizer, points, examples[:4], ledger=ledger), Counting(demo.model)
    second.run(engine=engine)
    assert engine.done == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert [result for _, result in second.results()] == expected
    third, engine = TaskRun(demo.model, demo.tokenizer, points, examples[:4], ledger=ledger), Counting(demo.model)
    third.run(engine=engine)
    assert engine.done == []
    assert [result for _, result in third.results()] == expected
    ledger.clear()
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_file_is_measured_again(
    demo: LoadedModel, examples: list[Example], tmp_path: Path
) -> None:
    ledger, points = Ledger(tmp_path / "one"), [Point(KnormPress(0.5))]
    expected = measured(demo, points, examples[:5], ledger=ledger)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 5
    whole = json.loads(files[1].read_text())
    key = next(iter(whole["found"]))
    files[0].write_text(files[0].read_text()[:40])
    files[1].write_text(json.dumps(whole | {"found": {key: whole["found"][key] | {"losses": ["0.5"]}}}))
    files[2].write_text("[]")
    files[3].write_text(files[4].read_text())
    run, engine = TaskRun(demo.model, demo.tokenizer, points, examples[:5], ledger=ledger), Counting(demo.model)
    run.run(engine=engine)
    assert [index for index, _ in engine.done] == [0, 1, 2, 3]
    assert [result for _, result in run.results()] == expected
    longer, engine = (
        TaskRun(demo.model, demo.tokenizer, points, examples[:5], ledger=ledger, max_new_tokens=2),
        Counting(demo.model),
    )
    longer.run(engine=engine)
    assert len(engine.done) == 5
    assert isinstance(longer.work, ExampleWork)
