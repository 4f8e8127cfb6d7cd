"""A small machine for the pager: frames, several processes' page tables, a swap file and a scheduler that interleaves.

It keeps to what Linux does with a memfd mapped by processes that registered a userfaultfd for missing, minor and
write-protect faults, as far as a pager can tell:

- A touch of a page that is not mapped, or a store to a protected one, makes a *message* and puts the thread to sleep at
  that page. Nothing but a wake-up of that page lets it try again. A message may be read long after it was true.
- Marks of write protection outlive the page: a page that is made or mapped later is protected again.
- Filling fails with EEXIST at a page that is there, mapping with EFAULT at a hole, and ends at the first such page.

Frames given back are filled with `GONE`, so that reading through a stale translation shows. The server may look at a
hole, which makes a page of zeros that nobody asked for (`n_silent_zeros`).

Effects that may not wait are carried out at once, but after each effect `between` is called: processes run on while the
pager works; and `after_effect`, where a test may kill the server. Those that may wait are carried out when the test, or
its random generator, says so.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.mm.effects import (
    SERVER,
    Backoff,
    Effect,
    Fill,
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
    ReadCached,
    ReadSwap,
    Unprotect,
    Wake,
    WriteProtect,
    WriteSwap,
    Zero,
)
from nopin.mm.space import Bytes
from nopin.units import PAGE_BYTES

GONE = 0xDB
"""What frames hold that were given back."""


class Fault(NamedTuple):
    """What a touch met: a message of userfaultfd."""

    mapper: int
    page: int
    write: bool
    minor: bool
    protected: bool


class Killed(Exception):
    """SIGBUS: the page's bytes are lost, or there is no room for it."""


@dataclass(slots=True)
class Mapping:
    """One process's page table of the arena.

    Attributes:
        writable: mapped pages, and whether stores pass. marked: pages whose protection outlived them.
        asleep: threads that wait, by page.
        alive: False: every operation fails with ESRCH.
    """

    writable: dict[int, bool] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    poisoned: set[int] = field(default_factory=set)
    asleep: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    alive: bool = True


@dataclass(slots=True, eq=False)
class Task:
    """A procedure that waits.

    Attributes:
        effect: what it waits for.
    """

    procedure: Procedure[Any]
    done: Callable[[Any], None] | None
    effect: Effect | None = None


