"""Many independent points on all cores: the same results, in the same order, whatever the number of workers.

A point is a value that can be sent to another process, and what is called with it a function of a module. Neither knows
how many workers there are or which one it is on, so the number of them cannot show in a result.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

from nopin.linux.interpreter import interrupts_held_back, let_interrupts_through


def _begin_worker() -> None:
    """Let Ctrl-C end this process without a word: whoever started it tells of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    let_interrupts_through()


def _unseen(done: int, total: int) -> None:
    """Nobody wants to see progress."""


class Sweep:
    """Calls functions with points, in `n_jobs` processes; use it as a context.

    Args:
        n_jobs: 1: here, without any process.
        on_point: called with (done, of how many) after each point.

    Attributes:
        on_point: may be changed between calls of `map`.
    """

    def __init__(self, n_jobs: int, on_point: Callable[[int, int], None] | None = None) -> None:
        assert n_jobs >= 1
        self.on_point = on_point or _unseen
        self._pool: ProcessPoolExecutor | None = None
        if n_jobs > 1:
            # Not forked: a progress bar draws from a thread, which a forked process would lack.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(n_jobs, mp_context=context, initializer=_begin_worker)

    def map(self, function: Callable[[Any], Any], points: Iterable[Any]) -> list[Any]:
        """Call with each point; the results, in the order of the points."""
        listed = list(points)
        results = []
        came = map(function, listed) if self._pool is None else self._spread(self._pool, function, listed)
        for result in came:
            results.append(result)
            self.on_point(len(results), len(listed))
        return results

    @staticmethod
    def _spread(pool: ProcessPoolExecutor, function: Callable[[Any], Any], points: list[Any]) -> Iterator[Any]:
        with interrupts_held_back():  # processes are started as points come
            return pool.map(function, points)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
