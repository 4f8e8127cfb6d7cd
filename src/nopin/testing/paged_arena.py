"""Managed memory in a test's hand: frames, swap and faults, evicted only when and what the test says.

What a pager owes to devices is kept (`mm.device_faults`), and the notifier protocol with it; there is no policy, no
budget and no other mapper. A frame given back is filled with `GONE`, so whoever reads
it through a stale translation shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from nopin.iommu.mirror import Mirror
from nopin.iommu.windows import DeviceArena
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import Backoff, PageRun, Procedure, Quiesce, ReadSwap, T
from nopin.mm.notifier import Notifiers
from nopin.mm.space import Reason, Staging
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

GONE = 0xDB
"""What frames hold that were given back."""


class PagedArena:
    """An arena of `n_pages`, all of them untouched.

    Attributes:
        memory: (n_pages * 4096,) uint8, the frames.
        resident: pages in their frames; others are in `swap`, or read as zeros.
        lost: pages whose copy in swap cannot be read.
        held: holds by page.
        dirty: pages to be written at eviction; others are dropped.
        n_faults: device faults begun.
        device: the arena as a device takes it.
    """

    def __init__(self, n_pages: int, *, wants_updates: bool = False) -> None:
        self.n_pages = n_pages
        self.staging = Staging(np.zeros(n_pages * PAGE_BYTES, np.uint8))
        self.memory = self.staging.array
        self.resident: set[int] = set()
        self.swap: dict[int, bytes] = {}
        self.lost: set[int] = set()
        self.held: Counter[int] = Counter()
        self.dirty: set[int] = set()
        self.n_faults = 0
        self.notifiers = Notifiers()
        self.mirror = Mirror(self.notifiers, self, n_pages, wants_updates=wants_updates)
        self.device = DeviceArena(self.mirror, self.staging)

    def page(self, number: int) -> bytes:
        """Return what the owner would read in a page."""
        if number in self.resident:
            return self.memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES].tobytes()
        return self.swap.get(number, bytes(PAGE_BYTES))

    def contents(self) -> bytes:
        """Return what the owner would read in all of it."""
        return b"".join(self.page(number) for number in range(self.n_pages))

    def store(self, at: int, data: bytes) -> None:
        """Store as the owner's CPU does."""
        for page in range(at // PAGE_BYTES, (at + len(data) - 1) // PAGE_BYTES + 1):
            self._bring(page)
            self.dirty.add(page)
        self.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """See `DeviceFaults`. Waits for the medium once for each page in swap."""
        self.n_faults += 1
        for n_done, page in enumerate(range(pages.first, pages.end)):
            if page in self.lost:
                self._hold(pages.first, n_done)
                return FaultPages(n_done, Reason.LOST)
            while page not in self.resident and page in self.swap:
                yield ReadSwap(page * PAGE_BYTES, PAGE_BYTES)
                self._bring(page)
        for page in range(pages.first, pages.end):  # one may have gone while another was waited for
            self._bring(page)
            if write:
                self.dirty.add(page)
        self._hold(pages.first, pages.n)
        return FaultPages(pages.n)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """See `DeviceFaults`."""
        run = range(pages.first, pages.end)
        if not self.resident.issuperset(run):
            return False
        if write:
            self.dirty.update(run)
        return True

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """See `DeviceFaults`. Pages in swap wait for the medium."""
        run = range(pages.first, pages.end)
        if any(page in self.lost or (page in self.swap and page not in self.resident) for page in run):
            return False
        for page in run:
            self._bring(page)
        yield from ()
        return self.settled(pages, write=write)

    def release(self, pages: PageRun) -> None:
        """See `DeviceFaults`."""
        for page in range(pages.first, pages.end):
            assert self.held[page] > 0, "a hold given back twice"
            self.held[page] -= 1
        self.held += Counter()  # drops zeros

    def evict(self, pages: Iterable[int]) -> Procedure[int]:
        """Evict those of `pages` that are resident and not held; returns how many."""
        victims = [page for page in pages if page in self.resident and not self.held[page]]
        if not victims:
            return 0
        bracket = self.notifiers.invalidate_start([Range(p, p + 1) for p in victims], Cause.RECLAIM)
        self.dirty |= bracket.harvest.dirty
        yield Quiesce(bracket.fences)
        kept = {page for part in bracket.kept for page in range(part.start, part.end)}
        for page in victims:
            if page in kept or self.held[page] or page not in self.resident:
                continue
            if page in self.dirty or page not in self.swap:
                self.swap[page] = self.page(page)
            self._give_back(page)
        bracket.end()
        return len(victims) - len(kept)

    def discard(self, pages: PageRun) -> None:
        """Give bytes up, at once, held or not: the pages read as zeros."""
        bracket = self.notifiers.invalidate_start([Range(pages.first, pages.end)], Cause.TRUNCATE)
        for page in range(pages.first, pages.end):
            self.swap.pop(page, None)
            if page in self.resident:
                self._give_back(page)
        bracket.end()

    def run(self, procedure: Procedure[T]) -> T:
        """Carry a procedure out, start to end."""
        return run_through(procedure)

    def evict_now(self, *pages: int) -> None:
        """Evict pages, or all that are resident."""
        self.run(self.evict(pages or sorted(self.resident)))

    def _hold(self, first: int, n: int) -> None:
        self.held.update(range(first, first + n))

    def _bring(self, page: int) -> None:
        if page in self.resident:
            return
        data = self.swap.get(page, bytes(PAGE_BYTES))
        self.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = np.frombuffer(data, np.uint8)
        self.resident.add(page)

    def _give_back(self, page: int) -> None:
        self.resident.discard(page)
        self.dirty.discard(page)
        self.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = GONE


def run_through(procedure: Procedure[T]) -> T:
    """Carry a procedure of a paged arena out, start to end."""
    try:
        while True:
            assert isinstance(next(procedure), ReadSwap | Quiesce | Backoff)
    except StopIteration as end:
        result: T = end.value
        return result
