"""The command ``coldpress``: ppl, speed, sweep, tasks, calibrate, compress, ask, inspect, report, presses.

Also what the scripts in evaluation/ run.

Exit codes: 0 all measured; 1 a press failed or a self-check did; 2 the input cannot work; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from coldpress.errors import InputError, SelfCheckError, nearest

__all__ = ["main"]

BITS = (8, 4, 2)  # those of coldpress.quantised, which takes torch along
PPL_PRESETS = ("hf-strided", "gptq", "llamacpp", "lm-eval")  # those of coldpress.eval.settings, likewise


class _Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2; an option has to be written out."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {_line(message)} (see {self.prog} --help)\n")
        raise SystemExit(2)

    @property
    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the command and its options; None takes them from the command line.
        prog: how the user called it, for the record and the help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(AttributeError, ValueError):  # a terminal that has no Δ still gets its table
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    parser = _parser(prog)
    args, unknown = parser.parse_known_args([_underscored(a) for a in argv])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{nearest(unknown[0], args.options)}")
    try:
        code: int = args.run(args, argv, prog)
        return code
    except InputError as error:
        sys.stderr.write(f"error: {_line(str(error))}\n")
        return 2
    except SelfCheckError as error:
        sys.stderr.write(f"self-check failed: {_line(str(error))}\n")
        return 1
    except BrokenPipeError:  # whoever reads our output has gone; what was measured is on disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


def _line(message: str) -> str:
    return " ".join(message.split())


def _underscored(argument: str) -> str:
    """``--compression-ratio=0.5`` as ``--compression_ratio=0.5``: both spellings of an option are the same."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog or "coldpress", description="Training-free compression of the key-value cache.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    ppl = commands.add_parser("ppl", help="perplexity and speed of a model, with and without presses", prog=prog)
    _add_options(ppl)
    ppl.set_defaults(options=ppl.options, run=_run_ppl)
    speed = commands.add_parser("speed", help="the same as ppl --speed_only")
    _add_options(speed)
    speed.set_defaults(options=speed.options, run=_run_ppl, speed_only=True)
    sweep = commands.add_parser("sweep", help="presses x ratios x texts x models; goes on where it was stopped")
    _add_sweep_options(sweep)
    sweep.set_defaults(options=sweep.options, run=_run_sweep)
    tasks = commands.add_parser(
        "tasks", help="questions about compressed contexts: needles, tracking, counting, probes"
    )
    _add_task_options(tasks)
    tasks.set_defaults(options=tasks.options, run=_run_tasks)
    calibrate = commands.add_parser("calibrate", help="measure what a press needs of a model, on a text, and save it")
    _add_calibration_options(calibrate)
    calibrate.set_defaults(options=calibrate.options, run=_run_calibrate)
    compress = commands.add_parser("compress", help="compress a text once and save what is left, to ask it later")
    _add_compress_options(compress)
    compress.set_defaults(options=compress.options, run=_run_compress)
    ask = commands.add_parser("ask", help="ask questions about a text that coldpress compress has saved")
    _add_ask_options(ask)
    ask.set_defaults(options=ask.options, run=_run_ask)
    look = commands.add_parser("inspect", help="a page that shows which tokens of a text a press keeps, and where")
    _add_inspect_options(look)
    look.set_defaults(options=look.options, run=_run_inspect)
    report = commands.add_parser("report", help="tables, a page and plots of the results in a folder")
    _add_report_options(report)
    report.set_defaults(options=report.options, run=_run_report)
    presses = commands.add_parser("presses", help="the methods, what they need, and where they come from")
    presses.add_argument("name", nargs="?", help="a press, by its name or its class: all about it")
    presses.add_argument("--json", action="store_true", help="print the entries as JSON")
    presses.set_defaults(options=presses.options, run=_run_presses)
    return parser


def _add_model(group: Any) -> None:
    add = group.add_argument
    add("--model", help="hub id, local folder, .gguf file, or demo (default: EleutherAI/pythia-70m)")
    add("--revision", help="branch, tag or commit of the model on the hub")


def _add_sources(group: Any, split: str) -> None:
    """The options that say which model, and which text."""
    _add_model(group)
    add = group.add_argument
    add("--dataset", help="wikitext, pg19, demo, a local folder or file, or a hub id (default: wikitext)")
    add("--subset", help="configuration of the dataset, such as wikitext-103-v1")
    add("--split", help=f"split of the dataset (default: {split})")
    add("--sample_idx", type=_not_negative, help="take this row of the dataset as the only text (a book of pg19)")
    add("--text_file", help="take this UTF-8 file as the text instead of a dataset")


