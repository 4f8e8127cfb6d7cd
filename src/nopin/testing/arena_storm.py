"""A storm over one arena: processes, a device, evictions, prefetches and discards at once, against an oracle of bytes.

Every page has two *cells* of eight bytes. Accesses write a number nobody wrote before (now and then zero, so that pages
become all zeros), or read and compare with what the oracle allows: exactly the number last written, but for pages that
are being given up, where zero is right too.

The order of everything is decided by one random generator. Processes run between any two effects of the pager; devices,
being the server itself, only where procedures wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from nopin.iommu.mirror import Mirror
from nopin.mm.arena_pages import News, PagerSettings
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import BUSY, PageState, PageTable
from nopin.mm.pager import Pager
from nopin.mm.residency import Budget
from nopin.mm.space import Reason
from nopin.mm.swap import SwapSpace, n_units
from nopin.testing.arena_machine import ArenaMachine, Killed
from nopin.units import PAGE_BYTES, U64_MAX

_CELLS = (0, PAGE_BYTES - 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class StormSettings:
    """What blows.

    Attributes:
        n_mappings: processes. n_threads: accesses of processes under way at once, at most.
        budgets: what the budget may be set to; the first one at the beginning.
        discards, removals: processes give pages up, by word or by madvise.
        pushes: the device is given pages as they become present.
        pager: settings of the pager.
    """

    n_pages: int = 40
    n_mappings: int = 2
    n_threads: int = 6
    budgets: tuple[int, ...] = (12, 8, 20)
    discards: bool = True
    removals: bool = False
    pushes: bool = False
    pager: PagerSettings = field(default_factory=PagerSettings)


class Storm:
    """See above.

    Attributes:
        n_reads, n_writes: accesses that passed, of processes and the device.
        n_killed: accesses answered with SIGBUS. refused: device faults that failed, by reason.
        lost: pages whose bytes the pager declared gone.
    """

    def __init__(self, seed: int, settings: StormSettings | None = None) -> None:
        self.settings = settings or StormSettings()
        self.random = Random(seed)
        n_pages = self.settings.n_pages
        self.machine = ArenaMachine(n_pages, self.random, n_mappings=self.settings.n_mappings)
        self.machine.between = self._between
        self.shared = np.zeros(PageTable.bytes_needed(n_pages), np.uint8)
        self.n_reads = self.n_writes = self.n_killed = 0
        self.refused: Counter[Reason] = Counter()
        self.lost: set[int] = set()
        self._allowed: dict[tuple[int, int], set[int]] = {}
        self._giving_up: Counter[int] = Counter()
        self._runnable: list[Callable[[], None]] = []
        self._n_asleep = 0
        self._n_device = 0
        self._zaps: list[PageRun] = []
        self._next_value = 1
        self._blowing = False
        self._n_budget_changes = 0
        self._most = self.settings.budgets[0]
        self.begin(self.settings.budgets[0])

    def begin(self, budget_pages: int) -> None:
        """Make a pager over what is there: the first one, or a successor."""
        self.table = PageTable(self.settings.n_pages, self.shared)
        self.swap = SwapSpace(self.settings.pager.swap_limit_bytes)
        self.budget = Budget(budget_pages)
        self.notifiers = Notifiers()
        news = News(pages_lost=self.lost.add)
        self.pager = Pager(self.table, self.swap, self.budget, self.notifiers, self.machine, self.settings.pager, news)
        n_pages, pushes = self.settings.n_pages, self.settings.pushes
        self.mirror = Mirror(self.notifiers, self.pager, n_pages, wants_updates=pushes)

    def take_over(self) -> None:
        """The server was killed: a successor begins with the files, and wakes everybody."""
        machine = self.machine
        self._blowing = False
        machine.forget_tasks()
        self._giving_up.clear()  # undone or half done; the oracle allows both from then on
        self._n_device = 0
        self._n_budget_changes = 0
        self.begin(self._most)
        machine.run(self.pager.recover())
        for mapping in machine.mappings.values():
            for page in list(mapping.asleep):
                for again in mapping.asleep.pop(page):
                    again()

    # The storm

    def blow(self, n_steps: int) -> None:
        """Take random steps."""
        self._blowing = True
        for _ in range(n_steps):
            self._step()
            self._check()
        self._blowing = False

    def calm(self) -> None:
        """Let everything that is under way end; raises AssertionError if something hangs."""
        self.rest()
        waiting = [task.effect for task in self.machine.waiting]
        assert not waiting, f"procedures that wait for ever: {waiting}"
        assert self._n_asleep == 0, "threads that nobody wakes"
        self._check_idle()

    def rest(self) -> None:
        """Let everything go on that can."""
        machine = self.machine
        n_steps = 0
        while actions := [
            action
            for possible, action in (
                (machine.messages, self._serve),
                (self._runnable, self._retry),
                (self._zaps, self._zap),
                (machine.can_go_on, machine.go_on),
            )
            if possible
        ]:
            n_steps += 1
            assert n_steps < 200_000, "it never ends"
            self.random.choice(actions)()
            self._check()

    def read_everything(self) -> None:
        """Read every cell by a process, one after the other."""
        for page in range(self.settings.n_pages):
            self.read(1, page)
        self.calm()

    def read(self, mapper: int, page: int) -> bool:
        """Read a page by a process, or (0) by the device; False if that gets an error."""
        n_failed = self.n_killed + sum(self.refused.values())
        for cell in range(len(_CELLS)):
            if mapper:
                self._access(mapper, page, cell, None)
            else:
                self._n_device += 1
                self._device_access(PageRun(page, 1), cell, write=False)
            self.rest()
        return self.n_killed + sum(self.refused.values()) == n_failed

    def expect_zeros(self, run: PageRun) -> None:
        """Pages have been given up: they read as zeros until somebody stores to them."""
        for page in range(run.first, run.end):
            for cell in range(len(_CELLS)):
                self._allowed[page, cell] = {0}

    def store(self, mapper: int, page: int) -> None:
        """Store to all cells of a page by a process."""
        for cell in range(len(_CELLS)):
            self._access(mapper, page, cell, self._fresh())
            self.rest()

    def _step(self) -> None:
        choose = self.random.random()
        if choose < 0.25:
            self._cpu_op()
        elif choose < 0.35:
            self._device_op()
        elif choose < 0.60:
            self._serve()
        elif choose < 0.85:
            if self.machine.can_go_on:
                self.machine.go_on()
        elif choose < 0.90:
            self._retry()
        else:
            self.random.choice(self._rare())()

    def _rare(self) -> list[Callable[[], None]]:
        start, pager, run = self.machine.start, self.pager, self._run(8)
        rare: list[Callable[[], None]] = [
            lambda: start(pager.give_back(self.random.randrange(1, 10))),
            lambda: start(pager.reclaim()),
            lambda: start(pager.prefetch(run, write=self._coin())),
            lambda: self.machine.drop_mapping(self._mapper(), run),
            self._set_budget,
        ]
        if self.settings.discards:
            rare.append(lambda: self._give_up(run))
        if self.settings.removals:
            rare += [lambda: self._remove(run), self._zap, self._zap]
        return rare

    def _between(self) -> None:
        while self.random.random() < 0.4 and (self._blowing or self._runnable or self._zaps):
            if self._runnable and self._coin():
                self._retry()
            elif self._zaps and self._coin():
                self._zap()
            elif self._blowing:
                self._cpu_op()

    # Processes

    def _cpu_op(self) -> None:
        if self._n_asleep + len(self._runnable) < self.settings.n_threads:
            self._access(self._mapper(), self._page(), self.random.randrange(len(_CELLS)), self._value_or_read())

    def _access(self, mapper: int, page: int, cell: int, value: int | None) -> None:
        """An access of a process, now, or as soon as it is let."""

        def woken() -> None:
            self._n_asleep -= 1
            self._runnable.append(lambda: self._access(mapper, page, cell, value))

        try:
            fault = self.machine.touch(mapper, page, write=value is not None)
        except Killed:
            self.n_killed += 1
            return
        if fault is not None:
            self._n_asleep += 1
            self.machine.sleep(fault, woken)
            return
        assert self.machine.present[page], "a process has a page mapped that is not in the file"
        self._move(page, cell, value)

    def _retry(self) -> None:
        if self._runnable:
            self._runnable.pop(self.random.randrange(len(self._runnable)))()

    def _serve(self) -> None:
        """Read a message and have it answered."""
        if self.machine.messages:
            mapper, page, write, minor, protected = self.machine.messages.popleft()
            self.machine.start(self.pager.cpu_fault(mapper, page, write=write, minor=minor, protected=protected))

    # The device

    def _device_op(self) -> None:
        if self._n_device < 2:
            self._n_device += 1
            self._device_access(self._run(3), self.random.randrange(len(_CELLS)), write=self._coin())

    def _device_access(self, run: PageRun, cell: int, *, write: bool) -> None:
        if self.mirror.use(run.first, run.n, write=write):
            assert self.settings.removals or self.machine.present[run.first : run.end].all(), "a mirror of what is gone"
            self.machine.view(run)
            for page in range(run.first, run.end):
                self._move(page, cell, self._value() if write else None)
            self._n_device -= 1
            return

        if self._coin() and self.mirror.fill_present(run, write=write):
            self._device_access(run, cell, write=write)
            return

        def filled(came: FaultPages) -> None:
            if came.reason is not None and came.reason is not Reason.BUSY:
                self.refused[came.reason] += 1
                self._n_device -= 1
            else:
                self._device_access(run, cell, write=write)
            self.mirror.unhold(run, came)

        self.machine.start(self.mirror.fill(run, write=write), filled)

    # Giving up

    def _give_up(self, run: PageRun) -> None:
        self._begin_giving_up(run)
        self.machine.start(self.pager.discard(run), lambda _: self._end_giving_up(run))

    def _remove(self, run: PageRun) -> None:
        """MADV_REMOVE: the message is read, the kernel zaps some time later, the pager finds out."""
        self._begin_giving_up(run)
        self._begin_giving_up(run)
        self._zaps.append(run)
        dropped = self.random.choice((True, None))
        self.machine.start(self.pager.removed(run, dropped=dropped), lambda _: self._end_giving_up(run))

    def _zap(self) -> None:
        if self._zaps:
            run = self._zaps.pop()
            self.machine.zap(run)
            self._end_giving_up(run)

    def _begin_giving_up(self, run: PageRun) -> None:
        for page in range(run.first, run.end):
            self._giving_up[page] += 1
            for cell in range(len(_CELLS)):
                self._allowed.setdefault((page, cell), {0}).add(0)

    def _end_giving_up(self, run: PageRun) -> None:
        for page in range(run.first, run.end):
            self._giving_up[page] = max(0, self._giving_up[page] - 1)

    def _set_budget(self) -> None:
        budget = self.random.choice(self.settings.budgets)
        self._most = max(self._most, budget)
        self._n_budget_changes += 1
        self.machine.start(self.pager.set_budget(budget), lambda _: self._budget_set())

    def _budget_set(self) -> None:
        self._n_budget_changes -= 1
        if not self._n_budget_changes and self.budget.room >= 0:
            self._most = self.budget.n_pages

    # The oracle

    def _move(self, page: int, cell: int, value: int | None) -> None:
        at = page * PAGE_BYTES + _CELLS[cell]
        word = self.machine.memory[at : at + 8].view(np.uint64)
        allowed = self._allowed.setdefault((page, cell), {0})
        if value is not None:
            self.n_writes += 1
            word[0] = value
            allowed.clear()
            allowed.add(value)
            if self._giving_up[page]:
                allowed.add(0)
            return
        self.n_reads += 1
        found = int(word[0])
        assert found in allowed, f"page {page} cell {cell} reads {found:#x}, may be {allowed}"
        if not self._giving_up[page]:
            allowed.intersection_update({found})

    def _check(self) -> None:
        """Assert what holds at any time."""
        n_present = int(self.machine.present.sum())
        slack = self.machine.n_silent_zeros if self.settings.removals else 0
        assert n_present <= self._most + slack, f"{n_present} pages are resident; {self._most} may be"
        assert self.settings.removals or not self.machine.n_silent_zeros, "the server touched a hole"
        self.mirror.check()

    def _check_idle(self) -> None:
        """Assert what holds when nothing is under way."""
        table, machine = self.table, self.machine
        assert not (table.states & BUSY).any(), "busy for ever"
        resident = table.states == PageState.RESIDENT
        copied = table.units != 0
        if not self.settings.removals:
            assert (resident == machine.present).all(), "the table and the file disagree"
        assert self.budget.n_used == int(resident.sum()), "charges and residency disagree"
        taken = [n_units(int(stored)) for stored in table.stored[copied]]
        assert self.swap.n_used == sum(taken), "space in swap got lost"
        assert not (copied & (table.states == PageState.EMPTY)).any(), "an empty page with a copy"
        assert copied[table.states == PageState.SWAPPED].all(), "a page in swap without a copy"
        for mapping in machine.mappings.values():
            stores = [page for page, writable in mapping.writable.items() if writable]
            assert not copied[stores].any(), "a store to a page with a valid copy would not be heard"

    # Chance

    def _coin(self) -> bool:
        return self.random.random() < 0.5

    def _mapper(self) -> int:
        return self.random.randrange(1, self.settings.n_mappings + 1)

    def _page(self) -> int:
        """A page, the first ones more often."""
        return min(self.random.randrange(self.settings.n_pages), self.random.randrange(self.settings.n_pages))

    def _run(self, n_most: int) -> PageRun:
        n = self.random.randrange(1, n_most + 1)
        return PageRun(self.random.randrange(self.settings.n_pages - n + 1), n)

    def _value_or_read(self) -> int | None:
        return self._value() if self._coin() else None

    def _value(self) -> int:
        if self.random.random() < 0.2:
            return 0
        return self._fresh()

    def _fresh(self) -> int:
        """A number nobody wrote before, of which every byte matters."""
        self._next_value += 1
        return self._next_value * 0x9E3779B97F4A7C15 & U64_MAX
