"""From texts and messages to token ids: whole prompts, and prefixes that stay prefixes whatever follows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from coldpress.errors import InputError

__all__ = ["Message", "chat_ids", "has_template", "joined", "prefix_ids", "text_ids"]

Message = Mapping[str, str]  # role and content

# What may follow a prefix. A tokenizer may join its last letters with these, so tokens that change are none of it.
_FOLLOWING = (" a", "a", "\n", "\n\nA", ".", " (")
_WORD = re.compile(r"\s?\w{1,40}\Z")  # that a text ends in


def has_template(tokenizer: Any) -> bool:
    """Whether messages are rendered by the tokenizer's own chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as the tokenizer begins one."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of messages up to where the answer begins.

    Without a chat template the contents stand one after the other with an empty line between them, after the
    tokenizer's beginning-of-text token if it has one, and a line's end follows the last one.

    Raises:
        InputError: the chat template refuses the messages.
    """
    if not has_template(tokenizer):
        return _plain_ids(tokenizer, _joined_contents(tokenizer, messages) + "\n")
    return _plain_ids(tokenizer, _rendered(tokenizer, messages, add_generation_prompt=True))


def prefix_ids(tokenizer: Any, source: str | Sequence[Message]) -> list[int]:
    """The tokens that a text or messages have in common with all that goes on from their end.

    The last message is left open: what follows may be more of its content. A word that the text ends in, or
    the last few characters, are in no token of the prefix, as a tokenizer may join them with what follows.

    Raises:
        InputError: no tokens are left, or the chat template does not hold the last content once, as it is.
    """
    encode: Callable[[str], list[int]]
    if isinstance(source, str):
        before, after = source, ""
        encode = lambda text: text_ids(tokenizer, text)  # noqa: E731
    else:
        before, after = _open(tokenizer, source)
        encode = lambda text: _plain_ids(tokenizer, text)  # noqa: E731
    found = encode(before)
    endings = [before + following for following in (*_FOLLOWING, after) if following]
    word = _WORD.search(before)
    if word is not None:  # it may go on with any letter
        endings.append(before[: word.start()])
    for ending in endings:
        other = encode(ending)
        n = next((i for i, (a, b) in enumerate(zip(found, other, strict=False)) if a != b), len(other))
        found = found[:n]
    if not found:
        raise InputError("A prefix needs at least one token; give a longer text.")
    return found


def joined(first: Sequence[Message], more: Sequence[Message]) -> list[Message]:
    """The messages of a request that goes on from declared ones.

    Where the first new message has the role of the last declared one, it is more of its content.
    """
    if not first or not more or first[-1]["role"] != more[0]["role"]:
        return [*first, *more]
    last = {**first[-1], "content": first[-1]["content"] + more[0]["content"]}
    return [*first[:-1], last, *more[1:]]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _joined_contents(tokenizer: Any, messages: Sequence[Message]) -> str:
    beginning = getattr(tokenizer, "bos_token", None) or ""
    return beginning + "\n\n".join(message["content"] for message in messages)


def _rendered(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
    except TemplateError as error:
        raise InputError(f"The tokenizer's chat template refuses the messages: {error}.") from error


def _open(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, str]:
    """What stands before the end of the last content, and what a template puts after it."""
    if not has_template(tokenizer):
        return _joined_contents(tokenizer, messages), "\n"
    *earlier, last = messages
    mark = f"[{'#' * (max(len(message['content']) for message in messages) + 10)}]"  # longer than any, so in none
    rendered = _rendered(tokenizer, [*earlier, {**last, "content": last["content"] + mark}])
    if rendered.count(mark) != 1:
        raise InputError("The tokenizer's chat template does not hold the last message once, as it is.")
    before, after = rendered.split(mark)
    return before, after
