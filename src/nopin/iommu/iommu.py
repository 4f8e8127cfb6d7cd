"""The device's view of process memory: copies by (PASID, address), parking where pages are slow to come.

Of plain memory nothing is cached here. Translation is the owner's page table at the moment of the copy; what this adds
is the look at residency before it, so that a page in swap parks one piece of work instead of stopping the device.
Managed memory lies in windows over some addresses of a process and is reached through its arena's mirror
(`managed.py`); a process without windows does not pay for there being such.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from itertools import takewhile

import numpy as np

from nopin.iommu.access import PARKED, Access, Span
from nopin.iommu.managed import Fault, ManagedAccess
from nopin.iommu.page_requests import Meter, PageRequest, PageRequests
from nopin.iommu.pasid import PasidTable
from nopin.iommu.relay import Copy, Ends, Relay, Relayed, Turn, are_present, relay_in_turn, relay_once, start_of
from nopin.iommu.windows import DeviceArena, Window
from nopin.mm.space import Absent, AddressSpace, FaultResult, IoVec, Staging
from nopin.ranges import Range, coalesce
from nopin.units import PAGE_BYTES, U64_MAX

_SPAN_LIMIT = 2 << 20
"""Scatter lists within this span are looked up in one scan, the gaps included: a scan of 512 present pages
costs about as much as two small scans."""

SHORT_BYTES = 64 << 10
"""Not worth a relay. Every staging buffer holds as much."""


class Iommu:
    """Address spaces by PASID, and the page requests against them.

    Every copy returns the bytes moved, short at the first inaccessible byte, 0 for an unknown PASID; or
    `PARKED`. Pages that are absent but come quickly (zero fill) are counted in the meter and brought by the copy
    itself. Without a waiter a copy does not look at residency: for who has just done so, by `admit_all`.

    Args:
        queue_limit: page requests outstanding at most.
        relay: how copies from space to space are carried out.
    """

    def __init__(self, *, queue_limit: int = 4096, relay: Relay = relay_in_turn) -> None:
        self._relay = relay
        self._pasids = PasidTable()
        self._plain: dict[int, AddressSpace] = {}  # those without windows; looked up on every access
        self._requests = PageRequests(queue_limit)
        self._managed = ManagedAccess(self._requests, self._passes)

    def bind(self, space: AddressSpace) -> int:
        """Give a space a PASID. The caller keeps owning the space.

        Raises:
            OverflowError: all PASIDs are in use.
        """
        pasid = self._pasids.bind(space)
        self._plain[pasid] = space
        return pasid

    def unbind(self, pasid: int) -> None:
        """Later accesses return 0; open page requests are dropped and their waiters woken. Twice is fine."""
        self._pasids.unbind(pasid)
        self._plain.pop(pasid, None)
        self._managed.forget_space(pasid)
        self._requests.drop_space(pasid)

    def attach(self, arena: DeviceArena) -> None:
        """Take in an arena that windows will show. The caller keeps owning it."""
        self._managed.attach(arena)

    def detach(self, arena: DeviceArena) -> None:
        """Take an arena out, with its windows; who waits for its pages is woken. Twice is fine."""
        self._managed.detach(arena)

    def map_window(self, pasid: int, where: Range, arena: DeviceArena, offset: int) -> None:
        """From here on addresses `where` of a process are bytes of an attached arena, from `offset` on.

        Requires: whole pages, inside the arena, and a bound PASID.
        """
        space = self._pasids.get(pasid)
        assert space is not None, "a window for a process that is not here"
        self._plain.pop(pasid, None)
        self._managed.map(pasid, space, where, arena, offset)

    def unmap_window(self, pasid: int, where: Range) -> None:
        """From here on addresses `where` of a process are plain. Requires: whole pages."""
        self._managed.unmap(pasid, where)

    def windows(self, pasid: int) -> list[Window]:
        """The windows of a process, by address."""
        return self._managed.windows(pasid)

    def space(self, pasid: int) -> AddressSpace | None:
        """The space bound to a PASID: its plain memory, where it has windows."""
        return self._pasids.get(pasid)

    def read(
        self,
        pasid: int,
        address: int,
        length: int,
        staging: Staging,
        offset: int,
        meter: Meter,
        waiter: Hashable | None,
    ) -> int:
        """Copy process memory into staging at `offset`."""
        space = self._plain.get(pasid)
        if space is None:
            return self._managed.copy(pasid, address, length, staging, offset, meter, waiter, write=False)
        if waiter is not None:
            is_plain = 0 < length <= SHORT_BYTES and not self._requests.any_resumed
            if is_plain and space.read_present(address, length, staging, offset):
                return length  # looked and copied in one step; whatever is special, the general way finds out
            if not self._admit(space, pasid, address, length, meter, waiter, write=False):
                return PARKED
        return space.read(address, length, staging, offset)

    def write(
        self,
        pasid: int,
        address: int,
        length: int,
        staging: Staging,
        offset: int,
        meter: Meter,
        waiter: Hashable | None,
    ) -> int:
        """Copy staging at `offset` into process memory."""
        space = self._plain.get(pasid)
        if space is None:
            return self._managed.copy(pasid, address, length, staging, offset, meter, waiter, write=True)
        if waiter is not None:
            is_plain = 0 < length <= SHORT_BYTES and not self._requests.any_resumed
            if is_plain and space.write_present(address, length, staging, offset):
                return length
            if not self._admit(space, pasid, address, length, meter, waiter, write=True):
                return PARKED
        return space.write(address, length, staging, offset)

    def read_v(
        self,
        pasid: int,
        remote: IoVec,
        staging: Staging,
        local: IoVec,
        meter: Meter,
        waiter: Hashable | None,
    ) -> int:
        """Copy process segments into staging segments, in order; totals are equal."""
        space = self._plain.get(pasid)
        if space is None:
            return self._managed.copy_v(pasid, remote, staging, local, meter, waiter, write=False)
        if waiter is not None and not self._admit_v(space, pasid, remote, meter, waiter, write=False):
            return PARKED
        return space.read_v(remote, staging, local)

    def write_v(
        self,
        pasid: int,
        remote: IoVec,
        staging: Staging,
        local: IoVec,
        meter: Meter,
        waiter: Hashable | None,
    ) -> int:
        """Copy staging segments into process segments, in order; totals are equal."""
        space = self._plain.get(pasid)
        if space is None:
            return self._managed.copy_v(pasid, remote, staging, local, meter, waiter, write=True)
        if waiter is not None and not self._admit_v(space, pasid, remote, meter, waiter, write=True):
            return PARKED
        return space.write_v(remote, staging, local)

    def copy_held_v(
        self, pasid: int, remote: IoVec, staging: Staging, local: IoVec, waiter: Hashable | None, *, write: bool
    ) -> int | None:
        """Do what `read_v` or `write_v` does, if all pages are there. None: one is not; nothing was done or counted."""
        space = self._plain.get(pasid)
        if space is None:
            return self._managed.copy_held_v(pasid, remote, staging, local, waiter, write=write)
        if waiter is not None and not _all_there(space, remote, write=write):
            return None
        self._requests.settle(waiter)
        copy = space.write_v if write else space.read_v
        return copy(remote, staging, local)

    def relay(self, source: Span, target: Span, length: int, staging: Staging, grain: int) -> Relayed | None:
        """Copy `length` bytes from space to space; see `Relay`. None: parked, nothing was moved."""
        source_space, target_space = self._plain.get(source.pasid), self._plain.get(target.pasid)
        if source_space is None or target_space is None:
            return self._managed.relay((source, source_space), (target, target_space), length, staging, grain)
        passes = self._passes(source_space, source, length, False)
        if not self._passes(target_space, target, length, True) or not passes:
            return None  # both were looked at, so both are waited for together
        unseen = self._requests.lets_through(source.waiter) or self._requests.lets_through(target.waiter)
        self._requests.settle(source.waiter)
        self._requests.settle(target.waiter)
        ends = Ends(source_space, target_space)
        if length <= SHORT_BYTES:
            return relay_once(ends, source.address, target.address, length, staging, grain)
        relay = relay_in_turn if unseen else self._relay  # what may be slow is no work for two
        return relay(ends, (Copy(source.address, target.address, length),), staging, grain)

    def copy_present(
        self,
        source_pasid: int,
        source: int,
        target_pasid: int,
        target: int,
        length: int,
        staging: Staging,
        meters: tuple[Meter, Meter],
    ) -> bool:
        """Copy a short range from space to space, if all of it is there, or comes at once, and lets itself be copied.

        Args:
            meters: of the source and of the target, where what came at once is counted.

        False: nothing else was decided or counted, and `relay`, which finds out why, may copy the same again.
        Requires: 0 < `length` <= `SHORT_BYTES`.
        """
        source_space, target_space = self._plain.get(source_pasid), self._plain.get(target_pasid)
        if self._requests.any_resumed:
            return False
        if source_space is None or target_space is None:
            ends = (source_pasid, source, source_space), (target_pasid, target, target_space)
            return self._managed.copy_present(*ends, meters, length, staging)
        at = start_of(source, target, staging.address) if length > PAGE_BYTES else 0
        if not source_space.read_present(source, length, staging, at):
            return False
        return target_space.write_present(target, length, staging, at)

    def copy_present_v(
        self, source_pasid: int, sources: IoVec, target_pasid: int, targets: IoVec, staging: Staging
    ) -> bool:
        """Copy many ranges from plain memory to plain memory, if all pages are there and let themselves be copied.

        All are read before the first is written; writes are in order. False: nothing was decided or counted, and some
        may have been written. Requires: totals are equal and fit the staging buffer.
        """
        source_space, target_space = self._plain.get(source_pasid), self._plain.get(target_pasid)
        if source_space is None or target_space is None or self._requests.any_resumed:
            return False
        if not _all_there(source_space, sources, write=False) or not _all_there(target_space, targets, write=True):
            return False
        total = int(np.add.reduce(sources[:, 1]))
        at = start_of(int(sources[0, 0]), int(targets[0, 0]), staging.address)
        middle = np.array([[at, total]], np.uint64)
        return (
            source_space.read_v(sources, staging, middle) == total
            and target_space.write_v(targets, staging, middle) == total
        )

    def relay_run(
        self, source_pasid: int, target_pasid: int, copies: list[Copy], staging: Staging, grain: int, turn: Turn
    ) -> int:
        """Carry out several copies one after the other, as far as they need not wait for pages.

        Returns bytes written, in order. If the turn is not over, `relay` tells one by one why it is less than all.
        """
        source, target = self._plain.get(source_pasid), self._plain.get(target_pasid)
        if source is None or target is None:
            return 0
        ends = Ends(source, target)
        if not are_present(ends, copies):
            copies = list(takewhile(lambda copy: are_present(ends, (copy,)), copies))
        return self._relay(ends, copies, staging, grain, turn).n_written if copies else 0

    def admit_all(self, accesses: Sequence[Access]) -> bool:
        """Look at all ranges of a step before any of it is copied. True: copy, without another look.

        False: parked. What is slow is waited for together, and nobody's patience counts as used before all pass:
        ranges that stay absent by turns would otherwise never get through.
        """
        waiters = {span.waiter for span, _length, _write in accesses}
        looks = [self._look(*access) for access in accesses]
        if not all(looks):
            self._managed.put_off(waiters)
            if not self._are_there_now(accesses, waiters):
                return False
        for span, _length, _write in accesses:
            self.settle(span.waiter)
        return True

    def prepare(self, accesses: Sequence[Access], waiter: Hashable) -> bool:
        """Bring ranges in once, before the first of the copies that will look again. False: parked.

        True also when the memory is bad; the copy will tell.
        """
        if self._requests.was_resumed(waiter):
            return True
        looks = [self._look(*access) for access in accesses]
        return all(looks) or self._are_there_now(accesses, (waiter,))

    def _are_there_now(self, accesses: Sequence[Access], waiters: Collection[Hashable | None]) -> bool:
        """Look again at ranges that were parked for, if what was missing has come at once; else they stay so."""
        if not self._managed.came_at_once(waiters):
            return False
        looks = [self._look(*access) for access in accesses]
        return all(looks)

    def settle(self, waiter: Hashable | None) -> None:
        """Say that the waiter goes on without a copy of its own: what was prepared is for others."""
        self._requests.settle(waiter)
        self._managed.settle(waiter)

    @property
    def stirs(self) -> bool:
        """True if there is anything for `take_requests`, `take_faults` or `take_wakeups` to do this turn."""
        return self._requests.stirs or self._managed.counts_turns

    def take_requests(self) -> list[PageRequest]:
        """Page requests for plain memory, for whoever runs faults; each is to be answered by `respond`."""
        return self._requests.take()

    def take_faults(self) -> list[Fault]:
        """Page requests for managed memory, for whoever runs the procedures of each arena. They answer themselves."""
        return self._managed.take_faults()

    def run_faults(self) -> None:
        """Have arenas run what answers their page requests; see `DeviceArena.runner`."""
        self._managed.run_faults()

    def respond(self, request: PageRequest, result: FaultResult) -> None:
        """A request has been dealt with. Bad memory wakes the waiters too: their copies find the byte."""
        del result  # an answer is an answer; what is wrong, if anything, shows where the bytes are moved
        self._requests.answer(request)

    def take_wakeups(self) -> list[Hashable]:
        """Waiters to resume, each once. Each tries again, and may park again. Call it once a turn."""
        self._managed.turn()
        return self._requests.take_wakeups()

    def forget(self, waiter: Hashable) -> None:
        """The waiter is gone: it will not be woken, and starts anew if it comes again."""
        self._requests.forget(waiter)
        self._managed.settle(waiter)

    def _look(self, span: Span, length: int, write: bool) -> bool:
        """Decide whether one of several ranges may be copied now."""
        space = self._plain.get(span.pasid)
        if space is None:
            return self._managed.admits(span, length, write=write)
        return self._passes(space, span, length, write)

    def _passes(self, space: AddressSpace, span: Span, length: int, write: bool) -> bool:
        """Decide the same about plain memory, leaving its waiter's count of parks alone."""
        if span.waiter is None or length <= 0:
            return True
        absent = space.absent(span.address, span.address + length, write=write)
        return absent is None or not self._parks(absent, span, length, write=write)

    def _admit(
        self,
        space: AddressSpace,
        pasid: int,
        address: int,
        length: int,
        meter: Meter,
        waiter: Hashable,
        *,
        write: bool,
    ) -> bool:
        """Decide whether an access may copy now; otherwise it is parked."""
        absent = space.absent(address, address + length, write=write) if length > 0 else None
        if absent is not None and self._parks(absent, Span(pasid, address, meter, waiter), length, write=write):
            return False
        self._requests.settle(waiter)
        return True

    def _parks(self, absent: Absent, span: Span, length: int, *, write: bool) -> bool:
        """Count absent pages; park whoever must wait for them."""
        where = Range.of_length(span.address, length).to_pages()
        slow = [where] if absent.slow else []
        return self._parks_for(absent, slow, span.pasid, span.meter, span.waiter, write=write)

    def _parks_for(
        self, absent: Absent, slow: list[Range], pasid: int, meter: Meter, waiter: Hashable, *, write: bool
    ) -> bool:
        meter.page_faults += absent.n_pages
        if not slow or (self._requests.lets_through(waiter) and not absent.held):
            meter.page_faults_handled += 1
            return False
        self._requests.park(waiter, pasid, slow, meter, write=write)
        return True

    def _admit_v(
        self, space: AddressSpace, pasid: int, segments: IoVec, meter: Meter, waiter: Hashable, *, write: bool
    ) -> bool:
        """The same for a scatter list, which waits for all its slow parts at once."""
        if not _span_is_there(space, segments, write=write):
            absent, slow = _absent_parts(space, segments.tolist(), write=write)
            if absent.n_pages and self._parks_for(absent, slow, pasid, meter, waiter, write=write):
                return False
        self._requests.settle(waiter)
        return True


