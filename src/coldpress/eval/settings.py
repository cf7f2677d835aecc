"""What is asked of each command that measures; its options have these names.

Settings that contradict each other, or that can never work, raise :class:`InputError` when they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.errors import InputError
from coldpress.eval.options import (
    SIZES,
    OfAdvice,
    OfBenchmark,
    OfCalibration,
    OfEngine,
    OfLimits,
    OfMachine,
    OfModel,
    OfPerplexity,
    OfPlacement,
    OfPresses,
    OfSpeed,
    OfTasks,
    OfText,
    OfTiming,
    OfWindows,
    Options,
    but,
    names_of,
)

STREAM_CHUNK = 64
MOST_EXAMPLES = 10_000  # of a task; all are made before the first is asked


# Bases are named from the last option to the first: that is the order in which dataclasses take their fields.


@dataclass(frozen=True)
class _Measured(OfLimits, OfEngine, OfMachine, OfPresses, OfModel, Options):
    """What every measurement under presses has."""

    @property
    def cluster(self) -> dict[str, Any]:
        """The options of the engine."""
        return {"ray_address": self.ray_address, "workers": self.workers}

    def protocol(self, *parts: str, after: str = "") -> str:
        """The name of a way to measure, of the parts that are not empty, pinned text and chunks included."""
        pinned = "" if getattr(self, "pin_system", None) is None else "pinned"
        chunk = "" if self.chunk_tokens is None else f"chunk{self.chunk_tokens}"
        return "-".join(part for part in (*parts, pinned, after, chunk) if part)

    def asking(self, **more: Any) -> Settings:
        """What says which presses are measured: an evaluation with the same ones."""
        return Settings(**{name: getattr(self, name) for name in (*names_of(OfPresses), "seed")}, **more)


@dataclass(frozen=True)
class Settings(OfTiming, OfSpeed, OfWindows, OfPerplexity, OfPlacement, OfText, _Measured):
    """Everything an evaluation of perplexity and speed was asked for."""

    output_dir: str = but(OfLimits, "output_dir", "results/perplexity")

    def __post_init__(self) -> None:
        self.check_choices()
        sizes = [f"--{name}" for name in SIZES if getattr(self, name)]
        if len(sizes) > 1:
            raise InputError(f"{' and '.join(sizes)} both say how much is kept; give one of them.")
        if not sizes:
            object.__setattr__(self, "compression_ratio", (0.5,))
        if self.ppl_preset is not None:
            self._check_preset()
        self._check_mode()
        if self.speed_only and (self.ppl_apply_press or self.ppl_only):
            raise InputError("--speed_only measures no perplexity; leave it out, or --ppl_apply_press and --ppl_only.")
        if self.speed_only:
            why = "--{} is for perplexity, and --speed_only measures none; leave one of them out."
            self.refuse(why, "add_bos", "max_length", "stride", "batch_size")
        if self.chunk_tokens is not None and not self.ppl_apply_press and self.ppl_only:
            raise InputError(
                "--chunk_tokens cuts up the prompt that a press compresses; --ppl_only alone has none: add "
                "--ppl_apply_press."
            )
        if not self.ppl_apply_press:
            why = "--{} is for perplexity under presses; add --ppl_apply_press, or leave it out."
            if self.ppl_mode is None:
                self.refuse(why, "max_documents")
            self.refuse(why, "max_windows", "greedy_tokens", "context_tokens", "target_tokens")
        if not self.kv_bits:
            why = "--{} says how pairs are stored in few bits; add --kv_bits, or leave it out."
            self.refuse(why, "kv_group_size", "kv_residual_tokens")
        if self.engine != "local" and not self.ppl_apply_press:
            raise InputError(
                f"--engine {self.engine} measures windows under presses, and none are asked for; add "
                "--ppl_apply_press, or leave --engine out."
            )
        if self.ppl_only and self.speed_decode_only:
            raise InputError("--ppl_only measures no speed; leave it out, or --speed_decode_only.")
        if self.compile and self.ppl_only:
            raise InputError("--compile is for decoding, and no speed is measured here; leave it out.")
        if self.compile and not self.warmup:
            raise InputError("--compile compiles in the untimed rounds; give --warmup 1 or more.")
        if self.compile and self.attn_implementation != OfMachine.attn_implementation:
            raise InputError(
                f"--compile decodes with attention of its own; leave --attn_implementation {self.attn_implementation} "
                "out, or --compile."
            )
        if not self.ppl_only and self.max_new_tokens < 2:
            raise InputError(f"--max_new_tokens must be at least 2 to time decoding, got {self.max_new_tokens}.")
        if not self.ppl_only and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise InputError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_new_tokens {self.max_new_tokens}."
            )

    def _check_preset(self) -> None:
        """Fill in what follows from ``--ppl_preset``; raise :class:`InputError` if it contradicts other options."""
        asked = [name for name in ("ppl_apply_press", "ppl_mode", "kv_bits") if getattr(self, name)]
        if tuple(self.press) != (NO_PRESS,) or asked:
            what = f"--{asked[0]}" if asked else f"--press {' '.join(self.press)}"
            raise InputError(
                f"--ppl_preset {self.ppl_preset} is the uncompressed model's perplexity, as others measure it; leave "
                f"{what} out, or measure presses with --ppl_apply_press and without a preset."
            )
        preset = f"--ppl_preset {self.ppl_preset}"
        self.refuse(preset + " says how windows lie; leave --{} out.", "stride", "context_tokens", "target_tokens")
        self.refuse(preset + " says how texts begin; leave --{} out.", "add_bos")
        self.refuse(preset + " measures no speed; leave --{} out.", "speed_only", "speed_decode_only", "compile")
        object.__setattr__(self, "ppl_only", True)

    def _check_mode(self) -> None:
        """Fill in what follows from ``--ppl_mode``; raise :class:`InputError` if it contradicts other options."""
        if self.ppl_mode == "streaming":
            if self.ppl_apply_press or self.speed_only or self.speed_decode_only:
                raise InputError(
                    "--ppl_mode streaming reads whole texts and measures no speed; leave --ppl_apply_press, "
                    "--speed_only and --speed_decode_only out."
                )
            mode, of_windows = "--ppl_mode streaming", ("context_tokens", "target_tokens", "stride", "max_length")
            self.refuse(mode + " has no windows; leave --{} out.", *of_windows)
            self.refuse(mode + " reads --stream_chunk tokens at a time; leave --{} out.", "chunk_tokens")
            self.refuse(mode + " evicts again and again, and --{} cannot; leave one out.", "kv_bits")
            self.refuse(mode + " reads one text after the other; leave --{} out.", "batch_size")
            object.__setattr__(self, "ppl_only", True)
            object.__setattr__(self, "stream_chunk", self.stream_chunk or STREAM_CHUNK)
            object.__setattr__(self, "positions", self.positions or "rerotate")
            return
        self.refuse("--{} belongs to --ppl_mode streaming.", "stream_chunk", "positions")
        if self.ppl_mode == "prefix":
            object.__setattr__(self, "ppl_apply_press", True)
        elif self.ppl_apply_press:
            object.__setattr__(self, "ppl_mode", "prefix")


@dataclass(frozen=True)
class TaskSettings(OfTasks, OfText, _Measured):
    """Everything a run over tasks was asked for."""

    # the haystack; None for sentences of our own
    dataset: str | None = but(OfText, "dataset", None)  # type: ignore[assignment]
    device_map: str | None = but(OfPlacement, "device_map", None, is_recorded=False)
    output_dir: str = but(OfLimits, "output_dir", "results/tasks")

    def __post_init__(self) -> None:
        from coldpress.eval.tasks import find_task

        for name in self.task:
            find_task(name)
        if self.dataset is not None and self.text_file is not None:
            raise InputError(
                f"--text_file {self.text_file} and --dataset {self.dataset} are both the text; give one of them."
            )
        if not self.reading:
            why = "--{} belongs to a text; name one with --dataset, or leave it out."
            self.refuse(why, "subset", "split", "sample_idx")
        if self.task_examples > MOST_EXAMPLES:
            raise InputError(f"--task_examples must be at most {MOST_EXAMPLES:,}, got {self.task_examples:,}.")
        self.check_choices()
        self.check_pin()
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"--depths must be numbers from 0 (beginning) to 1 (end), got {list(self.depths)}.")

    def of_jobs(self) -> Settings:
        return self.asking(engine=self.engine, ppl_apply_press=True, ppl_only=True)

    def recorded(self) -> dict[str, Any]:
        found = super().recorded()
        if self.pin_system is None:  # as before there was one, so that finished runs are found again
            del found["pin_system"]
        return found


@dataclass(frozen=True)
class BenchmarkSettings(_Measured, OfBenchmark):
    """Everything a run over a benchmark was asked for."""

    device_map: str | None = but(OfPlacement, "device_map", None, is_recorded=False)
    seed: int = but(OfLimits, "seed", 42)  # kvpress's, so that a fraction is the same one
    output_dir: str = but(OfLimits, "output_dir", "results/benchmarks")

    def __post_init__(self) -> None:
        from coldpress.eval.benchmarks import find_benchmark

        benchmark = find_benchmark(self.name)
        self.check_choices()
        self.check_pin()
        if not 0 < self.fraction <= 1:
            raise InputError(f"--fraction must be more than 0 and at most 1, got {self.fraction:.15g}.")
        if not benchmark.is_haystack:
            if self.needle_depth:
                raise InputError(f"--needle_depth belongs to needle_in_haystack; {self.name} hides nothing.")
            return
        if self.max_context_length is None or not self.needle_depth:
            raise InputError(f"{self.name} needs --max_context_length and --needle_depth, such as 4096 and 0 50 100.")
        if not all(0 <= depth <= 100 for depth in self.needle_depth):
            raise InputError(f"--needle_depth must be per cents from 0 to 100, got {list(self.needle_depth)}.")
        if self.fraction < 1:
            raise InputError(f"{self.name} has one text; leave --fraction out.")

    def of_jobs(self, longest_answer: int) -> Settings:
        """``longest_answer`` in tokens: a press that goes to work while decoding must find something to do."""
        if "finch" in self.press and not self.query_aware:
            raise InputError("finch chooses by the question at the end of a text; add --query_aware, or leave it out.")
        return self.asking(speed_only=True, max_new_tokens=max(longest_answer, 2))


@dataclass(frozen=True)
class CalibrationSettings(OfMachine, OfText, OfModel, OfCalibration, Options):
    """Everything a calibration was asked for."""

    # train, where the dataset has splits
    split: str | None = but(OfText, "split", None, help="split of the dataset (default: train)")  # type: ignore[assignment]


@dataclass(frozen=True)
class AdviceSettings(OfLimits, OfMachine, OfModel, OfAdvice, Options):
    """Everything a recommendation was asked for."""

    subset: str | None = but(OfText, "subset", None)
    split: str = but(OfText, "split", "test")
    sample_idx: int | None = but(OfText, "sample_idx", None)
    template: str | None = but(OfTasks, "template", None, help="of the questions (default: chat, where there is one)")
    output_dir: str = but(OfLimits, "output_dir", "results/recommend")

    def __post_init__(self) -> None:
        self.check_choices()
        if self.data is None or not self.data.strip():
            raise InputError("--data is missing; name the text that you work with: a UTF-8 file, a dataset, or demo.")
        for ratio in self.compression_ratio:
            if not 0 < ratio < 1:
                raise InputError(f"--compression_ratio must be more than 0 and less than 1, got {ratio:.15g}.")
        for name, most in (("budget_minutes", 10_000), ("margin", 10)):
            if not 0 < getattr(self, name) <= most:
                raise InputError(f"--{name} must be more than 0 and at most {most:,}, got {getattr(self, name):g}.")
        if NO_PRESS in self.press or "all" in self.press:
            raise InputError("--press takes names of presses; the uncompressed cache is always measured beside them.")
