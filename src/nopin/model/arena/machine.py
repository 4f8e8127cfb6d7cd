"""The machine under one pager: frames, processes' page tables of an arena, their sleeping threads, a swap file.

It keeps to what Linux does with a memfd mapped by processes that registered a userfaultfd for missing, minor and
write-protect faults, as far as a pager can tell:

- A touch of a page that is not mapped, or a store to a protected one, makes a *message* and puts the thread to sleep at
  that page. Nothing but a wake-up of that page lets it try again. A message may be read long after it was true.
- Marks of write protection outlive the page: a page that is made or mapped later is protected again.
- Filling fails with EEXIST at a page that is there, mapping with EFAULT at a hole, and ends at the first such page.
- While a process is *inside* a call that sends a message, until it runs again after that was read, it cannot be filled
  or mapped for. Whoever tries reads the message, if its sender is seen; else what belongs to the file is done through
  the server's own mapping, and threads are woken later (`server/arena_machine.py`).

Frames given back are filled with `GONE`, so that reading through a stale translation shows. The server may look at a
hole, which makes a page of zeros that nobody asked for (`n_silent_zeros`).

It is a port of the scheduler. The server's tasks share one lane: they give it up only where they wait, and processes
run between any two of their effects. The swap file answers later, when its own step comes.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.mm.effects import (
    SERVER,
    Fill,
    HasGoneOn,
    MapIn,
    Outcome,
    PageRun,
    Poison,
    Present,
    Procedure,
    Punch,
    ReadCached,
    ReadSwap,
    Unprotect,
    Wake,
    WriteProtect,
    WriteSwap,
    Zero,
)
from nopin.mm.residency import Pages
from nopin.mm.space import Bytes
from nopin.model.arena.processes import Asleep, Fault, Killed, Mapping, Message
from nopin.model.effects import Lane, Work
from nopin.model.scheduler import LATER, Performed, Scheduler, Task, _Later
from nopin.units import PAGE_BYTES

GONE = 0xDB
"""What frames hold that were given back."""


class ArenaMachine:
    """See above.

    Args:
        n_pages: size of the arena.
        n_mappings: processes.

    Attributes:
        memory: (n_pages * 4096,) uint8, the frames; those of `present` pages count.
        mappings: of processes, by number from 1.
        fault: called with each fault of a thread that has gone to sleep; to `send` a message.
        messages: not read yet.
        swap: the swap file's bytes; grows as it is written.
        n_frames_left: pages that can be made before ENOMEM.
        lane: the server's. tasks: of the server, alive.
        is_cached: asked whether bytes of swap can be had without waiting.
        is_seen: asked whether the sender of a message is seen by who looks.
        read_error, write_error: asked with (offset, length) for the errno of an access to swap.
    """

    def __init__(self, n_pages: int, scheduler: Scheduler, *, n_mappings: int = 1) -> None:
        self.n_pages = n_pages
        self.scheduler = scheduler
        self.memory: Bytes = np.full(n_pages * PAGE_BYTES, GONE, np.uint8)
        self.present: NDArray[np.bool_] = np.zeros(n_pages, np.bool_)
        self.mappings = {number: Mapping() for number in range(1, n_mappings + 1)}
        self.fault: Callable[[Fault], None] = _unheard
        self.messages: deque[Message] = deque()
        self.swap = bytearray()
        self.n_frames_left = 1 << 60
        self.n_silent_zeros = 0
        self.n_effects = 0
        self.lane = Lane("server")
        self.tasks: list[Task] = []
        self.is_cached: Callable[[], bool] = _never
        self.is_seen: Callable[[], bool] = _always
        self.read_error: Callable[[int, int], int] = _no_error
        self.write_error: Callable[[int, int], int] = _no_error
        self._reader: Task | None = None
        self._reads = True

    # What processes do

    def view(self, pages: PageRun) -> Bytes:
        """Return (n * 4096,) uint8, the frames: what a device reaches."""
        for page in range(pages.first, pages.end):
            if not self.present[page]:
                self.n_silent_zeros += 1
                self._make(page, None)
        return self.memory[pages.first * PAGE_BYTES : pages.end * PAGE_BYTES]

    def begin_with_zeros(self, pages: Pages) -> NDArray[np.bool_]:
        """Tell of each page whether its first word is zero."""
        return np.array([not self.view(PageRun(page, 1))[:8].any() for page in pages.tolist()], np.bool_)

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

    def reach(self, number: int, page: int, *, write: bool) -> Generator[Any, Any, None]:
        """Reach a page as a thread of a process does: ends in the step in which the access passes. Raises `Killed`."""
        while (fault := self.touch(number, page, write=write)) is not None:
            yield Asleep(fault)

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

    # The server

    def start(self, name: str, procedure: Procedure[Any], done: Callable[[Any], None] | None = None) -> Task:
        """Have the server run a procedure; a number is added to a name that is in use."""
        self.tasks = [task for task in self.tasks if not task.ended]
        task = self.scheduler.spawn(self._unique(name), procedure, port=self, lane=self.lane, done=done)
        self.tasks.append(task)
        return task

    def run(self, procedure: Procedure[Any]) -> Any:
        """Have the server run a procedure to its end, with all that happens besides; returns its result."""
        task = self.start("runs", procedure)
        while not task.ended:
            assert self.scheduler.step(), f"it waits for {task.waits_for}, which nobody will do"
        return task.result

    def begin(self, procedure: Procedure[Any]) -> Task:
        """Have the server run a procedure until it waits."""
        task = self.start("begins", procedure)
        while not task.ended and task.waits_for is None:
            self.scheduler.step()
        return task

    def send(self, message: Message) -> None:
        """Leave a message for the server. It reads them in order, at some time, and then begins to answer."""
        if message.sender:
            self.mappings[message.sender].inside += 1
        self.messages.append(message)
        self._have_one_read()

    def goes_on(self, number: int) -> None:
        """A thread of a process runs again after its message was read."""
        mapping = self.mappings[number]
        mapping.inside -= 1
        if not mapping.inside:
            waiting, mapping.to_protect = mapping.to_protect, []
            for effect, task in waiting:
                if not task.ended and self._protects(effect, task):
                    self.scheduler.resume(task)

    def hear(self, *, heard: bool) -> None:
        """Have messages read, or left alone."""
        self._reads = heard
        self._have_one_read()

    def kill_server(self) -> None:
        """What it was doing ends where it is. Messages it has not read stay."""
        for task in self.tasks:
            self.scheduler.drop(task)
        self.tasks.clear()
        self.lane = Lane("server")
        self._reader = None
        self._reads = False

    def _have_one_read(self) -> None:
        if self._reads and self.messages and self._reader is None:
            self._reader = self.start("reads a message", self._read())

    def _read(self) -> Generator[Any, Any, Any]:
        """Take the oldest message and be its answer."""
        if not self.messages:  # it was read on the way of something else
            self._reader = None
            return None
        message = self.messages[0]
        noted = message.look() if message.look is not None else None
        if noted is not None:
            yield Work("has looked what is asked for")
        reader, self._reader = self._reader, None
        assert reader is not None
        self.messages.popleft()
        reader.name = self._unique(message.name)
        self._have_one_read()
        if message.read is not None:
            self.scheduler.open(message.read)
            yield Work("has read it")
        if noted is not None:
            noted()
        return (yield from message.answer())

    def _read_on_the_way(self, number: int) -> bool:
        """Read what a process inside of a call has to say, if its sender is seen; tell whether that was anything.

        What it gives up is taken at once; the rest of the answer comes later.
        """
        message = next((each for each in self.messages if each.sender == number), None)
        if message is None or not self.is_seen():
            return False
        noted = message.look() if message.look is not None else None
        self.messages.remove(message)
        assert message.read is not None
        self.scheduler.open(message.read)
        if noted is not None:
            noted()
        self.start(message.name, message.answer())
        return True

    def _unique(self, name: str) -> str:
        taken = {task.name for task in self.tasks if not task.ended}
        return next(each for each in chain((name,), (f"{name} ({n})" for n in count(2))) if each not in taken)

    def wake_everybody(self) -> None:
        """Have every thread that sleeps at a page try again."""
        for mapping in self.mappings.values():
            self._wake(mapping, PageRun(0, self.n_pages))

    def perform(self, effect: Any, task: Task) -> Performed | _Later:
        """Carry out an effect of the pager, or put a thread to sleep; see `Port`."""
        self.n_effects += 1
        if isinstance(effect, Asleep):
            self.mappings[effect.fault.mapper].asleep.setdefault(effect.fault.page, []).append(task)
            self.fault(effect.fault)
            return LATER
        if isinstance(effect, WriteProtect):
            return Performed(None) if self._protects(effect, task) else LATER
        if isinstance(effect, ReadSwap | WriteSwap):
            self.scheduler.call_at(self.scheduler.now_ns, f"swap for {task.name}", partial(self._swap, effect, task))
            return LATER
        return Performed(self._at_once(effect))

    def _swap(self, effect: ReadSwap | WriteSwap, task: Task) -> None:
        if isinstance(effect, ReadSwap):
            self.scheduler.resume(task, self._read_swap(effect.offset_bytes, effect.length_bytes))
        else:
            self.scheduler.resume(task, self._write_swap(effect.offset_bytes, effect.pieces))

    def _protects(self, effect: WriteProtect, task: Task) -> bool:
        """Have stores wait, if no process is inside of a call; else that is done when it is not any more."""
        for number, mapping in self.mappings.items():
            if mapping.inside and effect.mapper in (None, number):
                self._read_on_the_way(number)
                mapping.to_protect.append((effect, task))
                return False
        for mapping in self._addressed(effect.mapper):
            _protect(mapping, effect.pages)
        return True

    # Effects

    def _at_once(self, effect: Any) -> Any:
        match effect:
            case Zero(pages, mapper):
                return self._fill(pages, mapper, None, protect=False)
            case Fill(pages, data, mapper, protect):
                assert len(data) == pages.n * PAGE_BYTES
                return self._fill(pages, mapper, np.frombuffer(data, np.uint8), protect=protect)
            case MapIn(pages, mapper, protect):
                return self._map_in(pages, mapper, protect=protect)
            case Unprotect(pages, mapper):
                for number in self.mappings if mapper is None else [mapper]:
                    self._lift(number, pages)
            case Wake(pages, mapper):
                for mapping in self._addressed(mapper):
                    self._wake(mapping, pages)
            case Poison(pages, mapper):
                return self._poison(pages, mapper)
            case Punch(pages):
                self.zap(pages)
            case ReadCached(offset, length):
                found = self._read_swap(offset, length) if self.is_cached() else None
                return None if isinstance(found, int) else found
            case HasGoneOn(mapper):
                return not self.mappings[mapper].inside
            case Present(pages):
                return self.present[pages.first : pages.end].copy()
            case _:
                raise AssertionError(effect)
        return None

    def _fill(self, pages: PageRun, mapper: int, data: Bytes | None, *, protect: bool) -> Outcome:
        mapping = self.mappings.get(mapper)
        if mapper != SERVER and (mapping is None or not mapping.alive):
            return Outcome(0, errno.ESRCH)
        if mapping is not None and mapping.inside:
            if self._read_on_the_way(mapper) and data is not None:
                return Outcome(0, errno.EINTR)
            if mapping.inside:
                self._wake_later(mapper, pages)
                mapping = None
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
        if mapping.inside:
            self._read_on_the_way(mapper)
            self._wake_later(mapper, pages)
            return Outcome(pages.n, 0)
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

    def _lift(self, number: int, pages: PageRun) -> None:
        mapping = self.mappings.get(number)
        if mapping is None:
            return
        if mapping.inside:
            self._read_on_the_way(number)
            self._wake_later(number, pages)
        else:
            self._unprotect(mapping, pages)

    def _wake_later(self, number: int, pages: PageRun) -> None:
        wake = partial(self._wake, self.mappings[number], pages)
        self.scheduler.call_at(self.scheduler.now_ns, f"wakes threads of process {number}", wake)

    def _unprotect(self, mapping: Mapping, pages: PageRun) -> None:
        for page in range(pages.first, pages.end):
            mapping.marked.discard(page)
            if page in mapping.writable:
                mapping.writable[page] = True
        self._wake(mapping, pages)

    def _wake(self, mapping: Mapping, pages: PageRun) -> None:
        for page in range(pages.first, pages.end):
            for task in mapping.asleep.pop(page, ()):
                self.scheduler.resume(task)

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


def _never() -> bool:
    return False


def _always() -> bool:
    return True


def _no_error(_offset: int, _length: int) -> int:
    return 0


def _unheard(fault: Fault) -> None:
    raise AssertionError(f"nobody reads messages: {fault}")


def _protect(mapping: Mapping, pages: PageRun) -> None:
    for page in range(pages.first, pages.end):
        if page in mapping.writable:
            mapping.writable[page] = False
        mapping.marked.add(page)
