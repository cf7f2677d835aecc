"""What an evaluation was asked for, and the presses that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from coldpress.bases.press import BasePress
from coldpress.bases.registry import NO_PRESS, make_press, parameters_of, press_names
from coldpress.bases.scorer import BUDGETS
from coldpress.core.counts import check_ratio
from coldpress.core.press import parts
from coldpress.core.requirements import check_chunks, check_quantisable, require_rerotatable
from coldpress.errors import CacheError, InputError, PressError
from coldpress.presses.decoding import DecodingPress
from coldpress.stores.bits import KVBits

PPL_MODES = ("prefix", "streaming")
PPL_PRESETS = ("hf-strided", "gptq", "llamacpp", "lm-eval")
POSITIONS = ("original", "rerotate")
STREAM_CHUNK = 64

__all__ = [
    "POSITIONS",
    "PPL_MODES",
    "PPL_PRESETS",
    "Job",
    "Settings",
    "check_types",
    "left_out_of_batches",
    "make_jobs",
]


@dataclass(frozen=True)
class Settings:
    """Everything an evaluation was asked for; the command line's options have these names.

    Raises:
        InputError: options that contradict each other, or that can never work.
    """

    model: str = "EleutherAI/pythia-70m"
    revision: str | None = None
    dataset: str = "wikitext"
    subset: str | None = None
    split: str = "test"
    sample_idx: int | None = None
    text_file: str | None = None
    press: tuple[str, ...] = (NO_PRESS,)
    compression_ratio: tuple[float, ...] = ()  # (0.5,) if no budget is given
    budget_tokens: tuple[int, ...] = ()
    budget_bytes: tuple[int, ...] = ()
    press_args: tuple[tuple[str, Any], ...] = ()
    chunk_tokens: int | None = None
    kv_bits: tuple[int, ...] = ()  # of the older pairs, instead of as they are
    kv_group_size: int = KVBits.group_size
    kv_residual_tokens: int = KVBits.residual_tokens
    ppl_apply_press: bool = False
    ppl_mode: str | None = None  # prefix or streaming
    ppl_preset: str | None = None  # how others measure the uncompressed model
    add_bos: bool | None = None  # before windows and texts; None: as the tokenizer begins a text
    stream_chunk: int | None = None
    positions: str | None = None  # original or rerotate; rerotate if a stream is read
    speed_only: bool = False
    ppl_only: bool = False
    speed_decode_only: bool = False
    compile: bool = False  # the timed decoding
    max_length: int | None = None
    stride: int | None = None
    context_tokens: int | None = None
    target_tokens: int | None = None
    limit_tokens: int | None = None
    max_documents: int | None = None
    max_windows: int | None = None  # of each document
    greedy_tokens: int = 0
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
    device_map: str | None = None
    tp_plan: str | None = None
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    seed: int = 0
    output_dir: str = "results/perplexity"

    def __post_init__(self) -> None:
        sizes = [f"--{name}" for name in ("compression_ratio", *BUDGETS) if getattr(self, name)]
        if len(sizes) > 1:
            raise InputError(f"{' and '.join(sizes)} both say how much is kept; give one of them.")
        if not sizes:
            object.__setattr__(self, "compression_ratio", (0.5,))
        if self.ppl_preset is not None:
            self._check_preset()
        self._check_mode()
        if self.speed_only and (self.ppl_apply_press or self.ppl_only):
            raise InputError("--speed_only measures no perplexity; leave it out, or --ppl_apply_press and --ppl_only.")
        if self.speed_only and self.add_bos is not None:
            raise InputError("--add_bos is for perplexity, and --speed_only measures none; leave one of them out.")
        if self.chunk_tokens is not None and not self.ppl_apply_press and self.ppl_only:
            raise InputError(
                "--chunk_tokens cuts up the prompt that a press compresses; --ppl_only alone has none: add "
                "--ppl_apply_press."
            )
        for name in ("max_documents", "max_windows", "greedy_tokens", "context_tokens", "target_tokens"):
            if getattr(self, name) and not self.ppl_apply_press and (name != "max_documents" or self.ppl_mode is None):
                raise InputError(f"--{name} is for perplexity under presses; add --ppl_apply_press, or leave it out.")
        for name in ("max_length", "stride"):
            if getattr(self, name) is not None and self.speed_only:
                raise InputError(f"--{name} is for perplexity, and --speed_only measures none; leave one of them out.")
        if self.speed_only and self.batch_size != 1:
            raise InputError("--batch_size is for perplexity, and --speed_only measures none; leave one of them out.")
        for name in ("kv_group_size", "kv_residual_tokens"):
            if getattr(self, name) != getattr(Settings, name) and not self.kv_bits:
                raise InputError(f"--{name} says how pairs are held in few bits; add --kv_bits, or leave it out.")
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
        if not self.ppl_only and self.max_new_tokens < 2:
            raise InputError(f"--max_new_tokens must be at least 2 to time decoding, got {self.max_new_tokens}.")
        if not self.ppl_only and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise InputError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_new_tokens {self.max_new_tokens}."
            )

    @property
    def loading(self) -> dict[str, Any]:
        """The options of load_model beside the name."""
        names = ("device", "dtype", "attn_implementation", "revision", "device_map", "tp_plan")
        return {name: getattr(self, name) for name in names}

    @property
    def cluster(self) -> dict[str, Any]:
        """The options of the engine."""
        return {"ray_address": self.ray_address, "workers": self.workers}

    def _check_preset(self) -> None:
        """Fill in what follows from ``--ppl_preset``; raise :class:`InputError` if it contradicts other options."""
        if self.ppl_preset not in PPL_PRESETS:
            raise InputError(f"--ppl_preset must be one of {', '.join(PPL_PRESETS)}, got {self.ppl_preset!r}.")
        asked = [name for name in ("ppl_apply_press", "ppl_mode", "kv_bits") if getattr(self, name)]
        if tuple(self.press) != (NO_PRESS,) or asked:
            what = f"--{asked[0]}" if asked else f"--press {' '.join(self.press)}"
            raise InputError(
                f"--ppl_preset {self.ppl_preset} is the uncompressed model's perplexity, as others measure it; leave "
                f"{what} out, or measure presses with --ppl_apply_press and without a preset."
            )
        for name in ("stride", "context_tokens", "target_tokens"):
            if getattr(self, name) is not None:
                raise InputError(f"--ppl_preset {self.ppl_preset} says how windows lie; leave --{name} out.")
        if self.add_bos is not None:
            raise InputError(f"--ppl_preset {self.ppl_preset} says how texts begin; leave --add_bos out.")
        for name in ("speed_only", "speed_decode_only", "compile"):
            if getattr(self, name):
                raise InputError(f"--ppl_preset {self.ppl_preset} measures no speed; leave --{name} out.")
        object.__setattr__(self, "ppl_only", True)

    def _check_mode(self) -> None:
        """Fill in what follows from ``--ppl_mode``; raise :class:`InputError` if it contradicts other options."""
        if self.ppl_mode not in (None, *PPL_MODES):
            raise InputError(f"--ppl_mode must be {' or '.join(PPL_MODES)}, got {self.ppl_mode!r}.")
        if self.positions not in (None, *POSITIONS):
            raise InputError(f"--positions must be {' or '.join(POSITIONS)}, got {self.positions!r}.")
        if self.ppl_mode == "streaming":
            if self.ppl_apply_press or self.speed_only or self.speed_decode_only:
                raise InputError(
                    "--ppl_mode streaming reads whole texts and measures no speed; leave --ppl_apply_press, "
                    "--speed_only and --speed_decode_only out."
                )
            for name in ("context_tokens", "target_tokens", "stride", "max_length"):
                if getattr(self, name) is not None:
                    raise InputError(f"--ppl_mode streaming has no windows; leave --{name} out.")
            if self.chunk_tokens is not None:
                raise InputError(
                    "--ppl_mode streaming reads --stream_chunk tokens at a time; leave --chunk_tokens out."
                )
            if self.kv_bits:
                raise InputError("--ppl_mode streaming evicts again and again, and --kv_bits cannot; leave one out.")
            if self.batch_size != 1:
                raise InputError("--ppl_mode streaming reads one text after the other; leave --batch_size out.")
            object.__setattr__(self, "ppl_only", True)
            object.__setattr__(self, "stream_chunk", self.stream_chunk or STREAM_CHUNK)
            object.__setattr__(self, "positions", self.positions or "rerotate")
            return
        for name in ("stream_chunk", "positions"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name} belongs to --ppl_mode streaming.")
        if self.ppl_mode == "prefix":
            object.__setattr__(self, "ppl_apply_press", True)
        elif self.ppl_apply_press:
            object.__setattr__(self, "ppl_mode", "prefix")


@dataclass(frozen=True)
class Job:
    """One press of one size: one result record.

    At most one of ``ratio``, ``budget_tokens`` and ``budget_bytes`` is given, and none for a press without a ratio.
    ``kv_bits`` says how what is kept is held; None: as it is.
    """

    name: str
    press: BasePress | None
    ratio: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None
    kv_bits: KVBits | None = None


def make_jobs(settings: Settings) -> list[Job]:
    """The presses to measure, in the order they were named: each at every ratio or budget, or once if it has none.

    ``all`` is every press that needs nothing but the model and compresses the prompt; name the calibrated, the trained
    and the decoding ones. ``no_press`` is measured once. With ``--chunk_tokens``, ``all`` leaves out what chooses only
    once; with ``--batch_size``, where perplexity is measured under presses, what takes one text at a time
    (:func:`left_out_of_batches`). With ``kv_bits`` each of them is measured at every number of bits; ``all`` leaves out
    those that cannot be held so.

    Raises:
        PressError: an unknown press or parameter, a ratio outside [0, 1), parameters for several presses, a budget for
            a press that was named and has none, a press that would compress nothing of what is measured, a press that
            was named and takes one text at a time.
        CacheError: bits that there are not, or that a press that was named cannot be held in.
    """
    if settings.ppl_mode == "streaming":
        return _make_stream_jobs(settings)
    for ratio in settings.compression_ratio:
        check_ratio(ratio, "--compression_ratio")
    names: list[str] = []
    for name in settings.press:
        names += [NO_PRESS, *_all_presses(settings)] if name == "all" else [name]
    names = list(dict.fromkeys(names))
    parameters = dict(settings.press_args)
    if parameters and len([name for name in names if name != NO_PRESS]) != 1:
        raise PressError("--press_args belongs to one press; name a single one with --press.")
    for size in ("compression_ratio", *BUDGETS):
        if size in parameters:
            raise PressError(f"--press_args cannot hold {size}; use --{size}.")
    budgets = [{size: value} for size in BUDGETS for value in getattr(settings, size)]
    jobs: list[Job] = []
    for name in names:
        own = {} if name == NO_PRESS else parameters
        if "seed" in parameters_of(name):
            own = {"seed": settings.seed, **own}
        check_types(name, own)
        if name == NO_PRESS:
            jobs.append(Job(name, None, 0.0))
            continue
        if name in press_names(has_ratio=False):
            asked = budgets[0] if budgets and name in settings.press else {}  # make_press says that it has none
            jobs.append(Job(name, make_press(name, 0.0, **asked, **own)))
            check_chunks(jobs[-1].press, settings.chunk_tokens)
            continue
        ratios = [ratio + 0.0 for ratio in settings.compression_ratio]  # 0.0 for -0.0
        mine = [Job(name, make_press(name, ratio, **own), ratio) for ratio in ratios]
        mine += [Job(name, make_press(name, 0.0, **budget, **own), **budget) for budget in budgets]
        for job in mine:
            _check_compresses(name, job.press, settings)
            check_chunks(job.press, settings.chunk_tokens)
        jobs += mine
    jobs = list({(job.name, job.ratio, job.budget_tokens, job.budget_bytes): job for job in jobs}.values())
    jobs = [job for job in jobs if _takes_batch(job, settings)]
    bits = dict.fromkeys(settings.kv_bits)
    return _in_bits(jobs, [KVBits(n, settings.kv_group_size, settings.kv_residual_tokens) for n in bits], settings)


def left_out_of_batches(settings: Settings) -> list[str]:
    """What ``all`` leaves out because it takes one text at a time; empty where ``all`` was not asked for."""
    if "all" not in settings.press or settings.batch_size == 1:
        return []
    measured = {job.name for job in make_jobs(settings)}
    return [job.name for job in make_jobs(replace(settings, batch_size=1)) if job.name not in measured]


def _takes_batch(job: Job, settings: Settings) -> bool:
    """Whether its perplexity can be measured on so many texts at once.

    Raises:
        PressError: it cannot, and was named.
    """
    if job.press is None or not settings.ppl_apply_press or settings.batch_size == 1:
        return True
    try:
        job.press.check_prefill(torch.empty(2, 1, dtype=torch.long), has_padding=False)  # two rows stand for any more
    except PressError as error:
        if job.name not in settings.press:
            return False
        raise PressError(
            f"{job.name} takes one text at a time, and --batch_size is {settings.batch_size}: leave --batch_size out, "
            f"or {job.name}."
        ) from error
    return True


def _in_bits(jobs: list[Job], kv_bits: list[KVBits], settings: Settings) -> list[Job]:
    """Each job at every number of bits; as it is where there are none."""
    if not kv_bits:
        return jobs
    held = []
    for job in jobs:
        try:
            check_quantisable(job.press, kv_bits[0])
        except CacheError:
            if job.name in settings.press:
                raise
            continue
        held += [replace(job, kv_bits=each) for each in kv_bits]
    return held


def _all_presses(settings: Settings) -> list[str]:
    """What ``all`` means beside no_press: with ``--chunk_tokens`` those that can choose again and again."""
    names = press_names(kind="training-free", at_prefill=True)
    if settings.chunk_tokens is None:
        return names
    return [name for name in names if (press := make_press(name, 0.0)) is not None and press.chooses_again]


def _make_stream_jobs(settings: Settings) -> list[Job]:
    """Each named scorer at each number of tokens, cut back to them after every chunk; ``no_press`` is measured once.

    Raises:
        PressError: a press that cannot choose again and again among what is left of a text, or no number of tokens.
    """
    names, parameters = list(dict.fromkeys(settings.press)), dict(settings.press_args)
    if parameters and len([name for name in names if name != NO_PRESS]) != 1:
        raise PressError("--press_args belongs to one press; name a single one with --press.")
    if not settings.budget_tokens and names != [NO_PRESS]:
        raise PressError(
            "A stream has no length that a ratio could be taken of; say how much is held: --budget_tokens."
        )
    if "all" in names:
        scorers = [name for name in press_names(kind="training-free", has_ratio=True) if _streams(name)]
        names = list(dict.fromkeys([NO_PRESS, *names, *scorers]))
        names.remove("all")
    jobs = []
    for name in names:
        own = {} if name == NO_PRESS else parameters
        if "seed" in parameters_of(name):
            own = {"seed": settings.seed, **own}
        check_types(name, own)
        if name == NO_PRESS:
            jobs.append(Job(name, None))
            continue
        assert settings.stream_chunk is not None
        scorer = make_press(name, 0.0, **own)
        for n in settings.budget_tokens:
            press = DecodingPress(scorer, compression_interval=settings.stream_chunk, target_size=n)  # type: ignore[arg-type]
            if settings.positions == "rerotate":
                require_rerotatable(press)
            if any(part.needs_hidden_states for part in parts(press)):
                raise PressError(
                    f"{name} looks at hidden states, which --ppl_mode streaming does not show; leave it out."
                )
            jobs.append(Job(name, press, budget_tokens=n))
    return jobs


def _streams(name: str) -> bool:
    """Whether the press called ``name`` can go into a decoding schedule."""
    try:
        DecodingPress(make_press(name, 0.0))  # type: ignore[arg-type]
    except PressError:
        return False
    return True


def _check_compresses(name: str, press: BasePress | None, settings: Settings) -> None:
    """Raise :class:`PressError` if a press that goes to work while decoding would find nothing to do."""
    if press is None or press.at_prefill:
        return
    if settings.ppl_apply_press or settings.ppl_only:
        raise PressError(
            f"{name} compresses what is generated and nothing of a prompt, so no perplexity shows it. Measure its "
            "speed and memory (--speed_only), or compress the prompt too, with PrefillDecodingPress in Python."
        )
    if not press.is_due(settings.max_new_tokens - 1):
        raise PressError(
            f"{name} would compress nothing within --max_new_tokens {settings.max_new_tokens}: generate more, or "
            "compress more often, as with --press_args '{\"compression_interval\": 16}'."
        )


def check_types(name: str, parameters: dict[str, Any]) -> None:
    """Parameters come from JSON, where a text may stand in for a number."""
    known = parameters_of(name)
    for parameter, value in parameters.items():
        if parameter not in known:  # make_press will say so
            continue
        field = known[parameter]
        kinds = [kind for part in str(field.type).split(" | ") for kind in _KINDS.get(part, ())] or [
            type(field.default)
        ]
        if value != field.default and type(value) not in kinds:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise PressError(f"{name}: {parameter} must be {allowed}, got {value!r}.")


_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
