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
from typing import TypeVar

from nopin.linux.interpreter import interrupts_held_back, let_interrupts_through

Point = TypeVar("Point")
Outcome = TypeVar("Outcome")


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

    Attributes:
        on_point: called with (done, of how many) after each point; may be changed between calls.
    """

    def __init__(self, n_jobs: int) -> None:
        assert n_jobs >= 1
        self.on_point: Callable[[int, int], None] = _unseen
        self._pool: ProcessPoolExecutor | None = None
        if n_jobs > 1:
            # Not forked: a progress bar draws from a thread, which a forked process would lack.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(n_jobs, mp_context=context, initializer=_begin_worker)

    def map(self, function: Callable[[Point], Outcome], points: Iterable[Point]) -> list[Outcome]:
        """Call with each point; the results, in the order of the points."""
        return list(self.each(function, points))

    def each(self, function: Callable[[Point], Outcome], points: Iterable[Point]) -> Iterator[Outcome]:
        """Yield the same as they come, in order; whoever has seen enough need not take the rest."""
        listed = list(points)
        alone = self._pool is None or len(listed) == 1  # a process takes a second to start
        came = map(function, listed) if alone else self._spread(function, listed)
        for done, result in enumerate(came, 1):
            self.on_point(done, len(listed))
            yield result

    def _spread(self, function: Callable[[Point], Outcome], points: list[Point]) -> Iterator[Outcome]:
        assert self._pool is not None
        with interrupts_held_back():  # processes are started as points come
            return self._pool.map(function, points)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
