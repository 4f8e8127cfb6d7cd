"""A real pager with a real mirror over an arena machine: the whole of managed memory but for the kernel.

Processes and the device reach cells of pages, which the oracle watches (`oracle/cells.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np

from nopin.iommu.mirror import Mirror
from nopin.mm.arena_pages import News, PagerSettings
from nopin.mm.effects import Gate, PageRun, Pause, Procedure
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import BUSY, PageState, PageTable
from nopin.mm.pager import Pager
from nopin.mm.residency import Budget
from nopin.mm.space import Reason
from nopin.mm.swap import SwapSpace, n_units
from nopin.model.arena.machine import ArenaMachine
from nopin.model.arena.processes import Fault, Killed, Message
from nopin.model.effects import Work
from nopin.model.oracle.cells import Cells
from nopin.model.oracle.violation import violate
from nopin.model.scheduler import Scheduler, Task

Steps = Generator[Any, Any, None]


class PagedArena:
    """See above.

    Args:
        budget_pages: that may be resident.
        pushes: the device is given pages as they become present.

    Attributes:
        lost: pages whose bytes the pager declared gone.
        n_killed: accesses of processes answered with SIGBUS. refused: device accesses that failed, by reason.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        n_pages: int,
        budget_pages: int,
        n_mappings: int = 2,
        settings: PagerSettings | None = None,
        pushes: bool = False,
    ) -> None:
        self.n_pages = n_pages
        self._pushes = pushes
        self.settings = settings or PagerSettings()
        self.machine = ArenaMachine(n_pages, scheduler, n_mappings=n_mappings)
        self.cells = Cells(self.machine.memory)
        self.shared = np.zeros(PageTable.bytes_needed(n_pages), np.uint8)
        self.lost: set[int] = set()
        self.n_killed = 0
        self.refused: Counter[Reason] = Counter()
        self._recovering = False
        self._zapped: set[int] = set()
        self._zapped_new: set[int] = set()  # those that were empty when the server read of it
        self.begin(budget_pages)

    def begin(self, budget_pages: int) -> None:
        """Make a pager over what is there: the first one, or a successor."""
        self.table = PageTable(self.n_pages, self.shared)
        self.swap = SwapSpace(self.settings.swap_limit_bytes)
        self.budget = Budget(budget_pages)
        self.notifiers = Notifiers()
        news = News(pages_lost=self.lost.add)
        self.pager = Pager(self.table, self.swap, self.budget, self.notifiers, self.machine, self.settings, news)
        self.mirror = Mirror(self.notifiers, self.pager, self.n_pages, wants_updates=self._pushes)
        self.machine.fault = self._serve

    def take_over(self) -> Task:
        """Kill the server; a successor begins with the files, and wakes everybody. Returns its first task."""
        machine = self.machine
        machine.kill_server()
        self.cells.forget_giving_up()
        self.begin(self.budget.n_pages)
        self._recovering = True
        return machine.start("recover", self.pager.recover(), lambda _: self._recovered())

    def _recovered(self) -> None:
        self._recovering = False
        self.machine.hear(heard=True)
        self.machine.wake_everybody()

    def _serve(self, fault: Fault) -> None:
        mapper, page, write, minor, protected = fault

        def answer() -> Procedure[None]:
            return self.pager.cpu_fault(mapper, page, write=write, minor=minor, protected=protected)

        self.machine.send(Message(f"answers process {mapper} at page {page}", answer))

    # What processes, devices and owners do

    def thread(self, mapper: int, page: int, value: int | None, *, cell: int = 0) -> Steps:
        """Store a value to a page as a process, or (None) read it."""
        try:
            yield from self.machine.reach(mapper, page, write=value is not None)
        except Killed:
            self.n_killed += 1
            return
        if not self.machine.present[page]:
            violate("stale_access", f"process {mapper} has page {page} mapped, which is not in the file")
        self.cells.access(f"process {mapper}", page, cell, value)

    def device(self, run: PageRun, value: int | None, *, cell: int = 0, at_once: bool = False) -> Steps:
        """Store a value to each page of a run as the device, or read them. On the server's lane.

        Args:
            at_once: take pages that are in memory, or come without waiting, into the mirror without a fault.
        """
        while not self.mirror.use(run.first, run.n, write=value is not None):
            if at_once:
                write = value is not None
                settled = self.pager.settled(run, write=write) or (yield from self.pager.settle(run, write=write))
                if settled and self.mirror.take_in(run, write=write):
                    continue
            came = yield from self.mirror.fill(run, write=value is not None)
            if came.reason is not None and came.reason is not Reason.BUSY:
                self.mirror.unhold(run, came)
                self.refused[came.reason] += 1
                return
            if came.reason is None and self.mirror.use(run.first, run.n, write=value is not None):
                self._device_access(run, value, cell)
                self.mirror.unhold(run, came)
                return
            self.mirror.unhold(run, came)
        self._device_access(run, value, cell)

    def _device_access(self, run: PageRun, value: int | None, cell: int) -> None:
        for page in range(run.first, run.end):
            if not self.machine.present[page] and not self._may_be_a_hole(page):
                violate("stale_access", f"the device reaches page {page}, which is not in the file")
            self.machine.view(PageRun(page, 1))
            self.cells.access("the device", page, cell, value)

    def _may_be_a_hole(self, page: int) -> bool:
        """Tell whether the device may reach a page that is not in the file, which makes one of zeros there.

        So it is with pages that came in after the server had read of a madvise, and that the kernel dropped after that.
        """
        return self.cells.is_being_given_up(page) or page in self._zapped_new

    def discard(self, run: PageRun) -> Steps:
        """Give pages up by word. On the server's lane."""
        began_at = self.cells.begin_giving_up(run)
        yield from self.pager.discard(run)
        self.cells.end_giving_up(run, began_at)

    def remove(self, run: PageRun, *, mapper: int = 1, dropped: bool | None = True) -> Steps:
        """Give pages up by MADV_REMOVE: when the server has read of it the kernel drops them, at its own time."""
        began_at = self.cells.begin_giving_up(run)
        read = Gate()
        new: list[int] = []

        def hear() -> Procedure[None]:
            new.extend(page for page in range(run.first, run.end) if self.table.state[page] == PageState.EMPTY)
            return self.pager.removed(mapper, run, dropped=dropped)

        def look() -> Callable[[], None]:
            expected = self.pager.expect_removal([run])
            return partial(self.pager.expect_no_more, expected, [run])

        self.machine.send(Message("hears of madvise", hear, read, look if dropped else None, mapper))
        yield Pause(read)
        self.machine.goes_on(mapper)
        yield Work("drops the pages")
        self._zapped.update(range(run.first, run.end))
        self._zapped_new.update(new)
        self.machine.zap(run)
        yield Work("has dropped the pages")
        self.cells.end_giving_up(run, began_at if dropped else None)

    # What must hold

    def check(self) -> None:
        """Check what holds at any time."""
        if self._recovering:
            return  # nothing is charged yet
        n_present = int(self.machine.present.sum())
        most = max(self.budget.n_pages, self.budget.n_used)
        if n_present > most + self.machine.n_silent_zeros:
            violate("unbalanced", f"{n_present} pages are resident, {most} are charged or allowed")
        self.mirror.check()

    def check_idle(self) -> None:
        """Check what holds when nothing is under way.

        A page that the kernel dropped because of a madvise may be gone although it came in after the server had read of
        that: the next fault finds out.
        """
        table, machine = self.table, self.machine
        resident = table.states == PageState.RESIDENT
        copied = table.units != 0
        taken = [n_units(int(stored)) for stored in table.stored[copied & (table.states != PageState.LOST)]]
        stores = [page for each in machine.mappings.values() for page, writable in each.writable.items() if writable]
        balances = {
            "pages are busy for ever": (table.states & BUSY).any(),
            "charges and residency disagree": self.budget.n_used != int(resident.sum()),
            "pages are held for ever": self.pager.n_held != 0,
            "space in swap got lost": self.swap.n_used != sum(taken),
            "the table and the file disagree": not set(np.flatnonzero(resident != machine.present)) <= self._zapped,
            "an empty page has a copy": (copied & (table.states == PageState.EMPTY)).any(),
            "a page in swap has no copy": not copied[table.states == PageState.SWAPPED].all(),
            "a store to a page with a valid copy would not be heard": copied[stores].any(),
        }
        waiting = [task.name for task in machine.tasks if not task.ended]
        if waiting:
            violate("unanswered_fault", f"the server waits for ever: {', '.join(waiting)}")
        for what, holds in balances.items():
            if holds:
                violate("unbalanced", what)
