"""A pager as small as can be, to try the live runner with: first in, first out; one page at a time."""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nopin.mm.device_faults import FaultPages, Frames
from nopin.mm.effects import (
    SERVER,
    Backoff,
    Effect,
    Fill,
    Gate,
    MapIn,
    Mapper,
    Open,
    PageRun,
    Pause,
    Poison,
    Present,
    Procedure,
    Punch,
    ReadSwap,
    Unprotect,
    WriteProtect,
    WriteSwap,
    Zero,
)
from nopin.mm.residency import Pages
from nopin.mm.space import Reason
from nopin.units import PAGE_BYTES, US_NS


@dataclass
class Statistics:
    faults: int = 0
    evictions: int = 0
    swap_in: int = 0


class FifoPager:
    """At most `budget` pages resident; page n is swapped to byte n * 4096; every page counts as dirty."""

    def __init__(self, frames: Frames, budget: int) -> None:
        self.frames = frames
        self.budget = budget
        self.resident: dict[int, None] = {}
        self.swapped: set[int] = set()
        self.lost: set[int] = set()
        self.busy: dict[int, Gate] = {}
        self.counts = Statistics()
        self.calls: list[tuple[str, PageRun, bool | None]] = []

    @property
    def uses_swap(self) -> bool:
        return bool(self.swapped)

    def expect_removal(self, runs: Sequence[PageRun]) -> Pages:
        del runs
        return np.empty(0, np.int64)

    def expect_no_more(self, expected: Pages, read: Sequence[PageRun]) -> None:
        pass

    def cpu_fault(self, mapper: Mapper, page: int, *, write: bool, minor: bool, protected: bool) -> Procedure[None]:
        self.counts.faults += 1
        run = PageRun(page, 1)
        while page in self.busy:
            yield Pause(self.busy[page])
        if protected:
            yield Unprotect(run, mapper)
        elif page in self.resident:
            yield MapIn(run, mapper, False)
        elif (yield from self._bring(page, mapper)) is not None:
            yield Poison(run, mapper)

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        for page in range(pages.first, pages.end):
            while page in self.busy:
                yield Pause(self.busy[page])
            if page not in self.resident and (yield from self._bring(page, SERVER)) is not None:
                return FaultPages(page - pages.first, Reason.LOST)
        return FaultPages(pages.n)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        return all(page in self.resident and page not in self.busy for page in range(pages.first, pages.end))

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        yield from ()
        return False

    def prefetch(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        return self.device_fault(pages, write=write)

    def release(self, pages: PageRun) -> None:
        pass

    def _bring(self, page: int, mapper: Mapper) -> Generator[Effect, Any, Reason | None]:
        gate = self.busy[page] = Gate()
        try:
            while len(self.resident) >= self.budget:
                yield from self._evict(next(iter(self.resident)))
            run = PageRun(page, 1)
            if page in self.lost:
                return Reason.LOST
            if page in self.swapped:
                data = yield ReadSwap(page * PAGE_BYTES, PAGE_BYTES)
                if isinstance(data, int):
                    self.lost.add(page)
                    return Reason.LOST
                outcome = yield Fill(run, data.data, mapper, False)
                self.counts.swap_in += 1
                self.swapped.discard(page)
            else:
                outcome = yield Zero(run, mapper)
            assert outcome.errno in (0, errno.EEXIST), outcome
            self.resident[page] = None
            return None
        finally:
            del self.busy[page]
            yield Open(gate)

    def _evict(self, page: int) -> Generator[Effect, Any, None]:
        run = PageRun(page, 1)
        gate = self.busy[page] = Gate()
        del self.resident[page]
        yield WriteProtect(run)
        number = yield WriteSwap(page * PAGE_BYTES, [self.frames.view(run)])
        assert number == 0, number
        yield Punch(run)
        yield Unprotect(run)
        self.swapped.add(page)
        self.counts.evictions += 1
        del self.busy[page]
        yield Open(gate)

    def discard(self, pages: PageRun) -> Procedure[None]:
        self.calls.append(("discard", pages, True))
        for page in range(pages.first, pages.end):
            while page in self.busy:
                yield Pause(self.busy[page])
            self.resident.pop(page, None)
            self.swapped.discard(page)
        yield Punch(pages)

    def removed(self, _mapper: int, pages: PageRun, *, dropped: bool | None) -> Procedure[None]:
        self.calls.append(("removed", pages, dropped))
        if not dropped:
            return
        while (yield Present(pages)).any():
            yield Backoff(50 * US_NS)
        for page in range(pages.first, pages.end):
            self.resident.pop(page, None)
            self.swapped.discard(page)

    def reclaim(self) -> Procedure[int]:
        yield from ()
        return 0

    wants_reclaim = False

    @property
    def first_touch(self) -> FifoPager:
        return self

    def open(self, mapper: Mapper, n_most: int) -> None:
        pass

    def begin(self, page: int) -> int:
        return 0

    def failed(self) -> None:
        raise AssertionError("none was begun")

    def came(self, page: int, n: int, n_done: int) -> bool:
        raise AssertionError("none was begun")

    def close(self) -> None:
        pass

    def give_back(self, n_pages: int) -> Procedure[int]:
        return self.reclaim()

    def set_budget(self, n_pages: int) -> Procedure[None]:
        self.budget = n_pages
        while len(self.resident) > n_pages:
            yield from self._evict(next(iter(self.resident)))

    def recover(self) -> Procedure[None]:
        raise AssertionError("this pager keeps nothing that could be recovered")

    def statistics(self) -> Statistics:
        return self.counts
