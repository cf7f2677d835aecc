"""What a sweep consists of: models x texts x kinds of measurement, from one mapping (a YAML file, or options)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.errors import DataError, InputError, nearest
from coldpress.eval.jobs import Job, make_jobs
from coldpress.eval.options import KINDS, PPL_PRESETS, SIZES, OfModel, OfText, check_value, names_of
from coldpress.eval.settings import Settings, TaskSettings
from coldpress.io.files import read_text

_LISTS = ("press", *SIZES, "kv_bits", "task", "task_tokens", "depths")  # what a file may say of one value alone
_OWN: dict[str, dict[str, Any]] = {  # what a section sets by itself
    "perplexity": {"ppl_apply_press": True, "ppl_only": True},
    "tasks": {},
    "speed": {"speed_only": True},
    "streaming": {"ppl_mode": "streaming"},
    "baselines": {"ppl_only": True},
}
_OPTIONS = {kind: {f.name: f for f in fields(TaskSettings if kind == "tasks" else Settings)} for kind in KINDS}
_EVERY = _OPTIONS["perplexity"] | {name: f for name, f in _OPTIONS["tasks"].items() if name not in _OPTIONS["speed"]}
_COMMON = sorted(f.name for f in fields(Settings) if f.metadata["in_sweep"])  # what may stand above all sections
_TEXT = (*names_of(OfText), "limit_tokens", "max_documents", "max_windows")
_TOP = ("models", "texts", *KINDS, "output_dir")


@dataclass(frozen=True)
class Evaluation:
    """One model, one text, one kind of measurement: what shares a prefill and a protocol."""

    kind: str  # one of KINDS
    settings: Settings | TaskSettings
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """For the progress bar."""
        s = self.settings
        if isinstance(s, TaskSettings):
            return f"{Path(s.model).name}, tasks"
        text = s.text_file or s.subset or s.dataset
        more = {"speed": f" at {s.context_limit}", "baselines": f" {s.ppl_preset}"}.get(self.kind, "")
        return f"{Path(s.model).name}, {Path(text).name}, {self.kind}{more}"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: its evaluations model by model, and where the results belong."""

    evaluations: tuple[Evaluation, ...]
    output_dir: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SweepPlan:
        """A plan from a configuration.

        Args:
            config: ``models`` and ``texts`` (lists of names, or of mappings of options), the presses and their sizes,
                sections named as KINDS (a mapping of options each, a list of them, or false), ``output_dir``, and any
                other option of ``coldpress ppl``, for all of them. What a section says takes the place of what stands
                above it or beside a text, and what stands beside a model that of all else, sections too. Without a
                section, perplexity and speed are measured.

        Raises:
            InputError: a name or value that means nothing, with what is allowed; options that contradict each other.
        """
        common = {name: value for name, value in config.items() if name not in _TOP}
        for name in common:
            if name not in _COMMON:
                allowed = [*_TOP, *_COMMON]
                raise InputError(f"A sweep has no {name!r}.{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")
        of_models = (*names_of(OfModel), *KINDS, *_COMMON)
        models = [_mapping(item, "model", of_models) for item in _listed(config.get("models", Settings.model))]
        texts = [_text(item) for item in _listed(config.get("texts", ["wikitext"]))]
        for name, found in (("models", models), ("texts", texts)):
            if not found:
                raise InputError(f"The sweep's list of {name} is empty; name at least one.")
        sections = [(kind, config[kind]) for kind in KINDS if kind in config]
        if not sections:
            sections = [("perplexity", {}), ("speed", {})]
        evaluations = []
        for model in models:
            own = {kind: model.pop(kind) for kind in KINDS if kind in model}
            for kind, section in (dict(sections) | own).items():
                # times and questions are the same beside any text
                beside = [{}] if kind == "tasks" else texts[:1] if kind == "speed" else texts  # tasks name their own
                for text in beside:
                    for options in _variants(kind, section):
                        evaluations += list(_evaluations(kind, {**common, **text, **options, **model}))
        if not evaluations:
            raise InputError(f"Nothing is measured: every one of {', '.join(KINDS)} is left out or false.")
        output_dir = config.get("output_dir", "results/sweep")
        if not isinstance(output_dir, str):
            raise InputError(f"output_dir must be a folder's name, got {output_dir!r}.")
        return cls(tuple(evaluations), output_dir)


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; :class:`DataError` where there is none."""
    import yaml

    twice: list[Any] = []  # names that their mapping has already, of which YAML takes the last

    seen: dict[int, Any] = {}

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:  # before it takes in what it merges
            keys = [] if id(node) in seen else [key for key, _ in node.value if isinstance(key.value, str)]
            seen[id(node)] = node
            twice.extend(key for i, key in enumerate(keys) if any(key.value == own.value for own in keys[:i]))
            super().flatten_mapping(node)

    try:
        config = yaml.load(read_text(path), Loader=Loader)
    except RecursionError as error:
        raise DataError(f"{path!r} is nested too deeply for a sweep's file") from error
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, a name with a NUL, no such date
        raise DataError(f"cannot read {path!r} ({error}): give a YAML file") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path!r} is not YAML: {' '.join(str(error).split())}") from error
    if twice:
        key, line = twice[0].value, twice[0].start_mark.line + 1
        raise DataError(f"{path!r} says {key} twice, at line {line} again: leave one out")
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise DataError(
            f"{path!r} holds no mapping of options; docs/guide/sweep.md shows what a sweep's file looks like"
        )
    return config


def with_options(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in which the options of the command line take the place of what it says.

    Options are those that were given, by their names; ``model``, ``dataset``, ``text_file``, ``context_limit`` and
    ``ppl_preset`` are lists.
    """
    merged, left = dict(config), dict(options)
    of_models = {name: left.pop(name) for name in ("revision",) if name in left}
    of_rows = {name: left.pop(name) for name in ("split", "sample_idx") if name in left}
    models, datasets, files = (left.pop(name, None) for name in ("model", "dataset", "text_file"))
    if models is not None or of_models:
        named = [
            _mapping(item, "model", names_of(Settings))
            for item in _listed(models or merged.get("models", Settings.model))
        ]
        merged["models"] = [{**model, **of_models} for model in named]
    if datasets is not None or files is not None or of_rows:
        named = [_text(item) for item in _listed(datasets or ([] if files else merged.get("texts", "wikitext")))]
        if of_rows and not named:
            raise InputError(f"--{next(iter(of_rows))} is for datasets, and only text files are named; leave it out.")
        merged["texts"] = [{**text, **of_rows} for text in named] + [{"text_file": name} for name in files or []]
    if "press_args" in left:
        names = [name for name in left.get("press", ()) if name != NO_PRESS]
        if len(names) != 1:
            raise InputError("--press_args belongs to one press; name a single one with --press, or use --config.")
        left["press"] = [{names[0]: left.pop("press_args")}]
    if not any(kind in merged for kind in KINDS):
        merged |= {"perplexity": True, "speed": True}
    for kind in ("perplexity", "speed"):
        if left.pop(f"no_{kind}", False):
            merged[kind] = False
    if "ppl_preset" in left:
        merged["baselines"] = left.pop("ppl_preset")
    deep = {name: _without(value, left) for name, value in merged.items() if name in ("models", "texts", *KINDS)}
    return merged | deep | left


