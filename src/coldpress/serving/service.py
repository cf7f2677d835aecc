"""What the server does, without HTTP: requests become jobs for the desk, and snapshots are made, shown and removed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.generating import switching_point
from coldpress.core.definition import in_short
from coldpress.core.press import Press
from coldpress.errors import RequestError
from coldpress.io.files import read_text
from coldpress.models.inspection import inspection_of
from coldpress.serving.answering import Answer, Failure, Wanted
from coldpress.serving.aside import Aside, Task
from coldpress.serving.batch import Batch
from coldpress.serving.bodies import Body
from coldpress.serving.desk import Desk
from coldpress.serving.snapshot import Snapshot
from coldpress.serving.snapshots import Snapshots
from coldpress.serving.streaming import parts_of
from coldpress.serving.wording import Message, chat_ids, joined, text_ids
from coldpress.stores.bits import BITS, ROTATED, bits_name

__all__ = ["Limits", "Making", "Service"]

_PRESS_OPTIONS = ("press", "compression_ratio", "budget_tokens", "budget_bytes", "press_args")
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # options of a chat that mean nothing here, and what clients send all the same
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
_SOURCES = ("text", "messages", "file")  # of a snapshot


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        running: requests that are answered at once.
        waiting: requests in the queue.
        new_tokens: of each choice.
        choices: of a request, over all its prompts.
        body_bytes: of a request's body.
        time_s: of a request, its time in the queue included.
        read_tokens: of a prompt that are read in one go, before other answers have their turn.
        idle_s: that a client may take to send its body, or to take a piece of its answer.
    """

    running: int = 8
    waiting: int = 64
    new_tokens: int = 1024
    choices: int = 16
    body_bytes: int = 16 << 20
    time_s: float = 600.0
    read_tokens: int = 512
    idle_s: float = 60.0


class Making:
    """A job for the desk: make a snapshot or its page aside. ``tell`` is called with it, or with a :class:`Failure`."""

    is_aside, is_reading = True, False

    def __init__(self, make: Callable[[], Any], aside: Aside, tell: Callable[[Any], None], client: str, time_s: float):
        self.make, self.aside, self.tell, self.client = make, aside, tell, client
        self.ends_at, self.is_cancelled = time.monotonic() + time_s, False
        self._task: Task | None = None

    def step(self) -> bool:
        """Have it made; whether it is."""
        self._task = self._task or self.aside.submit(self.make)
        if self._task.is_done:
            self.tell(self._task.taken())
        return self._task.is_done

    def fail(self, error: Exception) -> None:
        """Tell that it is not made."""
        self.tell(Failure(error))

    def end(self) -> None:
        """Give up what is not made."""
        if self._task is not None:
            self.aside.drop(self._task)
        self._task = None


