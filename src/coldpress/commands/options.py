"""The options of the commands, as argparse wants them; what they mean is decided elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any

from coldpress.commands.values import Several, auto_or_not, bits, integer, json_object, listed, positive
from coldpress.eval.options import (
    BITS,
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
    names_of,
    sort_of,
)
from coldpress.eval.settings import AdviceSettings, BenchmarkSettings, CalibrationSettings, Settings, TaskSettings

__all__ = [
    "add_machinery",
    "add_model",
    "add_press",
    "advice_options",
    "ask_options",
    "benchmark_options",
    "calibration_options",
    "compress_options",
    "inspect_options",
    "ppl_options",
    "report_options",
    "sweep_options",
    "task_options",
]

DEFAULT_PRESS = "default: sampled_defensive, or snapkv with --chunk_tokens"


def _add(group: Any, settings: Any, *parts: Any, many: Mapping[str, str | None] | None = None) -> None:
    """Offer options as the fields of ``settings`` say: type, range, choices, default, help.

    Args:
        group: of a parser.
        settings: a dataclass of :mod:`coldpress.eval.settings`.
        parts: names of its options, or classes of :mod:`coldpress.eval.options`, for all of each.
        many: those that take several values here, with their help where it is another.
    """
    known, many = {f.name: f for f in fields(settings)}, many or {}
    for part in parts:
        for name in [part] if isinstance(part, str) else names_of(part):
            _offer(group, known[name], name in many, many.get(name))


def _offer(group: Any, option: Field[Any], is_many: bool = False, said: str | None = None) -> None:
    sort, is_list, may_be_none = sort_of(option)
    about = option.metadata
    how: dict[str, Any] = {"help": said or _told(option)}
    if option.default is MISSING:
        group.add_argument(option.name, **how)
        return
    if about["metavar"] is not None:
        how["metavar"] = about["metavar"]
    whole = partial(integer, minimum=about["least"], maximum=about["most"])
    readers: dict[str, Any] = {"int": whole, "float": float, "int | str": bits}
    if option.name == "press_args":
        how["type"] = json_object
    elif sort == "bool":
        how |= {"action": "store_true", "default": None}
        if may_be_none:
            how = {"nargs": "?", "const": True, "type": auto_or_not, "metavar": "auto|yes|no", "help": how["help"]}
    elif is_list or is_many:
        how |= {"nargs": "+", "action": Several}  # with blanks or commas between them
        how["type"] = listed(readers.get(sort, str))
    elif about["choices"]:
        how["choices"] = about["choices"]
    elif sort in readers:
        how["type"] = readers[sort]
    group.add_argument(f"--{option.name}", **how)


def _told(option: Field[Any]) -> str:
    """The help of an option, with its default where that is a value and not told yet."""
    text, default = str(option.metadata["help"]), option.default
    if "default" in text or default is MISSING or default is None or default is False or default in ((), ""):
        return text
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{text} (default: {shown})"


def add_model(group: Any, default: str = OfModel.model) -> None:
    """The model's options, where what is taken without them is said in words."""
    model, revision = fields(OfModel)
    _offer(group, model, said=f"{model.metadata['help']} (default: {default})")
    _offer(group, revision)


def add_press(group: Any, what: str, *, are_two: bool = False, has_bytes: bool = False) -> None:
    """The options that say how ``what`` is compressed and stored.

    ``are_two``: by one press or two, to look at. ``has_bytes``: a budget may be one of bytes, too.
    """
    add = group.add_argument
    some: dict[str, Any] = {"nargs": "+", "default": []} if are_two else {}
    each = ", one for all or one for each" if are_two else ""
    name = "a name, or two side by side" if are_two else "a name, or no_press"
    add("--press", help=f"that compresses {what}: {name} ({DEFAULT_PRESS})", **some)
    text = f"fraction of the pairs to remove, in [0, 1){each} (default: 0.5)"
    add("--compression_ratio", type=float, metavar="RATIO", help=text, **some)
    add("--budget_tokens", type=positive, help="instead of a ratio: pairs that a head keeps, on average", **some)
    if has_bytes:
        add("--budget_bytes", type=positive, help="instead of a ratio: bytes of the kept pairs")
    add("--press_args", type=json_object, default={}, help="parameters of a single press as JSON")
    add("--chunk_tokens", type=positive, help=f"read {what} in pieces of so many tokens, and compress after each")
    if not are_two:
        add("--kv_bits", type=bits, metavar=BITS, help="store what is kept in so few bits")


def add_machinery(group: Any) -> None:
    """The options that say how a model runs."""
    _add(group, Settings, OfMachine)


# The options of each command