class ArenaMachine:
    """See above.

    Args:
        n_pages: size of the arena.
        random: decides the order of what may happen in any order.

    Attributes:
        memory: (n_pages * 4096,) uint8, the frames; those of `present` pages count.
        mappings: of processes, by number from 1.
        messages: of faults, not yet read.
        swap: the swap file's bytes; grows as it is written.
        n_frames_left: pages that can be made before ENOMEM.
        effects: how many were carried out, by name.
        now_ns: grows with `Backoff` only.
        cached_share: of what is read from swap, by chance, as much comes without waiting.
    """

    def __init__(self, n_pages: int, random: Random, *, n_mappings: int = 1) -> None:
        self.n_pages = n_pages
        self.memory: Bytes = np.full(n_pages * PAGE_BYTES, GONE, np.uint8)
        self.present: NDArray[np.bool_] = np.zeros(n_pages, np.bool_)
        self.mappings = {number: Mapping() for number in range(1, n_mappings + 1)}
        self.messages: deque[Fault] = deque()
        self.swap = bytearray()
        self.n_frames_left = 1 << 60
        self.n_silent_zeros = 0
        self.n_effects = 0
        self.effects: dict[str, int] = {}
        self.now_ns = 0
        self.cached_share = 0.5
        self.after_effect: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        self.read_error: Callable[[int, int], int] = lambda _offset, _length: 0
        self.write_error: Callable[[int, int], int] = lambda _offset, _length: 0
        self.waiting: list[Task] = []
        self._random = random
        self._ready: deque[tuple[Task, Any]] = deque()
        self._stepping = False

    # What processes do

    def view(self, pages: PageRun) -> Bytes:
        """Return (n * 4096,) uint8, the frames: what a device reaches."""
        for page in range(pages.first, pages.end):
            if not self.present[page]:
                self.n_silent_zeros += 1
                self._make(page, None)
        return self.memory[pages.first * PAGE_BYTES : pages.end * PAGE_BYTES]

    def touch(self, number: int, page: int, *, write: bool) -> Fault | None:
        """Try an access of a process; None: it passes. Raises `Killed`."""
        mapping = self.mappings[number]
        if page in mapping.poisoned:
            raise Killed(page)
        writable = mapping.writable.get(page)
        if writable is None:
            return Fault(number, page, write, bool(self.present[page]), protected=False)
        if write and not writable:
            return Fault(number, page, write=True, minor=False, protected=True)
        return None

    def sleep(self, fault: Fault, again: Callable[[], None]) -> None:
        """Put a thread to sleep at its page; `again` is called when it is woken."""
        self.mappings[fault.mapper].asleep.setdefault(fault.page, []).append(again)
        self.messages.append(fault)

    def drop_mapping(self, number: int, pages: PageRun) -> None:
        """Forget a process's translations: MADV_DONTNEED. Protection leaves marks."""
        for page in range(pages.first, pages.end):
            self._unmap(self.mappings[number], page)

    def zap(self, pages: PageRun) -> None:
        """Take pages out of the file as the kernel does for MADV_REMOVE, or a process for its own file."""
        for page in range(pages.first, pages.end):
            self.n_frames_left += int(self.present[page])
            self.present[page] = False
            self.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = GONE
            for mapping in self.mappings.values():
                self._unmap(mapping, page)

    # Procedures

    def start(self, procedure: Procedure[Any], done: Callable[[Any], None] | None = None) -> None:
        """Run a procedure as far as it goes without waiting."""
        self._ready.append((Task(procedure, done), None))
        self._run_ready()

    def run(self, procedure: Procedure[Any]) -> Any:
        """Run a procedure to its end, and all that waits besides it; returns its result."""
        results: list[Any] = []
        self.start(procedure, results.append)
        while not results:
            assert self.can_go_on, "it waits for something that nobody will do"
            self.go_on()
        return results[0]

    @property
    def can_go_on(self) -> bool:
        """True while some waiting effect can be carried out."""
        return any(_possible(task.effect) for task in self.waiting)

    def go_on(self) -> None:
        """Carry out one waiting effect, any that can be."""
        task = self._random.choice([task for task in self.waiting if _possible(task.effect)])
        self.waiting.remove(task)
        self._ready.append((task, self._late(task.effect)))
        self._run_ready()

    def forget_tasks(self) -> None:
        """The server was killed: what it was doing ends where it is. Messages it has not read stay."""
        self.waiting.clear()
        self._ready.clear()

    def _run_ready(self) -> None:
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._ready:
                self._step(*self._ready.popleft())
        finally:
            self._stepping = False

    def _step(self, task: Task, result: Any) -> None:
        while True:
            try:
                effect = task.procedure.send(result)
            except StopIteration as stop:
                if task.done is not None:
                    task.done(stop.value)
                return
            self.n_effects += 1
            name = type(effect).__name__
            self.effects[name] = self.effects.get(name, 0) + 1
            if isinstance(effect, ReadSwap | WriteSwap | Quiesce | Pause | Backoff):
                task.effect = effect
                self.waiting.append(task)
                self._after()
                return
            result = self._at_once(effect)
            self._after()

    def _after(self) -> None:
        self.between()
        self.after_effect()

    # Effects

    def _late(self, effect: Effect | None) -> Any:
        match effect:
            case ReadSwap(offset, length):
                return self._read_swap(offset, length)
            case WriteSwap(offset, pieces):
                return self._write_swap(offset, pieces)
            case Backoff(delay_ns):
                self.now_ns += delay_ns
        return None

    def _at_once(self, effect: Effect) -> Any:
        match effect:
            case Zero(pages, mapper):
                return self._fill(pages, mapper, None, protect=False)
            case Fill(pages, data, mapper, protect):
                assert len(data) == pages.n * PAGE_BYTES
                return self._fill(pages, mapper, data, protect=protect)
            case MapIn(pages, mapper, protect):
                return self._map_in(pages, mapper, protect=protect)
            case WriteProtect(pages, mapper):
                for mapping in self._addressed(mapper):
                    _protect(mapping, pages)
            case Unprotect(pages, mapper):
                for mapping in self._addressed(mapper):
                    self._unprotect(mapping, pages)
            case Wake(pages, mapper):
                for mapping in self._addressed(mapper):
                    self._wake(mapping, pages)
            case Poison(pages, mapper):
                return self._poison(pages, mapper)
            case Punch(pages):
                self.zap(pages)
            case ReadCached(offset, length):
                found = self._read_swap(offset, length) if self._random.random() < self.cached_share else None
                return found if isinstance(found, np.ndarray) else None
            case Present(pages):
                return self.present[pages.first : pages.end].copy()
            case Open(gate):
                gate.is_open = True
            case _:
                raise AssertionError(effect)
        return None

    def _fill(self, pages: PageRun, mapper: int, data: Bytes | None, *, protect: bool) -> Outcome:
        mapping = self.mappings.get(mapper)
        if mapper != SERVER and (mapping is None or not mapping.alive):
            return Outcome(0, errno.ESRCH)
        for at in range(pages.n):
            page = pages.first + at
            problem = errno.EEXIST if self.present[page] else 0 if self.n_frames_left > 0 else errno.ENOMEM
            if problem:
                return self._filled(mapping, PageRun(pages.first, at), problem)
            self._make(page, None if data is None else data[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
            if mapping is not None:
                mapping.writable[page] = not (protect or page in mapping.marked)
        return self._filled(mapping, pages, 0)

    def _filled(self, mapping: Mapping | None, done: PageRun, problem: int) -> Outcome:
        if mapping is not None:
            self._wake(mapping, done)
        return Outcome(done.n, problem)

    def _make(self, page: int, data: Bytes | None) -> None:
        self.n_frames_left -= 1
        self.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = 0 if data is None else data
        self.present[page] = True

    def _map_in(self, pages: PageRun, mapper: int, *, protect: bool) -> Outcome:
        mapping = self.mappings.get(mapper)
        if mapping is None or not mapping.alive:
            return Outcome(pages.n, 0) if mapper == SERVER else Outcome(0, errno.ESRCH)
        for at, page in enumerate(range(pages.first, pages.end)):
            taken = page in mapping.writable or page in mapping.poisoned
            problem = errno.EEXIST if taken else 0 if self.present[page] else errno.EFAULT
            if problem:
                return self._filled(mapping, PageRun(pages.first, at), problem)
            mapping.writable[page] = not (protect or page in mapping.marked)
        return self._filled(mapping, pages, 0)

    def _poison(self, pages: PageRun, mapper: int) -> Outcome:
        mapping = self.mappings.get(mapper)
        if mapping is None or not mapping.alive:
            return Outcome(0, errno.ESRCH)
        for at, page in enumerate(range(pages.first, pages.end)):
            if page in mapping.writable:
                return self._filled(mapping, PageRun(pages.first, at), errno.EEXIST)
            mapping.poisoned.add(page)
        return self._filled(mapping, pages, 0)

    def _unprotect(self, mapping: Mapping, pages: PageRun) -> None:
        for page in range(pages.first, pages.end):
            mapping.marked.discard(page)
            if page in mapping.writable:
                mapping.writable[page] = True
        self._wake(mapping, pages)

    def _wake(self, mapping: Mapping, pages: PageRun) -> None:
        for page in range(pages.first, pages.end):
            for again in mapping.asleep.pop(page, ()):
                again()

    def _unmap(self, mapping: Mapping, page: int) -> None:
        if mapping.writable.pop(page, True) is False:
            mapping.marked.add(page)

    def _addressed(self, mapper: int | None) -> list[Mapping]:
        if mapper is None:
            return list(self.mappings.values())
        return [self.mappings[mapper]] if mapper in self.mappings else []

    def _read_swap(self, offset: int, length: int) -> Bytes | int:
        problem = self.read_error(offset, length)
        if problem:
            return problem
        if offset + length > len(self.swap):
            return errno.EIO
        return np.frombuffer(bytes(self.swap[offset : offset + length]), np.uint8)

    def _write_swap(self, offset: int, pieces: Sequence[Bytes]) -> int:
        data = b"".join(piece.tobytes() for piece in pieces)
        problem = self.write_error(offset, len(data))
        if problem:
            data = data[: len(data) // 2]  # a failed write may have done half
        self.swap.extend(bytes(max(0, offset + len(data) - len(self.swap))))
        self.swap[offset : offset + len(data)] = data
        return problem


def _protect(mapping: Mapping, pages: PageRun) -> None:
    for page in range(pages.first, pages.end):
        if page in mapping.writable:
            mapping.writable[page] = False
        mapping.marked.add(page)


def _possible(effect: Effect | None) -> bool:
    match effect:
        case Pause(gate):
            return gate.is_open
        case Quiesce(fences):
            return all(fence.passed for fence in fences)
    return True
