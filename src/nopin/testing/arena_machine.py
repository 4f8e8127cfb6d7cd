"""One arena on a machine made of numpy arrays: frames, processes' page tables, a swap file, and the real pager.

Everything the pager relies upon is here as userfaultfd and memfd behave (and as `server/arena_machine.py` uses them):
marks of write protection that outlive their page, faults of several mappers for one page, wake-ups that find nothing.
Threads of processes run between any two effects, as real ones do; procedures of the pager take turns only where the
live runner lets them, at effects that wait. Who goes next is the caller's choice, so a seed replays a run.

Every access is checked against what was stored last. A frame given back is filled with `GONE`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.mirror import Mirror
from nopin.mm.arena_pages import News, PagerSettings
from nopin.mm.effects import (
    SERVER,
    Backoff,
    Effect,
    Fill,
    Gate,
    MapIn,
    Open,
    Outcome,
    PageRun,
    Pause,
    Poison,
    Present,
    Procedure,
    Punch,
    Quiesce,
    ReadSwap,
    Unprotect,
    Wake,
    WriteProtect,
    WriteSwap,
    Zero,
)
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import PageTable
from nopin.mm.pager import Pager
from nopin.mm.residency import Budget
from nopin.mm.space import Bytes
from nopin.mm.swap import SwapSpace
from nopin.units import PAGE_BYTES

GONE = 0xDB
WAITING = ReadSwap | WriteSwap | Quiesce | Pause | Backoff


@dataclass(slots=True, eq=False)
class Access:
    """One load or store, by a thread of a process or (mapper SERVER) by a device.

    Attributes:
        value: stored; None for a load.
        done, killed: it has been made; or it got SIGBUS, a device an access error.
        asleep: it waits until somebody wakes it.
    """

    mapper: int
    page: int
    value: int | None
    done: bool = False
    killed: bool = False
    asleep: bool = False


@dataclass(slots=True)
class Process:
    """The page table of one mapper: whether each mapped page is write-protected; marks of pages that are not mapped."""

    mapped: dict[int, bool] = field(default_factory=dict)
    marks: set[int] = field(default_factory=set)
    poisoned: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Task:
    """A procedure that has begun; `result` is sent to it when it goes on."""

    procedure: Generator[Effect, Any, Any]
    then: Callable[[Any], None]
    result: Any = None


class ArenaMachine:
    """See above.

    Attributes:
        truth: what was stored last in each page.
        tasks: procedures that can go on.
        fail_read, fail_write: called with (offset, length) of a swap access; an errno other than 0 makes it fail.
        n_most_resident: the most pages that were in the file at once.
    """

    def __init__(
        self,
        n_pages: int,
        budget: int,
        n_mappers: int = 2,
        swap_limit_bytes: int = 1 << 30,
        *,
        compress: bool = True,
    ) -> None:
        self.n_pages = n_pages
        self.memory = np.full(n_pages * PAGE_BYTES, GONE, np.uint8)
        self.present = np.zeros(n_pages, np.bool_)
        self.processes = {number: Process() for number in range(1, n_mappers + 1)}
        self.swap_file = bytearray()
        self.shared: Bytes = np.zeros(PageTable.bytes_needed(n_pages), np.uint8)
        self.truth: list[int] = [0] * n_pages
        self.fail_read: Callable[[int, int], int] = lambda _offset, _length: 0
        self.fail_write: Callable[[int, int], int] = lambda _offset, _length: 0
        self.n_most_resident = 0
        self.lost: set[int] = set()
        self._swap_limit_bytes = swap_limit_bytes
        self._compress = compress
        self._boot(budget)

    def _boot(self, budget: int) -> None:
        self.tasks: list[Task] = []
        self._running: Task | None = None
        self._effect: Effect | None = None
        self.sleepers: list[Access] = []
        self.budget = Budget(budget)
        self.notifiers = Notifiers()
        self.table = PageTable(self.n_pages, self.shared)
        self.swap = SwapSpace(self._swap_limit_bytes)
        news = News(pages_lost=self.lost.add)
        settings = PagerSettings(compress=self._compress, patience_ns=0, fault_around_pages=4)
        self.pager = Pager(self.table, self.swap, self.budget, self.notifiers, self, settings, news)
        self.mirror = Mirror(self.notifiers, self.pager, self.n_pages)

    def kill_server(self) -> None:
        """The server ends between two effects, and a new one takes over; processes know nothing of it."""
        budget, accesses = self.budget.n_pages, self.sleepers
        self._boot(budget)
        self.start(self.pager.recover())
        while self.tasks or self._running:
            self.step(0)
        for access in accesses:
            access.asleep = False  # the faults are raised again

    # Procedures

    def start(self, procedure: Procedure[Any], then: Callable[[Any], None] = lambda _result: None) -> None:
        """Begin a procedure; it takes its first step when it is chosen."""
        self.tasks.append(Task(procedure, then))

    @property
    def busy(self) -> bool:
        """True while some procedure can go on."""
        return bool(self.tasks or self._running)

    def step(self, choice: int) -> None:
        """Carry out one effect: of the procedure that runs, or of the one chosen among those that may."""
        task = self._running
        if task is None:
            if not self.tasks:
                return
            task = self._running = self.tasks.pop(choice % len(self.tasks))
        try:
            effect = task.procedure.send(task.result)
        except StopIteration as stop:
            self._running = None
            task.then(stop.value)
            return
        if isinstance(effect, WAITING):
            self._running = None
            if isinstance(effect, Pause) and not effect.gate.is_open:
                effect.gate.waiting.append(task)
                task.result = None
                return
            task.result = self._wait(effect)
            self.tasks.append(task)
            return
        task.result = self._act(effect)
        self.n_most_resident = max(self.n_most_resident, int(self.present.sum()))

    def _wait(self, effect: Effect) -> Any:
        if isinstance(effect, ReadSwap):
            problem = self.fail_read(effect.offset_bytes, effect.length_bytes)
            data = self.swap_file[effect.offset_bytes : effect.offset_bytes + effect.length_bytes]
            return problem or (np.frombuffer(bytes(data), np.uint8) if len(data) == effect.length_bytes else errno.EIO)
        if isinstance(effect, WriteSwap):
            written = b"".join(piece.tobytes() for piece in effect.pieces)
            problem = self.fail_write(effect.offset_bytes, len(written))
            if problem:
                return problem
            end = effect.offset_bytes + len(written)
            self.swap_file.extend(bytes(max(0, end - len(self.swap_file))))
            self.swap_file[effect.offset_bytes : end] = written
            return 0
        return None

    def _act(self, effect: Effect) -> Any:
        if isinstance(effect, Zero | Fill):
            return self._make(effect)
        if isinstance(effect, MapIn):
            return self._map_in(effect)
        if isinstance(effect, WriteProtect | Unprotect):
            return self._protect(effect)
        if isinstance(effect, Wake):
            return self._wake(effect.mapper, effect.pages)
        if isinstance(effect, Poison):
            process = self.processes[effect.mapper]
            process.poisoned |= {p for p in _numbers(effect.pages) if p not in process.mapped}
            self._wake(effect.mapper, effect.pages)
            return Outcome(effect.pages.n, 0)
        if isinstance(effect, Punch):
            return self._punch(effect.pages)
        if isinstance(effect, Present):
            return self.present[effect.pages.first : effect.pages.end].copy()
        assert isinstance(effect, Open)
        return self._open(effect.gate)

    def _make(self, effect: Zero | Fill) -> Outcome:
        for n_done, page in enumerate(_numbers(effect.pages)):
            if self.present[page]:
                return self._part_done(effect.mapper, effect.pages, n_done, errno.EEXIST)
            frame = self.frame(page)
            frame[:] = 0 if isinstance(effect, Zero) else effect.data[n_done * PAGE_BYTES :][:PAGE_BYTES]
            self.present[page] = True
            if effect.mapper != SERVER:
                self._map(effect.mapper, page, protect=isinstance(effect, Fill) and effect.protect)
        self._wake(effect.mapper, effect.pages)
        return Outcome(effect.pages.n, 0)

    def _map_in(self, effect: MapIn) -> Outcome:
        process = self.processes[effect.mapper]
        for n_done, page in enumerate(_numbers(effect.pages)):
            if not self.present[page]:
                return self._part_done(effect.mapper, effect.pages, n_done, errno.EFAULT)
            if page in process.mapped:
                return self._part_done(effect.mapper, effect.pages, n_done, errno.EEXIST)
            self._map(effect.mapper, page, protect=effect.protect)
        self._wake(effect.mapper, effect.pages)
        return Outcome(effect.pages.n, 0)

    def _part_done(self, mapper: int, pages: PageRun, n_done: int, problem: int) -> Outcome:
        """End early; whoever waits at what is done is woken all the same."""
        if n_done:
            self._wake(mapper, PageRun(pages.first, n_done))
        return Outcome(n_done, problem)

    def _map(self, mapper: int, page: int, *, protect: bool) -> None:
        process = self.processes[mapper]
        process.mapped[page] = protect or page in process.marks
        process.marks.discard(page)
        process.poisoned.discard(page)

    def _protect(self, effect: WriteProtect | Unprotect) -> None:
        on = isinstance(effect, WriteProtect)
        for number in self.processes if effect.mapper is None else [effect.mapper]:
            process = self.processes[number]
            for page in _numbers(effect.pages):
                if page in process.mapped:
                    process.mapped[page] = on
                elif on:
                    process.marks.add(page)
                else:
                    process.marks.discard(page)
            if not on:
                self._wake(number, effect.pages)

    def _punch(self, pages: PageRun) -> None:
        for page in _numbers(pages):
            self.present[page] = False
            self.frame(page)[:] = GONE
            for process in self.processes.values():
                if process.mapped.pop(page, False):
                    process.marks.add(page)  # protection outlives the page

    def _wake(self, mapper: int, pages: PageRun) -> None:
        for access in self.sleepers:
            if access.mapper == mapper and pages.first <= access.page < pages.end:
                access.asleep = False
        self.sleepers = [access for access in self.sleepers if access.asleep]

    def _open(self, gate: Gate) -> None:
        gate.is_open = True
        self.tasks += gate.waiting
        gate.waiting = []

    # Accesses

    @property
    def may_use_device(self) -> bool:
        """Devices copy between the steps of procedures, never inside one."""
        return self._running is None

    def attempt(self, access: Access) -> None:
        """Have an access go on: it is made, or it faults and sleeps."""
        assert not access.done
        if access.mapper == SERVER:
            self._attempt_of_device(access)
            return
        process, page = self.processes[access.mapper], access.page
        protected = process.mapped.get(page)
        if page in process.poisoned:
            access.killed = access.done = True
        elif protected is None or (protected and access.value is not None):
            access.asleep = True
            self.sleepers.append(access)
            self.start(self._fault(access, protected=protected is not None))
        else:
            self._make_access(access)

    def _fault(self, access: Access, *, protected: bool) -> Procedure[None]:
        """Answer a fault as the server does: the quick way if there is one."""
        minor = not protected and bool(self.present[access.page])
        if not minor and not protected:
            touch = self.pager.first_touch(access.mapper, access.page)
            if touch is not None and self.pager.first_touched(touch, (yield touch)):
                return
        write = access.value is not None
        yield from self.pager.cpu_fault(access.mapper, access.page, write=write, minor=minor, protected=protected)

    def _attempt_of_device(self, access: Access) -> None:
        write = access.value is not None
        if self.mirror.use(access.page, 1, write=write):
            self._make_access(access)
            return
        run = PageRun(access.page, 1)
        access.asleep = True

        def filled(came: Any) -> None:
            if came.reason is not None and came.reason.name != "BUSY":
                access.killed = access.done = True
            elif came.reason is None:
                if self.mirror.use(access.page, 1, write=write):
                    self._make_access(access)
                self.mirror.unhold(run, came)
            access.asleep = False

        self.start(self.mirror.fill(run, write=write), filled)

    def _make_access(self, access: Access) -> None:
        page = access.page
        assert self.present[page], f"{access} reached page {page}, which is not there"
        words: NDArray[np.uint64] = self.frame(page).view(np.uint64)
        who = "a device" if access.mapper == SERVER else f"process {access.mapper}"
        assert words[0] == words[-1] == self.truth[page], (
            f"{who} finds {words[0]:#x} ... {words[-1]:#x} in page {page}; {self.truth[page]:#x} was stored last"
        )
        if access.value is not None:
            words[:] = self.truth[page] = access.value
        access.done = True

    # Frames

    def frame(self, page: int) -> Bytes:
        """The bytes of one page."""
        return self.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]

    def view(self, pages: PageRun) -> Bytes:
        """See `Frames`."""
        assert self.present[pages.first : pages.end].all(), f"{pages}: the pager looks at pages that are not there"
        return self.memory[pages.first * PAGE_BYTES : pages.end * PAGE_BYTES]

    # Afterwards

    def check_books(self) -> None:
        """Check, with nothing under way, that budget, table, file and swap agree. Requires: not `busy`."""
        assert self.budget.n_used == int(self.present.sum())
        assert not self.pager.n_held
        copies = [(int(u), -(-int(s) // 512)) for u, s in zip(self.table.units, self.table.stored, strict=True) if u]
        assert self.swap.n_used == sum(n for _, n in copies)
        assert len({unit + at for unit, n in copies for at in range(n)}) == self.swap.n_used, "copies overlap"
        self.mirror.check()
        for process in self.processes.values():
            for page, protected in process.mapped.items():
                assert self.present[page]
                assert protected or not self.table.units[page], (
                    f"page {page} may be written unheard, and counts as clean"
                )


def _numbers(pages: PageRun) -> range:
    return range(pages.first, pages.end)
