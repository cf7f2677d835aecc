"""Work aside: what takes the model long, in a thread that goes on only while the desk lets it, a layer at a time.

So answers go on while a snapshot is made, whatever its press and its length: the thread stops where a layer's attention
begins and where it ends, and the desk takes it up again when it has made tokens for about as long.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from coldpress.architecture.rope import has_fixed_frequencies

__all__ = ["Aside", "Task"]


class _Dropped(BaseException):
    """Nobody wants the result; unwinds the thread from where it waits."""


class Task:
    """A function whose result is made aside.

    Attributes:
        is_done: it has ended, or was dropped.
        result: of the function, once it is done.
        error: what it has raised.
    """

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.is_done = self.is_dropped = False
        self.result: Any = None
        self.error: Exception | None = None

    def taken(self) -> Any:
        """The result. Raises what the function has raised."""
        if self.error is not None:
            raise self.error
        return self.result


class Aside:
    """One thread for tasks, one after the other. Of the desk's thread and this one, one runs at a time.

    Args:
        model: whose attention layers are where the thread stops. One whose rotary frequencies change with the text
            that it reads is not left in the middle of one, so its tasks run in one go.
    """

    def __init__(self, model: nn.Module):
        is_left = has_fixed_frequencies(model)
        self._layers = [part for part in model.modules() if hasattr(part, "layer_idx")] if is_left else []
        self._tasks: deque[Task] = deque()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._rests_until = 0.0
        self._is_closed = self._has_begun = False
        self._thread = threading.Thread(target=self._work, name="coldpress-aside", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Any]) -> Task:
        """Have a function run aside, after those that were submitted earlier."""
        task = Task(function)
        self._tasks.append(task)
        return task

    def go_on(self, is_alone: bool = True) -> None:
        """Let the first task go on to the next layer, or to its end.

        Args:
            is_alone: nothing else wants the model; else the thread rests for as long as it has just run.
        """
        if not self._tasks or (not is_alone and time.monotonic() < self._rests_until):
            return
        begun = time.monotonic()
        self._hand_over()
        ended = time.monotonic()
        self._rests_until = ended + (ended - begun)

    def drop(self, task: Task) -> None:
        """Give a task up; what it has begun is undone."""
        if task.is_done:
            return
        task.is_dropped = True
        if self._has_begun and self._tasks[0] is task:
            self._hand_over()
        else:
            self._tasks.remove(task)
            task.is_done = True

    def close(self) -> None:
        """Give all tasks up and end the thread."""
        while self._tasks:
            self.drop(self._tasks[0])
        self._is_closed = True
        self._turn.release()
        self._thread.join()

    def _hand_over(self) -> None:
        """Run the thread until it hands back."""
        self._turn.release()
        self._back.acquire()

    def _work(self) -> None:
        while True:
            self._turn.acquire()
            if self._is_closed:
                return
            self._run(self._tasks[0])
            self._back.release()

    def _run(self, task: Task) -> None:
        self._has_begun = True
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(self._stop).remove)
                stack.callback(layer.register_forward_hook(self._stop).remove)
            try:
                task.result = task.function()
            except _Dropped:
                pass
            except Exception as error:
                task.error = error
        self._tasks.popleft()
        self._has_begun, task.is_done = False, True

    def _stop(self, *_: Any) -> None:
        """Hand the model back to the desk, and wait for the next turn; other threads go on."""
        if threading.current_thread() is not self._thread:
            return
        self._back.release()
        self._turn.acquire()
        if self._tasks[0].is_dropped:
            raise _Dropped
