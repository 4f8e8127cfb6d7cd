"""Many independent points on all cores: the same results, in the same order, whatever the number of workers.

A point is a value that can be sent to another process, and what is called with it a function of a module. Neither knows
how many workers there are or which one it is on, so the number of them cannot show in a result.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any


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
            self._pool = ProcessPoolExecutor(n_jobs, mp_context=multiprocessing.get_context("spawn"))

    def map(self, function: Callable[[Any], Any], points: Iterable[Any]) -> list[Any]:
        """Call with each point; the results, in the order of the points."""
        listed = list(points)
        results = []
        came = map(function, listed) if self._pool is None else self._pool.map(function, listed)
        for result in came:
            results.append(result)
            self.on_point(len(results), len(listed))
        return results

    def __enter__(self) -> Sweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
