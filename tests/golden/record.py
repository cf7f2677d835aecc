"""What must not move, computed in one way for the golden files and for the tests that compare with them.

``make.py`` writes the files beside this one, ``test_golden.py`` reads them. Kept pairs, losses and perplexities are
those of the demo model on the demo text, on one thread.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    ComposedPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVBits,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    catalogue,
    make_press,
    prefill,
)

# All that is not public: what moves is changed here, and nowhere else below this folder.
from coldpress.bases.registry import PressInfo
from coldpress.core.data import as_data
from coldpress.core.data import from_data as from_data
from coldpress_command import main

DEMO = Path(coldpress.__file__).parent / "assets" / "demo"

HERE = Path(__file__).parent


def load(name: str) -> Any:
    """What the golden file ``name`` holds."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def write(name: str, sections: dict[str, dict[str, Any]]) -> None:
    """Write a golden file, one line for each entry of each section, so that a change of one is one line."""
    parts = []
    for section, entries in sections.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        parts.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    (HERE / name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# -- signatures.json --------------------------------------------------------------------------------------------------


class _Text:
    """Stands in a signature for what would be written in quotes, or in other words by another Python."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signatures() -> dict[str, Any]:
    """Every public name: the signature of a function, the members of a class, the type of anything else."""
    return {name: _described(getattr(coldpress, name)) for name in coldpress.__all__}


def _described(value: Any) -> Any:
    if isinstance(value, ModuleType):
        return "module"
    if not isinstance(value, type):
        return _signature(value) if callable(value) else type(value).__name__
    public = [getattr(coldpress, name) for name in coldpress.__all__]
    bases = [cls for cls in value.__mro__[1:] if cls in public]
    inherited: dict[str, str] = {}
    for cls in reversed(bases):
        inherited |= _members(cls)
    own = sorted(_members(value).items())
    return {
        "bases": [cls.__name__ for cls in bases],
        "constructor": _constructor(value),
        "members": {name: said for name, said in own if inherited.get(name) != said},
    }


def members(name: str) -> dict[str, str]:
    """All that users call or read of a public class, inherited from any class of ours or its own."""
    return _members(getattr(coldpress, name))


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "coldpress"


def _constructor(cls: type) -> str | None:
    """None where it is another package's."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return _signature(cls) if _is_ours(owner) else None


def _members(cls: type) -> dict[str, str]:
    """What users call or read, wherever in the package it is defined; a dataclass's fields are in its constructor."""
    known = {f.name for f in fields(cls)} if is_dataclass(cls) else set()
    found: dict[str, str] = {}
    for base in filter(_is_ours, cls.__mro__):
        for name, value in vars(base).items():
            if (name == "__call__" or not name.startswith("_")) and name not in {*known, *found}:
                found[name] = _member(value)
    return found


def _member(value: Any) -> str:
    if isinstance(value, (property, functools.cached_property)):
        function = value.fget if isinstance(value, property) else value.func
        assert function is not None
        return f"property{_signature(function)}"
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__}{_signature(value.__func__)}"
    return f"method{_signature(value)}" if inspect.isfunction(value) else f"{type(value).__name__} {value!r}"


