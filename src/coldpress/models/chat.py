"""A context as the user's turn of a chat, after a system prompt or without one."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from coldpress.errors import InputError

__all__ = ["user_turn"]


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
