"""Threads for what may wait for a disk: a job goes out, its result comes back to the loop."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Job = Callable[[], Any]
Done = Callable[[Any], None]


class Jobs:
    """A small pool, started at the first job. All methods belong to the loop's thread.

    Threads are daemons, so that one that hangs in the kernel does not keep the server from ending.

    Attributes:
        fd: an eventfd, readable when `deliver` has something.
    """

    def __init__(self, n_threads: int) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._n_threads = n_threads
        self._started = False
        self._waiting: SimpleQueue[tuple[Job, Done] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Done, Any]] = SimpleQueue()

    def submit(self, job: Job, done: Done) -> None:
        """Have a job done; it must not raise. `deliver` brings its result to `done`."""
        if not self._started:
            self._started = True
            for n in range(self._n_threads):
                threading.Thread(target=self._serve, name=f"nopin-swap-{n}", daemon=True).start()
        self._waiting.put((job, done))

    def deliver(self) -> None:
        """Call back for the results that have arrived."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        while not self._results.empty():
            done, result = self._results.get_nowait()
            done(result)

    def close(self) -> None:
        """Let the threads end when they can; does not wait for them."""
        if self._started:
            for _ in range(self._n_threads):
                self._waiting.put(None)

    def _serve(self) -> None:
        while (item := self._waiting.get()) is not None:
            job, done = item
            self._results.put((done, job()))
            os.eventfd_write(self.fd, 1)
