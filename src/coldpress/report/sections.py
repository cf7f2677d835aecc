"""Sections: records that may share an axis, each as an entry with a name, and who is ahead of whom."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coldpress.backends import BUDGETS, NO_PRESS
from coldpress.records.metrics import Paired, paired_difference
from coldpress.records.reading import asked, bits_of, groups, size_of, size_order
from coldpress.records.wording import short

Record = dict[str, Any]
REFERENCES = ("random", "streaming_llm")  # what any method should be ahead of; no_press is the baseline
KINDS = {  # of sections, in the order of a report
    "quality": "compressed context",
    "stream": "streams",
    "tasks": "tasks and probes",
    "speed": "speed and memory",
    "plain": "the uncompressed model",
}
BEST = 8  # presses that are drawn in colour
SAME = 1e-4  # nats a token in which two uncompressed caches may differ and yet be one
VERSIONS = ("transformers", "torch")  # under which the records of one section may have been measured


@dataclass(frozen=True)
class Entry:
    """One record with a name: ``label`` tells series apart, ``size`` is the ratio or budget that was asked for."""

    record: Record
    label: str
    size: str
    timed: Entry | None = None  # where a run of its own has timed it: the one behind the longest context

    def __getattr__(self, name: str) -> Any:  # delta_nll, ppl, ...: None where not measured
        if name.startswith("__"):
            raise AttributeError(name)
        return self.record.get(name)

    @property
    def is_ok(self) -> bool:
        return bool(self.record["status"] == "ok")

    @property
    def is_baseline(self) -> bool:
        return bool(self.record["press"] == NO_PRESS) and not bits_of(self.record)

    @property
    def is_reference(self) -> bool:
        return self.record["press"] in REFERENCES and not bits_of(self.record)

    @property
    def name(self) -> str:
        """``snapkv at 0.5``."""
        return f"{self.label} at {self.size}" if self.size and not self.is_baseline else self.label

    @property
    def asked(self) -> float | None:
        """The number of its size: the ratio, or the tokens or bytes of its budget."""
        sizes = [self.record.get(name) for name in ("compression_ratio", *BUDGETS)]
        return next((float(size) for size in sizes if size is not None), None)

    @property
    def context(self) -> Any:
        """Tokens of the timed context; None where none was."""
        return self.record.get("speed_context_tokens") or self.record.get("context_tokens")

    @property
    def kept_bytes(self) -> float | None:
        """Bytes of the cache after compression over those before."""
        before, after = self.record.get("kv_bytes_baseline"), self.record.get("kv_bytes")
        return after / before if before and after is not None else None

    @property
    def removed(self) -> float | None:
        """Fraction that is gone: of the pairs, or of the bytes where no pair went, as with fewer channels."""
        ratio = self.record.get("effective_compression_ratio")
        if ratio or bits_of(self.record) or self.kept_bytes is None:
            return ratio
        return max(0.0, 1 - self.kept_bytes)

    @property
    def at(self) -> Any:
        """Where it stands on an axis of ratios: as asked, or as achieved where that is more than 0.05 away; or None."""
        wanted = self.record.get("compression_ratio")
        if wanted is None or (self.removed is not None and abs(self.removed - wanted) > 0.05):
            return self.removed
        return float(wanted)

    @property
    def keeps_more(self) -> bool:
        """Whether less is gone than was asked for, so that others at its ratio cannot be compared with it."""
        wanted = self.record.get("compression_ratio")
        return wanted is not None and self.removed is not None and self.removed < wanted - 0.02

    @property
    def ppl_change(self) -> float | None:
        """Relative change of perplexity."""
        return None if self.record.get("delta_nll") is None else _expm1(self.record["delta_nll"])

    @property
    def ppl_change_ci(self) -> tuple[float, float] | None:
        ci = self.record.get("delta_nll_ci95")
        return None if ci is None else (_expm1(ci[0]), _expm1(ci[1]))

    @property
    def has_rounds(self) -> bool:
        """Whether its decoding was timed more than once, against that of the baseline."""
        spread = self.record.get("decode_speedup_spread")
        return spread is not None and bool(spread["min"] < spread["max"])

    @property
    def is_surely_faster(self) -> bool:
        """Whether it decoded faster than the baseline in each of several rounds."""
        return self.has_rounds and bool(self.record["decode_speedup_spread"]["min"] > 1)

    @property
    def equals_baseline(self) -> bool:
        """Whether each window has the baseline's loss to the last digit: nothing was compressed, or nothing noticed."""
        windows = self.record.get("per_window") or []
        same = bool(windows) and all(w["nll"] == w.get("nll_base") for w in windows)
        return self.is_ok and not self.is_baseline and (same or (not windows and self.record.get("delta_nll") == 0))


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf


