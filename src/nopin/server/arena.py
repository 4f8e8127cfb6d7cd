"""One arena of managed memory: its files, its pager, and the processes that map it.

Its pager decides, its runner acts (`pager_runner.py`), and this class brings them the faults and tells them what
processes do to their mappings:

    page fault        the pager's procedure for it, at once
    fork              the child maps the same, and says so: it shares the pages, as with any shared mapping
    mremap            the pages are where they went
    munmap            nobody maps these pages any more? then their bytes are gone, as a file's without a name
    madvise           DONTNEED keeps the bytes of shared memory, REMOVE gives them up
    exit, exec        the mapper goes

An arena lives as long as somebody other than an accelerator worker maps it, or its client has not given it up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from nopin.linux.arena_file import resident_bytes
from nopin.linux.fd_identity import identity_of
from nopin.linux.paging_uffd import FAULT_MINOR, FAULT_WP, FAULT_WRITE, Message, PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.causes import Cause
from nopin.mm.effects import Mapper as MapperNumber
from nopin.mm.effects import PageRun, Procedure
from nopin.ranges import Range, subtract
from nopin.server.arena_machine import ArenaMachine
from nopin.server.arena_maker import ArenaParts
from nopin.server.arena_store import MapperEntry
from nopin.server.fault_times import FaultTimes
from nopin.server.first_touches import FirstTouches
from nopin.server.mapper import IS_GIVEN_UP, Madvices, Mapper, Placed
from nopin.server.owner_view import OwnerView
from nopin.server.pager_runner import Clockwork, Runner
from nopin.server.registry import Record
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT, US_NS

_FLAGS = [(flags & FAULT_WRITE != 0, flags & FAULT_WP != 0, flags & FAULT_MINOR != 0) for flags in range(8)]
"""Of a fault's message: write, protected, minor."""
_PAGEFAULT = EventKind.PAGEFAULT
ROUNDS = 32
"""How often one process is answered in a row."""
_ROUNDS_BESIDE_OTHERS = 2
"""One on the server's CPU takes all its rounds; one on another CPU, which is slower to fault again, mostly gets one."""

_CLOSE_AGAIN_NS = 1000 * US_NS
_FIRST_MAPPER: MapperNumber = 1
_RECLAIM_AGAIN_NS = 10_000 * US_NS
_WAKE_AFTER_NS = 100 * US_NS
"""When to wake threads of a process that could not be served because it was inside fork or munmap."""


def _is_fault(message: Message) -> bool:
    return message[0] == _PAGEFAULT


class Host(Protocol):
    """What an arena needs of the server."""

    @property
    def clockwork(self) -> Clockwork:
        """Timers and threads."""
        ...

    @property
    def clock(self) -> Callable[[], int]:
        """Monotonic nanoseconds."""
        ...

    def serve(self, arena: Arena, mapper: Mapper) -> None:
        """Have a mapper's faults brought to `read`."""
        ...

    def stop_serving(self, mapper: Mapper) -> None:
        """Undo it."""
        ...

    def attend(self, arena: Arena) -> None:
        """Have `attend` of the arena called at the end of this turn."""
        ...

    def gone(self, arena: Arena) -> None:
        """Nobody uses the arena any more: it has been closed."""
        ...

    def broken(self, arena: Arena, problem: Exception) -> None:
        """A procedure of the arena raised."""
        ...

    def pressed(self, arena: Arena) -> None:
        """The arena needs room that others hold: have them give some back."""
        ...