def calibration_options(parser: argparse.ArgumentParser) -> None:
    _add(parser, CalibrationSettings, "press")
    rest = [name for name in names_of(OfCalibration) if name not in ("press", "output")]
    _add(parser.add_argument_group("what is measured"), CalibrationSettings, OfModel, OfText, *rest)
    _add(parser.add_argument_group("how"), CalibrationSettings, OfMachine, "output")


def compress_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compressed")
    _add(what, Settings, OfModel)
    add = what.add_argument
    add("--text_file", required=True, help="UTF-8 file with the text")
    add("--output", required=True, help="file to write, such as context.safetensors")
    add_press(what, "the text", has_bytes=True)
    add("--pin_system", metavar="TEXT", help="a system prompt before the text, which nothing may evict")
    add_machinery(parser.add_argument_group("how"))


def ask_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument("file", help="what coldpress compress or PressedCache.save has written")
    what.add_argument("question", nargs="+", help="a question; several are answered one by one")
    add_model(what, "the one that the file names")
    what.add_argument("--max_new_tokens", type=positive, default=50, help="of each answer (default: 50)")
    what.add_argument("--any_model", action="store_true", help="take a model with other weights than the file's")
    add_machinery(parser.add_argument_group("how"))


def inspect_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is shown")
    _add(what, Settings, OfModel, OfText)
    add = what.add_argument
    add("--output", required=True, help="page to write, such as page.html")
    add_press(what, "the text", are_two=True)
    add("--limit_tokens", type=positive, help="read only the first so many tokens (default: 4096)")
    add_machinery(parser.add_argument_group("how"))


def sweep_options(parser: argparse.ArgumentParser) -> None:
    many = {
        "model": "hub ids, local folders, .gguf files, smollm2, demo",
        "dataset": "names as in ppl, with a subset as in wikitext:wikitext-103-v1",
        "text_file": "UTF-8 files, texts beside the datasets or instead",
        "ppl_preset": "also the uncompressed model's perplexity, as others measure it",
        "context_limit": None,
    }
    what = parser.add_argument_group("what is measured")
    what.add_argument("--config", help="YAML file (docs/guide/sweep.md); options given beside it replace what it says")
    _add(what, Settings, OfModel, "dataset", "text_file", "split", "sample_idx", OfPresses, many=many)
    what.add_argument("--no_perplexity", action="store_true", default=None, help="leave perplexity under presses out")
    what.add_argument("--no_speed", action="store_true", default=None, help="leave speed and memory out")
    _add(what, Settings, "ppl_preset", many=many)
    _add(parser.add_argument_group("perplexity under the presses"), Settings, OfWindows)
    _add(parser.add_argument_group("speed and memory"), Settings, "context_limit", OfTiming, many=many)
    how = parser.add_argument_group("how")
    _add(how, Settings, OfMachine, OfPlacement, OfEngine, "allow_extrapolation", "seed")
    how.add_argument("--output_dir", help="folder of the results (default: results/sweep)")


def report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="results, those in subfolders too (default: results/perplexity)")
    add("--output", metavar="DIR", help="where report.html, report.md and the plots go (default: FOLDER/report)")
    add("--table", action="store_true", help="print the tables and write nothing; needs no matplotlib")
    text = "print a short report (models, data, methods, table, conclusion, commands), and write it to brief.md"
    add("--brief", action="store_true", help=text)
    add("--lang", choices=("en", "zh"), help="language of the brief report, zh in brief.zh.md (default: en)")


def ppl_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("what is measured"), Settings, OfModel, OfText, OfPresses)
    _add(parser.add_argument_group("perplexity"), Settings, OfPerplexity, OfWindows)
    _add(parser.add_argument_group("speed and memory"), Settings, OfSpeed, OfTiming)
    _add(parser.add_argument_group("how"), Settings, OfMachine, OfPlacement, OfEngine, OfLimits)


def task_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("what is asked"), TaskSettings, OfTasks)
    text = "of what model, in what text (default: sentences of our own)"
    _add(parser.add_argument_group(text), TaskSettings, OfModel, OfText)
    how = parser.add_argument_group("what is compressed, and how")
    _add(how, TaskSettings, OfPresses, OfMachine, OfEngine, OfLimits)


def advice_options(parser: argparse.ArgumentParser) -> None:
    text = ("subset", "split", "sample_idx")
    _add(parser.add_argument_group("what is measured"), AdviceSettings, OfModel, OfAdvice, *text, "template")
    _add(parser.add_argument_group("how"), AdviceSettings, OfMachine, OfLimits)


def benchmark_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("what is asked"), BenchmarkSettings, OfBenchmark, OfModel)
    how = parser.add_argument_group("what is compressed, and how")
    _add(how, BenchmarkSettings, OfPresses, OfMachine, OfEngine, OfLimits)