def _signature(function: Any) -> str:
    """As ``str(inspect.signature(function))``, with annotations as they are written in the source."""
    signature = inspect.signature(function)
    given = [
        p.replace(annotation=_annotation(p.annotation), default=_default(p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=given, return_annotation=_annotation(signature.return_annotation)))


def _annotation(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    if isinstance(annotation, str):
        return _Text(annotation)
    return _Text("None" if annotation is None else annotation.__name__)


def _default(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return default
    return _Text("<function>" if inspect.isfunction(default) else repr(default))


def commands() -> dict[str, list[str]]:
    """The arguments that each command takes, options and positional ones, in the order of its help."""
    first = _help([])
    names = re.findall(r"^ {4}(\w+)", first, re.MULTILINE)
    return {"": _arguments(first)} | {name: _arguments(_help([name])) for name in names}


def _help(command: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def _arguments(text: str) -> list[str]:
    """What stands in lines of their own, indented by two, before two blanks and the explanation."""
    found = []
    for line in re.findall(r"^ {2}(\S.*)$", text, re.MULTILINE):
        said = re.split(r" {2,}", line)[0]
        found += re.findall(r"(?<!\S)--?[a-z]\w*", said) or [said.partition(" ")[0]]
    return found


# -- presses.json -----------------------------------------------------------------------------------------------------

# Presses without a name of their own, small enough for what kept.json is made of.
MADE: dict[str, BasePress] = {
    "CAMPress": CAMPress(StreamingLLMPress(n_sink=2), 8, 96),
    "ComposedPress": ComposedPress([SnapKVPress(0.2, window_size=16), KeyDiffPress(0.25)]),
    "DMSPress": DMSPress(KnormPress(), threshold=-15.0, sliding_window_size=16, decoding=True),
    "DecodingPress": DecodingPress(AdaKVPress(SnapKVPress(window_size=16)), 8, 96),
    "DuoAttentionPress": DuoAttentionPress(
        0.5, pattern=[[(3 * i + 2 * j) % 5 / 5 for j in range(4)] for i in range(6)], sink_size=4, recent_size=24
    ),
    "KeyRerotationPress": KeyRerotationPress(KnormPress(0.5)),
    "PerLayerCompressionPress": PerLayerCompressionPress(KeyDiffPress(), [0.1, 0.3, 0.5, 0.6, 0.7, 0.8]),
    "PrefillDecodingPress": PrefillDecodingPress(
        SnapKVPress(0.5, window_size=16), DecodingPress(KeyDiffPress(), 8, 64)
    ),
}


def presses() -> dict[str, Any]:
    """Every name at its defaults and at half, and the presses that are made in Python only."""
    return {
        "named": {info.name: _named(info) for info in catalogue()},
        "made": {name: _written(press) for name, press in MADE.items()},
    }


def _named(info: Any) -> dict[str, Any]:
    flags = ("at_prefill", "can_rechoose", "per_head", "per_layer", "has_ratio", "in_block")
    earlier = {"can_rechoose": "decodes"}  # as the golden files call it
    said = {
        "title": info.title,
        "kind": info.kind,
        "call": info.call,
        "parameters": {p.name: p.default for p in info.parameters},
        "flags": [earlier.get(flag, flag) for flag in flags if getattr(info, flag)],
    }
    for ratio in (0.0, 0.5) if info.has_ratio else (0.0,):
        press, again = make_press(info.name, ratio), make_press(info.name, ratio)
        assert press is not None
        said[f"at {ratio}"] = _written(press) | {"equals another": press == again}
    return said


def _written(press: BasePress) -> dict[str, Any]:
    return {"class": type(press).__name__, "repr": repr(press), "data": as_data(press)}


# -- kept.json --------------------------------------------------------------------------------------------------------

N_PROMPT, N_NEXT, N_SHORT = 160, 32, 117  # tokens; N_SHORT: of the shorter of two prompts
RATIOS = (0.3, 0.7)
SMALL: dict[str, Any] = {  # so that windows and chunks are several in N_PROMPT tokens
    "window_size": 16, "n_future_positions": 64, "lag_size": 16, "chunk_length": 12, "block_size": 40, "n_recent": 40,
    "compression_interval": 8, "seed": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "chunk_snapkv": {"chunk_length": 48},
    "finch": {"chunk_length": 48},
    "simlayerkv": {"lazy_threshold": 0.5},
}
HANDFUL = ("adakv_snapkv", "keydiff", "knorm", "snapkv", "streaming_llm")
WAYS: dict[str, dict[str, Any]] = {
    "in pieces of 48": {"chunk_tokens": 48},
    "in 8 bits": {"kv_bits": KVBits(8, group_size=16, residual_tokens=16)},
    "in 4 bits": {"kv_bits": KVBits(4, group_size=16, residual_tokens=16)},
    "rerotated": {"positions": "rerotate"},
}
# Where at 0 two pairs are so close that another processor keeps the other one, the prompt begins elsewhere.
STARTS = {
    "decoding_knorm at 0.3": 34,
    "decoding_knorm at 0.7": 5,
    "keydiff in 8 bits": 3,
    "knorm at 0.3": 33,
    "knorm at 0.7": 25,
    "knorm in pieces of 48": 15,
    "knorm padded": 15,
    "leverage at 0.3": 61,
}


@dataclass(frozen=True)
class Case:
    """A press and how its cache is filled."""

    press: BasePress
    options: dict[str, Any] = field(default_factory=dict)  # of the cache
    in_block: bool = False
    is_padded: bool = False  # two rows, the second of which is padded on the left
    start: int = 0  # of the prompt, in the tokens of the text


def _small(info: PressInfo, ratio: float) -> BasePress:
    given = SMALL | OWN.get(info.name, {})
    press = make_press(info.name, ratio, **{p.name: given[p.name] for p in info.parameters if p.name in given})
    assert press is not None
    return press


def _cases() -> dict[str, Case]:
    cases, infos = {}, {info.name: info for info in catalogue()}
    for info in infos.values():
        if info.kind == "training-free":
            for ratio in RATIOS if info.has_ratio else (0.0,):
                own = f" at {ratio}" if info.has_ratio else ""
                cases[f"{info.name}{own}"] = Case(_small(info, ratio), in_block=info.in_block)
    cases |= {name: Case(press) for name, press in MADE.items()}
    for name in HANDFUL:
        press = _small(infos[name], 0.5)
        cases |= {f"{name} {way}": Case(press, options) for way, options in WAYS.items()}
        cases[f"{name} padded"] = Case(press, is_padded=True)
    return {name: replace(case, start=STARTS.get(name, 0)) for name, case in cases.items()}


CASES = _cases()


@functools.cache
def demo() -> tuple[PreTrainedModel, Any, Tensor]:
    """The demo model, its tokenizer, and the first tokens of the demo text ``[1, n]``."""
    torch.set_num_threads(1)
    folder = DEMO / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="coldpress", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = next((DEMO / "text").glob("*.txt")).read_text(encoding="utf-8")[:2_000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] >= 2 * (N_PROMPT + N_NEXT + 1)
    return model, tokenizer, ids


def token_digest() -> str:
    """Of the tokens that kept.json is made of: where they differ, so does everything else."""
    return hashlib.sha256(repr(demo()[2][0].tolist()).encode()).hexdigest()


def kept(name: str) -> dict[str, Any]:
    """One case of kept.json.

    Returns:
        ``lengths``: stored in each layer after the prompt; for a press that goes on, after what follows it too.
        ``kept``: of the first and the last layer, for each row and head the bits of the positions that are held.
        ``loss``: mean loss in nats of the tokens after the next ``N_NEXT``, which are fed as they stand in the text.
    """
    case = CASES[name]
    model, tokenizer, ids = demo()
    press = case.press.prepared(model, tokenizer)
    torch.manual_seed(0)  # for a press that draws
    ids = ids[:, case.start :]
    rows, mask = ids[:, : N_PROMPT + N_NEXT + 1], torch.ones(1, N_PROMPT + N_NEXT, dtype=torch.int64)
    if case.is_padded:
        start, n_pad = N_PROMPT + N_NEXT, N_PROMPT - N_SHORT
        short = ids[:, start : start + N_SHORT + N_NEXT + 1]
        rows = torch.cat([rows, torch.nn.functional.pad(short, (n_pad, 0))])
        mask = mask.repeat(2, 1)
        mask[1, :n_pad] = 0
    cache = PressedCache(None if case.in_block else press, **case.options)
    block: Any = press(model) if case.in_block else contextlib.nullcontext()
    with block, torch.no_grad():
        prefill(model, rows[:, :N_PROMPT], cache, mask[:, :N_PROMPT] if case.is_padded else None)
        said = {} if press.evicts_while_decoding else _held(cache)
        logits = []
        step = 1 if press.evicts_while_decoding else N_NEXT
        for start in range(N_PROMPT, N_PROMPT + N_NEXT, step):
            given: dict[str, Any] = {}
            if case.is_padded:
                places = (mask.cumsum(1) - 1)[:, start : start + step]
                given = {"attention_mask": mask[:, : start + step], "position_ids": places}
            logits.append(fed(model, rows[:, start : start + step], cache, **given))
        said = said or _held(cache)
    targets = rows[:, N_PROMPT + 1 :]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits, dim=1).transpose(1, 2).double(), targets)
    return said | {"loss": float(f"{float(loss):.15g}")}


def fed(model: PreTrainedModel, ids: Tensor, cache: PressedCache, **options: Any) -> Tensor:
    """Logits of ``ids``, which go into ``cache``, whatever this transformers calls that argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits: Tensor = model(input_ids=ids, use_cache=True, **{name: cache}, **options).logits
    return logits


def _held(cache: PressedCache) -> dict[str, Any]:
    lengths = cache.stored_lengths()
    return {"lengths": lengths, "kept": [_bits(cache.positions(layer)) for layer in (0, len(lengths) - 1)]}


def _bits(positions: Tensor) -> list[list[str]]:
    """Of each row and head the number, in hex, whose bit p says whether position p is held."""
    return [[f"{sum(1 << p for p in head if p >= 0):x}" for head in row] for row in positions.tolist()]


# -- cache_format1/ ---------------------------------------------------------------------------------------------------

N_SAVED, N_ANSWER, N_TINY_VOCAB = 48, 8, 64
IN_THE_MIDDLE = 10  # tokens after the prompt where a schedule of 7 is saved

# name -> press, bits and how many tokens came after the prompt
CACHES: dict[str, tuple[BasePress, KVBits | None, int]] = {
    "dense": (SnapKVPress(0.5, window_size=8), None, 0),
    "ragged": (AdaKVPress(SnapKVPress(0.5, window_size=8)), None, 0),
    "decoding": (DecodingPress(SnapKVPress(window_size=4), 7, 20, 6), None, IN_THE_MIDDLE),
    "bits": (SnapKVPress(0.5, window_size=8), KVBits(4, group_size=8, residual_tokens=8), 0),
    "thin": (ThinKPress(0.5, 8, press=KnormPress(0.3)), None, 0),
}


def _mixed(n: int, seed: int) -> Tensor:
    """``n`` numbers in (-1, 1) that look like noise and are the same to the last bit everywhere."""
    k = torch.arange(n, dtype=torch.int64) + 1_009 * seed
    return (((k * k * 31 + 17 * k) % 2_003).double() / 1_001.5 - 1).float()


@functools.cache
def tiny() -> PreTrainedModel:
    """A GPT-NeoX whose weights follow from a formula, so that a cache's file is small and its model is at hand."""
    config = GPTNeoXConfig(
        vocab_size=N_TINY_VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256, rotary_pct=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    config._attn_implementation = "coldpress"
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for seed, weights in enumerate(model.parameters()):
            numbers = _mixed(weights.numel(), seed).view_as(weights)
            weights.copy_(1 + numbers / 4 if weights.dim() == 1 else numbers / 2)
    return model


@functools.cache
def _tiny_ids() -> Tensor:
    n = N_SAVED + IN_THE_MIDDLE + 1
    return ((_mixed(n, 99) + 1) * N_TINY_VOCAB / 2).long()[None]


@torch.no_grad()
def filled(name: str) -> PressedCache:
    """The cache that is saved under ``name``."""
    press, bits, n_more = CACHES[name]
    cache, ids = PressedCache(press, kv_bits=bits), _tiny_ids()
    prefill(tiny(), ids[:, :N_SAVED], cache)
    for token in ids[:, N_SAVED : N_SAVED + n_more].split(1, dim=1) if n_more else ():
        fed(tiny(), token, cache)
        cache.remember(token)
    return cache


@torch.no_grad()
def go_on(cache: PressedCache) -> dict[str, Any]:
    """What a cache holds, and what the tiny model says with it: logits of the next token, and an answer of 8."""
    layers = range(len(cache.stored_lengths()))
    said: dict[str, Any] = {
        "press": repr(cache.press),
        "seen": cache.seen_tokens,
        "tokens": None if cache.token_ids is None else cache.token_ids[0].tolist(),
        "kept": [_bits(cache.positions(layer)) for layer in layers],
    }
    logits = fed(tiny(), _tiny_ids()[:, -1:], cache)[0, -1]
    said["logits"] = [float(f"{x:.8g}") for x in logits.tolist()]
    answer: list[int] = []
    for _ in range(N_ANSWER):
        answer.append(int(logits.argmax()))
        logits = fed(tiny(), torch.tensor([answer[-1:]]), cache)[0, -1]
    return said | {"answer": answer, "lengths": cache.stored_lengths()}


def header(path: Path) -> dict[str, Any]:
    """What the file of a cache says, without its checksums and versions, and the types and shapes of its tensors."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- it is no mapping
        shapes = {name: [part.get_dtype(), *part.get_shape()] for name, part in sorted(tensors.items())}
    said = json.loads(metadata.pop("cache"))
    assert re.fullmatch(r"[0-9a-f]{64}", metadata.pop("sha256")) and re.fullmatch(r"[0-9a-f]{64}", said.pop("sha256"))
    assert isinstance(said.pop("coldpress"), str)
    return metadata | {"cache": said, "tensors": shapes}


# -- records/ ---------------------------------------------------------------------------------------------------------

_DEMO = ["--model", "demo", "--device", "cpu", "--dtype", "float32"]
RUNS: dict[str, list[str]] = {
    "ppl": [
        *(
            "ppl",
            *_DEMO,
            "--dataset",
            "demo",
            "--press",
            "no_press",
            "snapkv",
            "streaming_llm",
            "--compression_ratio",
            "0.5",
        ),
        *("--ppl_apply_press", "--limit_tokens", "600", "--context_tokens", "96", "--target_tokens", "32"),
        *("--greedy_tokens", "4", "--context_limit", "96", "--max_new_tokens", "4", "--repetitions", "1"),
    ],
    "stream": [
        *("ppl", *_DEMO, "--dataset", "demo", "--press", "no_press", "streaming_llm"),
        *("--ppl_mode", "streaming", "--stream_chunk", "16", "--budget_tokens", "64", "--limit_tokens", "300"),
    ],
    "tasks": [
        *("tasks", *_DEMO, "--press", "no_press", "snapkv", "--task", "niah_single", "repeat_text"),
        *("--task_tokens", "128", "--task_examples", "2"),
    ],
}


def run(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run one of :data:`RUNS`, with its results in ``folder``; the record in each file, by the file's name."""
    assert main([*RUNS[name], "--output_dir", str(folder)]) == 0
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def keys_of(value: Any, path: str = "") -> list[str]:
    """The paths of all keys, ``tasks[].task`` for instance; of a list those of its first element."""
    if isinstance(value, list):
        return keys_of(value[0], f"{path}[]") if value else []
    if not isinstance(value, dict):
        return []
    return [key for name, own in value.items() for key in (f"{path}.{name}", *keys_of(own, f"{path}.{name}"))]