def _add_machinery(group: Any) -> None:
    """The options that say how a model runs."""
    add = group.add_argument
    add("--attn_implementation", choices=("sdpa", "eager", "flash_attention_2"), help="arithmetic (default: sdpa)")
    add("--device", help="auto, cpu, cuda, cuda:N (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: float32 on the CPU")


def _add_placement(group: Any) -> None:
    """The options that share one model out among devices."""
    add = group.add_argument
    add("--device_map", help="auto: share the layers out among this machine's devices, its memory and its disk")
    add("--tp_plan", help="auto: share every layer out among the processes that torchrun has started")


def _add_engine(group: Any) -> None:
    """The options that say where windows under presses are measured."""
    add = group.add_argument
    add("--engine", help="local, or ray: windows under presses on the workers of a Ray cluster (default: local)")
    add("--ray_address", help="host:port, auto or ray://host:port of a cluster (default: one started for the run)")
    add("--workers", type=_positive, help="of the Ray engine (default: what there is room for; 2 on this machine)")


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("press", help="a press that coldpress presses calls calibrated")
    what = parser.add_argument_group("what is measured")
    _add_sources(what, "train")
    add = what.add_argument
    add("--limit_tokens", type=_positive, help="use only the first so many tokens of the text")
    add("--n_samples", type=_positive, help="pieces of the text that the model reads (default: 100)")
    add("--sample_tokens", type=_positive, help="tokens of each (default: 1000)")
    add("--press_args", type=_json_object, help="parameters of the press as JSON, such as '{\"n_sink\": 4}'")
    how = parser.add_argument_group("how")
    _add_machinery(how)
    how.add_argument("--output", help="file to write (default: where presses look for it, see docs/presses.md)")


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compressed")
    _add_model(what)
    add = what.add_argument
    add("--text_file", required=True, help="UTF-8 file with the text")
    add("--output", required=True, help="file to write, such as context.safetensors")
    add("--press", default="snapkv", help="name of a press, or no_press (default: snapkv)")
    add("--compression_ratio", type=float, help="fraction of the pairs to remove, in [0, 1) (default: 0.5)")
    add("--budget_tokens", type=_positive, help="instead of a ratio: pairs that a head keeps, on average")
    add("--budget_bytes", type=_positive, help="instead of a ratio: bytes of the kept pairs")
    add("--press_args", type=_json_object, default={}, help="parameters of the press as JSON")
    _add_machinery(parser.add_argument_group("how"))


def _add_ask_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument("file", help="what coldpress compress or PressedCache.save has written")
    what.add_argument("question", nargs="+", help="a question; several are answered one by one")
    _add_model(what)
    what.add_argument("--max_new_tokens", type=_positive, default=50, help="of each answer (default: 50)")
    what.add_argument("--any_model", action="store_true", help="take a model with other weights than the file's")
    _add_machinery(parser.add_argument_group("how"))


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is shown")
    _add_sources(what, "test")
    add = what.add_argument
    add("--output", required=True, help="page to write, such as page.html")
    add("--press", nargs="+", default=["snapkv"], help="name of a press, or of two side by side (default: snapkv)")
    add(
        "--compression_ratio",
        nargs="+",
        type=float,
        default=[],
        help="fraction of the pairs to remove, in [0, 1), one for all or one for each (default: 0.5)",
    )
    add("--budget_tokens", nargs="+", type=_positive, default=[], help="instead of a ratio: pairs that a head keeps")
    add("--press_args", type=_json_object, default={}, help="parameters of a single press as JSON")
    add("--chunk_tokens", type=_positive, help="read the text in pieces of so many tokens, and compress after each")
    add("--limit_tokens", type=_positive, help="read only the first so many tokens (default: 4096)")
    _add_machinery(parser.add_argument_group("how"))


def _add_presses(group: Any) -> None:
    """The options that say which presses are measured, and at which sizes."""
    add = group.add_argument
    several = partial(add, nargs="+", action=_Several)  # with blanks or commas between them
    several("--press", type=_listed(str), help="names of presses, no_press (the default), or all")
    several(
        "--compression_ratio", type=_listed(float), help="fraction of the pairs to remove, in [0, 1) (default: 0.5)"
    )
    several("--budget_tokens", type=_listed(_positive), help="instead of a ratio: pairs that a head keeps, on average")
    several("--budget_bytes", type=_listed(_positive), help="instead of a ratio: bytes of the kept pairs of one text")
    add("--press_args", type=_json_object, help="parameters of a single press as JSON, such as '{\"window_size\": 32}'")
    add("--chunk_tokens", type=_positive, help="read prompts in pieces of so many tokens, and compress after each")
    bits, shown = _listed(int, BITS), f"{{{','.join(map(str, BITS))}}}"
    several("--kv_bits", type=bits, metavar=shown, help="hold what is kept in so few bits, its newest pairs not")
    add("--kv_group_size", type=_positive, help="numbers that share a step then (default: 64)")
    add("--kv_residual_tokens", type=_not_negative, help="newest pairs that stay as they are then (default: 128)")


