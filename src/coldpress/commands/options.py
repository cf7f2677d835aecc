"""The options of the commands, as argparse wants them; what they mean is decided elsewhere."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from coldpress.commands.values import Several, auto_or_not, bits, json_object, listed, not_negative, positive

__all__ = [
    "BITS",
    "add_machinery",
    "add_model",
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

BITS = "{8,4,2,k8v4,...}"  # numbers: in groups (KIVI); kKvV: keys in K bits and values in V, one by one, rotated
PPL_PRESETS = ("hf-strided", "gptq", "llamacpp", "lm-eval")  # those of coldpress.eval.settings, likewise
MOST_ROUNDS = 1_000_000  # they are listed before the first is timed


# Options that commands share


def add_model(group: Any, default: str = "EleutherAI/pythia-70m") -> None:
    add = group.add_argument
    add("--model", help=f"hub id, local folder, .gguf file, smollm2 or demo (default: {default})")
    add("--revision", help="branch, tag or commit of the model on the hub")


def _add_sources(group: Any, split: str) -> None:
    """The options that say which model, and which text."""
    add_model(group)
    add = group.add_argument
    add("--dataset", help="wikitext, pg19, demo, a local folder or file, or a hub id (default: wikitext)")
    add("--subset", help="configuration of the dataset, such as wikitext-103-v1")
    add("--split", help=f"split of the dataset (default: {split})")
    add("--sample_idx", type=not_negative, help="take this row of the dataset as the only text (a book of pg19)")
    add("--text_file", help="take this UTF-8 file as the text instead of a dataset")


def add_machinery(group: Any) -> None:
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
    add("--workers", type=positive, help="of the Ray engine (default: what there is room for; 2 on this machine)")


def _add_presses(group: Any) -> None:
    """The options that say which presses are measured, and at which sizes."""
    add = group.add_argument
    several = partial(add, nargs="+", action=Several)  # with blanks or commas between them
    several(
        "--press", type=listed(str), help="names of presses, no_press (the default), all, or a file's: file.py:MyPress"
    )
    several("--compression_ratio", type=listed(float), help="fraction of the pairs to remove, in [0, 1) (default: 0.5)")
    several("--budget_tokens", type=listed(positive), help="instead of a ratio: pairs that a head keeps, on average")
    several("--budget_bytes", type=listed(positive), help="instead of a ratio: bytes of the kept pairs of one text")
    add("--press_args", type=json_object, help="parameters of a single press as JSON, such as '{\"window_size\": 32}'")
    add("--chunk_tokens", type=positive, help="read prompts in pieces of so many tokens, and compress after each")
    several("--kv_bits", type=listed(bits), metavar=BITS, help="hold what is kept in so few bits, its newest pairs not")
    add("--kv_group_size", type=positive, help="numbers that share a step then (default: 64)")
    add("--kv_residual_tokens", type=not_negative, help="newest pairs that stay as they are then (default: 128)")


def _add_windows(group: Any) -> None:
    """The options of windows that are compressed and scored."""
    add = group.add_argument
    add("--context_tokens", type=positive, help="tokens compressed in each window (default: 3/4 of the positions)")
    add("--target_tokens", type=positive, help="tokens scored after them (default: 1/4 of the positions)")
    add(
        "--add_bos",
        nargs="?",
        const=True,
        type=auto_or_not,
        metavar="auto|yes|no",
        help="begin each window or text with the BOS token (default: auto, as the tokenizer begins a text)",
    )
    add("--limit_tokens", type=positive, help="use only the first so many tokens of the text")
    add("--max_documents", type=positive, help="under presses or streaming: no more than the first so many texts")
    add("--max_windows", type=positive, help="under presses: no more than the first so many windows of each text")
    add(
        "--greedy_tokens",
        type=positive,
        help="under presses: also generate so many tokens in each window, and count how many are the uncompressed ones",
    )
    add("--batch_size", type=positive, help="windows that are run together (default: 1)")


def _add_timing(group: Any) -> None:
    """The options of what is timed, but for its context."""
    add = group.add_argument
    add("--max_new_tokens", type=positive, help="tokens to generate (default: 200)")
    add("--min_new_tokens", type=positive, help="no end of text before so many (default: --max_new_tokens)")
    add("--repetitions", type=partial(positive, maximum=MOST_ROUNDS), help="timed rounds (default: 5)")
    add("--warmup", type=partial(not_negative, maximum=MOST_ROUNDS), help="untimed rounds before them (default: 1)")


def _add_limits(group: Any, seed: int = 0) -> None:
    add = group.add_argument
    add(
        "--allow_extrapolation",
        action="store_true",
        default=None,
        help="go past the positions the model was trained on",
    )
    add("--seed", type=not_negative, help=f"of all that is drawn: presses, timings, examples (default: {seed})")


# The options of each command


def calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("press", help="a press that coldpress presses calls calibrated")
    what = parser.add_argument_group("what is measured")
    _add_sources(what, "train")
    add = what.add_argument
    add("--limit_tokens", type=positive, help="use only the first so many tokens of the text")
    add("--n_samples", type=positive, help="pieces of the text that the model reads (default: 100)")
    add("--sample_tokens", type=positive, help="tokens of each (default: 1000)")
    add("--press_args", type=json_object, help="parameters of the press as JSON, such as '{\"n_sink\": 4}'")
    how = parser.add_argument_group("how")
    add_machinery(how)
    how.add_argument("--output", help="file to write (default: where presses look for it, see docs/presses.md)")


def compress_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compressed")
    add_model(what)
    add = what.add_argument
    add("--text_file", required=True, help="UTF-8 file with the text")
    add("--output", required=True, help="file to write, such as context.safetensors")
    add("--press", default="snapkv", help="name of a press, or no_press (default: snapkv)")
    add("--compression_ratio", type=float, help="fraction of the pairs to remove, in [0, 1) (default: 0.5)")
    add("--budget_tokens", type=positive, help="instead of a ratio: pairs that a head keeps, on average")
    add("--budget_bytes", type=positive, help="instead of a ratio: bytes of the kept pairs")
    add("--press_args", type=json_object, default={}, help="parameters of the press as JSON")
    add("--pin_system", metavar="TEXT", help="a system prompt before the text, which nothing may evict")
    add("--chunk_tokens", type=positive, help="read the text in pieces of so many tokens, and compress after each")
    add("--kv_bits", type=bits, metavar=BITS, help="store what is kept in so few bits")
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
    add("--budget_tokens", nargs="+", type=positive, default=[], help="instead of a ratio: pairs that a head keeps")
    add("--press_args", type=json_object, default={}, help="parameters of a single press as JSON")
    add("--chunk_tokens", type=positive, help="read the text in pieces of so many tokens, and compress after each")
    add("--limit_tokens", type=positive, help="read only the first so many tokens (default: 4096)")
    add_machinery(parser.add_argument_group("how"))


def sweep_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    add("--config", help="YAML file (docs/guide/sweep.md); options given beside it take the place of what it says")
    several = partial(add, nargs="+", action=Several)
    several("--model", type=listed(str), help="hub ids, local folders, .gguf files, smollm2, demo")
    add("--revision", help="branch, tag or commit of the models on the hub")
    several("--dataset", type=listed(str), help="names as in ppl, with a subset as in wikitext:wikitext-103-v1")
    several("--text_file", type=listed(str), help="UTF-8 files, texts beside the datasets or instead")
    add("--split", help="split of the datasets (default: test)")
    add("--sample_idx", type=not_negative, help="take this row of each dataset as the only text")
    _add_presses(what)
    add("--no_perplexity", action="store_true", default=None, help="leave perplexity under the presses out")
    add("--no_speed", action="store_true", default=None, help="leave speed and memory out")
    several("--ppl_preset", type=listed(str), help="also the uncompressed model's perplexity, as others measure it")
    windows = parser.add_argument_group("perplexity under the presses")
    _add_windows(windows)
    speed = parser.add_argument_group("speed and memory")
    lengths = partial(speed.add_argument, nargs="+", action=Several)
    lengths("--context_limit", type=listed(positive), help="tokens of the timed contexts (default: 4096)")
    _add_timing(speed)
    how = parser.add_argument_group("how")
    add_machinery(how)
    _add_placement(how)
    _add_engine(how)
    _add_limits(how)
    how.add_argument("--output_dir", help="folder of the results (default: results/sweep)")


def report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="results, those in subfolders too (default: results/perplexity)")
    add("--output", metavar="DIR", help="where report.html, report.md and the plots go (default: FOLDER/report)")
    add("--table", action="store_true", help="print the tables and write nothing; needs no matplotlib")


def ppl_options(parser: argparse.ArgumentParser) -> None:
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
    add("--stream_chunk", type=positive, help="streaming: tokens between two cuts (default: 64)")
    add(
        "--positions",
        choices=("original", "rerotate"),
        help="streaming: where kept keys stand, in the text or side by side (default: rerotate)",
    )
    add("--ppl_only", action="store_true", default=None, help="do not measure speed")
    add("--max_length", type=positive, help="tokens of a window (default: the model's positions)")
    add(
        "--stride",
        type=positive,
        help="tokens between windows (default: 512); with --ppl_apply_press at least the targets of a window, so that "
        "no token is scored twice (default: side by side)",
    )
    _add_windows(ppl)
    speed = parser.add_argument_group("speed and memory")
    add = speed.add_argument
    add("--speed_only", action="store_true", default=None, help="do not measure perplexity")
    add("--speed_decode_only", action="store_true", default=None, help="leave prefill and compression out of the time")
    add("--compile", action="store_true", default=None, help="decode by a step that torch.compile has made")
    add("--context_limit", type=positive, help="tokens of the timed context (default: 4096)")
    _add_timing(speed)
    how = parser.add_argument_group("how")
    add_machinery(how)
    _add_placement(how)
    _add_engine(how)
    _add_limits(how)
    how.add_argument("--output_dir", help="folder of the results (default: results/perplexity)")


def task_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    add = what.add_argument
    several = partial(add, nargs="+", action=Several)
    names = "niah_single, niah_multikey, vt, cwe; passkey, repeat, repeat_text, which ask nothing"
    several("--task", type=listed(str), help=names)
    several("--task_tokens", type=listed(positive), help="tokens of the contexts (default: 512 1024)")
    add("--task_examples", type=positive, help="of each task and length, spread over the depths (default: 20)")
    several("--depths", type=listed(float), help="where the answer is hidden, 0 to 1 (default: 0 0.25 0.5 0.75 1)")
    add("--template", choices=("none", "chat"), help="chat: questions in the model's chat template (default: none)")
    add("--pin_system", metavar="TEXT", help="a system prompt before every context, which nothing may evict")
    add("--max_new_tokens", type=positive, help="of an answer (default: what the task says)")
    _add_sources(parser.add_argument_group("of what model, in what text (default: sentences of our own)"), "test")
    how = parser.add_argument_group("what is compressed, and how")
    _add_presses(how)
    add_machinery(how)
    _add_engine(how)
    add = how.add_argument
    add("--allow_extrapolation", action="store_true", default=None, help="go past the model's positions")
    add("--seed", type=not_negative, help="of the examples and of random presses (default: 0)")
    add("--output_dir", help="folder of the results (default: results/tasks)")


def benchmark_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    add = what.add_argument
    add("name", help="ruler, loogle, infinitebench, longbench and others (docs/guide/benchmarks.md)")
    add("--data", metavar="FOLDER", help="a folder laid out as the benchmark's data set (default: that of the hub)")
    add("--data_dir", help="folder of the data set to read, such as 4096 of ruler or qasper of longbench")
    add("--fraction", type=float, help="of the questions, drawn with --seed as kvpress draws them (default: 1)")
    add("--limit", type=positive, help="no more than the first so many questions")
    add("--max_context_length", type=positive, help="cut contexts after so many tokens (default: as there is room)")
    add("--max_new_tokens", type=positive, help="of an answer (default: what the data set says)")
    add("--query_aware", action="store_true", default=None, help="compress each context together with its question")
    depths = partial(add, nargs="+", action=Several)
    depths("--needle_depth", type=listed(not_negative), help="per cents of the text before the needle")
    add("--pin_system", metavar="TEXT", help="a system prompt before every context, which nothing may evict")
    add_model(what)
    how = parser.add_argument_group("what is compressed, and how")
    _add_presses(how)
    add_machinery(how)
    _add_engine(how)
    _add_limits(how, seed=42)
    how.add_argument("--output_dir", help="folder of the results (default: results/benchmarks)")
