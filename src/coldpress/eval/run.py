"""One evaluation: load once, measure every press on the same tokens, write one result per press."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coldpress.errors import DataError, InputError, PressError
from coldpress.eval.datasets import Corpus, load_corpus
from coldpress.eval.models import LoadedModel, load_model
from coldpress.eval.perplexity import PrefixRun, plain_perplexity
from coldpress.eval.report import describe, table
from coldpress.eval.results import SCHEMA_VERSION, check_writable, environment, write_result
from coldpress.eval.speed import SpeedPoint, SpeedRun
from coldpress.eval.windows import PrefixPlan, plan_prefix
from coldpress.presses.base import BasePress
from coldpress.presses.registry import NO_PRESS, make_press, press_names

__all__ = ["Settings", "evaluate"]

UNKNOWN_POSITIONS = 2048  # assumed where a model's configuration does not say


@dataclass(frozen=True)
class Settings:
    """Everything an evaluation was asked for; the command line's options have these names."""

    model: str = "EleutherAI/pythia-70m"
    revision: str | None = None
    dataset: str = "wikitext"
    subset: str | None = None
    split: str = "test"
    sample_idx: int | None = None
    text_file: str | None = None
    press: tuple[str, ...] = (NO_PRESS,)
    compression_ratio: tuple[float, ...] = (0.5,)
    press_args: tuple[tuple[str, Any], ...] = ()
    ppl_apply_press: bool = False
    speed_only: bool = False
    ppl_only: bool = False
    speed_decode_only: bool = False
    max_length: int | None = None
    stride: int | None = None
    context_tokens: int | None = None
    target_tokens: int | None = None
    limit_tokens: int | None = None
    batch_size: int = 1
    context_limit: int = 4096
    max_new_tokens: int = 200
    min_new_tokens: int | None = None
    repetitions: int = 5
    warmup: int = 1
    allow_extrapolation: bool = False
    attn_implementation: str = "sdpa"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    output_dir: str = "results/perplexity"


@dataclass(frozen=True)
class _Job:
    """One press at one ratio: what its result record starts from."""

    name: str
    ratio: float
    press: BasePress | None


def note(message: str) -> None:
    """Tell the user something that changes what a number means."""
    tqdm.write(f"note: {message}", file=sys.stderr)


