"""Copies to and from processes that have managed memory, and the faults such copies raise.

An access comes by process address. It is cut at window borders (`windows.py`). What is plain goes the plain way. What
lies in a window is a matter between us and the arena's mirror:

    held by the mirror?  copy between the frames and the buffer, no system call, nothing to wait for
    in memory?           the mirror takes it in, and that is all, where faults are carried out at once
    quickly had?         a page of zeros, or one whose copy in swap is cached, is brought and taken in likewise
    not there?           a page request for the pages of this part, filed under the arena: carried out at once where
                         that can be, else the access parks
    never to be had?     the access ends here, short, as at an unmapped address

All parts of an access are looked at before a byte moves, so that one waits for all it lacks at once and resumes to do
all of it. Requests are filed by arena and page rather than by process and address: the same page wanted through two
processes, or two regions, is one fault.

A copy is one step of the loop, and invalidations are other steps, or come with a request that is carried out at once.
After one all is looked at again, so none comes between the last look and the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import NamedTuple

from nopin.iommu.access import PARKED, Span
from nopin.iommu.page_requests import Meter, PageRequest, PageRequests
from nopin.iommu.relay import Relayed
from nopin.iommu.tickets import Tickets
from nopin.iommu.window_copy import Segments, copy_in_window, copy_packed, copy_parts, parts_of, relay
from nopin.iommu.windows import DeviceArena, Part, Window, WindowedSpace, page_run
from nopin.mm.effects import PageRun, Procedure
from nopin.mm.space import AddressSpace, IoVec, Staging
from nopin.ranges import Range
from nopin.units import PAGE_SHIFT

PlainLook = Callable[[AddressSpace, Span, int, bool], bool]
"""Whether plain memory (space, span, length, write) may be copied now; otherwise the waiter is parked."""


class Fault(NamedTuple):
    """A page request against managed memory; whoever runs the arena's procedures runs it. It answers itself."""

    arena: DeviceArena
    procedure: Procedure[None]
    request: PageRequest


_End = tuple[int, int, AddressSpace | None]
"""PASID, address, and the space of a process without windows."""

_FEW_PAGES = 2
"""So many are brought one by one where that can be at once; more are better read together."""


