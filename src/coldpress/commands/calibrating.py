"""``coldpress calibrate``: measure what a press needs of a model on samples of a text, and save it."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import catalogue, make_press, press_names
from coldpress.core.press import parts
from coldpress.errors import DataError, PressError
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.settings import CalibrationSettings
from coldpress.io.artefacts import Artefact, Shape, artefact_path
from coldpress.io.output import check_output, check_writable
from coldpress.io.progress import note, progress, warnings_noted
from coldpress.learned.calibrated import Calibrated
from coldpress.learned.calibration import calibrate
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model, pick_device
from coldpress.loading.presses import check_types
from coldpress.loading.tokens import note_unreadable, tokenize
from coldpress.version import VERSION


def make_artefact(settings: CalibrationSettings) -> Path:
    """Calibrate, save, and say where; :class:`InputError`, before any long work, where that cannot work."""
    s = settings
    press = _press(s)
    pick_device(s.device)
    given = None if s.output is None else check_output(s.output, "filters.safetensors")
    corpus = load_corpus(**s.reading | {"split": s.split or "train"}, default_split="train")
    loaded = load_model(s.model, **s.loading)
    shape = Shape.of_config(loaded.model.config)
    path = artefact_path(press.artefact, shape.name, press.variant()) if given is None else given
    check_writable(path.parent)
    note_unreadable(loaded.tokenizer, (document.text for document in corpus.documents), loaded.name)
    documents = [tokens.ids for tokens in tokenize(corpus, loaded.tokenizer, s.limit_tokens)]
    loaded.check_ids(documents)
    longest, length = loaded.max_positions or UNKNOWN_POSITIONS, s.sample_tokens
    if length > longest:
        note(f"--sample_tokens {length} is past the {longest} positions of {s.model}; cut to {longest}.")
        length = longest
    samples = pick_samples(documents, s.n_samples, length)
    if len(samples) < s.n_samples:
        note(f"the text has {len(samples)} sample(s) of up to {length} tokens, not --n_samples {s.n_samples}.")
    with warnings_noted():
        tensors = calibrate(press, loaded.model, samples, partial(progress, name="calibration"))
    facts = loaded.facts() | {
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "parameters": repr(press),
        "variant": press.variant(),
        "dataset": corpus.name,
        "dataset_source": corpus.source,
        "subset": corpus.subset,
        "split": corpus.split,
        "text_sha256": corpus.text_sha256,
        "tokens_sha256": hashlib.sha256(torch.cat(samples).numpy().astype("<i8").tobytes()).hexdigest(),
        "n_samples": len(samples),
        "n_tokens": sum(len(ids) for ids in samples),
        "coldpress_version": VERSION,
    }
    Artefact(press.artefact, tensors, facts).save(path)
    print(f"{press.artefact} of {s.model}, {len(samples)} sample(s), {facts['n_tokens']:,} tokens: {path}")
    return path


def pick_samples(documents: list[Tensor], n_samples: int, length: int) -> list[Tensor]:
    """Up to ``n_samples`` pieces of ``length`` tokens, evenly spread over the text, none across two documents.

    Shorter documents serve only where no document is long enough; DataError where none has 2 tokens.
    """
    pieces = [piece for ids in documents for piece in ids.split(length) if len(piece) == length]
    pieces = pieces or [ids for ids in documents if len(ids) >= 2]
    if length < 2 or not pieces:
        raise DataError("A sample has fewer than 2 tokens; give a longer text or a larger --sample_tokens.")
    n = min(n_samples, len(pieces))
    return [pieces[i * len(pieces) // n] for i in range(n)]


def _press(s: CalibrationSettings) -> Calibrated:
    """The press that is calibrated; :class:`PressError` if it needs no calibration, or something else."""
    parameters = dict(s.press_args)
    load_press_files([s.press])
    check_types(s.press, parameters)
    press = make_press(s.press, 0.0, **parameters)
    found = None if press is None else next((part for part in parts(press) if isinstance(part, Calibrated)), None)
    if found is not None:
        return found
    if s.press in press_names(kind="trained"):
        needs = next(info.needs for info in catalogue() if info.name == s.press)
        raise PressError(f"{s.press} needs trained weights, which are loaded and cannot be calibrated: {needs}.")
    calibrated = ", ".join(press_names(kind="calibrated", at_prefill=True))
    raise PressError(f"{s.press} needs no calibration. These do: {calibrated}.")
