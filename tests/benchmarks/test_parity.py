"""benchmarks/parity: what it takes for the same, and what it complains about. kvpress is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.parity import __main__ as parity_main
from benchmarks.parity import artefacts
from benchmarks.parity.__main__ import document, with_committed
from benchmarks.parity.case import Case, Library
from benchmarks.parity.cases import CASES
from benchmarks.parity.compare import TOLERANCE, Row, compare_one, only_ties, problems
from benchmarks.parity.measure import kept_positions, measure
from benchmarks.parity.models import DEMO, Setting, as_chat
from benchmarks.parity.report import RESULTS, read, spelled, tables, write
from tests.contract.architectures import BY_NAME, tokens
from transformers import AutoTokenizer, DynamicCache

import coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.press import parts

# The presses that kvpress 0.5.5 exports, without its three base classes.
KVPRESS = """
    AdaKV Block CAM CUR Cap Chunk ChunkKV Compactor Composed CompressionRatioDecoding CriticalAdaKV CriticalKV DMS
    Decoding DuoAttention EntropyGatedChunkKV ExpectedAttention ExpectedAttentionStats FastKVzip Finch KVCompose KVgrad
    KVzap KVzip KeyDiff KeyRotation Knorm LUKV LagKV LeverageScore Merging NonCausalAttn ObservedAttention
    PerLayerCompression PrefillDecoding PyramidKV QFilter Random RestoreKV SimLayerKV SnapKV StreamingLLM TOVA ThinK