@dataclass
class Section:
    """Points that share protocol, model and text. ``unfinished`` ones failed or were interrupted on the way."""

    kind: str  # one of KINDS
    entries: list[Entry]
    unfinished: list[Entry] = field(default_factory=list)

    @property
    def all(self) -> list[Entry]:
        return [*self.entries, *self.unfinished]

    @property
    def first(self) -> Record:
        return self.all[0].record

    @property
    def baseline(self) -> Entry | None:
        return next((p for p in self.entries if p.is_baseline), None)

    @property
    def sizes(self) -> list[str]:
        """The sizes that presses were asked for, small ratios first."""
        pressed = [p for p in self.all if not p.is_baseline]
        return list(dict.fromkeys(p.size for p in sorted(pressed, key=lambda p: size_order(p.record))))

    @property
    def contexts(self) -> list[int]:
        """Tokens of the timed contexts, the shortest first."""
        return sorted({p.context for p in self.entries if p.context})

    def at(self, size: str) -> list[Entry]:
        return [p for p in self.entries if p.size == size and not p.is_baseline]

    @property
    def labels(self) -> list[str]:
        """Series in the order of their names, without the baseline and the references."""
        return sorted({p.label for p in self.all if not p.is_baseline and not p.is_reference})

    def best(self) -> list[str]:
        """The series to draw in colour: those of the best mean rank; by name."""
        ranks: dict[str, list[float]] = defaultdict(list)
        for size in self.sizes:
            ranked = sorted((p for p in self.at(size) if _cost(p) is not None), key=lambda p: (_cost(p), p.label))
            for rank, entry in enumerate(ranked):
                ranks[entry.label].append((rank + 1) / len(ranked))
        mean = {name: sum(ranks[name]) / len(ranks[name]) if ranks[name] else math.inf for name in self.labels}
        return sorted(sorted(mean, key=lambda name: (mean[name], name))[:BEST])

    def by_version(self) -> dict[tuple[str, ...], list[str]]:
        """The series that were measured under each combination of :data:`VERSIONS`, as ``transformers 5.24.0``."""
        found: dict[tuple[str, ...], list[str]] = {}
        for entry in self.all:
            env = entry.record["env"]
            found.setdefault(tuple(f"{name} {env[name]}" for name in VERSIONS), []).append(entry.label)
        return {versions: list(dict.fromkeys(labels)) for versions, labels in found.items()}


def _cost(entry: Entry) -> float | None:
    """What a small one of is good."""
    if entry.record.get("tasks"):
        losses = [t["answer_nll"] if t.get("score") is None else -t["score"] for t in entry.record["tasks"]]
        known = [x for x in losses if x is not None]
        return sum(known) / len(known) if known else None
    for name in ("delta_nll", "loss", "tpot_ms"):
        if entry.record.get(name) is not None:
            return float(entry.record[name])
    return None


