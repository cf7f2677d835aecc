"""Every option of what is measured, declared once: its default, its range, its help, and who has no use for it.

What the command line offers (``commands/options.py``), what a sweep's file may say, its ranges and its types, and what
a record holds of the settings all follow from the fields of these classes. :mod:`coldpress.eval.settings` puts them
together. Nothing here imports torch, so that help is printed without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any

from coldpress.backends import BACKENDS, BUDGETS, NO_PRESS
from coldpress.errors import InputError, nearest

KINDS = ("perplexity", "tasks", "streaming", "baselines", "speed")  # sections of a sweep, in the order of measuring
BITS = "{8,4,k8v4,mixed}"  # groups (KIVI); kKvV: keys in K bits, values in V, one by one; the best of these
PPL_PRESETS = ("hf-strided", "gptq", "llamacpp", "lm-eval")
TASKS = ("niah_single", "niah_multikey", "vt", "cwe", "passkey", "repeat_text")  # asked where none is named
USES = ("qa", "chat", "streaming", "throughput")  # of coldpress recommend
MOST_ROUNDS = 1_000_000  # they are listed before the first is timed
_NO_RATIO = ("streaming", "baselines")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    least: int = 1,
    most: int = 2**63 - 1,
    choices: tuple[Any, ...] = (),
    metavar: str | None = None,
    useless: tuple[str, ...] = (),
    is_recorded: bool = True,
    in_sweep: bool = True,
) -> Any:
    """A field of settings.

    Args:
        default: of the field; the help says it by itself where ``help`` does not speak of one.
        help: for the command line.
        least, most: of an integer, or of each of several.
        choices: what is allowed, where not all is.
        metavar: what the help calls the value.
        useless: the kinds of measurement of a sweep that pass over what is said for others.
        is_recorded: whether the settings of a record hold it; what is elsewhere in a record, or changes none, is not.
        in_sweep: whether a sweep's file may say it beside its sections.
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """What settings can tell of themselves."""

    def recorded(self) -> dict[str, Any]:
        """What a record holds of them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["is_recorded"]}

    @property
    def loading(self) -> dict[str, Any]:
        """The options of load_model beside the name."""
        asked = ("revision", *names_of(OfMachine, OfPlacement))
        return {name: getattr(self, name) for name in asked if hasattr(self, name)}

    def check_choices(self) -> None:
        """Raise :class:`InputError` for a word that is none of those allowed."""
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and isinstance(value, str) and value not in choices:
                what = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
                raise InputError(f"--{f.name} must be {what}, got {value!r}.{nearest(value, choices)}")

    def refuse(self, why: str, *names: str) -> None:
        """Raise :class:`InputError` if one of these options was given; ``why`` has {} in the place of its name."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise InputError(why.format(name))

    def check_pin(self) -> None:
        """Raise :class:`InputError` for a system prompt that says nothing."""
        prompt: str | None = getattr(self, "pin_system", None)
        if prompt is not None and not prompt.strip():
            raise InputError("--pin_system is empty; give the system prompt, or leave it out.")


def names_of(*parts: Any) -> tuple[str, ...]:
    """The names of the options of ``parts``, in order."""
    return tuple(f.name for part in parts for f in fields(part))


def but(part: Any, name: str, default: Any, **changes: Any) -> Any:
    """The option ``name`` of ``part`` with another default, and other words about it."""
    return option(default, **{**part.__dataclass_fields__[name].metadata, **changes})


def sort_of(option: Field[Any]) -> tuple[str, bool, bool]:
    """The type of an option's value, or of each of several; whether it takes several; whether it may be None."""
    text = str(option.type)
    bare = text.removesuffix(" | None")
    one = bare.removeprefix("tuple[").removesuffix(", ...]")
    return one, bare != one, text != bare


_SORTS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer >= {least}"),
    "float": ((int, float), "a number"),
    "int | str": ((int, str), "a number or a name"),  # bits, or the name of some
}