def _add_windows(group: Any) -> None:
    """The options of windows that are compressed and scored."""
    add = group.add_argument
    add("--context_tokens", type=_positive, help="tokens compressed in each window (default: 3/4 of the positions)")
    add("--target_tokens", type=_positive, help="tokens scored after them (default: 1/4 of the positions)")
    add("--limit_tokens", type=_positive, help="use only the first so many tokens of the text")
    add("--max_documents", type=_positive, help="under presses or streaming: no more than the first so many texts")
    add("--max_windows", type=_positive, help="under presses: no more than the first so many windows of each text")
    add(
        "--greedy_tokens",
        type=_positive,
        help="under presses: also generate so many tokens in each window, and count how many are the uncompressed ones",
    )
    add("--batch_size", type=_positive, help="windows that are run together (default: 1)")


def _add_timing(group: Any) -> None:
    """The options of what is timed, but for its context."""
    add = group.add_argument
    add("--max_new_tokens", type=_positive, help="tokens to generate (default: 200)")
    add("--min_new_tokens", type=_positive, help="no end of text before so many (default: --max_new_tokens)")
    add("--repetitions", type=partial(_positive, maximum=MOST_ROUNDS), help="timed rounds (default: 5)")
    add("--warmup", type=partial(_not_negative, maximum=MOST_ROUNDS), help="untimed rounds before them (default: 1)")


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add(
        "--allow_extrapolation",
        action="store_true",
        default=None,
        help="go past the positions the model was trained on",
    )
    add("--seed", type=_not_negative, help="of random presses and of the order of timings (default: 0)")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    add("--config", help="YAML file (docs/sweeps.md); options given beside it take the place of what it says")
    several = partial(add, nargs="+", action=_Several)
    several("--model", type=_listed(str), help="hub ids, local folders, .gguf files, demo")
    add("--revision", help="branch, tag or commit of the models on the hub")
    several("--dataset", type=_listed(str), help="names as in ppl, with a subset as in wikitext:wikitext-103-v1")
    several("--text_file", type=_listed(str), help="UTF-8 files, texts beside the datasets or instead")
    add("--split", help="split of the datasets (default: test)")
    add("--sample_idx", type=_not_negative, help="take this row of each dataset as the only text")
    _add_presses(what)
    add("--no_perplexity", action="store_true", default=None, help="leave perplexity under the presses out")
    add("--no_speed", action="store_true", default=None, help="leave speed and memory out")
    several("--ppl_preset", type=_listed(str), help="also the uncompressed model's perplexity, as others measure it")
    windows = parser.add_argument_group("perplexity under the presses")
    _add_windows(windows)
    speed = parser.add_argument_group("speed and memory")
    lengths = partial(speed.add_argument, nargs="+", action=_Several)
    lengths("--context_limit", type=_listed(_positive), help="tokens of the timed contexts (default: 4096)")
    _add_timing(speed)
    how = parser.add_argument_group("how")
    _add_machinery(how)
    _add_placement(how)
    _add_engine(how)
    _add_limits(how)
    how.add_argument("--output_dir", help="folder of the results (default: results/sweep)")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="results, those in subfolders too (default: results/perplexity)")
    add("--output", metavar="DIR", help="where report.html, report.md and the plots go (default: FOLDER/report)")
    add("--table", action="store_true", help="print the tables and write nothing; needs no matplotlib")


