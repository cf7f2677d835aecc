"""Jobs and points: from what was asked for to a press of each size, with its pairs as they are or in few bits."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import file_digest, load_press_files
from coldpress.bases.registry import NO_PRESS, make_press, press_names, takes_ratio
from coldpress.bases.scorer import BUDGETS
from coldpress.core.press import parts
from coldpress.core.ratio import check_ratio
from coldpress.core.requirements import check_chunks, check_quantisable, require_rerotatable
from coldpress.errors import CacheError, InputError, PressError
from coldpress.eval.settings import Settings
from coldpress.loading.models import pick_device
from coldpress.loading.presses import check_no_size, check_one_press, own_parameters
from coldpress.models.compilable import check_compilable, check_compiler
from coldpress.presses.decoding import DecodingPress
from coldpress.stores.bits import storage_of
from coldpress.stores.codec import Codec


def integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as the integer that it stands for; :class:`InputError` if it is none, or less than ``minimum``."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = minimum - 1
    if number < minimum or number != float(value):
        raise InputError(f"{name} must be an integer >= {minimum}, got {value!r}.")
    return number


def is_whole(press: BasePress | None) -> bool:
    """Whether ``press`` is asked to keep everything: its ratio is 0 and it has no budget."""
    if press is None:
        return True
    own = getattr(press, "compression_ratio", None)
    sizes = [own, *(getattr(press, name, None) for name in BUDGETS)]
    return own is not None and not any(sizes) and not getattr(press, "key_channel_compression_ratio", 0)


# What is measured


@dataclass(frozen=True)
class Point:
    """One press of one size, in so many bits; without a press and bits, the uncompressed baseline."""

    press: BasePress | None
    kv_bits: Codec | None = None

    @functools.cached_property
    def key(self) -> str:
        """The same for points that measure the same, in this process or another: 16 hex digits."""
        names = [] if self.press is None else [type(part).__name__ for part in parts(self.press)]  # those inside too
        bits = None if self.kv_bits is None else dict(vars(self.kv_bits))
        text = json.dumps([names, config_of(self.press), bits], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


BASELINE = Point(None)


def _without_tokenizer(press: BasePress) -> BasePress:
    """``press``, and each press inside it, as it is before it is given the model's tokenizer."""
    bare: dict[str, Any] = {
        name: _without_tokenizer(value) for name, value in vars(press).items() if isinstance(value, BasePress)
    }
    if hasattr(press, "tokenizer"):
        bare["tokenizer"] = None
    return replace(press, **bare) if bare else press  # type: ignore[type-var]


def config_of(press: BasePress | None) -> dict[str, Any] | None:
    """The parameters of a press, without the budgets that it was not given, and without the model's tokenizer.

    Of one that was loaded from a file also the file's digest, as ``file_sha256``.
    """
    if press is None:
        return None
    unset = (*BUDGETS, "tokenizer")
    config: dict[str, Any] = asdict(
        _without_tokenizer(press),
        dict_factory=lambda items: {k: v for k, v in items if k not in unset or v is not None},
    )  # type: ignore[call-overload]
    digest = file_digest(press)
    return config if digest is None else config | {"file_sha256": digest}


@dataclass(frozen=True)
class Job:
    """One press of one size: one result record.

    At most one of ``ratio``, ``budget_tokens`` and ``budget_bytes`` is given, and none for a press without a ratio.
    ``kv_bits`` says how what is kept is stored; None: as it is.
    """

    name: str
    press: BasePress | None
    ratio: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None
    kv_bits: Codec | None = None

    @property
    def point(self) -> Point:
        """What is measured."""
        return Point(self.press, self.kv_bits)


