"""``coldpress recommend``: measure a few presses on the user's text, and name two to take.

Runs of the same presses on the same model, as ``coldpress ppl`` and ``coldpress tasks`` make them, each until its share
of the time is up: windows (loss and KL), questions, for a stream also a long text that is read on, and timed rounds in
what is left. Their records are those of these commands. What follows from them is decided in
:mod:`coldpress.eval.advice`.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from textwrap import fill
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.bases.registry import make_press
from coldpress.errors import InputError
from coldpress.eval.advice import Row, Scored, advise, rule_of, table_of, words_of
from coldpress.eval.evaluate import PressRun, make_run
from coldpress.eval.jobs import Job, make_jobs
from coldpress.eval.options import SIZES, OfLimits, OfMachine, OfModel, names_of
from coldpress.eval.pace import NEW_TOKENS, ROUNDS, USES, Clock, Pace, Use, limit_for, target_of
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.run import Run, carry_out, checked_folder, prepared
from coldpress.eval.settings import STREAM_CHUNK, AdviceSettings, Settings, TaskSettings
from coldpress.eval.task_run import make_questions
from coldpress.io.progress import note
from coldpress.io.terminal import printable
from coldpress.loading.datasets import Corpus, excerpts, load_corpus, source_of
from coldpress.loading.models import LoadedModel, load_model
from coldpress.records.metrics import FEWEST_QUESTIONS
from coldpress.records.wording import short
from coldpress.report.glance import FEWEST_WINDOWS
from coldpress.report.terminal import table

Record = dict[str, Any]
TASKS = ("niah_single", "niah_multikey")
DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7)
TASK_ROOM = 192  # tokens that a context of questions has at least
STREAMED = 4  # times the context: a text that is read on
WIDTH = 100  # of a line
SLOWER = 1.2  # times as long as until now may the rest take
PARTS_OF_QUALITY = ("perplexity", "tasks")
OF_A_POINT = ("press", "compression_ratio", "budget_tokens", "kv_bits")
_SHARED = (*names_of(OfModel, OfMachine, OfLimits), *SIZES, "press")


def recommend(settings: AdviceSettings, command: str) -> tuple[list[Record], bool, str]:
    """Measure, write the records, and print a table and two names.

    A run that was killed, or whose time was up, goes on where it was when it is started again.

    Args:
        settings: what was asked for.
        command: the command line, for the record.

    Returns:
        The records, whether the user interrupted the run, and what goes on from there: the same command, and what it
        has to be given beside.

    Raises:
        InputError: before any long work, when something that was asked for cannot work.
    """
    use = USES[settings.use]
    of_presses = _of_presses(settings, use, settings.context_tokens or 1024)
    jobs = _jobs(of_presses, use, settings)  # raises what cannot work before a model is loaded
    folder = checked_folder(of_presses)
    where = {name: getattr(settings, name) for name in ("subset", "split", "sample_idx")}
    corpus = load_corpus(**{"dataset": "", **source_of(settings.data or "")}, **where)
    loaded = load_model(settings.model, **of_presses.loading)
    pace, jobs = Pace.of(loaded), _possible(jobs, loaded)
    context = settings.context_tokens or pace.context(use, jobs, settings.budget_minutes)
    runs, sizes = _runs(settings, use, context, corpus, loaded, command)
    for line in pace.words(use, jobs, *sizes, settings.budget_minutes):
        note(line)
    again, changed = "the same command", command
    if settings.context_tokens is None:  # it depends on how busy the machine is
        again += f" with --context_tokens {context}"
        changed = _with_option(command, "--context_tokens", context)
    clock = Clock(60 * settings.budget_minutes)
    found: dict[int, list[Record]] = {}  # of each run
    try:
        for run, ends in runs:
            if run.error is not None:
                continue
            if run.ledger is None:
                run.keep_in(folder)
            run.show_progress = clock.hook(run, ends)
            found[id(run)], is_interrupted = carry_out(run, folder, is_quiet=True, keeps_ledger=True)
            if is_interrupted:
                return [*chain(*found.values())], True, again
        records = [*chain(*found.values())]
        rest = _Rest(use, clock, pace.seconds(use, jobs, sizes[0]), sizes[1:], changed)
        print(_recommendation(settings, records, rest))
        print(f"\n{len(records)} result(s) in {printable(str(folder))}/", flush=True)
    except KeyboardInterrupt:  # between two of them, or while the result is reckoned
        return [*chain(*found.values())], True, again
    if all(run.is_over for run, _ in runs):
        for ledger in {id(run): run.ledger for run, _ in runs if run.ledger is not None}.values():
            ledger.discard()
    return records, False, again


def _with_option(command: str, name: str, value: int) -> str:
    """A command line in which an option has another value."""
    words = [word for word in shlex.split(command) if not word.startswith(f"{name}=")]
    while name in words:
        at = words.index(name)
        del words[at : at + 2]
    return shlex.join([*words, name, str(value)])


@dataclass(frozen=True)
class _Rest:
    """What is left to measure when the time is up."""

    use: Use
    clock: Clock
    guess: tuple[float, float, float]  # seconds of a window, of a question, and of all that is timed
    sizes: tuple[int, int]  # windows and questions that were planned
    command: str  # that measures the same

    def words(self, n_windows: int, n_questions: int) -> str:
        """The command that measures what is left, with the minutes that it takes; of a verdict if there is none yet."""
        windows, questions = self.sizes
        is_enough = n_windows >= FEWEST_WINDOWS and n_questions >= FEWEST_QUESTIONS
        is_open = not is_enough and windows >= FEWEST_WINDOWS and questions >= FEWEST_QUESTIONS
        if is_open:
            windows, questions = FEWEST_WINDOWS, FEWEST_QUESTIONS
        missing = max(0, windows - n_windows), max(0, questions - n_questions)
        took = [self.clock.took.get(name, guess) for name, guess in zip(PARTS_OF_QUALITY, self.guess, strict=False)]
        needed = limit_for(self.use, *missing, took) if any(missing) else self.guess[2] / 60  # all that is timed
        command = _with_option(self.command, "--budget_minutes", max(1, math.ceil(SLOWER * needed)))
        aim = "have enough to name a press" if is_open else "measure the rest"
        return f"The time was up. To {aim}, go on from here with:\n  {printable(command)}"


def _of_presses(settings: AdviceSettings, use: Use, context: int, **other: Any) -> Settings:
    """An evaluation of the presses, on windows of one context, and timed."""
    ratios = settings.compression_ratio
    budgets = tuple(max(1, round((1 - ratio) * context)) for ratio in ratios)
    given: dict[str, Any] = {"budget_tokens": budgets} if use.in_tokens else {"compression_ratio": ratios}
    given |= {name: getattr(settings, name) for name in names_of(OfModel, OfMachine, OfLimits)} | source_of(
        settings.data or ""
    )
    given |= {"press": (NO_PRESS, *(settings.press or use.presses)), "chunk_tokens": use.chunk_tokens}
    given |= {"ppl_apply_press": True, "context_limit": context, "context_tokens": context, "max_windows": 1}
    return Settings(**given | {"max_new_tokens": NEW_TOKENS, "repetitions": ROUNDS} | other)


def _runs(
    settings: AdviceSettings, use: Use, asked_context: int, corpus: Corpus, loaded: LoadedModel, command: str
) -> tuple[list[tuple[Run, dict[str, float]]], tuple[int, int, int]]:
    """What is measured, with the share of the time at which each part of it ends; tokens, windows and questions."""
    positions = loaded.max_positions or UNKNOWN_POSITIONS
    wanted = min(asked_context + target_of(asked_context), positions)
    parts, width = excerpts(corpus, loaded.tokenizer, wanted, settings.max_windows, settings.seed)
    context = (
        asked_context if width == asked_context + target_of(asked_context) else width - max(NEW_TOKENS, width // 9)
    )
    target = width - context
    if context < asked_context:
        why = f"the model has {positions} positions" if width == positions else "the text is short"
        note(f"contexts have {context} tokens, not {asked_context}: {why}.")
    of_windows = _of_presses(settings, use, context, target_tokens=target)
    jobs = _possible(_jobs(of_windows, use, settings), loaded, is_said=False)
    windows, asked, read_on = use.shares
    first = make_run(of_windows, jobs, parts, loaded, command)
    for line in first.notes:
        note(line)
    has_template = getattr(loaded.tokenizer, "chat_template", None) is not None
    task_tokens = max(min(max(context, TASK_ROOM), positions - TASK_ROOM // 2), 1)
    of_tasks = TaskSettings(
        **{name: getattr(of_windows, name) for name in _SHARED},
        **source_of(settings.data or ""),
        chunk_tokens=use.chunk_tokens,
        task=TASKS,
        task_tokens=(task_tokens,),
        task_examples=-(-settings.max_windows // len(TASKS)),
        depths=DEPTHS,
        template=settings.template or ("chat" if has_template else "none"),
    )
    questions = make_questions(of_tasks, jobs, parts, loaded, command)
    questions.examples.sort(key=lambda example: example.index)  # the tasks in turn: the time may be up before the last
    runs: list[tuple[Run, dict[str, float]]] = [(first, {"perplexity": windows}), (questions, {"tasks": asked})]
    if settings.use == "streaming":
        stream = _stream(settings, corpus, loaded, of_windows, command)
        runs += [] if stream is None else [(stream, {"perplexity": read_on})]
    first.is_timed_later = True  # quality comes first
    runs.append((first, {"speed": 1.0}))
    return runs, (context, sum(len(own.starts) for own in first.plan.windows or ()), len(questions.examples))


def _jobs(of_presses: Settings, use: Use, settings: AdviceSettings) -> list[Job]:
    whole = make_jobs(replace(of_presses, chunk_tokens=None))
    once = [job.name for job in whole if job.press is not None and not job.press.chooses_again]
    if use.chunk_tokens and once:
        raise InputError(
            f"{once[0]} chooses once, from a whole text, and --use {settings.use} compresses again and again: leave it "
            "out, or name one that coldpress presses marks with a d."
        )
    jobs = make_jobs(of_presses)
    if use.kv_bits and not settings.press:
        jobs += make_jobs(replace(of_presses, press=(NO_PRESS,), kv_bits=use.kv_bits))
    return jobs


def _possible(jobs: Sequence[Job], loaded: LoadedModel, is_said: bool = True) -> list[Job]:
    """Those that have what they need of the model; of the others it is said what they lack."""
    found = []
    for job in jobs:
        try:
            prepared([job], loaded)
        except InputError as error:
            if is_said:
                note(f"{job.name} is left out: {error}")
        else:
            found.append(job)
    if len(found) < 2:
        raise InputError("None of the presses can be measured on this model; name others with --press.")
    return found


def _stream(
    settings: AdviceSettings, corpus: Corpus, loaded: LoadedModel, of_windows: Settings, command: str
) -> PressRun | None:
    """One long text, read on past the context; None where the model or the text cannot do that."""
    n_tokens = STREAMED * (of_windows.context_tokens or 1)
    longest = max(corpus.documents, key=lambda document: len(document.text))
    of_stream = Settings(
        **{name: getattr(of_windows, name) for name in _SHARED},
        **source_of(settings.data or ""),
        ppl_mode="streaming",
        limit_tokens=n_tokens,
        max_documents=1,
    )
    text = replace(longest, text=longest.text[: 16 * n_tokens])
    try:
        return make_run(of_stream, make_jobs(of_stream), replace(corpus, documents=(text,)), loaded, command)
    except InputError as error:
        note(f"no long text is read on: {error}")
        return None


# What is printed: the table, the rule, two names, and how to use them


def _recommendation(settings: AdviceSettings, records: Sequence[Record], rest: _Rest) -> str:
    """The table and the two names.

    Args:
        settings: what was asked for.
        records: of the windows and of the questions of each press, and of streams.
        rest: says what measures more, where the time was up before all was measured.
    """
    use = USES[settings.use]
    streams = [record for record in records if record["protocol"].startswith("stream")]
    by_key: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record not in streams:
            by_key.setdefault(tuple(record[name] for name in OF_A_POINT), []).append(record)
    failed = {record["press"] for record in records if record["status"] == "failed"}
    whole = [found for found in by_key.values() if len(found) == 2 and found[0]["press"] not in failed]
    base = next((found for found in whole if found[0]["press"] == NO_PRESS and found[0]["kv_bits"] is None), None)
    if base is None or len(whole) < 2:
        return "Nothing was measured of which anything could be said; the errors above say why."
    has_sizes = len(settings.compression_ratio) > 1
    n_rounds = min(len(found[0].get("samples") or ()) for found in whole)  # the last one may have been cut
    rows = {_row(found, n_rounds, has_sizes): found[0] for found in whole if found is not base}
    plain = _row(base, n_rounds)
    advice = advise(plain, list(rows), settings.margin, use.by_time)
    first = base[0]
    n_windows, n_questions = len(next(iter(rows)).windows), len(plain.right)
    timed = f"{n_rounds or 'no'} timed round{'' if n_rounds < 2 else 's'}"
    counts = f"{n_windows} windows of {first['context_tokens']:,} + {first['target_tokens']} tokens"
    said = [
        f"{short(first['model'])} on {short(settings.data or '')}, for {settings.use}: {use.about}.",
        f"{counts}, {n_questions} questions and {timed}, {_sizes(settings, rows.values())}, in "
        f"{rest.clock.spent / 60:.1f} min.",
        table_of(plain, list(rows), advice),
        "compress: seconds that the first token comes later than without a press; ms: of each token after the first."
        if n_rounds
        else "Nothing was timed: the windows and questions took the time.",
    ]
    if streams:
        said += ["Read on, with the kept keys moved side by side:", table(streams)]
    said += [rule_of(plain, settings.margin), *words_of(plain, list(rows), advice, use.by_time)]
    if advice.cheap is not None:
        named = dict.fromkeys([advice.best[0], advice.cheap])
        how = [f"  {line}" for row in named for line in _how(settings, rows[row])]
        said.append("\n".join(["To use it:" if len(named) == 1 else "To use them:", *how]))
        if settings.use == "qa":
            said.append("compress reads as much of a text as the model was trained on, and says where it cuts it.")
    if rest.clock.is_up:
        said.append(rest.words(n_windows, n_questions))
    return "\n\n".join(part if "\n" in part else fill(printable(part), WIDTH) for part in said)


def _sizes(settings: AdviceSettings, records: Iterable[Record]) -> str:
    budgets = [*dict.fromkeys(r["budget_tokens"] for r in records if r["budget_tokens"])]
    if budgets:
        return f"{' and '.join(map(str, budgets))} tokens stored"
    return f"ratio {' and '.join(f'{ratio:.15g}' for ratio in settings.compression_ratio)}"


def _row(records: Sequence[Record], n_rounds: int, has_size: bool = False) -> Row:
    """Of the record of the windows and that of the questions of one press."""
    windows, asked = records
    label = windows["press"]
    if has_size and label != NO_PRESS:
        size = windows["budget_tokens"] or windows["compression_ratio"]
        label += "" if size is None else f" {size:.15g}"
    if windows["kv_bits"] is not None:
        label = str(windows["kv_bits"]) if label == NO_PRESS else f"{label} {windows['kv_bits']}"
    found = windows["per_window"] or ()
    samples = (windows.get("samples") or ())[:n_rounds]
    first = [s["prefill_ns"] / 1e9 for s in samples]
    decode = [s["decode_ns"] / (s["n_tokens"] - 1) / 1e6 for s in samples]
    return Row(
        label,
        tuple(Scored(w["n"], w["nll"], w["nll_base"], w["kld"]) for w in found if "kld" in w),
        tuple(row["score"] == 1 for row in asked["per_example"] or ()),
        windows["kv_bytes"],
        statistics.median(first) if first else None,
        statistics.median(decode) if decode else None,
    )


def _how(settings: AdviceSettings, record: Record) -> list[str]:
    """The lines that use what a record measured."""
    name, bits = record["press"], record["kv_bits"]
    ratio = None if name == NO_PRESS else record["compression_ratio"]
    press = f"--model {settings.model} --press {name}"
    press += "" if ratio is None else f" --compression_ratio {ratio:.15g}"
    press += "" if bits is None else f" --kv_bits {bits}"
    if settings.use == "qa":
        text = source_of(settings.data or "").get("text_file", "TEXT.txt")
        return [
            f"coldpress compress {press} --text_file {text} --output {name}.safetensors",
            f'coldpress ask {name}.safetensors "QUESTION"',
        ]
    if settings.use == "chat":
        return [f"coldpress chat {press} --chunk_tokens {USES['chat'].chunk_tokens}"]
    if settings.use == "throughput":
        return [f"coldpress serve {press}"]
    schedule = f"compression_interval={STREAM_CHUNK}, target_size={record['budget_tokens']}"
    return [f'coldpress.PressedCache(DecodingPress({make_press(name, 0.0)!r}, {schedule}), positions="rerotate")']
