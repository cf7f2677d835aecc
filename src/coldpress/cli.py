"""The command ``coldpress``: recommend, ppl, speed, sweep, tasks, benchmark, calibrate, compress, ask, chat, serve,
inspect, report, presses.

Also what the scripts in evaluation/ run. Help and versions are printed without torch and transformers, whose import
takes seconds.

Exit codes: 0 all measured; 1 a press failed or a self-check did; 2 the input cannot work, or there is no command, which
prints the help; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NoReturn

from coldpress.commands.early import check_early, check_server, check_utf8
from coldpress.commands.options import (
    advice_options,
    ask_options,
    benchmark_options,
    calibration_options,
    compress_options,
    inspect_options,
    ppl_options,
    report_options,
    sweep_options,
    task_options,
)
from coldpress.commands.serve_options import chat_options, serve_options
from coldpress.commands.streams import interrupted_at_once, open_streams, output_problem, shortly
from coldpress.commands.useful import check_benchmark, check_ppl, check_sweep, check_tasks, given_to
from coldpress.errors import InputError, SelfCheckError, nearest
from coldpress.eval.settings import AdviceSettings, BenchmarkSettings, CalibrationSettings, Settings, TaskSettings
from coldpress.io.terminal import printable

__all__ = ["main"]


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


class _Version(argparse.Action):
    """Print the versions that a report of a fault needs, as pip knows them."""

    def __call__(self, *_: Any) -> NoReturn:
        for package in ("coldpress", "torch", "transformers"):
            try:
                print(package, metadata.version(package))
            except metadata.PackageNotFoundError:
                print(package, "is not installed")
        raise SystemExit(0)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the command and its options; None takes them from the command line.
        prog: how the user called it, for the record and the help.
    """
    open_streams()
    warnings.formatwarning = shortly
    argv = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(AttributeError, ValueError):  # a terminal that has no Δ still gets its table
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    parser = _parser(prog)
    args, unknown = parser.parse_known_args([_underscored(a) for a in argv])
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}.{nearest(unknown[0], args.parser.options)}")
    if args.run is None:
        parser.print_help()
        return 2
    try:
        check_utf8(vars(args))
        with interrupted_at_once():
            check_early(vars(args))
            if args.run is _run_serve:
                check_server()
            if args.run is not _run_report or args.brief:  # a report only reads; a brief one says what presses do
                import_module("coldpress.public")  # all that takes seconds
        code: int = args.run(args, argv, prog)
        sys.stdout.flush()
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
    except PermissionError as error:  # a folder without rights is met where it is looked into
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {_line(str(error.filename))} cannot be used ({error.strerror}); give another one.\n")
        return 2
    except OSError:
        problem = output_problem()
        if problem is None:
            raise
        sys.stderr.write(f"error: standard output cannot be written ({problem}); results that are files are whole\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


def _line(message: str) -> str:
    return printable(" ".join(message.split()))


def _underscored(argument: str) -> str:
    """``--compression-ratio=0.5`` as ``--compression_ratio=0.5``: both spellings of an option are the same."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog or "coldpress", description="Training-free compression of the key-value cache.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of coldpress, torch and transformers"
    )
    parser.set_defaults(parser=parser, run=None)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    advice = commands.add_parser("recommend", help="measure a few presses on your own text, and name two to take")
    advice_options(advice)
    advice.set_defaults(parser=advice, run=_run_recommend)
    ppl = commands.add_parser("ppl", help="perplexity and speed of a model, with and without presses", prog=prog)
    ppl_options(ppl)
    ppl.set_defaults(parser=ppl, run=_run_ppl)
    speed = commands.add_parser("speed", help="the same as ppl --speed_only")
    ppl_options(speed)
    speed.set_defaults(parser=speed, run=_run_ppl, speed_only=True)
    sweep = commands.add_parser("sweep", help="presses x ratios x texts x models; goes on where it was stopped")
    sweep_options(sweep)
    sweep.set_defaults(parser=sweep, run=_run_sweep)
    tasks = commands.add_parser(
        "tasks", help="questions about compressed contexts: needles, tracking, counting, probes"
    )
    task_options(tasks)
    tasks.set_defaults(parser=tasks, run=_run_tasks)
    benchmark = commands.add_parser("benchmark", help="RULER, LongBench and others of the field's benchmarks")
    benchmark_options(benchmark)
    benchmark.set_defaults(parser=benchmark, run=_run_benchmark)
    calibrate = commands.add_parser("calibrate", help="measure what a press needs of a model, on a text, and save it")
    calibration_options(calibrate)
    calibrate.set_defaults(parser=calibrate, run=_run_calibrate)
    compress = commands.add_parser("compress", help="compress a text once and save what is left, to ask it later")
    compress_options(compress)
    compress.set_defaults(parser=compress, run=_run_compress)
    ask = commands.add_parser("ask", help="ask questions about a text that coldpress compress has saved")
    ask_options(ask)
    ask.set_defaults(parser=ask, run=_run_ask)
    chat = commands.add_parser("chat", help="talk to a model, whose earlier turns are compressed as they age")
    chat_options(chat)
    chat.set_defaults(parser=chat, run=_run_chat)
    serve = commands.add_parser("serve", help="answer questions over HTTP, as OpenAI's API, about compressed texts")
    serve_options(serve)
    serve.set_defaults(parser=serve, run=_run_serve)
    look = commands.add_parser("inspect", help="a page that shows which tokens of a text a press keeps, and where")
    inspect_options(look)
    look.set_defaults(parser=look, run=_run_inspect)
    report = commands.add_parser("report", help="tables, a page and plots of the results in a folder")
    report_options(report)
    report.set_defaults(parser=report, run=_run_report)
    presses = commands.add_parser("presses", help="the methods, what they need, and where they come from")
    presses.add_argument("name", nargs="?", help="a press, by its name, its class or as file.py:MyPress: all about it")
    presses.add_argument("--json", action="store_true", help="print the entries as JSON")
    presses.set_defaults(parser=presses, run=_run_presses)
    return parser


def _check_sources(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` if two texts are asked for."""
    if args.dataset is not None and args.text_file is not None:
        raise InputError("--dataset and --text_file both say which text is read; give one of them.")


def _run_recommend(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.eval.recommend import recommend

    return _outcome(*recommend(AdviceSettings(**given_to(AdviceSettings, vars(args))), _command(argv, prog)))


def _run_ppl(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.evaluate import evaluate
    from coldpress.io.launched import followers_silent

    command = f"{prog or 'coldpress'} {shlex.join(argv[1:] if prog else argv)}"
    settings = Settings(**given_to(Settings, vars(args)))
    check_ppl(vars(args), settings)
    if settings.tp_plan is None:
        return _outcome(*evaluate(settings, command))
    with followers_silent() as folder:  # every process takes part, and the first one speaks
        settings = settings if folder is None else replace(settings, output_dir=folder)
        return _outcome(*evaluate(settings, command), again="")


def _run_sweep(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.eval.sweep import summary, sweep
    from coldpress.eval.sweep_plan import SweepPlan, read_config, with_options

    config = {} if args.config is None else read_config(args.config)
    ignored = ("config", "parser", "run")
    options = {name: value for name, value in vars(args).items() if name not in ignored and value is not None}
    plan = SweepPlan.of(with_options(config, options))
    evaluations = plan.evaluations
    check_sweep(options, {e.kind for e in evaluations}, {job.name for e in evaluations for job in e.jobs})
    outcome = sweep(plan, f"{prog or 'coldpress'} {shlex.join(argv)}")
    print(summary(outcome, plan.output_dir))
    if outcome.is_interrupted:
        sys.stderr.write("\ninterrupted; the same command goes on from here\n")
        return 130
    return 1 if outcome.n_failed or outcome.problems else 0


def _run_tasks(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.eval.task_run import measure_tasks

    settings = TaskSettings(**given_to(TaskSettings, vars(args)))
    check_tasks(vars(args), settings)
    return _outcome(*measure_tasks(settings, _command(argv, prog)))


def _run_benchmark(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.eval.benchmarks.run import measure_benchmark

    settings = BenchmarkSettings(**given_to(BenchmarkSettings, vars(args)))
    check_benchmark(vars(args), settings)
    return _outcome(*measure_benchmark(settings, _command(argv, prog)))


def _command(argv: list[str], prog: str | None) -> str:
    return f"{prog or 'coldpress'} {shlex.join(argv)}"


def _outcome(records: list[dict[str, Any]], is_interrupted: bool, again: str = "the same command") -> int:
    """The exit code. Of an interrupted run it is said what is kept, and what goes on from there, if anything does."""
    n, n_open = len(records), sum(record["status"] == "interrupted" for record in records)
    if is_interrupted and not records:
        sys.stderr.write("\ninterrupted before anything was measured\n")
    elif is_interrupted:
        unfinished = "" if not n_open else ", unfinished" if n_open == n else f", {n_open} of them unfinished"
        goes_on = f"; {again} goes on from here" if again else ""
        sys.stderr.write(f"\ninterrupted; {n} result(s) kept{unfinished}{goes_on}\n")
    return 130 if is_interrupted else 1 if any(record["status"] == "failed" for record in records) else 0


def _run_calibrate(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.commands.calibrating import make_artefact

    make_artefact(CalibrationSettings(**given_to(CalibrationSettings, vars(args))))
    return 0


def _run_compress(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.commands.asking import compress

    names = ("text_file", "output", "press", "press_args", "compression_ratio", "budget_tokens", "budget_bytes")
    how = ("chunk_tokens", "kv_bits", "pin_system")
    compress(**{name: getattr(args, name) for name in (*names, *how)}, model_options=_model_options(args))
    return 0


def _run_ask(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.commands.asking import ask

    ask(args.file, args.question, _model_options(args, None), args.any_model, max_new_tokens=args.max_new_tokens)
    return 0


def _run_chat(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.commands.chatting import chat_given

    return chat_given(args, _model_options(args))


def _run_serve(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.commands.serving import serve_given

    return serve_given(args, _model_options(args))


def _run_inspect(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    _check_sources(args)
    from coldpress.commands.inspecting import make_page

    names = ("output", "press", "press_args", "compression_ratio", "budget_tokens", "limit_tokens", "chunk_tokens")
    source = {name: getattr(args, name) for name in ("subset", "sample_idx", "text_file")}
    source |= {"dataset": args.dataset or "wikitext", "split": args.split or "test"}
    command = f"{prog or 'coldpress'} {shlex.join(argv)}"
    given = {name: getattr(args, name) for name in names}
    make_page(**given, source=source, model_options=_model_options(args), command=command)
    return 0


def _model_options(args: argparse.Namespace, default: str | None = Settings.model) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("device", "dtype", "attn_implementation", "revision")}
    return {k: v for k, v in ({"name": args.model or default} | given).items() if v is not None}


def _run_report(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.errors import DataError, OutputError
    from coldpress.io.progress import note
    from coldpress.records.reading import groups
    from coldpress.records.results import collect
    from coldpress.report.terminal import show

    folders = args.folders or ["results/perplexity"]
    if args.output is not None and not args.output.strip():
        raise OutputError("--output is empty; give the folder that the report goes to.")
    if args.table and args.output is not None:
        raise InputError(f"--table writes no report to --output {args.output}; give one of them.")
    if args.table and args.brief:
        raise InputError("--table prints tables and --brief a report; give one of them.")
    if args.lang is not None and not args.brief:
        raise InputError(f"--lang {args.lang} is for the brief report; add --brief.")
    collection = collect(folders)
    for line in (*collection.skipped, *collection.twice):
        note(line)
    if not collection.records:
        no = "no result that can be read" if collection.skipped else "no results"
        raise DataError(f"{' '.join(folders)} holds {no}; run coldpress ppl first, or name another folder.")
    output = Path(args.output or Path(folders[0]) / "report")
    if args.brief:
        from coldpress.report.brief import write_brief

        text, path = write_brief(collection, output, args.lang or "en")
        print(text)
        note(f"report: {path}")
        return 0
    for group in groups(collection.records):  # numbers that were not measured alike do not share a table
        print(f"{show(group)}\n")
    if not args.table:
        from coldpress.report.page import write_report

        paths = write_report(collection, output)
        print(f"report: {paths[-1]}, report.md and {len(paths) - 2} plots beside it")
    return 0


def _run_presses(args: argparse.Namespace, argv: list[str], prog: str | None) -> int:
    from coldpress.bases.listing import entry, listing, python_only
    from coldpress.bases.press_files import load_press_files
    from coldpress.bases.registry import catalogue, find_press

    load_press_files([] if args.name is None else [args.name])
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