def make_jobs(settings: Settings) -> list[Job]:
    """The presses to measure, in the order they were named: each at every ratio or budget, or once if it has none.

    ``all`` is every press that needs nothing but the model and compresses the prompt; name the calibrated, the trained
    and the decoding ones. ``no_press`` is measured once. With ``--chunk_tokens``, ``all`` leaves out what chooses only
    once; with ``--batch_size``, where perplexity is measured under presses, what takes one text at a time
    (:func:`left_out_of_batches`). With ``kv_bits`` each of them is measured at every number of bits; ``all`` leaves out
    those that cannot be stored so, and with ``compile`` those that a compiled step cannot decode.

    Raises:
        PressError: an unknown press or parameter, a ratio outside [0, 1), parameters for several presses, a press that
            compresses nothing of what is measured, or one that was named and has no budget or takes one text at once.
        CacheError: bits that there are not, or that a press that was named cannot be stored in; with ``compile`` one of
            these that a compiled step cannot decode. ModelError: there is no compiler for it.
    """
    load_press_files(settings.press, settings.engine)
    if settings.ppl_mode == "streaming":
        return _make_stream_jobs(settings)
    for ratio in settings.compression_ratio:
        check_ratio(ratio, "--compression_ratio")
    names: list[str] = []
    for name in settings.press:
        names += [NO_PRESS, *_all_presses(settings)] if name == "all" else [name]
    names = list(dict.fromkeys(names))
    parameters = dict(settings.press_args)
    check_one_press(names, parameters)
    check_no_size(parameters)
    budgets = [{size: value} for size in BUDGETS for value in getattr(settings, size)]
    jobs: list[Job] = []
    for name in names:
        if name == NO_PRESS:
            jobs.append(Job(name, None, 0.0))
            continue
        own = own_parameters(name, parameters, settings.seed)
        if not takes_ratio(name):  # or is not known, which make_press says
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
    codecs = [storage_of(each, group_size=settings.kv_group_size, newest=settings.kv_residual_tokens) for each in bits]
    return _compilable(_in_bits(jobs, [codec for codec in codecs if codec is not None], settings), settings)


def left_out_of_batches(settings: Settings) -> list[str]:
    """What ``all`` leaves out because it takes one text at a time; empty where ``all`` was not asked for."""
    if "all" not in settings.press or settings.batch_size == 1:
        return []
    measured = {job.name for job in make_jobs(settings)}
    return [job.name for job in make_jobs(replace(settings, batch_size=1)) if job.name not in measured]


def _takes_batch(job: Job, settings: Settings) -> bool:
    """Whether its perplexity can be measured on so many texts at once; PressError if it cannot, and was named."""
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


def _in_bits(jobs: list[Job], kv_bits: list[Codec], settings: Settings) -> list[Job]:
    """Each job at every number of bits; as it is where there are none."""
    if not kv_bits:
        return jobs
    found = []
    for job in jobs:
        for each in kv_bits:
            try:
                if each.chooses and job.budget_bytes is None:
                    raise CacheError(
                        f"--kv_bits mixed spends a press's --budget_bytes, and {job.name} has none: give it, or say "
                        "k8v4 or k4v4."
                    )
                check_quantisable(job.press, each)
            except CacheError:
                if job.name in settings.press:
                    raise
                continue
            found.append(replace(job, kv_bits=each))
    return found


def _compilable(jobs: list[Job], settings: Settings) -> list[Job]:
    """The jobs that a compiled step can decode, where one was asked for; CacheError for one that was named."""
    if not settings.compile:
        return jobs
    device, leave, found = pick_device(settings.device), "leave --compile out", []
    check_compiler(device)
    for job in jobs:
        check_compilable(None, job.kv_bits, device, leave)
        try:
            check_compilable(job.press, job.kv_bits, device, leave)
        except CacheError:
            if job.name in settings.press:
                raise
            continue
        found.append(job)
    return found


def _all_presses(settings: Settings) -> list[str]:
    """What ``all`` means beside no_press: with ``--chunk_tokens`` those that can choose again and again."""
    names = press_names(kind="training-free", at_prefill=True)
    if settings.chunk_tokens is None:
        return names
    return [name for name in names if (press := make_press(name, 0.0)) is not None and press.chooses_again]


def _make_stream_jobs(settings: Settings) -> list[Job]:
    """Each named scorer at each number of tokens, cut back to them after every chunk; ``no_press`` is measured once.

    PressError for one that cannot choose again and again among what is left of a text, and without a number of tokens.
    """
    names = list(dict.fromkeys(settings.press))
    check_one_press(names, dict(settings.press_args))
    if not settings.budget_tokens and names != [NO_PRESS]:
        raise PressError(
            "A stream has no length that a ratio could be taken of; say how much is stored: --budget_tokens."
        )
    if "all" in names:
        scorers = [name for name in press_names(kind="training-free", has_ratio=True) if _streams(name)]
        names = list(dict.fromkeys([NO_PRESS, *names, *scorers]))
        names.remove("all")
    jobs = []
    for name in names:
        if name == NO_PRESS:
            jobs.append(Job(name, None))
            continue
        assert settings.stream_chunk is not None
        scorer = make_press(name, 0.0, **own_parameters(name, dict(settings.press_args), settings.seed))
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