def sections(records: Iterable[Record]) -> list[Section]:
    """The sections of a report. Only timed runs that differ in nothing but their context share one."""
    together: dict[tuple[Any, ...], list[Record]] = {}
    rest = []
    for record in records:
        if record["protocol"].startswith("speed"):
            settings = {**(record.get("settings") or {}), "context_limit": None}
            together.setdefault(asked({**record, "settings": settings}), []).append(record)
        else:
            rest.append(record)
    found: list[Section] = []
    by_key: dict[tuple[Any, ...], list[Section]] = {}
    for group in groups(rest):
        done, undone = _parted(_named(group))
        section = Section(_kind(group), done, undone)
        by_key.setdefault(asked(group[0]), []).append(section)
    for own in by_key.values():  # the interrupted beside the finished, though they have fewer windows
        whole = [section for section in own if section.entries] or own
        whole[0].unfinished += [p for section in own if section not in whole for p in section.unfinished]
        found += whole
    found = _joined(found)
    timed = [_parted(_named(sorted(group, key=_timed_order))) for group in together.values()]
    _tell_speed(found, [entry for done, _ in timed for entry in done])
    found += [Section("speed", done, undone) for done, undone in timed]
    order = [*KINDS]
    return sorted(found, key=lambda s: (text_name(s.first), s.first["model"], order.index(s.kind), s.first["protocol"]))


def _joined(found: Sequence[Section]) -> list[Section]:
    """Sections that differ in :data:`VERSIONS` alone as one, where the uncompressed cache is the same under them.

    Not where a press of one size is in both, which compares the versions, nor where the later one was timed.
    """
    whole: dict[tuple[Any, ...], list[Section]] = {}
    for section in sorted(found, key=lambda section: -len(section.entries)):
        env = {**section.first["env"], **dict.fromkeys(VERSIONS)}
        own = whole.setdefault(asked({**section.first, "env": env}), [])
        into = next((other for other in own if _is_same_run(other, section)), None)
        if into is None:
            own.append(section)
            continue
        into.entries = [*into.entries, *(p for p in section.entries if not p.is_baseline)]
        into.unfinished += section.unfinished
    kept = {id(section) for own in whole.values() for section in own}
    return [section for section in found if id(section) in kept]


def _is_same_run(a: Section, b: Section) -> bool:
    points = [{(p.label, p.size) for p in section.all if not p.is_baseline} for section in (a, b)]
    ours, others = _uncompressed(a), _uncompressed(b)
    return (
        not points[0] & points[1]
        and all(p.tpot_ms is None for p in b.entries)
        and bool(ours)
        and ours.keys() == others.keys()
        and all(abs(x - y) <= SAME for key in ours for x, y in zip(ours[key], others[key], strict=True))
    )


def _uncompressed(section: Section) -> dict[Any, tuple[float, ...]]:
    """What the uncompressed cache gave, as presses were compared with it: of each window, and of each task."""
    record: Record = next((p.record for p in section.entries if not p.is_baseline), {})
    windows = {w["id"]: (w["n"], w["nll_base"] / w["n"]) for w in record.get("per_window") or [] if w.get("nll_base")}
    names = ("score_base", "answer_nll_base")
    tasks = {
        (task["task"], task.get("length"), task.get("n"), *(task.get(name) is None for name in names)): tuple(
            task[name] for name in names if task.get(name) is not None
        )
        for task in record.get("tasks") or []
    }
    return {**windows, **tasks}


def _tell_speed(found: Iterable[Section], timed: Iterable[Entry]) -> None:
    """Give entries whose loss was measured in one run what another run of the same has timed, as in a sweep."""

    def same(record: Record) -> str:
        names = ("model", "weights_fingerprint", "num_params", "dtype", "device", "attn_implementation", "press")
        size = ("press_config", "kv_bits_config", "compression_ratio", *BUDGETS)
        return json.dumps([record.get(name) for name in (*names, *size)], sort_keys=True, default=str)

    longest: dict[str, Entry] = {}
    for entry in timed:
        key = same(entry.record)
        if entry.tpot_ms is not None and (entry.context or 0) >= (longest.get(key, entry).context or 0):
            longest[key] = entry
    for section in found:
        if section.kind == "quality":
            section.entries = [
                p if p.tpot_ms is not None else replace(p, timed=longest.get(same(p.record))) for p in section.entries
            ]


