"""Copies to and from processes that have managed memory, and the faults such copies raise.

An access comes by process address. It is cut at window borders (`windows.py`). What is plain goes the plain way. What
lies in a window is a matter between us and the arena's mirror:

    held by the mirror?  copy between the frames and the buffer, no system call, nothing to wait for
    not held?            park: a page request for the pages of this part, filed under the arena
    never to be had?     the access ends here, short, as at an unmapped address

All parts of an access are looked at before a byte moves, so that one waits for all it lacks at once and resumes to do
all of it. Requests are filed by arena and page rather than by process and address: the same page wanted through two
processes, or two regions, is one fault.

A copy is one step of the loop, and invalidations are other steps: none comes between the look and the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
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

    # Windows

    def attach(self, arena: DeviceArena) -> None:
        """Make an arena known. Requires: it is not."""
        assert arena.key == 0, "an arena is attached once"
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

    def knows(self, pasid: int) -> bool:
        """Tell whether a process has, or had, windows."""
        return pasid in self._spaces

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
        if window is not None:
            at = address - window.start + window.offset
            first = at >> PAGE_SHIFT
            if window.arena.mirror.use(first, ((at + length - 1) >> PAGE_SHIFT) - first + 1, write=write):
                memory = window.arena.memory.view
                if write:
                    memory[at : at + length] = staging.view[offset : offset + length]
                else:
                    staging.view[offset : offset + length] = memory[at : at + length]
                self._go_on(waiter)
                return length
        segments = ((address, length),)
        limit = self._look(space, Span(pasid, address, meter, waiter), segments, write=write)
        if limit == PARKED:
            self.settle(waiter)
            return PARKED
        self._go_on(waiter)
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
        limit = self._look(space, Span(pasid, 0, meter, waiter), segments, write=write)
        if limit == PARKED:
            self.settle(waiter)
            return PARKED
        self._go_on(waiter)
        return copy_packed(space, segments, limit, staging, local, write=write)

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
        n_readable = self._look(source_space, source_span, ((source_span.address, length),), write=False)
        n_writable = self._look(target_space, target_span, ((target_span.address, length),), write=True)
        if PARKED in (n_readable, n_writable):
            self.put_off({source_span.waiter, target_span.waiter})
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

    def _space_of(self, span: Span, plain: AddressSpace | None) -> WindowedSpace | None:
        return WindowedSpace(plain) if plain is not None else self._spaces.get(span.pasid)

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

    # Faults

    def faults(self, requests: Iterable[PageRequest]) -> list[Fault]:
        """Return what answers those requests that are for arenas. Of one that is gone the waiters are awake."""
        arenas = ((self._arenas.get(request.pasid), request) for request in requests)
        return [Fault(arena, self._answer(arena, request)) for arena, request in arenas if arena is not None]

    def turn(self) -> None:
        """Count a turn of the loop: who does not come for its pages loses them."""
        self._tickets.turn()

    def _answer(self, arena: DeviceArena, request: PageRequest) -> Procedure[None]:
        pages = PageRun(request.start, request.end - request.start)
        came = yield from arena.mirror.fill(pages, write=request.write)
        self._tickets.issue(self._requests.answer(request), arena, pages, came)
