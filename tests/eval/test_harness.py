"""lm-evaluation-harness's model ``coldpress``: its scores are those of a slow loop, and never those of one pass."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.press import BasePress
from coldpress.errors import InputError, PressError, SelfCheckError
from coldpress.stores.bits import KVBits

pytest.importorskip("lm_eval")

from coldpress.eval.harness import HFLM, ColdpressLM

TASKS = Path(__file__).parent / "tasks"
DEMO = str(resources.files("coldpress") / "assets" / "demo" / "model")
DOCUMENTS = [json.loads(line) for line in (TASKS / "texts.jsonl").read_text(encoding="utf-8").splitlines()]


@dataclass
class Request:
    """What lm_eval hands to a model."""

    args: tuple[Any, ...]
    task_name: str = "made up"
    metadata: dict[str, Any] = field(default_factory=dict)


CHOICES = [Request((d["context"], f" {choice}")) for d in DOCUMENTS for choice in d["choices"]]
LONG = [request for request in CHOICES if len(request.args[0]) > 300]
TEXTS = [Request((d["context"],)) for d in DOCUMENTS]
PROMPTS = [Request((d["context"], {"until": ["."], "max_gen_toks": 12})) for d in DOCUMENTS]
BITS = KVBits(4, residual_tokens=16)
SNAPKV = {"press": "snapkv", "press_args": {"window_size": 16}, "min_context_tokens": 32}


@functools.cache
def load(attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def hf() -> HFLM:
    return HFLM(pretrained=DEMO, device="cpu", dtype="float32", batch_size=4)


def make(**options: Any) -> ColdpressLM:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return ColdpressLM(load("coldpress"), tokenizer=tokenizer, **{"batch_size": 4, **options})


def scores(lm: HFLM, requests: list[Request]) -> Tensor:
    return torch.tensor([total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)], dtype=torch.float64)


def token_ids(lm: HFLM, request: Request) -> tuple[list[int], list[int]]:
    context, wanted = lm._encode_pair(*request.args)
    return context, wanted


# -- without a press: lm_eval's own numbers ------------------------------------------------------------------------


def test_without_a_press_it_is_hf(hf: HFLM) -> None:
    requests, demo = [*CHOICES, Request(("", " He said that"))], ColdpressLM("demo", batch_size=4)
    wanted, found = hf.loglikelihood(requests, disable_tqdm=True), demo.loglikelihood(requests, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    own, its = (lm.loglikelihood_rolling(TEXTS, disable_tqdm=True) for lm in (make(max_length=100), hf))
    assert own != pytest.approx(its, abs=1e-2)  # 100 tokens see less
    hf._max_length = 100
    try:
        assert own == pytest.approx(hf.loglikelihood_rolling(TEXTS, disable_tqdm=True), abs=1e-3)
    finally:
        hf._max_length = None
    assert make().generate_until(PROMPTS, disable_tqdm=True) == hf.generate_until(PROMPTS, disable_tqdm=True)


def test_greedy_is_said_of_what_is_written_greedily() -> None:
    lm = make(**SNAPKV)
    context = DOCUMENTS[3]["context"]
    text = lm.generate_until([Request((context, {"until": [], "max_gen_toks": 6}))], disable_tqdm=True)[0]
    found = lm.loglikelihood([Request((context, text)), Request((context, " olives"))], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("options", [{"chunk_tokens": 24}, {"batch_size": 1}, {"compression_ratio": 0.0}], ids=str)
def test_ratio_0_is_no_press(hf: HFLM, options: dict[str, Any]) -> None:
    lm = make(**{**SNAPKV, "compression_ratio": 0.0, **options})
    assert torch.allclose(scores(lm, CHOICES), scores(hf, CHOICES), atol=1e-4)
    assert lm.get_model_info()["coldpress"]["achieved_ratio"] == 0


# -- under a press: what a slow loop computes ----------------------------------------------------------------------


def slow_score(lm: ColdpressLM, press: BasePress | None, request: Request) -> float:
    """One request alone: compress the context but for its last token, then feed one token after the other."""
    context, wanted = token_ids(lm, request)
    cache = coldpress.PressedCache(press)
    if press is None:
        lm.model(torch.tensor([context[:-1]]), **cache_argument(cache))
    else:
        with press(lm.model):
            lm.model(torch.tensor([context[:-1]]), **cache_argument(cache))
    total, token = 0.0, context[-1]
    for i, following in enumerate(wanted):
        position = torch.tensor([[len(context) - 1 + i]])
        logits = lm.model(torch.tensor([[token]]), **cache_argument(cache), position_ids=position).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[following])
        token = following
    return total


@pytest.mark.parametrize(
    ("name", "press"),
    [
        ("knorm", coldpress.KnormPress(0.5)),
        ("adakv_snapkv", coldpress.AdaKVPress(coldpress.SnapKVPress(0.5))),
        ("pyramidkv", coldpress.PyramidKVPress(0.5)),
        ("expected_attention", coldpress.ExpectedAttentionPress(0.5)),
        ("kvzip", coldpress.KVzipPress(0.5)),  # takes one text at a time
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.inference_mode()
@pytest.mark.thinned(4)
def test_scores_are_those_of_a_slow_loop(name: str, press: BasePress) -> None:
    requests = [*CHOICES[2:5], *CHOICES[12:17:2]]  # one context is left whole, two are shared
    wanted: list[float] = []
    for batch_size in (1, 8):
        lm = make(press=name, compression_ratio=0.5, min_context_tokens=32, batch_size=batch_size)
        press = press.prepared(lm.model, lm.tokenizer)
        for request in requests[len(wanted) :]:
            is_long = len(token_ids(lm, request)[0]) > 32
            wanted.append(slow_score(lm, press if is_long else None, request))
        assert scores(lm, requests).tolist() == pytest.approx(wanted, abs=1e-4)
        assert lm.left_whole == 1


@torch.inference_mode()
def test_scores_are_those_of_a_mask_in_transformers_own_attention() -> None:
    plain = load("sdpa")
    lm = make(press="streaming_llm", compression_ratio=0.5)
    for request in LONG[:3]:
        context, wanted = token_ids(lm, request)
        ids, n_pressed = [*context, *wanted], len(context) - 1
        sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        evicted = slice(4, 4 + n_pressed - n_pressed // 2)  # ratio 0.5: all but the first 4 and the newest go
        sees[n_pressed:, evicted] = False
        bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
        logits = plain(torch.tensor([ids]), attention_mask=bias).logits[0]
        found = logits[len(context) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(wanted)[:, None]).sum()
        assert scores(lm, [request]).item() == pytest.approx(float(found), abs=1e-4)


def test_continuations_of_a_context_do_not_see_each_other() -> None:
    lm = make(**SNAPKV)
    together = scores(lm, LONG)
    alone = torch.cat([scores(lm, [request]) for request in LONG])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(scores(lm, LONG[::-1]).flip(0), together, atol=1e-4)


def test_one_prefill_for_all_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make(**SNAPKV)
    scores(lm, LONG[:3])  # the first contexts are read a second time, to prove that compression has an effect
    lengths = []
    monkeypatch.setattr(
        "coldpress.eval.harness.prefill",
        lambda model, ids, *rest: (lengths.append(tuple(ids.shape)), prefill(model, ids, *rest)),
    )
    from coldpress.models.prompts import prefill

    scores(lm, LONG[3:])
    assert sum(rows for rows, _ in lengths) == len({request.args[0] for request in LONG[3:]})


# -- the trap ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_one_pass_under_a_press_measures_nothing_and_this_does(hf: HFLM) -> None:
    press = coldpress.KnormPress(0.5)
    context, wanted = token_ids(hf, LONG[0])
    ids = torch.tensor([context + wanted[:-1]])
    plain = hf.model(ids).logits
    pressed = load("coldpress")
    with press(pressed):
        assert torch.allclose(pressed(ids).logits, plain, atol=1e-3)  # the trap
    assert (scores(make(press=press), LONG) - scores(hf, LONG)).abs().min() > 1e-3


@torch.inference_mode()
def test_the_first_token_is_predicted_from_what_is_left() -> None:
    lm, whole = make(press="knorm", compression_ratio=0.9), make()
    for request in LONG[:3]:
        wanted = token_ids(lm, request)[1]
        request = Request((request.args[0], lm.tokenizer.decode(wanted[:1])))
        assert token_ids(lm, request)[1] == wanted[:1]
        assert abs(scores(lm, [request]) - scores(whole, [request])).item() > 1e-3
        assert scores(lm, [request]).item() == pytest.approx(
            slow_score(lm, coldpress.KnormPress(0.9), request), abs=1e-4
        )
    generated = [lm.generate_until([r], disable_tqdm=True)[0] for r in PROMPTS if len(r.args[0]) > 300]
    assert generated != [whole.generate_until([r], disable_tqdm=True)[0] for r in PROMPTS if len(r.args[0]) > 300]


@dataclass(frozen=True)
class Idle(BasePress):
    """Says that it compresses, and keeps everything."""

    def compress(self, view: Any) -> None:
        return None


def test_a_press_that_does_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelfCheckError, match="nothing was compressed, all scores are bit for bit"):
        scores(make(press=Idle()), LONG)
    with pytest.raises(SelfCheckError, match="none of the 2 contexts has min_context_tokens=500"):
        scores(make(press="knorm", min_context_tokens=500), LONG[:4])
    with pytest.raises(SelfCheckError, match="none of the 6 contexts"):
        make(press="knorm", min_context_tokens=500).generate_until(PROMPTS, disable_tqdm=True)
    lm = make(press="knorm")  # the cache is filled, and the press forgotten
    monkeypatch.setattr(lm, "_prefilled", lambda *args: ColdpressLM._prefilled(lm, args[0], args[1], False, args[3]))
    with pytest.raises(SelfCheckError, match="nothing was compressed"):
        scores(lm, LONG)


def test_short_contexts_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    lm = make(**SNAPKV, compression_ratio=0.5)
    scores(lm, CHOICES)
    assert "2 of 6 contexts were left uncompressed" in caplog.text
    info = lm.get_model_info()["coldpress"]
    assert (info["contexts"], info["contexts_left_whole"]) == (6, 2)
    lengths = [len(lm.tok_encode(d["context"])) - 1 for d in DOCUMENTS]
    removed = sum(n - n // 2 for n in lengths if n >= 32) / sum(lengths)
    assert info["context_tokens"] == sum(lengths)
    assert info["achieved_ratio"] == pytest.approx(removed)


# -- whole texts, and texts that are written ------------------------------------------------------------------------


@torch.inference_mode()
def test_rolling_scores_each_block_against_the_compressed_one_before() -> None:
    lm = make(press="knorm", compression_ratio=0.5, max_length=100)
    found = lm.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    for request, total in zip(TEXTS, found, strict=True):
        ids, wanted = lm.tok_encode(request.args[0]), 0.0
        for start in range(0, len(ids), 50):
            cache, block = coldpress.PressedCache(coldpress.KnormPress(0.5)), ids[start : start + 50]
            before = ids[start - 50 : start] if start else [lm.prefix_token_id]
            if len(before) > 1:
                lm.model(torch.tensor([before[:-1]]), **cache_argument(cache))
            logits = lm.model(torch.tensor([before[-1:] + block[:-1]]), **cache_argument(cache)).logits[0]
            wanted += float(logits.log_softmax(-1).gather(-1, torch.tensor(block)[:, None]).sum())
        assert total == pytest.approx(wanted, abs=1e-3)
    whole = make(press="knorm", compression_ratio=0.0, max_length=100).loglikelihood_rolling(TEXTS, disable_tqdm=True)
    assert sum(whole) > sum(found) + 1  # the baseline: the same blocks, nothing removed


@pytest.mark.parametrize("options", [SNAPKV, {"press": "kvzip", "min_context_tokens": 32}], ids=["snapkv", "kvzip"])
def test_what_is_written_does_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    alone = make(**options, batch_size=1).generate_until(PROMPTS, disable_tqdm=True)
    assert make(**options, batch_size=4).generate_until(PROMPTS, disable_tqdm=True) == alone
    assert all("." not in text for text in alone)


@torch.inference_mode()
def test_what_is_written_is_what_a_slow_loop_writes() -> None:
    lm = make(press="knorm", compression_ratio=0.75)
    found = lm.generate_until([Request((r.args[0], {"until": [], "max_gen_toks": 12})) for r in PROMPTS], True)
    for request, text in zip(PROMPTS, found, strict=True):
        ids = lm.tok_encode(request.args[0])
        cache, written = coldpress.PressedCache(coldpress.KnormPress(0.75)), [ids[-1]]
        lm.model(torch.tensor([ids[:-1]]), **cache_argument(cache))
        for _ in range(12):
            written.append(int(lm.model(torch.tensor([written[-1:]]), **cache_argument(cache)).logits[0, -1].argmax()))
        assert text == lm.tok_decode(written[1:])


def test_a_press_that_goes_on_compresses_what_is_fed() -> None:
    press = coldpress.DecodingPress(coldpress.KnormPress(), compression_interval=4, target_size=24)
    lm = make(press=press, batch_size=3)
    requests = LONG[:4]
    wanted = []
    for request in requests:
        context, continuation = token_ids(lm, request)
        cache, total, token = coldpress.PressedCache(press), 0.0, context[-1]
        with torch.inference_mode():
            lm.model(torch.tensor([context[:-1]]), **cache_argument(cache))
            for following in continuation:
                logits = lm.model(torch.tensor([[token]]), **cache_argument(cache)).logits[0, -1]
                total += float(logits.log_softmax(-1)[following])
                token = following
        wanted.append(total)
    assert scores(lm, requests).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"kv_bits": BITS}, {"kv_bits": BITS, **SNAPKV}, {"budget_tokens": 40, "press": "knorm"}]
)
def test_bits_and_budgets(hf: HFLM, options: dict[str, Any]) -> None:
    lm = make(**options)
    change = (scores(lm, LONG) - scores(hf, LONG)).abs()
    assert 0 < change.max() < 20
    info = lm.get_model_info()["coldpress"]
    assert (info["achieved_ratio"] > 0) == ("press" in options)


# -- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"press": "snapvk"}, "Did you mean 'snapkv'"),
        ({"press": "snapkv", "compression_ratio": 1.5}, "1.5"),
        ({"press": "snapkv", "press_args": {"windowsize": 3}}, "window_size"),
        ({"press": "snapkv", "press_args": "not JSON"}, "press_args must be"),
        ({"press": "snapkv", "press_args": {"compression_ratio": 0.5}}, "press_args cannot hold"),
        ({"press": "snapkv", "compression_ratio": 0.5, "budget_tokens": 5}, "both say how much"),
        ({"compression_ratio": 0.5}, "give press=NAME"),
        ({"press": coldpress.KnormPress(0.5), "compression_ratio": 0.5}, "belong to a press that is named"),
        ({"press": 7}, "press must be the name"),
        ({"press": "kvzip", "chunk_tokens": 16}, "chunk_tokens"),
        ({"kv_bits": 3}, "kv_bits"),
        ({"batch_size": "auto"}, "batch_size must be an integer"),
        ({"min_context_tokens": -1}, "min_context_tokens must be an integer"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFLM, "__init__", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    with pytest.raises(InputError, match=said):
        make(**options)


def test_press_args_may_be_json_and_a_press_without_a_ratio_has_none() -> None:
    lm = make(press="snapkv", press_args='{"window_size": 8}', compression_ratio=0.25)
    assert lm.press == coldpress.SnapKVPress(0.25, window_size=8)
    assert make(press="snapkv").press == coldpress.SnapKVPress(0.5)
    assert make(press="snapkv", budget_tokens=64).press == coldpress.SnapKVPress(budget_tokens=64)
    assert isinstance(make(press="think").press, coldpress.ThinKPress)
    with pytest.raises(PressError, match="no compression ratio"):
        make(press="think", compression_ratio=0.5)


def test_stored_answers_of_another_press_are_not_taken(tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    pytest.importorskip("sqlitedict")
    path = str(tmp_path / "answers.db")
    first = CachingLM(make(**SNAPKV), path)
    wanted = first.loglikelihood(LONG[:2])
    again = CachingLM(make(**SNAPKV), path)
    assert again.loglikelihood(LONG[:2]) == wanted
    assert again.lm.contexts == 0  # nothing was computed
    with pytest.raises(InputError, match="another press"):
        CachingLM(make(**SNAPKV, compression_ratio=0.75), path)
    for model in (first, again):
        model.dbdict.close()


# -- lm_eval itself -------------------------------------------------------------------------------------------------


MODEL_ARGS = "pretrained=demo,press=knorm,compression_ratio=0.75,min_context_tokens=32"
NAMES = ("coldpress_choice", "coldpress_rolling", "coldpress_generate")


def check(config: dict[str, Any], samples: list[dict[str, Any]], hf: HFLM) -> None:
    """What lm_eval says of a run: its scores are those of this model, under this press."""
    said = config["coldpress"]
    assert said["press"] == "KnormPress(compression_ratio=0.75)"
    assert (
        0.7 < said["achieved_ratio"] < 0.75 and said["contexts_left_whole"] == 2 + 1 + 2
    )  # the prefix token among them
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    found = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    lm = make(press="knorm", compression_ratio=0.75, min_context_tokens=32)
    assert found == pytest.approx(scores(lm, CHOICES).tolist(), abs=1e-4)
    assert found != pytest.approx(scores(hf, CHOICES).tolist(), abs=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm_eval's own
def test_tasks_of_lm_eval(tmp_path: Path, hf: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    manager = TaskManager(include_path=".", include_defaults=False)  # lm_eval's own are thousands of files
    results = lm_eval.simple_evaluate(
        "coldpress", MODEL_ARGS, tasks=list(NAMES), batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=10
    )
    assert set(results["results"]) == set(NAMES)
    check(results["config"], results["samples"]["coldpress_choice"], hf)


@pytest.mark.slow
def test_the_command(tmp_path: Path, hf: HFLM) -> None:
    source = str(Path(coldpress.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    line = [
        *(sys.executable, "-m", "coldpress.lm_eval", "--model", "coldpress", "--model_args", MODEL_ARGS),
        *("--device", "cpu", "--batch_size", "4", "--include_path", ".", "--tasks", ",".join(NAMES), "--log_samples"),
        *("--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(line, cwd=TASKS, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "were left uncompressed" in done.stderr and "acc_norm" in done.stdout
    (results,) = (tmp_path / "out").rglob("results*.json")
    (samples,) = (tmp_path / "out").rglob("samples_coldpress_choice*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    check(json.loads(results.read_text(encoding="utf-8"))["config"], [json.loads(line) for line in lines], hf)


def test_errors_of_the_command_line_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from coldpress.lm_eval import main

    def fail(error: Exception) -> None:
        raise error

    for error, code in ((PressError("no such\npress"), 2), (SelfCheckError("nothing was compressed"), 1)):
        monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda error=error: fail(error))
        assert main() == code
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    assert main() == 0


def test_the_page_names_arguments_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "lm-eval.md").read_text(encoding="utf-8")
    table = page.split("| argument | |\n|---|---|\n")[1].split("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    own, its = (inspect.signature(cls.__init__).parameters for cls in (ColdpressLM, HFLM))
    assert len(named) > 12 and set(named) <= {*own, *its}
    assert {*own} - {"self", "attn_implementation", "device", "gguf_file", "options"} <= set(named)
    (model_args,) = re.findall(r"--model_args '(\{.*?\}\})'", page)
    assert make(
        **{k: v for k, v in json.loads(model_args).items() if k != "pretrained"}
    ).press == coldpress.SnapKVPress(0.5, window_size=32)
