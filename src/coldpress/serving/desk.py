"""The desk: requests wait here in a fair queue; one thread answers several, a step of each in every round."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

from coldpress.errors import RequestError

__all__ = ["Desk", "Job"]


class Job(Protocol):
    """Work for the desk, in steps.

    Attributes:
        client: who asks; clients are served in turn.
        ends_at: time on :func:`time.monotonic` after which it is given up.
        is_cancelled: nobody waits for it any more.
        is_aside: its work is done aside, and it takes no place of those that are answered; one of these at a time.
        is_reading: its next step takes long; one of these in each round.
    """

    client: str
    ends_at: float
    is_cancelled: bool

    @property
    def is_aside(self) -> bool: ...

    @property
    def is_reading(self) -> bool: ...

    def step(self) -> bool:
        """Do a part of the work; whether it was the last one."""

    def fail(self, error: Exception) -> None:
        """Tell whoever waits what went wrong."""

    def end(self) -> None:
        """Let go of what the work needed; nothing is asked of the job after it."""


class Desk:
    """One thread that does a step of each running job in turn, and a queue in which clients have equal shares.

    Args:
        most_running: jobs that are worked on at once, beside one whose work is done aside.
        most_waiting: jobs in the queue.
        after_round: what the steps of a round have left to be done together.
    """

    def __init__(self, most_running: int, most_waiting: int, after_round: Callable[[], object] = lambda: None):
        self.most_running, self.most_waiting, self._after_round = most_running, most_waiting, after_round
        self.is_draining = False
        self._running: list[Job] = []
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, whose turn is next first
        self._is_closed = False
        self._job_s = 1.0  # that a job has taken lately, on average
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="coldpress-desk", daemon=True)
        self._thread.start()

    @property
    def n_running(self) -> int:
        """Jobs that are worked on."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Jobs in the queue."""
        return sum(map(len, self._waiting.values()))

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not self._running and not self._waiting

    def submit(self, job: Job) -> None:
        """Take a job into the queue.

        Raises:
            RequestError: 429 where the queue is full, 503 where the server is about to end.
        """
        with self._changed:
            if self.is_draining or self._is_closed:
                raise RequestError(
                    "The server is about to end and takes no more requests; ask again later.",
                    503,
                    "server_draining",
                    retry_after_s=5,
                )
            n_answered = sum(not running.is_aside for running in self._running)
            if n_answered + self.n_waiting >= self.most_running + self.most_waiting:
                raise RequestError(
                    f"The queue is full: at most {self.most_waiting} requests wait; ask again later.",
                    429,
                    "queue_full",
                    retry_after_s=math.ceil(min(60.0, max(1.0, self._job_s * self.n_waiting / self.most_running))),
                )
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up: its place is free at once where it waits, and after its step where it runs."""
        with self._changed:
            job.is_cancelled = True
            line = self._waiting.get(job.client)
            if line is not None and job in line:
                line.remove(job)
                if not line:
                    del self._waiting[job.client]
            self._changed.notify()

    def drain(self) -> None:
        """Take no new jobs; those that are there are finished."""
        with self._changed:
            self.is_draining = True

    def close(self) -> None:
        """End the thread; jobs that are there fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        begun: dict[int, float] = {}
        while True:
            with self._changed:
                while not (self._running or self._waiting or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    left = [*self._running, *(job for line in self._waiting.values() for job in line)]
                    self._running, self._waiting = [], OrderedDict()
                late = self._late()
                while (job := self._next()) is not None:
                    begun[id(job)] = time.monotonic()
                    self._running.append(job)
                running = list(self._running)
            for job in late:
                job.fail(_too_late())
            if self._is_closed:
                for job in left:
                    job.fail(RequestError("The server has ended.", 503, "server_draining", retry_after_s=5))
                return
            reader = next((job for job in running if job.is_reading), None)
            done = [job for job in running if self._is_in_turn(job, reader) and self._step(job)]
            self._after_round()
            del running, late, reader
            with self._changed:
                for job in done:
                    job.end()
                    self._running.remove(job)
                    self._job_s += 0.1 * (time.monotonic() - begun.pop(id(job)) - self._job_s)

    def _step(self, job: Job) -> bool:
        """Do a step of a job; whether it is done with."""
        if job.is_cancelled:
            return True
        try:
            if time.monotonic() > job.ends_at:
                raise _too_late()
            return job.step()
        except Exception as error:
            job.fail(error)
            return True

    @staticmethod
    def _is_in_turn(job: Job, reader: Job | None) -> bool:
        """Whether a job has a step in this round: of those that read long texts the first one, and all others."""
        return job is reader or not job.is_reading or job.is_cancelled or time.monotonic() > job.ends_at

    def _next(self) -> Job | None:
        """The job whose turn it is, if there is a place for it; its client is last in turn then."""
        n_aside = sum(job.is_aside for job in self._running)
        is_free = {True: not n_aside, False: len(self._running) - n_aside < self.most_running}
        for client, line in self._waiting.items():
            job = next((job for job in line if is_free[job.is_aside]), None)
            if job is not None:
                line.remove(job)
                del self._waiting[client]
                if line:
                    self._waiting[client] = line
                return job
        return None

    def _late(self) -> list[Job]:
        """Take the jobs that have waited too long out of the queue."""
        now, found = time.monotonic(), []
        for client, line in list(self._waiting.items()):
            found += [job for job in line if now > job.ends_at]
            self._waiting[client] = deque(job for job in line if now <= job.ends_at)
            if not self._waiting[client]:
                del self._waiting[client]
        return found


def _too_late() -> RequestError:
    return RequestError(
        "The request has taken longer than the server allows; ask for fewer tokens, or later.",
        503,
        "timeout",
        retry_after_s=5,
    )