def _without(value: Any, names: Iterable[str]) -> Any:
    """What a configuration says somewhere, without some of its options."""
    if isinstance(value, list):
        return [_without(one, names) for one in value]
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _mapping(item: Any, main: str, allowed: Sequence[str]) -> dict[str, Any]:
    """A name alone, or a mapping of options with it."""
    if isinstance(item, str):
        return {main: item}
    if not isinstance(item, dict):
        raise InputError(f"A {main} is a name or a mapping of options, got {item!r}.")
    for name in item:
        if name not in allowed:
            raise InputError(f"A {main} has no option {name!r}.{nearest(str(name), allowed)}")
    if main == "model" and "model" not in item:
        raise InputError(f"A model's mapping needs its name: model; got {item!r}.")
    return dict(item)


def _text(item: Any) -> dict[str, Any]:
    """``wikitext:wikitext-103-v1`` is a dataset and its subset; so is a folder with one of its own."""
    text = _mapping(item, "dataset", _TEXT)
    if text.get("dataset") is not None and text.get("text_file") is not None:
        raise InputError(f"A text is a dataset or a text_file, not both; got {item!r}.")
    name = text.get("dataset")
    if isinstance(name, str) and ":" in name and "subset" not in text and not Path(name).exists():
        text["dataset"], _, text["subset"] = name.rpartition(":")
    return text


