"""A context as the user's turn of a chat, after a system prompt or without one, and as it is where there is no chat."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from coldpress.errors import InputError

__all__ = ["prompt_parts", "user_turn"]


def user_turn(tokenizer: Any, text: str, system: str | None = None, enable_thinking: bool = False) -> tuple[str, str]:
    """What stands before the end of ``text`` in the tokenizer's chat template, ``text`` included, and what follows it.

    Args:
        tokenizer: with a chat template.
        text: of the user; what follows it may come later, such as a question.
        system: the system's turn; None for what the template puts there by itself.
        enable_thinking: handed to the template.

    Raises:
        InputError: the template does not hold the texts once, as they are, or takes no system's turn.
    """
    mark = f"[{'#' * (len(text) + 10)}]"  # longer than the text, so it is not in there
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": text + mark})
    try:
        rendered = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=enable_thinking
        )
    except TemplateError as error:
        raise InputError(f"The tokenizer's chat template refuses the prompt: {error}.") from error
    if rendered.count(mark) != 1:
        raise InputError("The tokenizer's chat template does not hold the user's text once, as it is.")
    before, after = rendered.split(mark)
    if system is not None and system.strip() not in before:
        raise InputError("The tokenizer's chat template drops the system's turn; put it into the context and pin that.")
    return before, after


def prompt_parts(
    tokenizer: Any, context: str, system: str | None = None, enable_thinking: bool = False, is_first: bool = True
) -> tuple[str, str, str]:
    """What is pinned, what follows it up to the end of ``context``, and what stands after a question.

    Args:
        tokenizer: with a chat template, or without one: then the context is taken as it is, after the token for the
            beginning of a text if there is one, and a line ends after a question.
        context: what is asked about; may be empty where a cache stores it.
        system: a system prompt, which is pinned; None for none.
        enable_thinking: handed to the template.
        is_first: whether nothing stands before.

    Raises:
        InputError: as :func:`user_turn`, or the template has the system's turn elsewhere than at the beginning.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        bos = (getattr(tokenizer, "bos_token", None) or "") if is_first else ""
        return ("", bos + context, "\n") if system is None else (f"{bos}{system}\n\n", context, "\n")
    before, after = user_turn(tokenizer, context, system, enable_thinking)
    if system is None:
        return "", before if context else "", after  # else the cache stores the beginning of the turn
    pinned, _ = user_turn(tokenizer, "", system, enable_thinking)
    if not before.startswith(pinned):
        raise InputError("The tokenizer's chat template puts the system's turn elsewhere than before the context.")
    return pinned, before.removeprefix(pinned), after