def _add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    _add_sources(what, "test")
    add = what.add_argument
    _add_presses(what)
    ppl = parser.add_argument_group("perplexity")
    add = ppl.add_argument
    add("--ppl_apply_press", action="store_true", default=None, help="score targets against the compressed context")
    add(
        "--ppl_mode",
        choices=("prefix", "streaming"),
        help="prefix: as --ppl_apply_press; streaming: read each text to its end, the cache cut back on the way",
    )
    add(
        "--ppl_preset",
        choices=PPL_PRESETS,
        help="the uncompressed model's perplexity as others measure it (docs/measuring.md)",
    )
    add("--stream_chunk", type=_positive, help="streaming: tokens between two cuts (default: 64)")
    add(
        "--positions",
        choices=("original", "rerotate"),
        help="streaming: where kept keys stand, in the text or side by side (default: rerotate)",
    )
    add("--ppl_only", action="store_true", default=None, help="do not measure speed")
    add("--max_length", type=_positive, help="tokens of a window (default: the model's positions)")
    add(
        "--stride",
        type=_positive,
        help="tokens between windows (default: 512); with --ppl_apply_press at least the targets of a window, so that "
        "no token is scored twice (default: side by side)",
    )
    _add_windows(ppl)
    speed = parser.add_argument_group("speed and memory")
    add = speed.add_argument
    add("--speed_only", action="store_true", default=None, help="do not measure perplexity")
    add("--speed_decode_only", action="store_true", default=None, help="leave prefill and compression out of the time")
    add("--compile", action="store_true", default=None, help="decode by a step that torch.compile has made")
    add("--context_limit", type=_positive, help="tokens of the timed context (default: 4096)")
    _add_timing(speed)
    how = parser.add_argument_group("how")
    _add_machinery(how)
    _add_placement(how)
    _add_engine(how)
    _add_limits(how)
    how.add_argument("--output_dir", help="folder of the results (default: results/perplexity)")