def _parted(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    return [p for p in entries if p.is_ok], [p for p in entries if not p.is_ok]


def _timed_order(record: Record) -> tuple[Any, ...]:
    return record.get("context_tokens") or 0, record["press"] != NO_PRESS, record["press"], size_of(record)


def _kind(group: Sequence[Record]) -> str:
    if any(r.get("tasks") for r in group) or group[0]["protocol"].startswith("tasks"):
        return "tasks"
    if any(r.get("nll_by_position") for r in group) or group[0].get("ppl_mode") == "streaming":
        return "stream"
    compares = group[0]["protocol"].startswith("prefix") or any(r.get("delta_nll") is not None for r in group)
    return "quality" if compares else "plain"


def _named(group: Sequence[Record]) -> list[Entry]:
    """Points whose label and size are found once in each context."""
    modes = {r.get("position_mode") for r in group if r["press"] != NO_PRESS and r.get("ppl_mode") == "streaming"}
    base = []
    for record in group:
        label = f"{record['press']}{f' {bits_of(record)}-bit' if bits_of(record) else ''}"
        shows_mode = len(modes) > 1 and record["press"] != NO_PRESS
        base.append(f"{label} ({record.get('position_mode')})" if shows_mode else label)
    same_size: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, record in enumerate(group):
        same_size[base[i], size_of(record), record.get("context_tokens")].append(i)
    doubled = {base[same[0]] for same in same_size.values() if len(same) > 1}
    for name in doubled:
        own = [i for i, label in enumerate(base) if label == name]
        configs = [_parameters(group[i]) for i in own]
        differing = sorted({k for c in configs for k in c if len({d.get(k) for d in configs}) > 1})
        for i, config in zip(own, configs, strict=True):
            said = ", ".join(f"{k}={config[k]}" for k in differing if k in config)
            base[i] = f"{name} ({said[:60]})" if said else name
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    entries = []
    for i in sorted(range(len(group)), key=lambda i: (group[i].get("timestamp") or "", i)):
        record = group[i]
        key = base[i], size_of(record), record.get("context_tokens")
        seen[key] += 1
        entries.append((i, Entry(record, f"{base[i]} (run {seen[key]})" if seen[key] > 1 else base[i], key[1])))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]


def _parameters(record: Record) -> dict[str, str]:
    """The parameters of a press but its size, as texts."""
    config = record.get("press_config") or {}
    sizes = ("compression_ratio", *BUDGETS)
    return {str(k): json.dumps(v, sort_keys=True, default=str) for k, v in config.items() if k not in sizes}


def _clusters(record: Record) -> dict[Any, tuple[int, float]]:
    parts = record.get("per_window") or record.get("per_document") or []
    return {part["id"]: (part["n"], part["nll"]) for part in parts}


def paired(a: Entry, b: Entry) -> Paired | None:
    """Loss of ``a`` minus that of ``b`` in nats a token, window by window; None where not the same were scored."""
    own, other = _clusters(a.record), _clusters(b.record)
    if not own or own.keys() != other.keys() or any(own[i][0] != other[i][0] for i in own):
        return None
    ids = list(own)
    return paired_difference([own[i][0] for i in ids], [own[i][1] for i in ids], [other[i][1] for i in ids])


def text_name(record: Record) -> str:
    """A text as it is usually written."""
    name, subset = short(record["dataset"]), record.get("subset") or ""
    for known, written in (("wikitext-103", "WikiText-103"), ("wikitext-2", "WikiText-2")):
        if subset.startswith(known) or (not subset and name == known):
            return written
    written = {"wikitext": "WikiText", "pg19": "PG-19"}.get(name, name)
    return f"{written}/{subset}" if subset else written
