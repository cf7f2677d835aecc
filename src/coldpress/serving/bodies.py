"""Bodies of requests: JSON that anybody may send, read option by option, and nothing in it is passed over."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from coldpress.errors import RequestError, nearest
from coldpress.serving.wording import Message

__all__ = ["Body"]

_ROLES = ("system", "developer", "user", "assistant")
_ALIKE = 0.7  # an option must be to one of ours to be taken for it: clients send options of other servers
_MOST_STOPS, _MOST_STOP_CHARACTERS = 16, 1000


class Body:
    """The options of a request. Each is taken once, and :meth:`finish` refuses what nobody has taken.

    Args:
        content: bytes of a JSON object.

    Raises:
        RequestError: they are none.
    """

    def __init__(self, content: bytes):
        try:
            found = json.loads(content.decode("utf-8"), parse_constant=_refuse)
        except RecursionError as error:
            raise RequestError("The body is nested too deeply.", code="invalid_json") from error
        except ValueError as error:  # no UTF-8 too
            raise RequestError(f"The body is no JSON: {str(error)[:200]}.", code="invalid_json") from error
        if not isinstance(found, dict):
            raise RequestError(f"The body must be a JSON object, got {_shown(found)}.", code="invalid_json")
        self._given: dict[str, Any] = found
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The value of an option as it is; None where it is null or was not given."""
        self._known.append(name)
        return self._given.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether an option is there and has not been taken."""
        return name in self._given

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """An integer from ``least`` to ``most``."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            _wrong(name, f"an integer from {least} to {most}", value)
        return value

    def number(self, name: str, default: float | None, least: float, most: float) -> float | None:
        """A number from ``least`` to ``most``."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not least <= value <= most:
            _wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false, which it is where it was not given."""
        value = self.take(name)
        if value is not None and type(value) is not bool:
            _wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A text; None where it was not given."""
        value = self.take(name)
        if value is None:
            return None
        return _text(name, value)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; an empty one where it was not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            _wrong(name, "a JSON object", value)
        return value or {}

    def stop(self) -> tuple[str, ...]:
        """The option ``stop``: a text, or up to 16."""
        value = self.take("stop")
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > _MOST_STOPS:
            _wrong("stop", f"a text or a list of up to {_MOST_STOPS} texts", value)
        for text in texts:
            if not _text("stop", text) or len(text) > _MOST_STOP_CHARACTERS:
                _wrong("stop", f"texts of 1 to {_MOST_STOP_CHARACTERS} characters", text)
        return tuple(texts)

    def messages(self, name: str = "messages") -> list[Message]:
        """A list of messages, each with the role system, developer, user or assistant and a content that is a text."""
        value = self.take(name)
        if not isinstance(value, list) or not value:
            _wrong(name, 'a list of messages such as [{"role": "user", "content": "..."}]', value)
        return [_message(f"{name}[{index}]", part) for index, part in enumerate(value)]

    def prompts(self, vocabulary: int) -> list[str | list[int]]:
        """The option ``prompt``: texts, or lists of token ids below ``vocabulary``."""
        value = self.take("prompt")
        value = "" if value is None else value
        if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
            value = [value]
        if not isinstance(value, list) or not value:
            _wrong("prompt", "a text, a list of texts, token ids, or a list of these", value)
        for part in value:
            if isinstance(part, list):
                if not part or not all(type(token) is int and 0 <= token < vocabulary for token in part):
                    _wrong("prompt", f"token ids from 0 to {vocabulary - 1}, at least one", part)
            else:
                _text("prompt", part)
        return value

    def neutral(self, name: str, *values: Any) -> None:
        """An option of OpenAI's API that has one meaning here: it may be null, or one of ``values``."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            allowed = [json.dumps(one) for i, one in enumerate(values) if one not in values[:i]]  # 0.0 is 0
            raise RequestError(
                f"{name} is not supported; {' or give '.join(['leave it out', *allowed])}.",
                code="unsupported_parameter",
                param=name,
            )

    def finish(self) -> None:
        """Raise :class:`RequestError` if there are options that were not taken."""
        for name in self._given:
            raise RequestError(
                f"Unknown option {_shown(name)}.{nearest(name[:100], self._known, _ALIKE)}",
                code="unknown_parameter",
                param=name[:100],
            )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        _wrong(where, "a message with role and content", value)
    for name in value:
        if name not in ("role", "content"):
            raise RequestError(
                f"{where} has {_shown(name)}, and a message has a role and a content here.",
                code="unsupported_parameter",
                param=f"{where}.{name[:100]}",
            )
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{index}]", part) for index, part in enumerate(content))
    return {"role": "system" if role == "developer" else role, "content": _text(f"{where}.content", content)}


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
        _wrong(where, '{"type": "text", "text": "..."}, as the model reads texts alone', part)
    return _text(where, part["text"])


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _wrong(name, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        _wrong(name, "a text without lone surrogates", value)
    return value


def _wrong(name: str, wanted: str, value: Any) -> NoReturn:
    raise RequestError(f"{name} must be {wanted}, got {_shown(value)}.", code="invalid_value", param=name)


def _shown(value: Any) -> str:
    """The beginning of a value as JSON."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "..."
    return text if len(text) <= 80 else f"{text[:77]}..."
