"""A hot working set of half the budget in an array of four times the budget, while a scan runs through the rest.

What is counted is how many accesses of the hot set faulted once warm, by the kernel's own count for this thread; so a
page that was there and only had to be mapped counts too, and so does what the interpreter itself may fault.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nopin.errors import UsageError
from nopin.lab.scratch import scratch_folder
from nopin.lab.servers import LocalServer
from nopin.linux.arena_file import resident_bytes
from nopin.units import PAGE_BYTES
from nopin.verbs.device import Device

BUDGET_BYTES = 32 << 20
BUDGET_BYTES_MIN = 1 << 20
TIMES_BUDGET = 4
HOT_SHARE = 0.5
SCAN_PAGES = 64
"""Of the scan, between two lots of as many hot accesses."""
ASKED_SHARE = 0.05
N_WARM_PASSES = N_PASSES = 2
SEED = 0
_WORDS = PAGE_BYTES // 8


class OvercommitFigure(msgspec.Struct, kw_only=True, frozen=True):
    """What came of it, after `N_WARM_PASSES` of the scan, in `N_PASSES` more.

    Attributes:
        hot_accesses: of which `hot_faults` faulted.
        scan_accesses, scan_faults: the same of the scan; it always has to come from swap, readahead makes it less.
        wrong: words that were not what had been stored there.
        resident_bytes_max: at any look, one a lot; budget_bytes is what is allowed.
    """

    budget_bytes: int
    array_bytes: int
    hot_bytes: int
    hot_accesses: int
    hot_faults: int
    scan_accesses: int
    scan_faults: int
    wrong: int
    resident_bytes_max: int
    asked: float = ASKED_SHARE

    @property
    def share(self) -> float:
        """Of the hot accesses that faulted."""
        return self.hot_faults / self.hot_accesses

    @property
    def as_promised(self) -> bool:
        """Few faults, no wrong word, and no more resident than allowed."""
        return self.share <= self.asked and not self.wrong and self.resident_bytes_max <= self.budget_bytes

    def as_json(self) -> dict[str, Any]:
        """Return everything, computed figures too."""
        return {**msgspec.structs.asdict(self), "share": self.share, "as_promised": self.as_promised}


def run_overcommit(advance: Callable[[int], None], *, budget_bytes: int = BUDGET_BYTES) -> OvercommitFigure:
    """Measure, with a server of its own.

    Args:
        advance: called with the number of pages that were scanned since the last call; `scan_pages` says of how many.

    Raises:
        UsageError: the budget is no whole number of MiB.
        HostLacks: no userfaultfd for this user.
    """
    if budget_bytes < BUDGET_BYTES_MIN or budget_bytes % BUDGET_BYTES_MIN:
        raise UsageError(f"a budget of {budget_bytes} bytes; give one or more whole MiB")
    with ExitStack() as held:
        folder = held.enter_context(scratch_folder())
        server = held.enter_context(LocalServer(folder / "managed.sock"))
        device = held.enter_context(Device(server=str(server.socket_path), budget=budget_bytes))
        work = _Work(device, budget_bytes)
        for _ in range(N_WARM_PASSES):
            work.scan_through(advance)
        work.forget_counts()
        for _ in range(N_PASSES):
            work.scan_through(advance)
        return work.figure()


def scan_pages(budget_bytes: int) -> int:
    """Return how many pages the scan touches in all."""
    n_pages = budget_bytes // PAGE_BYTES
    return (N_WARM_PASSES + N_PASSES) * (TIMES_BUDGET * n_pages - int(HOT_SHARE * n_pages))


class _Work:
    """The array: word 0 of each page is its number, hot pages first."""

    def __init__(self, device: Device, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        n_budget_pages = budget_bytes // PAGE_BYTES
        self._n_pages = TIMES_BUDGET * n_budget_pages
        self._n_hot = int(HOT_SHARE * n_budget_pages)
        self._memory_fd = device.default_arena.memory_fd
        self._numbers: NDArray[np.int64] = device.zeros((self._n_pages, _WORDS), np.int64)[:, 0]
        self._random = np.random.default_rng(SEED)
        self._resident_max = 0
        for first in range(0, self._n_pages, SCAN_PAGES):
            self._numbers[first : first + SCAN_PAGES] = np.arange(first, first + SCAN_PAGES)
        self.forget_counts()

    def forget_counts(self) -> None:
        """Count from here."""
        self._counts = {"hot_accesses": 0, "hot_faults": 0, "scan_accesses": 0, "scan_faults": 0, "wrong": 0}

    def scan_through(self, advance: Callable[[int], None]) -> None:
        """Read every page of the rest, in order, and as many hot ones, at random, in between."""
        for first in range(self._n_hot, self._n_pages, SCAN_PAGES):
            scanned = np.arange(first, first + SCAN_PAGES)
            self._read("scan", scanned)
            self._read("hot", self._random.integers(0, self._n_hot, SCAN_PAGES))
            self._resident_max = max(self._resident_max, resident_bytes(self._memory_fd))
            advance(SCAN_PAGES)

    def _read(self, who: str, pages: NDArray[np.int64]) -> None:
        before = _faults()
        found = self._numbers[pages]
        self._counts[f"{who}_faults"] += _faults() - before
        self._counts[f"{who}_accesses"] += len(pages)
        self._counts["wrong"] += int((found != pages).sum())

    def figure(self) -> OvercommitFigure:
        """Return what was counted."""
        return OvercommitFigure(
            budget_bytes=self._budget_bytes,
            array_bytes=self._n_pages * PAGE_BYTES,
            hot_bytes=self._n_hot * PAGE_BYTES,
            resident_bytes_max=self._resident_max,
            **self._counts,
        )


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt
