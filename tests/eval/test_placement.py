"""Models on several devices: layers that are brought when they run, and heads shared out among processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import VERSION
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    PressedCache,
    SnapKVPress,
    TOVAPress,
)
from coldpress.errors import ClusterError, ModelError
from coldpress.eval.cluster import RayEngine
from coldpress.eval.losses import forward
from coldpress.loading.models import LoadedModel, load_model
from coldpress.models.block import prefilling

PRESSES = [
    KnormPress(0.5),
    SnapKVPress(0.5, window_size=8),
    TOVAPress(0.5),
    AdaKVPress(SnapKVPress(0.5, window_size=8)),
    CriticalKVPress(SnapKVPress(0.5, window_size=8)),
    ExpectedAttentionPress(0.5),
    KeyRerotationPress(KnormPress(0.5)),
    KVComposePress(0.5),
]


@torch.inference_mode()
def logits(model: PreTrainedModel, press: BasePress, ids: Tensor) -> Tensor:
    cache = PressedCache(press)
    with prefilling(model, cache):
        forward(model, ids[:, :60], cache, keep=1)
    return forward(model, ids[:, 60:], cache)


@pytest.fixture(scope="module")
def whole() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def split() -> LoadedModel:
    """Some layers in memory, the others on disk until they run."""
    loaded = load_model("demo", device_map="auto", max_memory={"cpu": "15MB"})
    assert set(loaded.model.hf_device_map.values()) == {"cpu", "disk"}
    assert {p.is_meta for p in loaded.model.parameters()} == {True, False}
    return loaded


def test_weights_are_the_same_wherever_they_are_held(whole: LoadedModel, split: LoadedModel) -> None:
    assert split.weights_fingerprint == whole.weights_fingerprint
    assert split.device == whole.device == torch.device("cpu")


@pytest.mark.parametrize("press", PRESSES, ids=lambda press: type(press).__name__)
def test_presses_on_a_model_whose_layers_are_brought_when_they_run(
    whole: LoadedModel, split: LoadedModel, press: BasePress, text: Tensor
) -> None:
    ids = text[None, :80]
    assert torch.equal(logits(split.model, press, ids), logits(whole.model, press, ids))


def test_the_embedding_may_be_offloaded_too(whole: LoadedModel, text: Tensor) -> None:
    """Then the first parameter says nothing about where token ids go."""
    if VERSION < (5, 0):  # transformers 4 cannot put it there
        with pytest.raises(ModelError, match="device disk is invalid"):
            load_model("demo", device_map="auto", max_memory={"cpu": "1MB"})
        return
    if VERSION == (5, 2):  # nothing brings the weights back from the disk
        with pytest.raises(ModelError, match="leaves the weights of demo nowhere"):
            load_model("demo", device_map="auto", max_memory={"cpu": "1MB"})
        return
    loaded = load_model("demo", device_map="auto", max_memory={"cpu": "1MB"})
    assert next(loaded.model.parameters()).is_meta and loaded.device == torch.device("cpu")
    press = SnapKVPress(0.5, window_size=8)
    ids = text[None, :80].to(loaded.device)
    assert torch.equal(logits(loaded.model, press, ids), logits(whole.model, press, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "atuo"}, "device_map 'atuo'.*Did you mean 'auto'"),
        ({"device_map": "auto", "tp_plan": "auto"}, "give one of them"),
        ({"device_map": "auto", "device": "cpu"}, "leave --device cpu out"),
        ({"tp_plan": "sequence"}, "allowed is auto"),
        ({"tp_plan": "auto"}, "torchrun --nproc_per_node"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ModelError, match=message):
        load_model("demo", **options)


def test_workers_of_a_cluster_hold_whole_models(split: LoadedModel) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ClusterError, match="leave --device_map and --tp_plan out"):
        RayEngine(split)


# Heads shared out among two processes


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_choose_what_one_does_or_say_that_they_cannot(tmp_path: Path) -> None:
    """Every press that says it looks at each head alone, with Llama (grouped heads) and GPT-NeoX (fused heads)."""
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"llama", "gpt_neox"}
    for results in found.values():
        assert {"knorm", "snapkv", "pyramidkv", "streaming_llm", "expected_attention", "think"} <= results.keys()
        worst = {name: value for name, value in results.items() if not isinstance(value, str) and value > 1e-4}
        assert not worst
        for name in ("tova", "adakv_snapkv", "chunkkv", "critical_snapkv", "simlayerkv"):
            assert "may need all heads of a layer at once" in results[name]
        assert "give budget_tokens or a compression_ratio" in results["budget_bytes"]


@pytest.mark.slow
def test_the_first_of_two_processes_speaks_and_writes(tmp_path: Path) -> None:
    options = "--model demo --dataset demo --press snapkv tova --ppl_apply_press --ppl_only --context_tokens 64"
    options += " --target_tokens 32 --limit_tokens 200"
    done = torchrun(
        "-m", "coldpress.cli", "ppl", *options.split(), "--tp_plan", "auto", "--output_dir", str(tmp_path / "two")
    )
    assert done.stdout.count("result(s) in") == 1
    assert done.stderr.count("failed: PressError: tensor parallelism needs a press that looks at each head") == 1
    one = [sys.executable, "-m", "coldpress.cli", "ppl", *options.split(), "--output_dir", str(tmp_path / "one")]
    subprocess.run(one, check=False, capture_output=True, timeout=200)
    records = {
        (path.parent.name, record["press"]): record
        for path in tmp_path.rglob("*.json")
        for record in [json.loads(path.read_text())]
    }
    mine, its = records["two", "snapkv"], records["one", "snapkv"]
    assert mine["status"] == its["status"] == "ok"
    assert mine["ppl"] == pytest.approx(its["ppl"], rel=1e-5)
    assert mine["weights_fingerprint"] == its["weights_fingerprint"]
    assert records["two", "tova"]["status"] == "failed"