class Arena:
    """A served arena.

    Args:
        number: names it among the server's.
        name: for figures.

    Attributes:
        wanted: its client has not given it up.
        awaited: a forked child that had no server to ask may still come.
        record: where a successor finds it.
        faults_worker: messages about faults of accelerator workers (and about what these do to their mappings).
        madvices: messages of madvise.
    """

    def __init__(self, host: Host, number: int, name: str, parts: ArenaParts) -> None:
        self.number = number
        self.name = name
        self.wanted = True
        self.awaited = False
        self.record: Record | None = None
        self.faults_worker = 0
        self.madvices = Madvices()
        self.parts = parts
        self.pager = parts.pager
        self.n_pages = parts.frames.n_pages
        self._times = FaultTimes()
        self._latency = self._times.counts
        self._file = identity_of(parts.frames.fd)
        self._host = host
        self._clock = host.clock
        self._machine = ArenaMachine(parts.frames, self._note)
        self._first_touches = FirstTouches(
            self.pager, self._machine, self._clock, self._latency, lambda: bool(self._noted)
        )
        self.runner = Runner(self._machine, parts.swap, host.clockwork, partial(host.broken, self))
        parts.device.runner = self.runner
        parts.news.pressure = partial(host.pressed, self)
        self._reclaiming = False
        self._next_mapper = _FIRST_MAPPER
        self._noted: set[Mapper] = set()
        self._begun: list[Procedure[None]] = []
        self._closed = False

    @property
    def budget_bytes(self) -> int:
        """What may be resident."""
        return self.parts.budget.limit * PAGE_BYTES

    @property
    def mappers(self) -> list[Mapper]:
        """The processes that map it."""
        return list(self._machine.mappers.values())

    @property
    def file_bytes(self) -> int:
        """Memory the frames take, as the kernel counts it."""
        return resident_bytes(self.parts.frames.fd)

    # Mappers

    def map(
        self, uffd: PagingUffd, place: Placed, process: PidFd, *, worker: bool, view: OwnerView | None = None
    ) -> Mapper:
        """Serve a process that has mapped pages. Owns the descriptors if it does not raise.

        A process that maps a second part brings a second userfaultfd, and is a second mapper.

        Raises:
            OSError: the store is full: were we killed, the process would read zeros.
        """
        mapper = Mapper(self._next_mapper, uffd, [place], process, worker=worker)
        if not self._remember(mapper):
            raise OSError(errno.ENOBUFS, "the arena's store has no room for one more process")
        self._add(mapper)
        if view is not None:
            self.show(mapper, view)
        return mapper

    def adopt(self, mapper: Mapper) -> Mapper:
        """Serve a process that a predecessor served, under the number it had."""
        self._next_mapper = max(self._next_mapper, mapper.number)
        self._add(mapper)
        return mapper

    def show(self, mapper: Mapper, view: OwnerView) -> None:
        """Have devices find the arena in the address space of a process, by one more of its connections."""
        mapper.views = [each for each in mapper.views if not each.dead] + [view]
        for place in mapper.places:
            view.show(place)

    def _add(self, mapper: Mapper) -> None:
        """Serve it. A successor has to know it already: once it is served, its bytes may depend on us."""
        self._next_mapper += 1
        mapper.removals = self.pager
        mapper.madvices = self.madvices
        self._machine.mappers[mapper.number] = mapper
        self._host.serve(self, mapper)

    def _remember(self, mapper: Mapper) -> bool:
        """Tell a successor of it; False if there is no room."""
        places = [(place.first, place.n, place.address) for place in mapper.places]
        entry = MapperEntry(mapper.number, places, mapper.worker, mapper.process.pid)
        return self.parts.store.put_mapper(entry, [mapper.uffd.fileno(), mapper.process.fileno()])

    def unmap(self, mapper: Mapper) -> None:
        """A process has gone, or maps nothing any more; free what nobody maps now. Twice is fine."""
        if self._machine.mappers.pop(mapper.number, None) is None:
            return
        self._noted.discard(mapper)
        self._host.stop_serving(mapper)
        mapper.close()
        self.parts.store.forget_mapper(mapper.number)
        if mapper.worker:
            return
        for place in mapper.places:
            for view in mapper.views:
                view.hide(place.where)
            self._free_unmapped(place)
        self.close_if_unused()

    def set_budget(self, budget_bytes: int, done: Callable[[], None]) -> None:
        """Change how much may be resident; `done` once no more is."""
        self.runner.start(self.pager.set_budget(budget_bytes // PAGE_BYTES), lambda _: done())

    def give_up(self) -> None:
        """The client does not want it any more; it lives on while a process maps it."""
        self.wanted = False
        self.close_if_unused()

    @property
    def in_use(self) -> bool:
        """True while somebody other than a worker maps some of it."""
        return any(not mapper.worker and mapper.places for mapper in self._machine.mappers.values())

    def close_if_unused(self) -> None:
        """End the arena when nobody is left who could use it, and nothing is under way."""
        if self._closed or self.wanted or self.awaited or self.in_use:
            return
        if self.runner.n_suspended:
            self._host.clockwork.after(_CLOSE_AGAIN_NS, self.close_if_unused)
            return
        self._closed = True
        for mapper in list(self._machine.mappers.values()):
            self.unmap(mapper)
        self.parts.close()
        self._host.gone(self)

    def probe(self) -> None:
        """Find mappers whose address space has ended unheard."""
        for mapper in list(self._machine.mappers.values()):
            if mapper.uffd.gone():
                self.unmap(mapper)

    # Messages

    def read(self, mapper: Mapper, *, alone: bool) -> None:
        """Answer what a process's userfaultfd has to say, and what it says then, up to `ROUNDS` times.

        A toucher on the same CPU gets it in between, faults again, and is answered without a turn of the whole loop.
        Looking what a madvise is for takes as long as half a fault. Where no page is in swap it can be found out later
        as well (`mm.giving_up`), so the look is made once a burst only.

        Args:
            alone: no other process faults. Beside others it gets fewer rounds.

        Raises:
            UsageError: the process tampered with it.
        """
        rounds = ROUNDS if alone else _ROUNDS_BESIDE_OTHERS
        began_ns = self._clock()
        messages = mapper.look_and_read()
        while messages:
            n_answered, began_ns, messages = self._first_touches.answer(mapper, messages, began_ns, rounds)
            rounds -= n_answered
            if mapper.worker:
                self.faults_worker += n_answered + len(messages)
            if messages:
                self._answer(mapper, messages, began_ns)
                rounds -= 1
                if rounds <= 0 or self._noted or mapper.number not in self._machine.mappers:
                    break
                began_ns, messages = self._first_touches.read_on(mapper)
        if self._noted:
            self.attend()

    def _answer(self, mapper: Mapper, messages: Sequence[Message], began_ns: int) -> None:
        """Deal with messages: events first, in order, so that faults are answered where things are now."""
        if len(messages) > 1:
            messages = sorted(messages, key=_is_fault)
        for message in messages:
            kind, flags, address, _ = message
            if kind != _PAGEFAULT:
                self._take_event(mapper, message)
                continue
            page = (address - mapper.bias) >> PAGE_SHIFT
            if not mapper.low <= page < mapper.high:
                found = mapper.page_at(address)
                if found is None and (found := self._learn(mapper, address)) is None:
                    # It is being moved or unmapped, and the message of that follows.
                    mapper.uffd.wake(address & ~PAGE_MASK, PAGE_BYTES)
                    continue
                page = found
            write, protected, minor = _FLAGS[flags & 7]
            fault = self.pager.cpu_fault(mapper.number, page, write=write, minor=minor, protected=protected)
            task = self.runner.start(fault)
            if task is None:
                self._latency[flags & 7][(self._clock() - began_ns).bit_length()] += 1
            else:
                task.done = partial(self._answered, flags & 7, began_ns)

    def _learn(self, mapper: Mapper, address: int) -> int | None:
        """Find out which page is at an address that we know nothing of: a mapping that mremap made grow, say."""
        place = mapper.learn(address, self._file, self.n_pages)
        if place is None:
            return None
        self._remember(mapper)
        for view in mapper.views:
            view.show(place)
        return mapper.page_at(address)

    def _answered(self, flags: int, began_ns: int, _result: None) -> None:
        self._latency[flags][(self._clock() - began_ns).bit_length()] += 1

    @property
    def latency(self) -> dict[str, list[int]]:
        """How long answering faults took: see `FaultTimes`."""
        return self._times.by_kind()

    def _take_event(self, mapper: Mapper, message: Message) -> None:
        kind, first, second, third = message
        if kind == EventKind.FORK:  # not asked for by our library; the child is nobody's
            os.close(first & 0xFFFFFFFF)
        elif kind == EventKind.REMAP:
            self._moved(mapper, Range.of_length(first, third), second)
        elif kind == EventKind.REMOVE:
            for removal in self._removals(mapper, Range(first, second), dropped=IS_GIVEN_UP[third]):
                self.runner.start(removal)
        elif kind == EventKind.UNMAP:
            self._unmapped(mapper, Range(first, second))

    def _moved(self, mapper: Mapper, source: Range, target: int) -> None:
        """Pages are at a second place, too. Unless that was asked for, word follows that the first is unmapped."""
        parts = [part for part in (place.part(source) for place in mapper.places) if part is not None]
        moved = [part._replace(address=part.address - source.start + target) for part in parts]
        for place in moved:
            mapper.cut(place.where)  # where a fault came first, it is known already
            mapper.add(place)
        self._remember(mapper)
        for view in mapper.views:
            for place in moved:
                view.show(place)
            view.tell(source, Cause.REMAP)

    def _removals(self, mapper: Mapper, where: Range, *, dropped: bool | None) -> list[Procedure[None]]:
        """Take the pages, then tell others."""
        self.madvices.count(dropped=dropped)
        removals = [self.pager.removed(mapper.number, run, dropped=dropped) for run in mapper.runs_at(where)]
        for view in mapper.views:
            view.tell(where, Cause.REMOVE)
        return removals

    def _unmapped(self, mapper: Mapper, where: Range) -> None:
        gone = mapper.cut(where)
        if gone:
            self._remember(mapper)
        for view in mapper.views if gone else ():
            view.hide(where)
            view.tell(where, Cause.UNMAP)
        for place in gone:
            mapper.uffd.wake(place.address, place.n * PAGE_BYTES)
            self._free_unmapped(place)
        if not mapper.places:
            self.unmap(mapper)

    def _free_unmapped(self, place: Placed) -> None:
        """Discard those of the pages that no process but workers maps."""
        left = [Range(place.first, place.end)]
        for mapper in self._machine.mappers.values():
            if mapper.worker:
                continue
            for piece in mapper.pieces(PageRun(place.first, place.n)):
                left = subtract(left, Range(piece.first, piece.end))
        for part in left:
            self.runner.start(self.pager.discard(PageRun(part.start, part.length)))

    # Afterwards

    def _note(self, mapper: Mapper) -> None:
        if not self._noted:
            self._host.attend(self)
        self._noted.add(mapper)
        self._claim_removed(mapper)

    def _claim_removed(self, mapper: Mapper) -> None:
        """Take what is being given up at once: the process goes on, and what it stores next must not be given up.

        No message is read behind one that says that pages are elsewhere, so they are where they were.
        """
        unread, mapper.unread = mapper.unread, []
        for message in unread:
            kind, first, second, third = message
            if kind == EventKind.REMOVE:
                self._begun += self._removals(mapper, Range(first, second), dropped=IS_GIVEN_UP[third])
            else:
                mapper.unread.append(message)

    def attend(self) -> None:
        """Deal with what came up about mappers while effects were carried out."""
        begun, self._begun = self._begun, []
        for removal in begun:
            self.runner.start(removal)
        noted, self._noted = self._noted, set()
        for mapper in noted:
            messages, mapper.unread = mapper.unread, []
            now = self._clock()
            self._answer(mapper, messages, now)
            if mapper.to_wake:
                self._host.clockwork.after(_WAKE_AFTER_NS, partial(self._wake, mapper))
            if mapper.gone:
                self.unmap(mapper)
        if self.pager.wants_reclaim and not self._reclaiming:
            self._reclaim()
        self.close_if_unused()

    def give_back(self, n_pages: int) -> None:
        """Evict pages because another arena needs the room."""
        if not self._reclaiming:
            self._reclaiming = True
            self.runner.start(self.pager.give_back(n_pages), self._reclaimed)

    def _reclaim(self) -> None:
        """Make room in the background, so that faults find it."""
        self._reclaiming = True
        self.runner.start(self.pager.reclaim(), self._reclaimed)

    def _reclaimed(self, n_left: int) -> None:
        if n_left:
            self._reclaiming = False
        else:  # nothing could leave: looking again at once would be no use
            self._host.clockwork.after(_RECLAIM_AGAIN_NS, self._may_reclaim)

    def _may_reclaim(self) -> None:
        self._reclaiming = False

    def _wake(self, mapper: Mapper) -> None:
        ranges, mapper.to_wake = mapper.to_wake, []
        if mapper.number in self._machine.mappers:
            for where in ranges:
                mapper.uffd.wake(where.start, where.length)