class Service:
    """A model, its snapshots, and the desk at which requests are answered.

    Args:
        model: that the snapshots are of.
        tokenizer: the model's.
        name: under which requests ask for the model.
        snapshots: of this model and tokenizer.
        limits: of requests.
        press_of: makes a press of the options ``press``, ``compression_ratio``, ``budget_tokens``, ``budget_bytes`` and
            ``press_args``, some of which may be missing.
        files: the folder whose files a client may name; None: no file is opened for one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        snapshots: Snapshots,
        limits: Limits,
        press_of: Callable[[dict[str, Any]], Press | None],
        files: Path | None = None,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.snapshots, self.limits, self.press_of = snapshots, limits, press_of
        self.files = None if files is None else files.resolve()
        self.batch, self.aside = Batch(model), Aside(model)
        self.desk = Desk(limits.running, limits.waiting, self._run)
        self.started_at = int(time.time())
        config = model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        self.max_positions = int(min(getattr(tokenizer, "model_max_length", positions), positions))
        self._switch_at = switching_point(config)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._most_characters = self.max_positions * max(map(len, tokenizer.get_vocab()), default=1)

    def chat(self, body: Body) -> Wanted:
        """What a request for a chat completion wants."""
        self._check_model(body)
        snapshot, messages = self._named(body), body.messages()
        n_likely = body.integer("top_logprobs", None, 0, 20)
        has_logprobs = body.flag("logprobs")
        if n_likely is not None and not has_logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", code="invalid_value", param="top_logprobs")
        for name, values in _NEUTRAL.items():
            body.neutral(name, *values)
        max_new = body.integer("max_completion_tokens", None, 1, 2**31)
        older = body.integer("max_tokens", None, 1, 2**31)
        if None not in (max_new, older) and max_new != older:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
        if snapshot is not None:
            if snapshot.source is None or isinstance(snapshot.source, str):
                raise RequestError(
                    "The snapshot is of a text and no messages: ask it at /v1/completions, or declare it as messages.",
                    param="snapshot",
                )
            messages = joined(snapshot.source, messages)
        self._check_characters(sum(len(message["content"]) for message in messages))
        ids = chat_ids(self.tokenizer, messages)
        if snapshot is not None and ids[: snapshot.n_tokens] != snapshot.ids:
            raise RequestError(
                "The chat template renders the snapshot's messages otherwise when these follow; send all messages.",
                param="snapshot",
            )
        return self._wanted(body, ids, snapshot, max_new or older, (n_likely or 0) if has_logprobs else None)

    def completions(self, body: Body) -> list[Wanted]:
        """What a request for completions wants, for each of its prompts."""
        self._check_model(body)
        snapshot, prompts = self._named(body), body.prompts(self._vocabulary)
        n_likely, max_new = body.integer("logprobs", None, 0, 5), body.integer("max_tokens", 16, 0, 2**31)
        echo = body.flag("echo")
        body.neutral("suffix", "")
        body.neutral("best_of", 1)
        if max_new == 0 and not echo:
            raise RequestError("max_tokens must be at least 1, unless the prompt is echoed.", param="max_tokens")
        if echo and snapshot is not None:
            raise RequestError("echo needs all tokens of the prompt, and a snapshot has few.", param="echo")
        prompt_ids = [self._prompt_ids(prompt, snapshot) for prompt in prompts]
        first = self._wanted(body, prompt_ids[0], snapshot, max_new, n_likely, echo)
        if first.n * len(prompts) > self.limits.choices:
            raise RequestError(f"n times prompts must be at most {self.limits.choices}.", param="n")
        rest = []
        for ids in prompt_ids[1:]:
            self._check_length(ids, first.max_new_tokens)
            rest.append(Wanted(**{**vars(first), "ids": ids}))
        return [first, *rest]

    def answer(self, wanted: Wanted, tell: Callable[[Any], None], client: str) -> Answer:
        """Put a request into the queue. Raises :class:`RequestError` where there is no room."""
        limits = self.limits
        who = f"{client} {wanted.user}"
        job = Answer(self.snapshots, self.batch, self.aside, wanted, tell, who, limits.time_s, limits.read_tokens)
        self.desk.submit(job)
        return job

    def make(self, body: Body, tell: Callable[[Any], None], client: str) -> Making:
        """Put the making of a snapshot into the queue."""
        if sum(map(body.has, _SOURCES)) != 1:
            raise RequestError("A snapshot is of a text, of messages or of a file; give one of them.", param="text")
        source: str | list[Message]
        source = body.messages() if body.has("messages") else body.text("text") or self._file(body.text("file"))
        if body.flag("chat") and source and isinstance(source, str):
            source = [{"role": "user", "content": source}]
        options: dict[str, Any] = {}
        given = {name: body.take(name) for name in _PRESS_OPTIONS if body.has(name)}
        if any(value is not None for value in given.values()):
            options["press"] = self.press_of({name: value for name, value in given.items() if value is not None})
        if body.has("kv_bits"):
            options["kv_bits"] = body.take("kv_bits")
            if options["kv_bits"] not in (None, *BITS, *ROTATED) or isinstance(options["kv_bits"], bool):
                known = "8, 4, 2 or null, or a name such as k8v4"
                raise RequestError(f"kv_bits must be {known}.", code="invalid_value", param="kv_bits")
        if body.has("chunk_tokens"):
            options["chunk_tokens"] = body.integer("chunk_tokens", None, 1, 2**31)
        for name in (*_PRESS_OPTIONS, *_SOURCES, "kv_bits", "chunk_tokens"):
            body.take(name)  # known, whether given or not
        self._check_model(body)
        body.finish()
        if not source:
            raise RequestError("The text is empty.", code="invalid_value", param="text")
        snapshots = self.snapshots
        if isinstance(source, str):
            self._check_characters(len(source))
            n_tokens = len(text_ids(self.tokenizer, source))
        else:
            self._check_characters(sum(len(message["content"]) for message in source))
            n_tokens = len(chat_ids(self.tokenizer, source))
        if n_tokens >= self.max_positions:
            raise self._too_long(f"The snapshot has {n_tokens} tokens")
        job = Making(lambda: snapshots.add(source, **options), self.aside, tell, client, self.limits.time_s)
        self.desk.submit(job)
        return job

    def page(self, snapshot: Snapshot, tell: Callable[[Any], None], client: str) -> Making:
        """Put the making of a page into the queue that shows which tokens of a snapshot are kept."""
        press = snapshot.press
        if press is None:
            raise RequestError("The snapshot has no press, so all of its tokens are kept.", code="no_press")

        def make() -> str:
            text, ends = parts_of(self.tokenizer, snapshot.ids)
            found = inspection_of(self.snapshots.forked(snapshot, is_counted=False)[0], press, text, snapshot.ids, ends)
            return found.to_html(f"snapshot {snapshot.id}", [f"model: {self.name}"])

        job = Making(make, self.aside, tell, client, self.limits.time_s)
        self.desk.submit(job)
        return job

    def shown(self, snapshot: Snapshot) -> dict[str, Any]:
        """A snapshot in the types of JSON."""
        return {
            "id": snapshot.id,
            "object": "snapshot",
            "tokens": snapshot.n_tokens,
            "tier": snapshot.tier,
            "bytes": snapshot.memory_bytes,
            "disk_bytes": snapshot.disk_bytes,
            "press": None if snapshot.press is None else in_short(snapshot.press),
            "kv_bits": bits_name(snapshot.kv_bits),
            "chunk_tokens": snapshot.chunk_tokens,
            "removed_ratio": None if snapshot.achieved_ratio is None else round(snapshot.achieved_ratio, 4),
            "uses": snapshot.uses,
        }

    def found(self, key: str) -> Snapshot:
        """The snapshot with this id. Raises :class:`RequestError` with 404 without one."""
        snapshot = self.snapshots.get(key)
        if snapshot is None:
            raise RequestError(
                f"There is no snapshot {key[:80]!r}; declare it at POST /v1/snapshots.",
                404,
                "snapshot_not_found",
                "snapshot",
            )
        return snapshot

    def close(self) -> None:
        """End the desk, and write snapshots that are in memory alone to their folder."""
        self.desk.close()
        self.aside.close()
        self.snapshots.flush()

    def _run(self) -> None:
        """After each round of the desk: the model reads the newest tokens of all answers, and then what is aside."""
        n_tokens = self.batch.run()
        self.aside.go_on(is_alone=not n_tokens)

    def _file(self, name: str | None) -> str:
        """The text of a file in the folder of files.

        Raises:
            RequestError: there is no such file in the folder, or it is none of text, or too large.
        """
        if not name:
            return ""
        if self.files is None:
            raise RequestError("This server opens no files; start it with --allow_files FOLDER.", 403, param="file")
        try:
            path = (self.files / name).resolve(strict=True)  # where links lead
            if not path.is_relative_to(self.files) or not path.is_file():
                raise FileNotFoundError
            return read_text(path)
        except (OSError, RuntimeError, ValueError) as error:
            why = f" ({error})" if isinstance(error, ValueError) and "\0" not in name else ""
            raise RequestError(
                f"There is no file of text {ascii(name)[:80]} in the folder of this server{why}.",
                404,
                "file_not_found",
                "file",
            ) from error

    def _check_model(self, body: Body) -> None:
        name = body.text("model")
        if name not in (None, self.name):
            raise RequestError(
                f"There is no model {str(name)[:80]!r} here; ask for {self.name!r}.", 404, "model_not_found", "model"
            )

    def _named(self, body: Body) -> Snapshot | None:
        key = body.text("snapshot")
        return None if key is None else self.found(key)

    def _prompt_ids(self, prompt: str | list[int], snapshot: Snapshot | None) -> list[int]:
        """The tokens of a prompt, after those of a snapshot that it goes on from."""
        if isinstance(prompt, str):
            self._check_characters(len(prompt))
        if snapshot is None:
            return text_ids(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, list):
            return [*snapshot.ids, *prompt]
        if not isinstance(snapshot.source, str):
            raise RequestError(
                "The snapshot is of messages: ask it at /v1/chat/completions, or declare it as a text.",
                param="snapshot",
            )
        ids = text_ids(self.tokenizer, snapshot.source + prompt)
        if ids[: snapshot.n_tokens] != snapshot.ids:
            raise RequestError("The prompt joins the snapshot's last word; begin it with a space.", param="prompt")
        return ids

    def _wanted(
        self,
        body: Body,
        ids: list[int],
        snapshot: Snapshot | None,
        max_new: int | None,
        n_likely: int | None,
        echo: bool = False,
    ) -> Wanted:
        """The options that both kinds of requests have; refuses all that nobody has taken."""
        temperature, top_p = body.number("temperature", 1.0, 0.0, 2.0), body.number("top_p", 1.0, 0.0, 1.0)
        seed, n = body.integer("seed", None, -(2**63), 2**63 - 1), body.integer("n", 1, 1, self.limits.choices)
        stop = body.stop()
        for name in ("presence_penalty", "frequency_penalty"):
            body.neutral(name, 0, 0.0)
        body.neutral("logit_bias", {})
        body.neutral("response_format", {"type": "text"})
        body.neutral("store", False)
        user = body.text("user") or ""
        body.finish()
        room = self._check_length(ids, 1 if max_new is None else max_new)
        max_new = min(room, self.limits.new_tokens) if max_new is None else max_new
        if max_new > self.limits.new_tokens:
            raise RequestError(
                f"max_tokens must be at most {self.limits.new_tokens} on this server, got {max_new}.",
                param="max_tokens",
            )
        assert temperature is not None and top_p is not None and n is not None
        if snapshot is not None and len(ids) <= snapshot.n_tokens:
            raise RequestError("A snapshot needs at least one token after it to be asked.", param="prompt")
        return Wanted(ids, snapshot, max_new, temperature, top_p, seed, n, stop, n_likely, echo, user)

    def _check_length(self, ids: list[int], n_new: int) -> int:
        """How many tokens may follow; raises :class:`RequestError` if that is less than ``n_new``."""
        if not ids:
            raise RequestError("The prompt has no tokens.", code="invalid_value", param="prompt")
        room = self.max_positions - len(ids)
        if room < n_new:
            raise self._too_long(f"The prompt has {len(ids)} tokens and asks for {n_new} more")
        if self._switch_at is not None and len(ids) <= self._switch_at < len(ids) + n_new:
            raise RequestError(
                f"The model changes its rotary frequencies after {self._switch_at} tokens, and an answer cannot cross "
                "that; ask for fewer tokens.",
                code="context_length_exceeded",
            )
        return room

    def _check_characters(self, n: int) -> None:
        """Refuse what is too long whatever its tokens are, before it is cut into them, which takes time."""
        if n > self._most_characters:
            raise self._too_long(f"A text of {n} characters has too many tokens")

    def _too_long(self, what: str) -> RequestError:
        message = f"{what}, and the model has {self.max_positions} positions; send less, or ask for less."
        return RequestError(message, code="context_length_exceeded")
