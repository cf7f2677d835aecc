"""What a sweep consists of, from a file or from options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldpress.errors import DataError, InputError
from coldpress.eval.sweep_plan import SweepPlan, read_config, with_options


def evaluations(**config: Any) -> list[tuple[str, str, str, int]]:
    """Model, text, kind and number of points of each evaluation."""
    found = SweepPlan.of(config).evaluations
    return [(c.settings.model, c.settings.subset or c.settings.dataset, c.kind, len(c.jobs)) for c in found]


def test_every_model_meets_every_text_and_one_text_is_timed() -> None:
    sizes = {"press": ["knorm", "snapkv"], "compression_ratio": [0.25, 0.5]}
    assert evaluations(models=["demo", "b"], texts=["demo", "wikitext:wikitext-103-v1"], **sizes) == [
        ("demo", "demo", "perplexity", 5),
        ("demo", "wikitext-103-v1", "perplexity", 5),
        ("demo", "demo", "speed", 5),
        ("b", "demo", "perplexity", 5),
        ("b", "wikitext-103-v1", "perplexity", 5),
        ("b", "demo", "speed", 5),
    ]


def test_sections_say_what_is_measured() -> None:
    found = SweepPlan.of(
        {
            "models": [{"model": "demo", "dtype": "float16"}],
            "texts": [{"dataset": "demo", "limit_tokens": 900}],
            "press": ["knorm", {"snapkv": {"window_size": 16}}],
            "perplexity": [{"context_tokens": 64}, {"context_tokens": 128, "limit_tokens": 500}],
            "speed": {"context_limit": [256, 512], "press": "streaming_llm"},
            "streaming": {"press": ["tova"], "budget_tokens": [32, 64]},
            "baselines": ["gptq", "llamacpp"],
            "tasks": {"task": "passkey", "task_tokens": 64, "task_examples": 2},
            "max_windows": 3,
        }
    ).evaluations
    counts = {"perplexity": 2, "tasks": 1, "streaming": 3, "baselines": 2, "speed": 2}
    assert [evaluation.kind for evaluation in found] == [kind for kind, n in counts.items() for _ in range(n)]
    assert all(evaluation.settings.dtype == "float16" for evaluation in found)
    first, second = found[:2]
    assert (first.settings.context_tokens, first.settings.limit_tokens, first.settings.max_windows) == (64, 900, 3)
    assert (second.settings.context_tokens, second.settings.limit_tokens) == (128, 500)
    assert [job.name for job in first.jobs] == ["no_press", "knorm", "snapkv"]
    assert first.jobs[-1].press.window_size == 16  # type: ignore[union-attr]
    tasks, streaming, baselines, timed = found[2], found[3:6], found[6:8], found[8:]
    assert tasks.settings.task == ("passkey",) and tasks.settings.task_tokens == (64,)  # type: ignore[union-attr]
    assert [job.name for job in tasks.jobs] == ["no_press", "knorm", "snapkv"]
    assert [evaluation.jobs[0].budget_tokens for evaluation in streaming] == [
        None,
        32,
        64,
    ]  # each is finished by itself
    assert [evaluation.settings.ppl_preset for evaluation in baselines] == ["gptq", "llamacpp"]
    assert [evaluation.settings.context_limit for evaluation in timed] == [256, 512]
    assert [[job.name for job in evaluation.jobs] for evaluation in timed] == [["no_press", "streaming_llm"]] * 2
    with_windows = [getattr(evaluation.settings, "ppl_apply_press", False) for evaluation in found]
    assert with_windows == [evaluation.kind == "perplexity" for evaluation in found]


def test_a_model_may_have_options_of_its_own() -> None:
    models = ["a", {"model": "demo", "max_windows": 5, "compression_ratio": [0.9], "repetitions": 2}]
    found = SweepPlan.of({"models": models, "texts": ["demo"], "press": "knorm", "max_windows": 40}).evaluations
    assert [evaluation.settings.max_windows for evaluation in found if evaluation.kind == "perplexity"] == [40, 5]  # type: ignore[union-attr]
    assert [job.ratio for job in found[-1].jobs] == [0.0, 0.9] and found[-1].settings.repetitions == 2  # type: ignore[union-attr]


def test_a_model_may_have_sections_of_its_own() -> None:
    models = ["a", {"model": "demo", "speed": False, "perplexity": {"context_tokens": 64}}]
    found = SweepPlan.of({"models": models, "texts": ["demo"], "press": "knorm", "speed": True}).evaluations
    assert [(evaluation.settings.model, evaluation.kind) for evaluation in found] == [
        ("a", "speed"),
        ("demo", "perplexity"),
    ]


def test_options_take_the_place_of_what_a_file_says() -> None:
    config = {"models": ["a"], "texts": ["wikitext"], "press": ["all"], "speed": {"repetitions": 3}}
    merged = with_options(config, {"model": ["demo"], "revision": "main", "text_file": ["x.txt"], "press": ["knorm"]})
    assert merged["models"] == [{"model": "demo", "revision": "main"}]
    assert merged["texts"] == [{"text_file": "x.txt"}] and merged["press"] == ["knorm"]
    assert merged["speed"] == {"repetitions": 3} and "perplexity" not in merged
    merged = with_options({}, {"no_speed": True, "ppl_preset": ["gptq"], "sample_idx": 2, "dataset": ["pg19", "demo"]})
    assert (merged["perplexity"], merged["speed"], merged["baselines"]) == (True, False, ["gptq"])
    assert merged["texts"] == [{"dataset": "pg19", "sample_idx": 2}, {"dataset": "demo", "sample_idx": 2}]
    deep = {"models": [{"model": "demo", "max_windows": 9, "speed": {"warmup": 3}}], "perplexity": [{"max_windows": 8}]}
    merged = with_options({**deep, "texts": ["demo"]}, {"max_windows": 2, "warmup": 0})
    assert merged["models"] == [{"model": "demo", "speed": {}}] and merged["perplexity"] == [{}]
    assert (merged["max_windows"], merged["warmup"]) == (2, 0)
    merged = with_options({}, {"press": ["no_press", "snapkv"], "press_args": {"window_size": 8}})
    assert merged["press"] == [{"snapkv": {"window_size": 8}}] and "press_args" not in merged


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modles": ["demo"]}, "no 'modles'. Did you mean 'models'"),
        ({"models": []}, "list of models is empty"),
        ({"models": [3]}, "A model is a name or a mapping of options, got 3"),
        ({"models": [{"name": "demo"}]}, "A model has no option 'name'"),
        ({"models": [{"dtype": "float16"}]}, "needs its name"),
        ({"texts": [{"dataset": "demo", "subst": "x"}]}, "Did you mean 'subset'"),
        ({"perplexity": {"context_token": 5}}, "Did you mean 'context_tokens'"),
        ({"perplexity": 5}, "perplexity is a mapping of options"),
        ({"perplexity": {"context_tokens": "many"}}, "context_tokens must be an integer >= 1, got 'many'"),
        ({"perplexity": {"context_tokens": True}}, "must be an integer"),
        ({"speed": {"repetitions": 0}}, "repetitions must be an integer >= 1"),
        ({"compression_ratio": [0.5, "a"]}, "compression_ratio must be a number"),
        ({"compression_ratio": 1.5}, "fraction of pairs to remove"),
        ({"press": ["snapvk"]}, "Did you mean 'snapkv'"),
        ({"press": [{"snapkv": 16}]}, "A press is a name, or a name with its parameters"),
        ({"press": [{"snapkv": {"window": 16}}]}, "no parameter 'window'"),
        ({"tasks": {"task": ["passkeys"]}}, "passkey"),
        ({"tasks": {"task_examples": 0}}, "task_examples must be an integer >= 1"),
        ({"tasks": {"max_windows": 2}}, "tasks has no option 'max_windows'"),
        ({"baselines": ["hf"]}, "--ppl_preset must be one of"),
        ({"streaming": {"press": ["knorm"]}}, "--budget_tokens"),
        ({"perplexity": False, "speed": False}, "Nothing is measured"),
        ({"output_dir": 3}, "output_dir must be a folder's name"),
        ({"press_args": {"window_size": 3}}, "no 'press_args'"),
        ({"seed": 2**63}, "seed must be an integer <= 9223372036854775807"),
        ({"speed": {"repetitions": 10**9}}, "repetitions must be an integer <= 1000000"),
        ({"compression_ratio": 10**400}, "fraction of pairs to remove"),
        ({"texts": [{"dataset": "demo", "text_file": "a.txt"}]}, "a dataset or a text_file, not both"),
        ({"tasks": {"dataset": 5}}, "dataset must be a text"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_loaded(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepPlan.of({"models": ["demo"], "texts": ["demo"], **config})


def test_a_name_that_is_merged_is_not_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("a: {b: [&x {<<: {seed: 1}, seed: 2}]}\nc: {<<: *x}\n")
    assert read_config(str(path)) == {"a": {"b": [{"seed": 2}]}, "c": {"seed": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "holds no mapping"),
        (b"- 1\n- 2\n", "holds no mapping"),
        (b"1: 2\n", "holds no mapping"),
        (b"a: [1\n", "is not YAML"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"models: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"press: knorm\nseed: 1\npress: tova\n", "says press twice, at line 3"),
        (b"models:\n- {model: demo, dtype: auto, dtype: float32}\n", "says dtype twice"),
        (b"seed: 2001-99-99\n", "cannot read"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_config(str(path))
    assert "\n" not in str(caught.value)


def test_aliases_may_stand_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("press: &p [knorm, *p]\n")
    with pytest.raises(InputError, match="A press is a name"):
        SweepPlan.of({"models": "demo", "texts": "demo", **read_config(str(path))})


def test_a_name_with_a_nul_is_no_configuration() -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_config("a\0b")


def test_tasks_are_hidden_in_the_text_of_their_own_section() -> None:
    tasks = {"task": "passkey", "dataset": "demo"}
    (evaluation,) = SweepPlan.of({"models": "demo", "texts": ["wikitext"], "tasks": tasks}).evaluations
    assert evaluation.settings.dataset == "demo"
    (evaluation,) = SweepPlan.of({"models": "demo", "texts": ["wikitext"], "tasks": {"task": "passkey"}}).evaluations
    assert evaluation.settings.dataset is None


def test_what_stands_above_all_sections_goes_to_those_that_use_it() -> None:
    config: dict[str, Any] = {
        "models": ["demo"], "texts": ["demo"], "press": ["knorm"], "add_bos": False,
        "max_length": 64, "batch_size": 2, "kv_bits": [4], "kv_group_size": 32, "kv_residual_tokens": 8,
        "perplexity": True, "speed": True, "baselines": ["gptq"], "tasks": {"task_tokens": [64]},
        "streaming": {"budget_tokens": [32]},
    }  # fmt: skip
    of_kind = {evaluation.kind: evaluation.settings for evaluation in SweepPlan.of(config).evaluations}
    assert of_kind["perplexity"].add_bos is False and of_kind["streaming"].add_bos is False
    assert of_kind["speed"].add_bos is None and of_kind["baselines"].add_bos is None
    assert of_kind["speed"].max_length is None and of_kind["perplexity"].max_length == 64
    with pytest.raises(InputError, match="perplexity: add_bos must be true or false, got 'yes'"):
        SweepPlan.of({"models": ["demo"], "texts": ["demo"], "add_bos": "yes"})


def test_a_split_of_text_files_alone_is_refused() -> None:
    with pytest.raises(InputError, match="--split is for datasets, and only text files are named"):
        with_options({}, {"text_file": ["x.txt"], "split": "nonsense"})