""".replace("KeyRotation", "KeyRerotation").split()


def mask(*kept: int, n_tokens: int = 6) -> torch.Tensor:
    """bool ``[1, 1, 1, T]``."""
    return torch.tensor([[[[t in kept for t in range(n_tokens)]]]])


def result(kept: torch.Tensor, loss: float = 1.0, scores: torch.Tensor | None = None) -> dict[str, Any]:
    return {"kept": kept, "losses": torch.full((1, 4), loss), "scores": scores, "extra": 0, "error": None}


def no_scores(index: int) -> None:
    return None


KEY = ("llama", "knorm", 0.5, "kvpress")
PLAIN = Case("knorm", lambda p, r, m: p.KnormPress(r))


def test_kept_pairs_are_found_in_any_order() -> None:
    keys, values = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    order = torch.tensor([7, 0, 4, 5])
    expected = torch.zeros(2, 3, 9, dtype=torch.bool)
    expected[..., order] = True
    assert torch.equal(kept_positions((keys[:, :, order], values[:, :, order]), (keys, values)), expected)
    # keys that were rotated are found by their values, and values that were merged by their keys
    assert torch.equal(kept_positions((keys[:, :, order] + 1, values[:, :, order]), (keys, values)), expected)
    assert torch.equal(kept_positions((keys[:, :, order], values[:, :, order] + 1), (keys, values)), expected)
    with pytest.raises(ValueError, match="none of those of the text"):
        kept_positions((keys[:, :, order] + 1, values[:, :, order] + 1), (keys, values))


def test_empty_places_and_equal_tokens_are_told_apart() -> None:
    keys = torch.randn(1, 1, 5, 4)
    keys[:, :, 3] = keys[:, :, 1]
    filled = torch.tensor([[[True, True, True, False]]])
    kept = kept_positions((keys[:, :, [1, 3, 4, 0]], keys[:, :, [1, 3, 4, 0]]), (keys, keys), filled)
    assert kept[0, 0].tolist() == [False, True, False, True, True]


def test_ties_are_equal_scores_of_pairs_that_compete() -> None:
    scores = torch.tensor([[[[5.0, 1.0, 1.0, 3.0, 0.5, 0.4]]]])
    assert only_ties(mask(0, 3, 1), mask(0, 3, 2), scores, "head")
    assert not only_ties(mask(0, 3, 1), mask(0, 3, 4), scores, "head")
    assert not only_ties(mask(0, 3, 1), mask(0, 3, 1, 2), scores, "head")  # one keeps more
    chunks = torch.tensor([[[[5.0, 5.0, 5.0, 3.0, 3.0, 1.0]]]])  # each with a threshold of its own
    assert only_ties(mask(0, 1, 3), mask(0, 2, 4), chunks, "head")
    assert not only_ties(mask(0, 1, 3), mask(0, 2, 5), chunks, "head")
    two = torch.ones(1, 1, 2, 3)
    ours = torch.tensor([[[[True, True, False], [True, False, False]]]])
    theirs = torch.tensor([[[[True, False, False], [True, True, False]]]])
    assert not only_ties(ours, theirs, two, "head") and only_ties(ours, theirs, two, "layer")


def test_runs_agree_by_pairs_and_losses() -> None:
    same = compare_one(PLAIN, KEY, result(mask(0, 1)), result(mask(0, 1), 1 + TOLERANCE / 2))
    assert same.agrees and same.pairs == 2 and same.moved == 0
    assert not compare_one(PLAIN, KEY, result(mask(0, 1)), result(mask(0, 1), 1 + 2 * TOLERANCE)).agrees
    other = compare_one(PLAIN, KEY, result(mask(0, 1)), result(mask(0, 2)))
    assert not other.agrees and other.moved == 0.5
    assert compare_one(PLAIN, KEY, result(mask(0, 1)), result(mask(0, 2), 2.0, torch.ones(1, 1, 1, 6))).agrees
    left = compare_one(PLAIN, KEY, result(mask(0, 1)), result(mask(0, 1)) | {"extra": 4})  # beside those of the text
    assert not left.agrees and left.theirs == 6 and left.moved == 0.5
    failed = compare_one(PLAIN, KEY, result(mask(0)), {"error": "ValueError: no"})
    assert not failed.agrees and failed.error == "kvpress: ValueError: no"


def test_every_difference_needs_a_reason_and_every_reason_a_difference() -> None:
    same, other = Row("knorm", "llama", 0.5, "kvpress"), Row("knorm", "llama", 0.5, "kvpress", moved=0.1)
    fixed = replace(same, variant="repaired")
    explained = replace(PLAIN, why="because", repaired=True, models=("llama",))
    assert not problems(PLAIN, [same]) and not problems(explained, [other, fixed])
    assert "nothing explains it" in problems(PLAIN, [other])[0]
    assert "out of date" in problems(explained, [same, fixed])[0]
    assert not problems(replace(explained, models=("llama", "qwen2")), [same, fixed])  # not run on all of them
    assert "even with" in problems(explained, [other, replace(fixed, moved=0.1)])[0]
    broken = replace(same, error="kvpress: AttributeError: head_dim")
    assert "head_dim" in problems(PLAIN, [broken])[0]
    breaks = replace(PLAIN, breaks=("llama",), breaks_why="no head_dim")
    assert not problems(breaks, [broken])
    assert "out of date" in problems(breaks, [same])[0]
    assert problems(breaks, [replace(same, error="coldpress: PressError: no")])


def test_one_run_of_coldpress() -> None:
    model = BY_NAME["llama"].build()
    cache = coldpress.PressedCache()
    press = coldpress.AdaKVPress(coldpress.SnapKVPress(0.5, window_size=8))  # heads of different lengths
    setting = Setting("llama", model, tokens(2, 96), 40)
    found = measure(setting, replace(PLAIN, rows=2), press, cache, False, no_scores)
    assert found.kept is not None and found.losses is not None and found.losses.shape == (2, 32)
    for index in range(2):
        expected = torch.zeros(2, 2, 41, dtype=torch.bool)
        at = cache.positions(index)[..., :-32]  # without the scored tokens
        expected.scatter_(2, at.masked_fill(at < 0, 40), True)
        assert torch.equal(found.kept[:, index], expected[..., :40])


def test_pairs_beside_those_of_the_text_are_counted() -> None:
    model = BY_NAME["llama"].build()
    setting = Setting("llama", model, tokens(1, 96), 40)

    @contextmanager
    def reads_twice(model: Any) -> Iterator[None]:
        yield
        model.model(input_ids=setting.ids[:, :8], **cache_argument(cache))

    cache = DynamicCache()
    found = measure(setting, PLAIN, reads_twice, cache, False, no_scores)
    assert found.kept is not None and found.kept.all()
    assert found.extra == len(model.model.layers) * model.config.num_key_value_heads * 8


def test_a_text_in_a_chat() -> None:
    model = BY_NAME["llama"].build()
    model.config.name_or_path = str(DEMO / "model")
    setting = Setting("llama", model, tokens(1, 96), 40)
    with as_chat(setting) as chat:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "What is a flatterer?"}], tokenize=False)
        before = tokenizer.encode(text.partition("What")[0], add_special_tokens=False)
        assert len(before) > 4 and chat.ids[0, : len(before)].tolist() == before
        assert torch.equal(chat.ids[:, len(before) :], setting.ids[:, len(before) :])
    assert model.config.name_or_path == str(DEMO / "model")


def test_shares_of_a_budget_add_up() -> None:
    curves = np.load(artefacts.budget_curves(BY_NAME["llama"].build(), 1 / 160))
    assert curves.shape[0] == 99 and curves.min() >= 0 and curves.max() <= 1
    for percent in (25, 50, 75):
        at = curves[percent - 1]
        assert at.mean() == pytest.approx(percent / 100) and at.std() > 0.01
        assert at * 160 == pytest.approx(np.round(at * 160))


@pytest.mark.parametrize(
    "name",
    ["qfilter", "expected_attention_stats", "kvzap", "kvzap, linear", "fastkvzip", "lukv_snapkv", "duo_attention"],
)
def test_coldpress_reads_the_random_files(name: str) -> None:
    model = BY_NAME["llama"].build()
    (case,) = (case for case in CASES if case.name == name)
    press = case.make(Library(coldpress), 0.5, model)
    found = measure(
        Setting("llama", model, tokens(1, 160), 120), case, press, coldpress.PressedCache(), False, no_scores
    )
    assert found.kept is not None and 0.4 < found.kept.float().mean() < 0.8


def test_every_press_of_kvpress_is_in_the_list() -> None:
    names = {name for case in CASES for name in spelled(case)[1]}
    assert {f"{name}Press" for name in KVPRESS} == names
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_makes_a_press_of_coldpress(case: Case) -> None:
    """Of the classes that its table names, and at the ratio that it was asked for."""
    names = spelled(case)[1]
    missing = [name for name in names if not hasattr(coldpress, name)]
    if not missing and not case.not_compared and case.ratios != (0.0,):
        for ratio in case.ratios:
            press = case.make(Library(coldpress), ratio, BY_NAME["llama"].build())
            inside = list(parts(press))
            assert {type(part).__name__ for part in inside} >= set(names)  # and those that are a default
            if press.has_ratio and press.at_prefill and not isinstance(press, coldpress.ComposedPress):
                assert ratio in [value for part in inside for value in vars(part).values()]


def test_the_tables_show_what_was_written(tmp_path: Path) -> None:
    rows = [
        Row("cur", "llama", 0.5, "kvpress", moved=0.125, loss_difference=0.25),
        Row("cur", "llama", 0.5, "repaired", loss_difference=1e-6),
    ]
    case = {
        "name": "cur",
        "press": "CURPress(0.5)",
        "letter": "K",
        "why": "a sum",
        "breaks": [],
        "absent": "",
        "is_default": False,
    }
    other = {
        "name": "kvzap",
        "press": "",
        "letter": "",
        "why": "",
        "breaks": [],
        "absent": "a hub",
        "is_default": False,
        "rows": [],
    }
    facts = {"coldpress": "0.1", "kvpress": "0.5.5", "torch": "2", "transformers": "5"}
    cases = [case | {"rows": [row.as_record() for row in rows]}, other]
    cases.append(cases[0] | {"name": "cur, defaults", "is_default": True})
    facts |= {"models": ["llama"], "ratios": [0.5], "scored": 32, "scored_long": 64}
    write(tmp_path / "results.json", facts | {"cases": cases})
    text = tables(read(tmp_path / "results.json"))
    assert "| cur | `CURPress(0.5)` | 1 of 1 | 12 % | up to 0.25 |" in text
    assert "1 of 1 agree; losses within 1e-06 | K | a sum |" in text
    assert "| kvzap | a hub |" in text
    assert "cur, defaults" not in text.partition("### Different, and why, with kvpress's parameters")[0]
    assert text.count("| cur, defaults | `CURPress(0.5)` | 1 of 1 |") == 1
    header = next(line for line in text.splitlines() if line.startswith("| case | press") and "source" in line)
    legend = text.partition("### How to read the tables")[2].partition("###")[0]
    for column in header.strip("| ").split(" | "):
        assert f"| {column} | " in legend


def test_rows_are_added_to_the_committed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_main, "RESULTS", tmp_path / "results.json")
    versions = {"coldpress": "0.1", "kvpress": "0.5.5", "torch": "2", "transformers": "5"}
    old = [Row(name, model, 0.5, "kvpress") for name in ("knorm", "cur") for model in ("llama", "SmolLM2-135M")]
    write(tmp_path / "results.json", document(old, versions))
    new = Row("knorm", "llama", 0.5, "kvpress", moved=0.25)
    assert set(with_committed([new], versions)) == {new, *old[1:]}
    changed = (tmp_path / "results.json").read_text(encoding="utf-8").replace("CURPress(0.5)", "CURPress(0.5, 2)")
    (tmp_path / "results.json").write_text(changed, encoding="utf-8")
    assert set(with_committed([new], versions)) == {new, old[1]}
    with pytest.raises(SystemExit, match="other versions"):
        with_committed([new], versions | {"torch": "3"})


def test_the_committed_results_give_the_reasons_of_today() -> None:
    cases = read(RESULTS)["cases"]
    committed = {case["name"]: case for case in cases if case["rows"]}
    known = {case.name: case for case in CASES}
    assert committed and set(committed) <= set(known)
    for name, case in committed.items():
        assert (case["why"], case["letter"]) == (known[name].why, known[name].letter)
