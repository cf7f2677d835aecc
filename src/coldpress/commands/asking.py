"""``coldpress compress`` and ``coldpress ask``: compress a text once, and ask it questions whenever you like."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import make_press, takes_ratio
from coldpress.cache.file import model_options, save_cache
from coldpress.cache.pressed import PressedCache
from coldpress.commands.reading import reading_shown
from coldpress.errors import CacheError, InputError, ModelError, UnreachableError
from coldpress.io.files import path_of
from coldpress.io.output import check_output
from coldpress.io.progress import note, warnings_noted
from coldpress.io.terminal import printable
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import BY_NAME, DTYPES, LoadedModel, load_model
from coldpress.loading.presses import check_no_size, check_of_a_context, check_types, default_press
from coldpress.loading.tokens import note_unreadable
from coldpress.models.pipeline import KVPressTextGenerationPipeline

__all__ = ["ask", "compress"]

_ROOM_TOKENS = 128  # that compress leaves free in the model's positions for a question and its answer


def compress(
    text_file: str,
    output: str,
    press: str | None,
    press_args: dict[str, Any],
    model_options: dict[str, Any],
    compression_ratio: float | None = None,
    chunk_tokens: int | None = None,
    kv_bits: int | str | None = None,
    pin_system: str | None = None,
    **budget: int | None,
) -> None:
    """Read a text, compress it, save the cache to ``output``, and say how large it is.

    Args:
        text_file: UTF-8.
        press: a registered name; None for :func:`default_press`.
        press_args: its parameters.
        model_options: of :func:`load_model`.
        compression_ratio: 0.5 if neither it nor a budget is given, and the press has a ratio.
        chunk_tokens: of the pieces that the text is read in; None for a text in one piece.
        kv_bits: 8, 4, 2, or a name such as ``"k8v4"``: what is kept is stored in so few bits.
        pin_system: a system prompt, put before the text and pinned.
        budget: ``budget_tokens`` or ``budget_bytes``, instead of a ratio.

    Raises:
        InputError: something that was asked for cannot work; before any long work.
    """
    budget = {name: size for name, size in budget.items() if size is not None}
    if compression_ratio is not None and budget:
        raise InputError(f"--compression_ratio and --{next(iter(budget))} both say how much is kept; give one of them.")
    press = press or default_press(chunk_tokens)
    check_no_size(press_args)
    load_press_files([press])
    if compression_ratio is None:
        compression_ratio = 0.5 if takes_ratio(press) and not budget else 0.0
    check_types(press, press_args)
    chosen = make_press(press, compression_ratio, **budget, **press_args)
    check_of_a_context(press, chosen, {"compression_ratio": compression_ratio, **budget})
    cache = PressedCache(chosen, chunk_tokens=chunk_tokens, kv_bits=kv_bits)
    path = check_output(output, "context.safetensors")
    (document,) = load_corpus("demo", text_file=text_file).documents
    loaded = load_model(**model_options)
    note_unreadable(loaded.tokenizer, [document.text], loaded.name)
    tokens = partial(getattr, cache.session, "prefill_end")
    with warnings_noted(), reading_shown(loaded.model, tokens, press):
        _pipeline(loaded)(document.text, questions=[], cache=cache, max_new_tokens=_ROOM_TOKENS, pin_system=pin_system)
    save_cache(cache, path, loaded.model, None, _lasting(loaded.name))
    sizes = f"{_read(cache)}, {cache.achieved_ratio():.1%} removed, {path.stat().st_size:,} bytes"
    print(printable(f"{path}: {sizes}, of {loaded.name}"))


def ask(
    file: str, questions: list[str], model_options: dict[str, Any], any_model: bool = False, **options: Any
) -> None:
    """Print the answer to each question about the context that is saved in ``file``.

    Args:
        model_options: of :func:`load_model`. The model that the file names is taken where they name none, and its dtype
            where they say none.
        any_model: take a model with other weights than the one that made the file.
        options: of the pipeline.

    Raises:
        InputError: there is no such file, its model is not here, or another one was given.
    """
    loaded = _model_of(file, model_options)
    cache = PressedCache.load(file, loaded.model, check_model=not any_model)
    if cache.session.cut_tokens:
        note(f"{file} holds the {_read(cache)} of its text: the rest was cut off, and no answer can know of it.")
    shown = _Answers(loaded.tokenizer, questions)
    has_beams = (loaded.model.generation_config.num_beams or 1) > 1  # of which none is the answer before the end
    streamer = None if has_beams else shown
    answers = _pipeline(loaded)(questions=questions, cache=cache, streamer=streamer, **options)["answers"]
    for answer in answers if has_beams else ():
        shown.begin()
        shown.say(answer)
        shown.end()


class _Answers(BaseStreamer):
    """Prints answers while they are made; each after its question, where there are several."""

    def __init__(self, tokenizer: Any, questions: list[str]):
        self.tokenizer, self.questions = tokenizer, questions
        self.n_begun, self.is_open = 0, False
        self.ids: list[int] = []
        self.text = self.said = ""  # of this answer: all of it, and what is printed

    def begin(self) -> None:
        if len(self.questions) > 1:
            print(self.questions[self.n_begun])
        self.n_begun, self.is_open = self.n_begun + 1, True
        self.ids, self.text, self.said = [], "", ""

    def put(self, value: Tensor) -> None:
        """The prompt of a question, or the next token of its answer."""
        if not self.is_open:
            self.begin()
            return
        self.ids += value.flatten().tolist()
        self.say(self.tokenizer.decode(self.ids, skip_special_tokens=True), is_last=False)

    def say(self, text: str, is_last: bool = True) -> None:
        """Print what is new in an answer so far, but for the first bytes of a character, and blanks at its ends."""
        self.text = text
        certain = printable((text if is_last else text.rstrip("\ufffd")).strip(), keep="\n\t")
        print(certain[len(self.said) :], end="", flush=True)
        self.said = max(self.said, certain, key=len)

    def end(self) -> None:
        self.say(self.text)
        print("\n" if len(self.questions) > 1 else "")
        self.is_open = False


def _read(cache: PressedCache) -> str:
    """How many tokens a cache has read, and of how many."""
    seen, n_cut = cache.seen_tokens, cache.session.cut_tokens
    return f"first {seen:,} of {seen + n_cut:,} tokens" if n_cut else f"{seen:,} tokens"


def _lasting(name: str) -> str:
    """What :func:`load_model` is given for this model from another folder."""
    place = path_of(name)
    return str(place.resolve()) if name not in BY_NAME and place.exists() else name


def _model_of(file: str, given: dict[str, Any]) -> LoadedModel:
    """The model that ``file`` needs, or the one that was given."""
    saved = model_options(file)
    if saved.get("dtype") not in DTYPES:
        saved.pop("dtype", None)
    if "name" in given:
        return load_model(**{"dtype": saved.get("dtype", "auto")} | given)
    if "name" not in saved:
        raise CacheError(f"{file} does not name the model that made it; say which one with --model.")
    try:
        return load_model(**{**saved, **given})
    except (ModelError, UnreachableError) as error:
        raise ModelError(
            f"{file} needs the model that made it, {saved['name']!r}, which cannot be had under this name; say where "
            f"it is with --model. ({error})"
        ) from error


def _pipeline(loaded: LoadedModel) -> KVPressTextGenerationPipeline:
    return KVPressTextGenerationPipeline(model=loaded.model, tokenizer=loaded.tokenizer, device=loaded.device)
