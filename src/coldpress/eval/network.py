"""Whether the Hugging Face hub can be asked: one request, no retries, an answer within seconds."""

from __future__ import annotations

import re
import threading

__all__ = ["hub_problem", "one_line"]

PROBE_TIMEOUT_S = 6.0


def hub_problem(path: str) -> str | None:
    """Why the hub cannot be asked for ``path``, or None if it answers (whatever the answer is).

    The libraries on top of the hub retry an unreachable one for more than 20 s for every file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline mode, HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            answer = get_session().head(f"{constants.ENDPOINT}/{path}", timeout=PROBE_TIMEOUT_S)
            failed = answer.status_code >= 500  # "not found" is an answer
            answers.append(f"{constants.ENDPOINT}: status {answer.status_code}" if failed else None)
        except Exception as error:
            cause = re.search(r"\[Errno[^\]]*\][^'\"()]*", str(error))  # the end of a long chain
            answers.append(f"{constants.ENDPOINT}: {cause[0].strip() if cause else one_line(error)}")

    # In a thread, because a name server that never answers has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S + 1)
    return answers[0] if answers else f"{constants.ENDPOINT}: no answer within {PROBE_TIMEOUT_S:.0f} s"


def one_line(error: BaseException) -> str:
    """The first 200 characters of an error's message without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__