class ManagedAccess:
    """The part of an Iommu that knows windows.

    Args:
        requests: shared with plain memory, because one access may wait for both.
        look_at_plain: decides about the plain parts of an access.
    """

    def __init__(self, requests: PageRequests, look_at_plain: PlainLook) -> None:
        self._requests = requests
        self._look_at_plain = look_at_plain
        self._tickets = Tickets()
        self._spaces: dict[int, WindowedSpace] = {}
        self._arenas: dict[int, DeviceArena] = {}
        self._next_key = -1
        self._arenas_run = False  # arenas carry out their faults: all of them do, or none

    # Windows

    def attach(self, arena: DeviceArena) -> None:
        """Make an arena known. Requires: it is not, and has a runner if the others have."""
        assert arena.key == 0, "an arena is attached once"
        runs = arena.runner is not None
        assert runs == self._arenas_run or not self._arenas, "some arenas run their faults, and some do not"
        self._arenas_run = runs
        arena.key = self._next_key
        self._next_key -= 1  # never used again: an answer that comes late finds nobody
        self._arenas[arena.key] = arena

    def detach(self, arena: DeviceArena) -> None:
        """Forget an arena and its windows; who waited for its pages finds that out."""
        if self._arenas.pop(arena.key, None) is None:
            return
        for space in self._spaces.values():
            space.drop(arena)
        self._requests.drop_space(arena.key)

    def map(self, pasid: int, plain: AddressSpace, where: Range, arena: DeviceArena, offset: int) -> None:
        """Lay a window of an attached arena over a process's addresses."""
        assert arena.key in self._arenas, "an arena that is not attached"
        self._spaces.setdefault(pasid, WindowedSpace(plain)).add(where, arena, offset)

    def unmap(self, pasid: int, where: Range) -> None:
        """Take the windows away there; without any the addresses are plain."""
        if pasid in self._spaces:
            self._spaces[pasid].remove(where)

    def forget_space(self, pasid: int) -> None:
        """The process is gone."""
        self._spaces.pop(pasid, None)

    def windows(self, pasid: int) -> list[Window]:
        """The windows of a process, by address."""
        space = self._spaces.get(pasid)
        return space.windows if space is not None else []

    # Copies: see `Iommu`

    def copy(
        self,
        pasid: int,
        address: int,
        length: int,
        staging: Staging,
        offset: int,
        meter: Meter,
        waiter: Hashable | None,
        *,
        write: bool,
    ) -> int:
        """Copy between process memory and staging at `offset`; 0 for a process we do not know."""
        space = self._spaces.get(pasid)
        if space is None or length <= 0:
            return 0
        window = space.find(address, length)
        if window is not None and self._is_held(window, address, length, meter, write=write):
            at, memory = window.at(address), window.arena.memory.view
            if write:
                memory[at : at + length] = staging.view[offset : offset + length]
            else:
                staging.view[offset : offset + length] = memory[at : at + length]
            self._go_on(waiter)
            return length
        segments = ((address, length),)
        limit = self._admit(space, Span(pasid, address, meter, waiter), segments, write=write)
        if limit == PARKED:
            return PARKED
        return copy_parts(space, segments, limit, staging, offset, write=write)

    def copy_v(
        self,
        pasid: int,
        remote: IoVec,
        staging: Staging,
        local: IoVec,
        meter: Meter,
        waiter: Hashable | None,
        *,
        write: bool,
    ) -> int:
        """Copy between process segments and staging segments, in order; totals are equal."""
        space = self._spaces.get(pasid)
        if space is None or not len(remote):
            return 0
        done = copy_in_window(space, remote, staging, local, write=write)
        if done is not None:
            self._go_on(waiter)
            return done
        segments: Segments = remote.tolist()
        limit = self._admit(space, Span(pasid, 0, meter, waiter), segments, write=write)
        if limit == PARKED:
            return PARKED
        return copy_packed(space, segments, limit, staging, local, write=write)

    def copy_held_v(
        self, pasid: int, remote: IoVec, staging: Staging, local: IoVec, waiter: Hashable | None, *, write: bool
    ) -> int | None:
        """Copy a list that lies in one window whose mirror holds all of it; see `Iommu.copy_held_v`."""
        space = self._spaces.get(pasid)
        if space is None:
            return 0
        done = copy_in_window(space, remote, staging, local, write=write)
        if done is not None:
            self._go_on(waiter)
        return done

    def copy_present(
        self, source: _End, target: _End, meters: tuple[Meter, Meter], length: int, staging: Staging
    ) -> bool:
        """Copy a short range from process to process, at least one of which has windows; see `Iommu.copy_present`."""
        there, here = self._whole(source, length), self._whole(target, length)
        if there is None or here is None:
            return False
        data: bytes | memoryview
        if not isinstance(there, Window):
            if not there.read_present(source[1], length, staging, 0):
                return False
            data = staging.view[:length]
        elif self._is_held(there, source[1], length, meters[0], write=False):
            at = there.at(source[1])
            data = there.arena.memory.view[at : at + length]
        else:
            return False
        if not isinstance(here, Window):
            staging.view[:length] = data
            return here.write_present(target[1], length, staging, 0)
        if not self._is_held(here, target[1], length, meters[1], write=True):
            return False
        at = here.at(target[1])
        here.arena.memory.view[at : at + length] = data
        return True

    def _whole(self, end: _End, length: int) -> Window | AddressSpace | None:
        """Return the window that holds all of a range, or the plain memory that does; None if it has parts of both."""
        pasid, address, plain = end
        if plain is not None:
            return plain
        space = self._spaces.get(pasid)
        if space is None:
            return None
        return space.find(address, length) or (space.plain if space.is_plain(address, length) else None)

    def _is_held(self, window: Window, address: int, length: int, meter: Meter, *, write: bool) -> bool:
        """Use pages of a window that the mirror holds, or that come at once; False if not all are, and none is used."""
        first, n = page_run(window.at(address), length)
        mirror = window.arena.mirror
        return mirror.use(first, n, write=write) or (
            self._fills(window.arena, first, n, meter, write=write) and mirror.use(first, n, write=write)
        )

    def relay(
        self,
        source: tuple[Span, AddressSpace | None],
        target: tuple[Span, AddressSpace | None],
        length: int,
        staging: Staging,
        grain: int,
    ) -> Relayed | None:
        """Copy from process to process where at least one has windows; see `Iommu.relay`.

        Args:
            source, target: with the space of a process without windows, None for one with.
        """
        (source_span, _), (target_span, _) = source, target
        source_space, target_space = self._space_of(*source), self._space_of(*target)
        if source_space is None:
            return Relayed(0, 0)
        if target_space is None:
            return Relayed(length, 0)
        waiters = {source_span.waiter, target_span.waiter}

        n_readable = self._look_at_one(source_space, source_span, length, write=False)
        n_writable = self._look_at_one(target_space, target_span, length, write=True)
        if PARKED in (n_readable, n_writable):
            self.put_off(waiters)
            if self.came_at_once(waiters):  # what is plain was there a moment ago
                n_readable = (
                    self._look_at_one(source_space, source_span, length, write=False) if source_space else length
                )
                n_writable = (
                    self._look_at_one(target_space, target_span, length, write=True) if target_space else length
                )
        if PARKED in (n_readable, n_writable):
            return None
        self._go_on(source_span.waiter)
        self._go_on(target_span.waiter)
        places = (source_space, source_span.address), (target_space, target_span.address)
        return relay(*places, n_readable, n_writable, length, staging, grain)

    def admits(self, span: Span, length: int, *, write: bool) -> bool:
        """Look at one of several ranges of a step; False when it is parked for. Bad memory passes: the copy tells."""
        space = self._spaces.get(span.pasid)
        if space is None or span.waiter is None or length <= 0:
            return True
        return self._look(space, span, ((span.address, length),), write=write) != PARKED

    def _look_at_one(self, space: WindowedSpace, span: Span, length: int, *, write: bool) -> int:
        """Say how much can be copied of one range, as `_look`; one in a single window is looked at the quick way."""
        window = space.find(span.address, length)
        if window is not None and length > 0:
            first, n = page_run(window.at(span.address), length)
            mirror = window.arena.mirror
            if mirror.holds(first, n, write=write) or self._fills(window.arena, first, n, span.meter, write=write):
                return length
            return self._held_bytes(Part(span.address, length, window), span, write=write)
        if not space:
            return length if self._look_at_plain(space.plain, span, length, write) else PARKED
        return self._look(space, span, ((span.address, length),), write=write)

    def _fills(self, arena: DeviceArena, first: int, n: int, meter: Meter, *, write: bool) -> bool:
        """Have the mirror take in pages that are in memory, or a few that need not be waited for. Counts as a fault.

        None is evicted for it, so what was looked at before is as it was.
        """
        runner, mirror, pages = arena.runner, arena.mirror, PageRun(first, n)
        if runner is None:
            return False
        pager = mirror.pager
        if not pager.settled(pages, write=write) and (
            n > _FEW_PAGES or not runner.finish(pager.settle(pages, write=write))
        ):
            return False
        n_missing = mirror.take_in(pages, write=write)
        if not n_missing:
            return False
        meter.page_faults += n_missing
        meter.page_faults_handled += 1
        return True

    def _space_of(self, span: Span, plain: AddressSpace | None) -> WindowedSpace | None:
        return WindowedSpace(plain) if plain is not None else self._spaces.get(span.pasid)

    def _admit(self, space: WindowedSpace, span: Span, segments: Segments, *, write: bool) -> int:
        """Look at an access that is about to be made; returns as `_look`."""
        limit = self._look(space, span, segments, write=write)
        if limit == PARKED:
            self.settle(span.waiter)
            if self.came_at_once((span.waiter,)):
                limit = self._look(space, span, segments, write=write)
        if limit != PARKED:
            self._go_on(span.waiter)
        return limit

    def _look(self, space: WindowedSpace, span: Span, segments: Segments, *, write: bool) -> int:
        """Say how many bytes of segments can be copied now, the rest never; or park for what is to come.

        Tickets the waiter holds are looked at and left alone. Bytes of plain memory count as good: the copy finds out.
        """
        done, parked = 0, False
        for part in parts_of(space, segments):
            if part.window is None:
                where = span._replace(address=part.address)
                parked |= not self._look_at_plain(space.plain, where, part.length, write)
                done += part.length
                continue
            held = self._held_bytes(part, span, write=write)
            if held == PARKED:
                parked, held = True, part.length
            done += held
            if held < part.length:
                break
        return PARKED if parked else done

    def _held_bytes(self, part: Part, span: Span, *, write: bool) -> int:
        """Say the same of a part in a window."""
        assert part.window is not None
        arena, at = part.window.arena, part.window.at(part.address)
        first, n = page_run(at, part.length)
        n_held = arena.mirror.n_held(first, n, write=write)
        if n_held == n:
            return part.length
        if span.waiter is None or self._tickets.is_bad(span.waiter, arena, first + n_held):
            return max(0, ((first + n_held) << PAGE_SHIFT) - at)
        span.meter.page_faults += arena.mirror.n_missing(first, n, write=write)
        self._requests.park(span.waiter, arena.key, (Range(first, first + n),), span.meter, write=write)
        return PARKED

    def _go_on(self, waiter: Hashable | None) -> None:
        """The waiter makes its access."""
        self._requests.settle(waiter)
        self.settle(waiter)

    # Waiters

    def settle(self, waiter: Hashable | None) -> None:
        """The waiter makes the access it parked for, or is gone: its pages need not be held any longer."""
        if self._tickets:
            self._tickets.spend(waiter)

    def put_off(self, waiters: Iterable[Hashable | None]) -> None:
        """Those who wait together wait again. If it is for want of memory, none keeps what it has from the others."""
        if self._tickets and any(self._tickets.is_busy(waiter) for waiter in waiters):
            for waiter in waiters:
                self._tickets.spend(waiter)

    @property
    def counts_turns(self) -> bool:
        """True while `turn` has something to count for."""
        return self._tickets.counts_turns

    # Faults

    def came_at_once(self, waiters: Collection[Hashable | None]) -> bool:
        """Carry out what was asked for by those who just parked; True if they need not wait, and are to look again."""
        if not self._arenas_run:
            return False
        self.run_faults()
        return self._requests.take_back(waiters)

    def run_faults(self) -> None:
        """Carry out what answers the requests for arenas, which have runners, as far as it goes without waiting."""
        for fault in self.take_faults():
            assert fault.arena.runner is not None, "a fault of an arena whose faults are to be taken"
            fault.arena.runner.start(fault.procedure)

    def take_faults(self) -> list[Fault]:
        """Return what answers the requests for arenas. Of one that is gone the waiters are awake."""
        requests = self._requests.take(managed=True)
        arenas = ((self._arenas.get(request.pasid), request) for request in requests)
        return [Fault(arena, self._answer(arena, request), request) for arena, request in arenas if arena is not None]

    def turn(self) -> None:
        """Count a turn of the loop: who does not come for its pages loses them."""
        self._tickets.turn()

    def _answer(self, arena: DeviceArena, request: PageRequest) -> Procedure[None]:
        pages = PageRun(request.start, request.end - request.start)
        came = yield from arena.mirror.fill(pages, write=request.write)
        self._tickets.issue(self._requests.answer(request), arena, pages, came)