def check_value(kind: str, option: Field[Any], value: Any) -> None:
    """Values come from a file, where anything may stand for a number; raise :class:`InputError` with the option."""
    wanted, is_list, may_be_none = sort_of(option)
    if option.name == "press" or (value is None and may_be_none):
        return
    if wanted not in _SORTS:
        raise InputError(f"{kind}: {option.name} cannot be given for a sweep.")
    (types, what), least, most = _SORTS[wanted], option.metadata["least"], option.metadata["most"]
    for one in value if is_list else [value]:
        is_sort = isinstance(one, types) and (wanted == "bool" or not isinstance(one, bool))
        if not is_sort or (wanted == "int" and one < least):
            raise InputError(f"{kind}: {option.name} must be {what.format(least=least)}, got {one!r}.")
        if wanted == "int" and one > most:
            raise InputError(f"{kind}: {option.name} must be an integer <= {most}.")


# Options that are alike: elsewhere in a record; not in a file; no use for other kinds of measurement

_unrecorded = partial(option, is_recorded=False)
_on_command_line = partial(option, in_sweep=False)
_of_engine = partial(_unrecorded, useless=("speed", *_NO_RATIO))
_of_perplexity = partial(option, useless=("tasks", "speed", *_NO_RATIO))
_of_kept = partial(_unrecorded, useless=_NO_RATIO)
_not_of_tasks = partial(option, useless=("tasks",))


# What more than one command has


@dataclass(frozen=True)
class OfModel:
    model: str = _on_command_line("EleutherAI/pythia-70m", "hub id, local folder, .gguf file, smollm2 or demo")
    revision: str | None = _on_command_line(None, "branch, tag or commit of the model on the hub")


@dataclass(frozen=True)
class OfText:
    dataset: str = _on_command_line(
        "wikitext", "wikitext, pg19, demo, a local folder or file, or a hub id (default: wikitext)"
    )
    subset: str | None = _on_command_line(None, "configuration of the dataset, such as wikitext-103-v1")
    split: str = _on_command_line("test", "split of the dataset")
    sample_idx: int | None = _on_command_line(
        None, "take this row of the dataset as the only text (a book of pg19)", least=0
    )
    text_file: str | None = _on_command_line(None, "take this UTF-8 file as the text instead of a dataset")

    @property
    def reading(self) -> dict[str, Any]:
        """The options of load_corpus; empty where no text is named, as tasks allow it."""
        if self.dataset is None and self.text_file is None:
            return {}
        return {name: getattr(self, name) for name in names_of(OfText)} | {"dataset": self.dataset or ""}


@dataclass(frozen=True)
class OfPresses:
    press: tuple[str, ...] = _unrecorded(
        (NO_PRESS,),
        "names of presses, no_press (the default), all, or a file's: file.py:MyPress",
        useless=("baselines",),
    )
    compression_ratio: tuple[float, ...] = _of_kept(
        (),  # (0.5,) if no budget is given
        "fraction of the pairs to remove, in [0, 1) (default: 0.5)",
        metavar="RATIO",
    )
    budget_tokens: tuple[int, ...] = _unrecorded(
        (), "instead of a ratio: pairs that a head keeps, on average", useless=("baselines",)
    )
    budget_bytes: tuple[int, ...] = _unrecorded(
        (), "instead of a ratio: bytes of the kept pairs of one text", useless=("baselines",)
    )
    press_args: tuple[tuple[str, Any], ...] = option(
        (), "parameters of a single press as JSON, such as '{\"window_size\": 32}'", is_recorded=False, in_sweep=False
    )
    chunk_tokens: int | None = option(
        None, "read prompts in pieces of so many tokens, and compress after each", useless=_NO_RATIO
    )
    kv_bits: tuple[int | str, ...] = _of_kept(
        (), "hold what is kept in 8, 4 or 2 bits, or as k4v4 or mixed; not its newest pairs", metavar=BITS
    )
    kv_group_size: int = _of_kept(64, "numbers that share a step then", most=65536)
    kv_residual_tokens: int = _of_kept(128, "newest pairs that stay as they are then", least=0)