def _all_there(space: AddressSpace, segments: IoVec, *, write: bool) -> bool:
    """Say whether all pages of a scatter list are there."""
    return _span_is_there(space, segments, write=write) or all(
        space.absent(part.start, part.end, write=write) is None for part in _page_ranges(segments.tolist())
    )


def _span_is_there(space: AddressSpace, segments: IoVec, *, write: bool) -> bool:
    """Say the same by one look, at all from the first to the last. False: that is too much, or something is absent."""
    first, last = _span_of(segments)
    return last - first <= _SPAN_LIMIT and space.absent(first, last, write=write) is None


def _span_of(segments: IoVec) -> tuple[int, int]:
    """Return the range that holds all segments, gaps included."""
    if len(segments) == 1:
        ((first, length),) = segments.tolist()
        return first, first + length
    if not len(segments):
        return 0, 0
    starts, lengths = segments[:, 0], segments[:, 1]
    return int(starts.min()), int((starts + (lengths - 1)).max()) + 1  # an end may be 2^64, which would be 0


def _absent_parts(space: AddressSpace, pieces: list[list[int]], *, write: bool) -> tuple[Absent, list[Range]]:
    """Return what is absent of a scatter list, and the parts that are slow to come."""
    n_pages, slow, held = 0, list[Range](), False
    for part in _page_ranges(pieces):
        absent = space.absent(part.start, part.end, write=write)
        if absent is not None:
            n_pages += absent.n_pages
            held |= absent.held
            if absent.slow:
                slow.append(part)
    return Absent(n_pages, bool(slow), held), slow


def _page_ranges(pieces: list[list[int]]) -> list[Range]:
    """Whole pages a scatter list touches, in order, each once; segments past the address space left out."""
    return coalesce(
        Range(address, address + length).to_pages()
        for address, length in pieces
        if length and address + length <= U64_MAX
    )
