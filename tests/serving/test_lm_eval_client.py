"""lm-evaluation-harness's local-completions, which scores and generates, against a server of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.serving.running import running
from tests.tiny_folder import DEMO

from coldpress import SnapKVPress
from coldpress.loading.models import load_model

for package in ("datasets", "tenacity", "aiohttp", "requests"):
    pytest.importorskip(package)
lm_eval = pytest.importorskip("lm_eval")

TASKS = Path(__file__).resolve().parents[1] / "eval" / "tasks"
NAMES = ["coldpress_choice", "coldpress_generate", "coldpress_rolling"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm_eval's own
def test_its_results_are_those_of_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")

    def results(model: str, arguments: str) -> dict[str, Any]:
        manager = TaskManager(include_path=".", include_defaults=False)  # lm_eval's own are thousands of files
        found = lm_eval.simple_evaluate(
            model, arguments, tasks=NAMES, batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=10
        )
        return {
            f"{name} {metric}": value
            for name in NAMES
            for metric, value in found["results"][name].items()
            if isinstance(value, float) and "stderr" not in metric
        } | {"answers": [one["filtered_resps"] for one in found["samples"]["coldpress_generate"]]}

    expected = results("hf", f"pretrained={DEMO},dtype=float32,max_length=1024")
    with running(load_model("demo", device="cpu"), SnapKVPress(0.5), name="demo") as server:
        given = f"model=demo,base_url={server.url}/v1/completions,tokenizer={DEMO},tokenizer_backend=huggingface"
        found = results("local-completions", f"{given},max_length=1024,num_concurrent=2")
    assert found.pop("answers") == expected.pop("answers")
    assert found == pytest.approx(expected, rel=1e-4) and len(found) >= 4