def evaluate(settings: Settings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run an evaluation, print its table, and write its results.

    Args:
        settings: what to measure.
        command: the command line, for the record.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run. What was measured until then is
        among them, with status ``interrupted``; a press that failed has status ``failed``.

    Raises:
        InputError: before any long work, when something that was asked for cannot work.
        SelfCheckError: when the model itself, without a press, contradicts a check.
    """
    if settings.speed_only and (settings.ppl_apply_press or settings.ppl_only):
        raise InputError("--speed_only measures no perplexity; leave it out, or --ppl_apply_press and --ppl_only.")
    jobs = _jobs(settings)
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)
    corpus = load_corpus(
        settings.dataset,
        subset=settings.subset,
        split=settings.split,
        sample_idx=settings.sample_idx,
        text_file=settings.text_file,
    )
    loaded = load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        revision=settings.revision,
    )
    torch.manual_seed(settings.seed)
    run = _Run(settings, jobs, corpus, loaded, command)
    is_interrupted = False
    try:
        run.measure()
    except KeyboardInterrupt:
        is_interrupted = True
    records = run.records(is_interrupted)
    paths = [write_result(output_dir, record) for record in records]
    if records:
        print(f"\n{describe(records[0])}\n\n{table(records)}\n")
        print(f"{len(paths)} result(s) in {output_dir}/")
    return records, is_interrupted


def _jobs(settings: Settings) -> list[_Job]:
    names: list[str] = []
    for name in settings.press:
        names += [NO_PRESS, *press_names()] if name == "all" else [name]
    names = list(dict.fromkeys(names))
    parameters = dict(settings.press_args)
    if parameters and len([n for n in names if n != NO_PRESS]) != 1:
        raise PressError("--press_args belongs to one press; name a single one with --press.")
    jobs = []
    for name in names:
        own = {"seed": settings.seed, **parameters} if name == "random" else parameters
        for ratio in settings.compression_ratio:
            press = make_press(name, ratio, **({} if name == NO_PRESS else own))
            jobs.append(_Job(name, 0.0 if press is None else ratio, press))
    return list({(job.name, job.ratio): job for job in jobs}.values())


class _Run:
    """The measurements of one evaluation and the records made of them."""

    def __init__(self, settings: Settings, jobs: list[_Job], corpus: Corpus, loaded: LoadedModel, command: str):
        self.settings, self.jobs, self.corpus, self.loaded, self.command = settings, jobs, corpus, loaded, command
        self.positions = self._positions()
        self.documents = self._tokenize()
        self.total_tokens = sum(len(ids) for ids in self.documents)
        self.plain: dict[str, Any] | None = None
        self.prefix: PrefixRun | None = None
        self.speed: SpeedRun | None = None
        self.seconds: dict[str, float] = {}
        self.protocol = "speed"
        if settings.ppl_apply_press:
            self.plans = self._plan_prefix()
            plan = self.plans[0][1]
            self.protocol = f"prefix-C{plan.context}-T{plan.target}-S{plan.stride}"
        elif not settings.speed_only:
            self.max_length = self._within(settings.max_length or self.positions, "--max_length")
            self.stride = settings.stride or min(512, self.max_length)
            self.protocol = f"strided-L{self.max_length}-S{self.stride}"

    # -- what to measure ----------------------------------------------------------------------------------------

    def _positions(self) -> int:
        positions = self.loaded.max_positions
        if positions is None:
            note(f"{self.settings.model} does not say how many positions it has; {UNKNOWN_POSITIONS} are assumed.")
            return UNKNOWN_POSITIONS
        return positions

    def _within(self, wanted: int, what: str) -> int:
        """``wanted`` tokens, or the trained positions if that is more than those and extrapolation is not asked for."""
        if wanted <= self.positions:
            return wanted
        if self.settings.allow_extrapolation:
            note(f"{what} {wanted} is past the {self.positions} positions {self.settings.model} was trained on.")
            return wanted
        note(
            f"{what} {wanted} is past the {self.positions} positions {self.settings.model} was trained on; "
            f"{self.positions} are used (--allow_extrapolation uses all)."
        )
        return self.positions

    def _tokenize(self) -> list[Tensor]:
        """Token ids of each document, without special tokens, until ``--limit_tokens`` is reached."""
        left = self.settings.limit_tokens if self.settings.limit_tokens is not None else sys.maxsize
        documents = []
        for document in self.corpus.documents:
            encoded = self.loaded.tokenizer(document.text, add_special_tokens=False, verbose=False)
            ids = torch.tensor(encoded["input_ids"][:left], dtype=torch.long)
            if len(ids) >= 2:
                documents.append(ids)
            left -= len(ids)
            if left < 2:
                break
        if not documents:
            raise DataError(
                "The text has fewer than 2 tokens; a token is scored from the one before it. Use a longer text"
                f"{' or a larger --limit_tokens' if self.settings.limit_tokens is not None else ''}."
            )
        return documents

    def _plan_prefix(self) -> list[tuple[Tensor, PrefixPlan]]:
        s = self.settings
        width = s.max_length or self.positions
        if s.context_tokens is not None and s.target_tokens is not None:
            width = s.context_tokens + s.target_tokens
        width = self._within(width, "context and targets of")
        longest = max(len(ids) for ids in self.documents)
        if longest < width and s.context_tokens is None and s.target_tokens is None:
            if longest < 4:
                raise DataError(f"The text has {longest} tokens; at least 4 are needed for a context and two targets.")
            note(f"no document has {width} tokens; the one window is {longest} tokens long.")
            width = longest
        target = s.target_tokens or (width - s.context_tokens if s.context_tokens else max(2, width // 4))
        context = s.context_tokens or width - target
        if context + target > width or context < 1:
            raise InputError(
                f"--context_tokens {context} and --target_tokens {target} do not fit in {width} tokens "
                f"(the model's positions or --max_length)."
            )
        fitting = [ids for ids in self.documents if len(ids) >= context + target]
        if fitting and len(fitting) < len(self.documents):
            note(
                f"{len(self.documents) - len(fitting)} document(s) shorter than {context + target} tokens are left out."
            )
        return [(ids, plan_prefix(len(ids), context, target, s.stride)) for ids in fitting or self.documents]

    # -- measuring ----------------------------------------------------------------------------------------------

    def measure(self) -> None:
        s = self.settings
        if s.ppl_apply_press:
            presses = [job.press for job in self.jobs if job.press is not None]
            self.prefix = PrefixRun(self.loaded.model, presses, self.plans, s.batch_size)
            self._timed("perplexity", lambda bar: self.prefix.run(bar))  # type: ignore[union-attr]
        elif not s.speed_only:
            if any(job.press is not None for job in self.jobs):
                note("this perplexity is the uncompressed model's; --ppl_apply_press measures it under the press.")

            def plain(bar: Any) -> None:
                self.plain = plain_perplexity(
                    self.loaded.model, self.documents, max_length=self.max_length, stride=self.stride, progress=bar
                )

            self._timed("perplexity", plain)
        if not s.ppl_only:
            self._measure_speed()

    def _timed(self, name: str, work: Any) -> None:
        start = time.perf_counter()

        def bar(items: Iterable[Any]) -> Any:
            return tqdm(items, desc=name, file=sys.stderr, dynamic_ncols=True, smoothing=0.05)

        work(bar)
        self.seconds[name] = time.perf_counter() - start

    def _measure_speed(self) -> None:
        s = self.settings
        if s.max_new_tokens < 2:
            raise InputError(f"--max_new_tokens must be at least 2 to time decoding, got {s.max_new_tokens}.")
        ids = self.documents[0]
        room = (
            self._within(s.context_limit + s.max_new_tokens, "--context_limit plus --max_new_tokens =")
            - s.max_new_tokens
        )
        if room < 1:
            raise InputError(
                f"--max_new_tokens {s.max_new_tokens} leaves no room for a context in {self.positions} positions."
            )
        context = ids[None, : min(room, s.context_limit)].to(self.loaded.device)
        eos = getattr(self.loaded.model.generation_config, "eos_token_id", None)
        presses = [job.press for job in self.jobs]
        self.speed = SpeedRun(
            self.loaded.model,
            context,
            presses if None in presses else [None, *presses],  # the baseline is always timed beside the presses
            max_new_tokens=s.max_new_tokens,
            min_new_tokens=s.min_new_tokens,
            eos_ids=[] if eos is None else eos if isinstance(eos, list) else [eos],
            decode_only=s.speed_decode_only,
            repetitions=s.repetitions,
            warmup=s.warmup,
            seed=s.seed,
        )
        self._timed("speed", self.speed.run)

    # -- records ------------------------------------------------------------------------------------------------

    def records(self, is_interrupted: bool) -> list[dict[str, Any]]:
        """One record per press; of an interrupted run those with something complete in them."""
        env = environment()
        perplexities = (
            {} if self.prefix is None else {id(p.press): r for p, r in self.prefix.results() if p.counts or p.error}
        )
        records = []
        for job in self.jobs:
            parts: list[Any] = []
            if self.prefix is not None:
                parts.append(perplexities.get(id(job.press)))
            elif self.plain is not None:
                parts.append(self.plain)
            parts.append(self._speed_part(job))
            parts = [part for part in parts if part is not None]
            if not parts and is_interrupted:
                continue
            error = next((part for part in parts if isinstance(part, Exception)), None)
            record = self._start(job, env)
            record["status"] = "failed" if error else "interrupted" if is_interrupted else "ok"
            if error is not None:
                record["error"] = f"{type(error).__name__}: {error}"
                record["traceback"] = "".join(traceback.format_exception(error))
                tqdm.write(f"error: press {job.name} at {job.ratio:g} failed: {record['error']}", file=sys.stderr)
            else:
                for part in parts:
                    record |= part
            records.append(record)
        return records

    def _speed_part(self, job: _Job) -> dict[str, Any] | Exception | None:
        if self.speed is None:
            return None
        point = next(p for p in self.speed.points if p.press is job.press)
        baseline: SpeedPoint = next(p for p in self.speed.points if p.press is None)
        if not point.samples and point.error is None:
            return None
        try:
            part = point.result(baseline, self.speed.context_ids.shape[1])
        except Exception as error:
            return error
        part["speed_tokens_per_s"] = part["decode_tokens_per_s"]
        if self.prefix is None:
            return part
        # The sizes of the perplexity's context are the record's; those of the timed context get a name of their own.
        own = ("context_tokens", "kv_bytes", "kv_bytes_baseline", "kv_len_before", "kv_len_after",
               "effective_compression_ratio")  # fmt: skip
        return {f"speed_{key}" if key in own else key: value for key, value in part.items()}

    def _start(self, job: _Job, env: dict[str, Any]) -> dict[str, Any]:
        s, corpus = self.settings, self.corpus
        asked = {
            k: v for k, v in asdict(s).items() if k not in ("output_dir", "press", "compression_ratio", "press_args")
        }
        record: dict[str, Any] = dict.fromkeys(METRICS)
        record |= {
            "schema_version": SCHEMA_VERSION,
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "status": "ok",
            "error": None,
            "command": self.command,
            "protocol": self.protocol,
            "settings": asked,
            "seed": s.seed,
            **self.loaded.facts(),
            "dataset": s.text_file or s.dataset,
            "dataset_source": corpus.source,
            "subset": corpus.subset,
            "split": corpus.split,
            "sample_idx": s.sample_idx,
            "doc_ids": [d.doc_id for d in corpus.documents][: len(self.documents)],
            "join": corpus.join,
            "add_bos": False,
            "text_sha256": corpus.text_sha256,
            "text_bytes": corpus.text_bytes,
            "total_tokens": self.total_tokens,
            "press": job.name,
            "press_config": None if job.press is None else asdict(job.press),  # type: ignore[call-overload]
            "compression_ratio": job.ratio,
            "position_mode": "original",
            "seconds": self.seconds,
            "env": env,
        }
        if self.prefix is not None:
            plan = self.prefix.plan
            record |= {"context_tokens": plan.context, "target_tokens": plan.target, "stride": plan.stride}
            record |= {"kv_len_before": plan.context, "batch_size": s.batch_size}
        elif not s.speed_only:
            record |= {"max_length": self.max_length, "stride": self.stride}
        return record


METRICS = (
    *("scored_tokens", "windows", "loss", "ppl", "baseline_loss", "baseline_ppl", "delta_nll", "delta_nll_se"),
    *("delta_nll_ci95", "ppl_ratio_ci95", "top1_acc", "same_top1", "kld", "delta_p", "nll_by_distance", "per_window"),
    *("context_tokens", "target_tokens", "kv_bytes", "kv_bytes_baseline", "kv_len_before", "kv_len_after", "kept_hash"),
    *("effective_compression_ratio", "generated_tokens", "repetitions", "generation_tokens_per_s"),
    *("speed_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "tpot_ms", "decode_speedup"),
    *("peak_mem_bytes", "peak_mem_kind", "peak_mem_baseline_bytes", "peak_mem_delta_bytes", "peak_reserved_bytes"),
)