def _variants(kind: str, section: Any) -> list[dict[str, Any]]:
    """The sets of options that a section stands for."""
    if section is False or section is None:
        return []
    if kind == "baselines" and not isinstance(section, dict) and section is not True:
        presets = _listed(section)
        if presets and all(isinstance(preset, str) for preset in presets):
            return [{"ppl_preset": presets}]
    variants = [{}] if section is True else _listed(section)
    for options in variants:
        if not isinstance(options, dict):
            raise InputError(f"{kind} is a mapping of options, a list of them, true or false; got {options!r}.")
        own_text = names_of(OfText) if kind == "tasks" else ()
        allowed = [name for name, f in _OPTIONS[kind].items() if f.metadata["in_sweep"] or name in own_text]
        for name in options:
            if name not in allowed:
                raise InputError(f"{kind} has no option {name!r}.{nearest(str(name), allowed)}")
    return variants


def _evaluations(kind: str, options: dict[str, Any]) -> Iterator[Evaluation]:
    """The evaluations of one model, text and set of options: one for each timed context and each preset."""
    for name in (*_LISTS, "context_limit", "ppl_preset"):
        if name in options:
            options[name] = _listed(options[name])
    options |= _OWN[kind]
    contexts = options.get("context_limit", [Settings.context_limit])
    presets = options.get("ppl_preset", list(PPL_PRESETS))
    useless = {name for name, f in _EVERY.items() if kind in f.metadata["useless"]}
    options = {k: v for k, v in options.items() if k not in useless and k not in ("context_limit", "ppl_preset")}
    if kind == "speed":
        for context in contexts:
            yield _evaluation(kind, {**options, "context_limit": context})
    elif kind == "baselines":
        for preset in presets:
            yield _evaluation(kind, {**options, "ppl_preset": preset})
    elif kind == "streaming":
        evaluation = _evaluation(kind, options)
        yield from (
            replace(evaluation, jobs=(job,)) for job in evaluation.jobs
        )  # each a point that is finished by itself
    else:
        yield _evaluation(kind, options)


def _evaluation(kind: str, options: dict[str, Any]) -> Evaluation:
    """With a job for each press and size; a press may be a mapping of its name to its own parameters."""
    for name, value in options.items():
        check_value(kind, _OPTIONS[kind].get(name) or _EVERY[name], value)
    entries = options.pop("press", [NO_PRESS] if kind == "baselines" else ["all"])
    plain = [entry for entry in entries if isinstance(entry, str)]
    with_parameters = [entry for entry in entries if not isinstance(entry, str)]
    options |= {name: tuple(options[name]) for name in _LISTS if name in options}
    names = tuple(dict.fromkeys([NO_PRESS, *plain]))
    try:
        own = {name: value for name, value in options.items() if name in _OPTIONS[kind]}
        settings = TaskSettings(**own, press=names) if kind == "tasks" else Settings(**own, press=names)
        of_jobs = settings.of_jobs() if isinstance(settings, TaskSettings) else settings
        jobs = make_jobs(of_jobs)
        for entry in with_parameters:
            values = entry.values() if isinstance(entry, dict) else [None]
            if not all(isinstance(value, dict) and all(isinstance(name, str) for name in value) for value in values):
                raise InputError(f"A press is a name, or a name with its parameters as a mapping; got {entry!r}.")
            for name, parameters in entry.items():
                jobs += make_jobs(replace(of_jobs, press=(str(name),), press_args=tuple(parameters.items())))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{kind}: {error}") from error
    return Evaluation(kind, settings, tuple(jobs))
