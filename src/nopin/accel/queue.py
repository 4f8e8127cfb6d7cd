"""Jobs that wait for a worker: first come, first served, bounded."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from nopin.errors import Closed, QueueFull

T = TypeVar("T")


class JobQueue(Generic[T]):
    """A bounded queue between those who launch and the lanes. Safe to use from any thread.

    Args:
        depth: how many may wait at once.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: T) -> None:
        """Add a job at the end.

        Raises:
            QueueFull: `depth` jobs wait already; nothing was added.
            Closed: the queue was closed.
        """
        with self._changed:
            if self._closed:
                raise Closed("this Accelerator was closed")
            if len(self._waiting) >= self._depth:
                raise QueueFull(
                    f"{self._depth} jobs wait for this accelerator; wait for one of them, or ask for a deeper queue "
                    "with dev.accelerator(depth=...)"
                )
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> T | None:
        """Wait for a job and take it; None once the queue is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return None if self._closed else self._waiting.popleft()

    def withdraw(self, job: T) -> bool:
        """Take one job out that nobody has taken; False when somebody has."""
        with self._changed:
            try:
                self._waiting.remove(job)
            except ValueError:
                return False
            return True

    def close(self) -> list[T]:
        """Let nobody wait any more; returns the jobs that nobody has taken. Twice is fine."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def __len__(self) -> int:
        return len(self._waiting)
