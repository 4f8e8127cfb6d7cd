"""What an accelerator counts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from nopin.accel.messages import Usage


@dataclass(frozen=True, slots=True)
class AcceleratorStatistics:
    """Figures of one accelerator since it was made.

    Attributes:
        n_waiting, n_running: jobs that wait for a worker, and that have one.
        n_finished, n_failed, n_cancelled: jobs that have ended, by how: well; the kernel raised, or the worker died
            or could not be had; cancelled before or while running.
        n_workers_started, n_workers_lost: worker processes started, and those that died unasked.
        run_ns: time workers spent in kernels, summed over them.
        n_faults: page faults of workers in kernels, as `Usage` counts them.
    """

    n_waiting: int
    n_running: int
    n_finished: int
    n_failed: int
    n_cancelled: int
    n_workers_started: int
    n_workers_lost: int
    run_ns: int
    n_faults: int


class Tally:
    """The counters behind `AcceleratorStatistics`, written by all lanes of an accelerator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n = dict.fromkeys(("running", "finished", "failed", "cancelled", "started", "lost"), 0)
        self._usage = Usage(0, 0)

    def count(self, what: str) -> None:
        """Count one more `finished`, `failed`, `cancelled`, `started` or `lost`."""
        with self._lock:
            self._n[what] += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count a job as running inside."""
        self._step("running", +1)
        try:
            yield
        finally:
            self._step("running", -1)

    def add(self, usage: Usage) -> None:
        """Add what a job took."""
        with self._lock:
            total = self._usage
            self._usage = Usage(total.run_ns + usage.run_ns, total.n_faults + usage.n_faults)

    def read(self, n_waiting: int) -> AcceleratorStatistics:
        """The figures now."""
        with self._lock:
            n, usage = self._n, self._usage
            return AcceleratorStatistics(
                n_waiting=n_waiting,
                n_running=n["running"],
                n_finished=n["finished"],
                n_failed=n["failed"],
                n_cancelled=n["cancelled"],
                n_workers_started=n["started"],
                n_workers_lost=n["lost"],
                run_ns=usage.run_ns,
                n_faults=usage.n_faults,
            )

    def _step(self, what: str, by: int) -> None:
        with self._lock:
            self._n[what] += by
