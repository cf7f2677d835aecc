"""Scope: the threads that a block such as ``with press(model):`` holds for."""

from __future__ import annotations

import threading
import weakref

__all__ = ["Scope"]


class Scope:
    """The thread that opens a block, and the threads that are started while it is open.

    So a thread that streams what a model generates is inside the block that started it. Python does not say which
    thread started another; one that a third thread has started meanwhile is taken for the block's own.
    """

    def __init__(self) -> None:
        self.owner = threading.current_thread()
        self._earlier = weakref.WeakSet(threading.enumerate())

    @property
    def is_owner(self) -> bool:
        """Whether the current thread opened the block."""
        return threading.current_thread() is self.owner

    def holds(self) -> bool:
        """Whether the current thread is inside the block."""
        return self.is_owner or threading.current_thread() not in self._earlier

    def started(self) -> list[threading.Thread]:
        """The threads that were started since and still run."""
        return [thread for thread in threading.enumerate() if thread not in self._earlier and thread is not self.owner]