class _Several(argparse.Action):
    """An option that takes lists of values, and joins them: ``0.25,0.5 0.9`` is three."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def _listed(one: Callable[[str], Any], choices: Sequence[Any] = ()) -> Callable[[str], list[Any]]:
    """What reads values of the type ``one`` with commas between them; what ends in a comma is as without it."""

    def read(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",")]
        values = []
        for part in [part for part in parts if part] or [text]:
            try:
                values.append(one(part))
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"invalid {one.__name__} value: {part!r}") from error
            if choices and values[-1] not in choices:
                raise argparse.ArgumentTypeError(
                    f"invalid choice: {values[-1]} (choose from {', '.join(map(str, choices))})"
                )
        return values

    return read


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    add = what.add_argument
    several = partial(add, nargs="+", action=_Several)
    names = "niah_single, niah_multikey, vt, cwe; passkey, repeat, repeat_text, which ask nothing"
    several("--task", type=_listed(str), help=names)
    several("--task_tokens", type=_listed(_positive), help="tokens of the contexts (default: 512 1024)")
    add("--task_examples", type=_positive, help="of each task and length, spread over the depths (default: 20)")
    several("--depths", type=_listed(float), help="where the answer is hidden, 0 to 1 (default: 0 0.25 0.5 0.75 1)")
    add("--template", choices=("none", "chat"), help="chat: questions in the model's chat template (default: none)")
    add("--max_new_tokens", type=_positive, help="of an answer (default: what the task says)")
    _add_sources(parser.add_argument_group("of what model, in what text (default: sentences of our own)"), "test")
    how = parser.add_argument_group("what is compressed, and how")
    _add_presses(how)
    _add_machinery(how)
    _add_engine(how)
    add = how.add_argument
    add("--allow_extrapolation", action="store_true", default=None, help="go past the model's positions")
    add("--seed", type=_not_negative, help="of the examples and of random presses (default: 0)")
    add("--output_dir", help="folder of the results (default: results/tasks)")


def _integer(text: str, minimum: int, maximum: int = 2**63 - 1) -> int:
    digits = text.strip().removeprefix("+").replace("_", "")
    try:
        value = maximum + 1 if digits.isdecimal() and len(digits) > 1000 else int(text)  # int reads no more than 4300
    except ValueError:
        value = minimum - 1
    got = text if len(text) <= 40 else f"{text[:30]}... of {len(text)} characters"
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, got {got!r}")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"must be an integer of at most {maximum}, got {got!r}")
    return value


MOST_ROUNDS = 1_000_000  # they are listed before the first is timed
_positive = partial(_integer, minimum=1)
_not_negative = partial(_integer, minimum=0)


def _check_sources(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` if two texts are asked for."""
    if args.dataset is not None and args.text_file is not None:
        raise InputError("--dataset and --text_file both say which text is read; give one of them.")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _json_object(text: str) -> dict[str, Any]:
    wanted = 'must be a JSON object such as {"window_size": 32}'
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{wanted}, got {text[:80]!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
    return value


def _run_ppl(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.run import Settings, evaluate
    from coldpress.presses.base import BUDGETS
    from coldpress.sharded import followers_silent

    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    for name in ("press", "compression_ratio", *BUDGETS, "kv_bits"):
        if name in given:
            given[name] = tuple(given[name])
    if "press_args" in given:
        given["press_args"] = tuple(given["press_args"].items())
    command = f"{prog or 'coldpress'} {shlex.join(argv[1:] if prog else argv)}"
    settings = Settings(**given)
    if settings.tp_plan is None:
        records, is_interrupted = evaluate(settings, command)
    else:  # every process takes part, and the first one speaks
        with followers_silent() as folder:
            settings = settings if folder is None else replace(settings, output_dir=folder)
            records, is_interrupted = evaluate(settings, command)
    if is_interrupted:
        sys.stderr.write(f"\ninterrupted; {len(records)} result(s) kept\n")
        return 130
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _run_sweep(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.eval.sweep import summary, sweep
    from coldpress.eval.sweep_plan import SweepPlan, read_config, with_options

    config = {} if args.config is None else read_config(args.config)
    ignored = ("config", "options", "run")
    options = {name: value for name, value in vars(args).items() if name not in ignored and value is not None}
    plan = SweepPlan.of(with_options(config, options))
    outcome = sweep(plan, f"{prog or 'coldpress'} {shlex.join(argv)}")
    print(summary(outcome, plan.output_dir))
    if outcome.is_interrupted:
        sys.stderr.write("\ninterrupted; the same command goes on from here\n")
        return 130
    return 1 if outcome.n_failed or outcome.problems else 0


def _run_tasks(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.task_command import TaskSettings, measure_tasks

    given = {f.name: getattr(args, f.name) for f in fields(TaskSettings) if getattr(args, f.name) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if "press_args" in given:
        given["press_args"] = tuple(given["press_args"].items())
    records, is_interrupted = measure_tasks(TaskSettings(**given), f"{prog or 'coldpress'} {shlex.join(argv)}")
    if is_interrupted:
        sys.stderr.write(f"\ninterrupted; {len(records)} result(s) kept; the same command goes on from here\n")
        return 130
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _run_calibrate(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.calibrate import CalibrationSettings, make_artefact

    names = [f.name for f in fields(CalibrationSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "press_args" in given:
        given["press_args"] = tuple(given["press_args"].items())
    make_artefact(CalibrationSettings(**given))
    return 0


def _run_compress(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.asking import compress

    names = ("text_file", "output", "press", "press_args", "compression_ratio", "budget_tokens", "budget_bytes")
    compress(**{name: getattr(args, name) for name in names}, model_options=_model_options(args))
    return 0


def _run_ask(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.asking import ask

    ask(args.file, args.question, _model_options(args), args.any_model, max_new_tokens=args.max_new_tokens)
    return 0


def _run_inspect(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.inspect import make_page

    names = ("output", "press", "press_args", "compression_ratio", "budget_tokens", "limit_tokens", "chunk_tokens")
    source = {name: getattr(args, name) for name in ("subset", "sample_idx", "text_file")}
    source |= {"dataset": args.dataset or "wikitext", "split": args.split or "test"}
    command = f"{prog or 'coldpress'} {shlex.join(argv)}"
    given = {name: getattr(args, name) for name in names}
    make_page(**given, source=source, model_options=_model_options(args), command=command)
    return 0


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("device", "dtype", "attn_implementation", "revision")}
    return {"name": args.model or "EleutherAI/pythia-70m"} | {k: v for k, v in given.items() if v is not None}


def _run_report(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.errors import DataError, OutputError
    from coldpress.eval.collect import collect
    from coldpress.eval.progress import note
    from coldpress.eval.report import groups, show

    folders = args.folders or ["results/perplexity"]
    if args.output is not None and not args.output.strip():
        raise OutputError("--output is empty; give the folder that the report goes to.")
    collection = collect(folders)
    for line in collection.skipped:
        note(line)
    if not collection.records:
        raise DataError(f"{' '.join(folders)} holds no results; run coldpress ppl first, or name another folder.")
    for group in groups(collection.records):  # numbers that were not measured alike do not share a table
        print(f"{show(group)}\n")
    if not args.table:
        from coldpress.eval.document import write_report

        paths = write_report(collection, Path(args.output or Path(folders[0]) / "report"))
        print(f"report: {paths[-1]}, report.md and {len(paths) - 2} plots beside it")
    return 0


def _run_presses(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.listing import entry, listing, python_only
    from coldpress.presses.registry import catalogue, find_press

    if args.json:
        infos = [*catalogue(), *python_only()] if args.name is None else [find_press(args.name)]
        print(json.dumps([_entry(info) for info in infos], indent=2, ensure_ascii=False))
    else:
        print(listing() if args.name is None else entry(find_press(args.name)))
    return 0


def _entry(info: Any) -> dict[str, Any]:
    return asdict(info) | {"parameters": [p._asdict() for p in info.parameters]}


if __name__ == "__main__":
    raise SystemExit(main())