@dataclass(frozen=True)
class OfMachine:
    attn_implementation: str = option(
        "sdpa", f"arithmetic: {', '.join(BACKENDS.values())}", choices=tuple(BACKENDS.values()), metavar="NAME"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = option("auto", "default: float32 on the CPU", choices=("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class OfPlacement:
    device_map: str | None = option(
        None, "auto: share the layers out among this machine's devices, its memory and its disk"
    )
    tp_plan: str | None = _on_command_line(
        None, "auto: share every layer out among the processes that torchrun has started"
    )


@dataclass(frozen=True)
class OfEngine:
    engine: str = _of_engine("local", "local, or ray: windows under presses on the workers of a Ray cluster")
    ray_address: str | None = _of_engine(
        None, "host:port, auto or ray://host:port of a cluster (default: one started for the run)"
    )
    workers: int | None = _of_engine(None, "of the Ray engine (default: what there is room for; 2 on this machine)")


@dataclass(frozen=True)
class OfLimits:
    allow_extrapolation: bool = option(False, "go past the positions the model was trained on")
    seed: int = option(0, "of all that is drawn: presses, timings, examples", least=0)
    output_dir: str = option("", "folder of the results", is_recorded=False, in_sweep=False)


# Perplexity and speed


@dataclass(frozen=True)
class OfPerplexity:
    ppl_apply_press: bool = _on_command_line(False, "score targets against the compressed context")
    ppl_mode: str | None = _on_command_line(
        None,
        "prefix: as --ppl_apply_press; streaming: read each text to its end, the cache cut back on the way",
        choices=("prefix", "streaming"),
    )
    ppl_preset: str | None = _not_of_tasks(
        None, "the uncompressed model's perplexity as others measure it (docs/measuring.md)", choices=PPL_PRESETS
    )
    stream_chunk: int | None = _not_of_tasks(None, "streaming: tokens between two cuts (default: 64)")
    positions: str | None = _not_of_tasks(
        None,
        "streaming: where kept keys stand, in the text or side by side (default: rerotate)",
        choices=("original", "rerotate"),
    )
    ppl_only: bool = _on_command_line(False, "do not measure speed")
    max_length: int | None = option(
        None, "tokens of a window (default: the model's positions)", useless=("tasks", "speed", "streaming")
    )
    stride: int | None = _of_perplexity(
        None,
        "tokens between windows (default: 512); with --ppl_apply_press at least the targets of a window, so that no "
        "token is scored twice (default: side by side)",
    )


@dataclass(frozen=True)
class OfWindows:
    context_tokens: int | None = _of_perplexity(
        None, "tokens compressed in each window (default: 3/4 of the positions)"
    )
    target_tokens: int | None = _of_perplexity(None, "tokens scored after them (default: 1/4 of the positions)")
    add_bos: bool | None = _unrecorded(
        None,
        "begin each window or text with the BOS token (default: auto, as the tokenizer begins a text)",
        useless=("tasks", "speed", "baselines"),
    )
    limit_tokens: int | None = _not_of_tasks(None, "use only the first so many tokens of the text")
    max_documents: int | None = option(
        None,
        "under presses or streaming: no more than the first so many texts",
        useless=("tasks", "speed", "baselines"),
    )
    max_windows: int | None = _of_perplexity(None, "under presses: no more than the first so many windows of each text")
    greedy_tokens: int = _of_perplexity(
        0,
        "under presses: also generate so many tokens in each window, and count how many are the uncompressed ones "
        "(default: none)",
        least=0,
    )
    batch_size: int = option(1, "windows that are run together", useless=("tasks", "speed", "streaming"))


@dataclass(frozen=True)
class OfSpeed:
    speed_only: bool = _on_command_line(False, "do not measure perplexity")
    speed_decode_only: bool = _not_of_tasks(False, "leave prefill and compression out of the time")
    compile: bool = _not_of_tasks(False, "decode by a step that torch.compile has made")
    context_limit: int = _not_of_tasks(4096, "tokens of the timed context")


@dataclass(frozen=True)
class OfTiming:
    max_new_tokens: int = option(200, "tokens to generate")
    min_new_tokens: int | None = _not_of_tasks(None, "no end of text before so many (default: --max_new_tokens)")
    repetitions: int = _not_of_tasks(5, "timed rounds", most=MOST_ROUNDS)
    warmup: int = _not_of_tasks(1, "untimed rounds before them", least=0, most=MOST_ROUNDS)


# Tasks, benchmarks, calibration


@dataclass(frozen=True)
class OfTasks:
    task: tuple[str, ...] = option(
        TASKS, "niah_single, niah_multikey, vt, cwe; passkey, repeat, repeat_text, which ask nothing"
    )
    task_tokens: tuple[int, ...] = option((512, 1024), "tokens of the contexts")
    task_examples: int = option(20, "of each task and length, spread over the depths")
    depths: tuple[float, ...] = option((0.0, 0.25, 0.5, 0.75, 1.0), "where the answer is hidden, 0 to 1")
    template: str = option("none", "chat: questions in the model's chat template", choices=("none", "chat"))
    pin_system: str | None = option(
        None, "a system prompt before every context, which nothing may evict", metavar="TEXT"
    )
    max_new_tokens: int | None = option(None, "of an answer (default: what the task says)")


@dataclass(frozen=True)
class OfBenchmark:
    name: str = option(help="ruler, loogle, infinitebench, longbench and others (docs/guide/benchmarks.md)")
    data: str | None = option(
        None, "a folder laid out as the benchmark's data set (default: that of the hub)", metavar="FOLDER"
    )
    data_dir: str | None = option(None, "folder of the data set to read, such as 4096 of ruler or qasper of longbench")
    fraction: float = option(1.0, "of the questions, drawn with --seed as kvpress draws them (default: 1)")
    limit: int | None = option(None, "no more than the first so many questions")
    max_context_length: int | None = option(None, "cut contexts after so many tokens (default: as there is room)")
    max_new_tokens: int | None = option(None, "of an answer (default: what the data set says)")
    query_aware: bool = option(False, "compress each context together with its question")
    needle_depth: tuple[int, ...] = option((), "per cents of the text before the needle", least=0)
    pin_system: str | None = but(OfTasks, "pin_system", None)


@dataclass(frozen=True)
class OfCalibration:
    press: str = option(help="a press that coldpress presses calls calibrated")
    limit_tokens: int | None = option(None, "use only the first so many tokens of the text")
    n_samples: int = option(100, "pieces of the text that the model reads")
    sample_tokens: int = option(1000, "tokens of each")
    press_args: tuple[tuple[str, Any], ...] = option((), "parameters of the press as JSON, such as '{\"n_sink\": 4}'")
    output: str | None = option(None, "file to write (default: where presses look for it, see docs/presses.md)")


@dataclass(frozen=True)
class OfAdvice:
    use: str = option("qa", "what the cache is for (docs/guide/choose.md)", choices=USES)
    data: str | None = option(None, "your text: a UTF-8 file, or what --dataset of coldpress ppl takes, such as demo")
    press: tuple[str, ...] = option((), "names of presses to measure (default: some for the use)")
    compression_ratio: tuple[float, ...] = option((0.5,), "fraction of the pairs to remove, in (0, 1)", metavar="RATIO")
    budget_minutes: float = option(10.0, "when to stop measuring, once the model is loaded")
    margin: float = option(0.05, "nats a token that a press may cost")
    context_tokens: int | None = option(
        None, "tokens of text that are compressed (default: 1024, fewer where the time is short)", least=64
    )
    max_windows: int = option(30, "no more windows, and no more questions, if the time allows as many", most=10_000)


SIZES = ("compression_ratio", *BUDGETS)  # of which one says how much is kept
