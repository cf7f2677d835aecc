"""``coldpress chat``: a conversation in the terminal, whose earlier turns are compressed as they age."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from coldpress.bases.press_files import load_press_files
from coldpress.cache.pressed import PressedCache
from coldpress.commands.serving import press_of, refuse_mixed
from coldpress.core.definition import in_short
from coldpress.errors import InputError, nearest
from coldpress.io.files import MAX_TEXT_BYTES, is_utf8, path_of, read_text
from coldpress.io.terminal import printable
from coldpress.loading.models import load_model
from coldpress.loading.presses import default_press
from coldpress.serving.conversation import Conversation

__all__ = ["Chat", "chat_given"]

_HELP = """\
/file NAME         read a text in UTF-8, compress it, and ask about it
/press NAME RATIO  compress by another press, such as: /press snapkv 0.5; /press no_press keeps all
/save NAME         write the conversation to NAME.json and NAME.safetensors
/load NAME         go on with one that was written
/clear             begin anew
/help              this list
/quit              end, as Ctrl-D does; Ctrl-C ends an answer"""


def chat_given(args: argparse.Namespace, model_options: dict[str, Any]) -> int:
    """Talk as the command line says; the exit code.

    Raises:
        InputError: an option cannot work.
    """
    if not 0 <= args.temperature <= 2 or not 0 <= args.top_p <= 1:
        raise InputError("--temperature must be in [0, 2] and --top_p in [0, 1].")
    if not args.temperature and (args.top_p < 1 or args.seed):
        option = "top_p" if args.top_p < 1 else "seed"
        raise InputError(f"--{option} is for tokens that are drawn; add a --temperature above 0, or leave it out.")
    given = {"press": args.press or default_press(args.chunk_tokens), "press_args": args.press_args}
    sizes = {name: size for name in ("compression_ratio", "budget_tokens") if (size := getattr(args, name)) is not None}
    load_press_files([given["press"]])
    press = press_of({**given, **sizes}, {})
    refuse_mixed(args.kv_bits)
    PressedCache(press, chunk_tokens=args.chunk_tokens, kv_bits=args.kv_bits)  # refuses what does not go together
    loaded = load_model(**model_options)

    def begin() -> Conversation:
        return Conversation(
            loaded.model,
            loaded.tokenizer,
            press,
            args.system,
            args.recent_tokens,
            kv_bits=args.kv_bits,
            chunk_tokens=args.chunk_tokens,
        )

    drawing = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    generator = torch.Generator().manual_seed(args.seed)
    chat = Chat(begin, {**drawing, "generator": generator})
    print(f"{loaded.name}, {'no press' if press is None else in_short(press)}; /help lists what else can be said")
    for line in _lines():
        if not chat.take(line):
            break
    return 0


class Chat:
    """A conversation and the commands that are said in it.

    Args:
        begin: makes an empty conversation.
        drawing: options of :meth:`Conversation.ask`.
    """

    def __init__(self, begin: Any, drawing: dict[str, Any]):
        self.begin, self.drawing = begin, drawing
        self.conversation: Conversation = begin()

    def take(self, line: str) -> bool:
        """Answer a question or do what a command says; whether to go on."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                self._do(name, rest.strip())
            elif not is_utf8(line):
                raise InputError("This line is not UTF-8, so nothing was asked; write it in UTF-8.")
            elif line:
                self._answer(line)
        except (InputError, MemoryError) as error:
            print(printable(f"error: {error}"))
        return True

    def _do(self, name: str, rest: str) -> None:
        commands = {
            "file": self._file,
            "press": self._press,
            "save": self._save,
            "load": self._load,
            "clear": self._clear,
            "help": self._help,
        }
        if name not in commands:
            raise InputError(f"There is no command /{name[:40]}.{nearest(name[:40], commands)} /help lists them.")
        if name in ("file", "press", "save", "load") and not rest:
            raise InputError(f"/{name} needs a name after it; /help says which.")
        commands[name](rest)

    def _answer(self, question: str) -> None:
        pieces = self.conversation.ask(question, **self.drawing)
        with contextlib.closing(pieces):  # type: ignore[type-var]
            try:
                for piece in pieces:
                    print(printable(piece, keep="\n\t"), end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")
        print()
        self._say_sizes()

    def _say_sizes(self) -> None:
        now = self.conversation
        speed = "" if now.tokens_per_s is None else f", {now.tokens_per_s:.1f} tokens/s"
        print(
            f"[{now.seen_tokens:,} tokens seen, {now.held_pairs:,.0f} held, {now.kv_bytes:,} bytes{speed}]", flush=True
        )

    def _file(self, name: str) -> None:
        try:
            text = read_text(path_of(name), MAX_TEXT_BYTES)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
        self.conversation.show(text)
        self._say_sizes()

    def _press(self, said: str) -> None:
        name, _, ratio = said.partition(" ")
        given: dict[str, Any] = {"press": name}
        if ratio:
            try:
                given["compression_ratio"] = float(ratio)
            except ValueError as error:
                raise InputError(f"A ratio is a number in [0, 1), got {ratio[:40]!r}.") from error
        self.conversation.change_press(press_of({}, given))
        self._say_sizes()

    def _save(self, name: str) -> None:
        print(printable(f"written: {', '.join(map(str, self.conversation.save(name)))}"))

    def _load(self, name: str) -> None:
        self.conversation.load(name)
        self._say_sizes()

    def _clear(self, _: str) -> None:
        self.conversation = self.begin()

    def _help(self, _: str) -> None:
        print(_HELP)


def _lines() -> Iterator[str]:
    """What the user says, until the input ends; Ctrl-C at the prompt ends it too."""
    with contextlib.suppress(AttributeError, ValueError):  # a line that is not UTF-8 shall not end the lines
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- lets lines be edited
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
