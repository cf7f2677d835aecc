"""The Hugging Face hub and other places of files: asked once, without retries, an answer or a reason within seconds."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from coldpress.errors import UnreachableError
from coldpress.io.files import replace_file

__all__ = ["fetch_hub_file", "fetch_url", "hub_problem", "network_problem", "one_line", "within"]

PROBE_TIMEOUT_S = 6.0
_PACKAGES = {"httpx", "httpx2", "requests", "urllib3", "huggingface_hub"}


def hub_problem(path: str) -> str | None:
    """Why the hub cannot be asked for ``path``, or None if it answers (whatever the answer is).

    The libraries on top of the hub retry an unreachable one for more than 20 s for every file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline mode, HF_HUB_OFFLINE is set"

    def ask() -> str | None:
        answer = get_session().head(f"{constants.ENDPOINT}/{path}", timeout=PROBE_TIMEOUT_S)
        failed = answer.status_code >= 500  # "not found" is an answer
        return f"{constants.ENDPOINT}: status {answer.status_code}" if failed else None

    problem, answer = within(PROBE_TIMEOUT_S + 1, ask)
    return f"{constants.ENDPOINT}: {problem}" if problem else answer


def fetch_hub_file(repo: str, name: str) -> Path | None:
    """The file called ``name`` of a repository on the hub: from the hub's cache, or else from the hub.

    Returns:
        Where it lies on this machine; None if there is no such repository or file.

    Raises:
        UnreachableError: it is not in the cache and the hub cannot be asked.
    """
    from huggingface_hub import errors, hf_hub_download, utils

    try:
        return Path(hf_hub_download(repo, name, local_files_only=True))
    except (FileNotFoundError, errors.HFValidationError):
        pass
    problem = hub_problem(f"{repo}/resolve/main/{name}")
    if problem is None:
        had_bars = not utils.are_progress_bars_disabled()
        utils.disable_progress_bars()
        try:
            return Path(hf_hub_download(repo, name))
        except errors.LocalEntryNotFoundError as error:  # what it says when the connection breaks
            problem = one_line(error)
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError):
            return None
        except Exception as error:
            problem = network_problem(error)
            if problem is None:
                raise
        finally:
            if had_bars:
                utils.enable_progress_bars()
    raise UnreachableError(f"the Hugging Face hub could not be reached for {repo} ({problem})")


def fetch_url(url: str, copy: Path) -> Path | None:
    """The file at ``url``, stored at ``copy`` from then on; None if there is none.

    Raises:
        UnreachableError: there is no copy yet and the place cannot be asked.
    """
    from huggingface_hub import constants, get_session

    if copy.is_file():
        return copy
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(f"{url} was not fetched: offline mode, HF_HUB_OFFLINE is set")
    problem, answer = within(10 * PROBE_TIMEOUT_S, lambda: get_session().get(url, timeout=PROBE_TIMEOUT_S))
    if problem is None and answer.status_code not in (200, 404):
        problem = f"status {answer.status_code}"
    if problem:
        raise UnreachableError(f"{url} could not be fetched ({problem})")
    if answer.status_code == 404:
        return None
    replace_file(copy, lambda part: part.write_bytes(answer.content))
    return copy


def within(seconds: float, ask: Any) -> tuple[str | None, Any]:
    """What went wrong in ``ask()``, and what it returned; an answer after ``seconds`` at the latest."""
    answers: list[tuple[str | None, Any]] = []

    def run() -> None:
        try:
            answers.append((None, ask()))
        except Exception as error:
            cause = re.search(r"\[Errno[^\]]*\][^'\"()]*", str(error))  # the end of a long chain
            answers.append((cause[0].strip() if cause else one_line(error), None))

    # In a thread, because a name server that never answers has no timeout of its own.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else (f"no answer within {seconds - 1:.0f} s", None)


def network_problem(error: BaseException | None) -> str | None:
    """One line when a broken connection is behind ``error``, None when something else is."""
    while error is not None:
        roots = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        network = roots & _PACKAGES and not isinstance(error, ValueError)  # that is an ill-formed id
        if network or isinstance(error, (ConnectionError, TimeoutError)):
            return one_line(error)
        error = error.__cause__
    return None


def one_line(error: BaseException) -> str:
    """The first 200 characters of an error's message without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__
