"""Answers in the shapes of OpenAI's API: whole ones and chunks, for messages and for texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from coldpress.errors import RequestError
from coldpress.serving.answering import End, Likely, Piece

__all__ = ["ChatShape", "Gathered", "TextShape", "error_of", "usage_of"]

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Gathered:
    """A choice as its pieces come in."""

    def __init__(self) -> None:
        self.text, self.tokens, self.finish_reason = "", list[Likely](), None

    def add(self, piece: Piece) -> None:
        """Take one more piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason  # type: ignore[assignment]


class _Shape:
    """What chunks and whole answers of one request share."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, tokenizer: Any, has_logprobs: bool):
        self.tokenizer, self.has_logprobs = tokenizer, has_logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Gathered], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that comes whole."""
        found = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": found, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An event of an answer that is streamed."""
        return {**self._head, "object": self.chunk_object, "choices": choices, **more}

    def first(self, n: int) -> list[dict[str, Any]]:
        """The choices of events that come before all pieces."""
        return []

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice in the event of a piece."""
        raise NotImplementedError

    def _choice(self, index: int, choice: Gathered) -> dict[str, Any]:
        raise NotImplementedError

    def _token(self, token: int) -> str:
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


class ChatShape(_Shape):
    """Chat completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, n: int) -> list[dict[str, Any]]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(n)]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The content that has been added."""
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _choice(self, index: int, choice: Gathered) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens) if self.has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Likely]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._token(token)
            as_bytes = None if "�" in text else list(text.encode())  # a part of a character
            return {"token": text, "logprob": logprob, "bytes": as_bytes}

        content = [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]} for one in tokens
        ]
        return {"content": content, "refusal": None}


class TextShape(_Shape):
    """Completions of texts."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Any, has_logprobs: bool):
        super().__init__(model, tokenizer, has_logprobs)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The text that has been added."""
        logprobs = self._logprobs(index, piece.tokens) if piece.tokens else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _choice(self, index: int, choice: Gathered) -> dict[str, Any]:
        logprobs = self._logprobs(index, choice.tokens) if self.has_logprobs else None
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Likely]) -> dict[str, Any]:
        texts = [self._token(one.token) for one in tokens]
        offsets, at = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        tops = [{self._token(t): logprob for t, logprob in one.top} if one.top else None for one in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage_of(ends: Sequence[End]) -> dict[str, Any]:
    """The tokens of a request, over all its prompts."""
    prompt, made = sum(end.prompt_tokens for end in ends), sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends)},
    }


def error_of(error: RequestError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _KINDS.get(error.status, default)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
