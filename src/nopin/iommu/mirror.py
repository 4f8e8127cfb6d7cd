"""The mirror: a device's own page table of one arena.

A CPU finds memory through its page table. A device that is to use the same addresses needs one too: a *secondary*
page table that repeats what the memory manager knows. This file is that table for managed memory. The questions it
answers are those of every secondary page table, in a graphics driver, in KVM, in a NIC with on-demand paging:

**May I use these pages, now?** `use(pages, write)` says so, and notes the use in the page's *young* bit, and in its
*dirty* bit if it is written. Nothing else in the device decides about access to managed memory, so a page that is not
in here cannot be touched. There is no address in an entry: frames of an arena lie in its file in page order, so page
number is frame number, and what a translation says is only *there* and *writable*.

**How does an entry come in?** By `fill`, as the last step of a device fault (but see *At once* and *Pushed*):

    read_begin                    remember the moment
    yield from device_fault       the pager brings the pages, perhaps from swap, and holds them
    read_retry                    has any of these pages been invalidated since? then again
    install                       in the same step as the check, so nothing can come between

The pager's answer is true when it is given, and may be false a moment later; the check makes that harmless. It asks
about exactly these pages, so traffic elsewhere never makes a fill repeat. Repeats are bounded: a fill that is beaten
`ATTEMPTS` times ends with BUSY, and whoever wanted the pages asks again later, behind others.

**At once.** Pages that are in memory need nobody brought and nothing waited for: the pager is asked (`settled`), and
`take_in` installs them in the same step. There is no moment in between to remember; only an invalidation that runs
forbids it. Pages that can be brought without a wait are asked of the pager (`settle`) and taken in likewise, in the
step in which they came.

**How does it go?** The notifiers tell (`mm/notifier.py`). For eviction, unmapping and all else that takes a page away
its entry is dropped and its bits are handed over: *dirty* tells the pager that its copy in swap is out of date,
*young* that the page is a bad victim. PROTECT drops only the right to write; reads go on hitting. SYNC hands over the
dirty bits and starts them anew, so that a write after a write-back is seen. A store to an entry without the right
faults once more, with `write`: that is how the pager learns of the first store to a clean page.

**Pushed.** With `wants_updates` the pager's news of pages that became present are installed at once, without a fault.
That is safe without a sequence check, because they come in the very step in which it is so, and not at all where an
invalidation runs.

**Who still reads when an entry goes?** Nobody: the device copies within one step of the loop, so nothing is under way
when a hook is called. A device with work under way would return a `Fence`.

**Size.** The table is a dictionary of chunks of 512 pages (2 MiB, the span of one lowest-level table on x86-64), made
when a page in it is first installed and dropped with its last: it grows with what the device uses, not with what is
registered, and all regions over an arena share it. Within a chunk there is a byte a page and kind of bit, because
Python searches bytes at memory speed: "all 512 there?" is one call, as cheap as for one entry of 2 MiB, and unlike
that an eviction of one page costs the others nothing.

Invariants: writable and dirty only where present (checked by `check`); no entry outlives the start of an invalidation
of its page; none is made between start and end.

Source: mm/hmm.c and Documentation/mm/hmm.rst of Linux for fill; virt/kvm/dirty_ring and VFIO for the bitmap's form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.reclaimed import Reclaimed
from nopin.mm.device_faults import DeviceFaults, FaultPages
from nopin.mm.effects import Backoff, PageRun, Procedure
from nopin.mm.notifier import Notifiers
from nopin.mm.space import Bytes, Reason
from nopin.mm.subscriber import Invalidation, Subscriber
from nopin.ranges import Range
from nopin.units import US_NS

CHUNK_SHIFT = 9
CHUNK_PAGES = 1 << CHUNK_SHIFT
_CHUNK_MASK = CHUNK_PAGES - 1

ATTEMPTS = 16
"""How often a fill may be beaten by invalidations before it ends with BUSY."""

FIRST_BACKOFF_NS = 10 * US_NS
"""Doubled at each attempt while an invalidation runs: 0.65 s in all; Linux gives 1 s (HMM_RANGE_DEFAULT_TIMEOUT)."""

_SET = bytes([1]) * CHUNK_PAGES
_CLEAR = bytes(CHUNK_PAGES)


class _Chunk:
    """512 pages: one byte, 0 or 1, a page and kind."""

    __slots__ = ("dirty", "n_present", "present", "writable", "young")

    def __init__(self) -> None:
        self.present = bytearray(CHUNK_PAGES)
        self.writable = bytearray(CHUNK_PAGES)
        self.young = bytearray(CHUNK_PAGES)
        self.dirty = bytearray(CHUNK_PAGES)
        self.n_present = 0


@dataclass(slots=True)  # counted in place; handed out as a copy
class MirrorStatistics:
    """Figures of one mirror; counts since it was made.

    Attributes:
        n_present: entries now; `n_chunks` of 512 pages hold them.
        fills: device faults that ended well.
        retries: times a fill was beaten by an invalidation.
        busy: fills that gave up for now.
        installed: entries made by fills; `pushed` by updates.
        invalidated: entries dropped; `protected` lost only the right to write.
    """

    n_present: int = 0
    n_chunks: int = 0
    fills: int = 0
    retries: int = 0
    busy: int = 0
    installed: int = 0
    pushed: int = 0
    invalidated: int = 0
    protected: int = 0


class Mirror(Subscriber):
    """A secondary page table of one arena, shared by all regions over it.

    Args:
        notifiers: of the arena, in page numbers; subscribed to for all of it.
        pager: brings pages, and holds them.
        n_pages: size of the arena.
        wants_updates: install what CPU faults bring in, too.
        owner: as whom this device asks for migrations and exclusive pages.

    Attributes:
        pager: the same.
        reclaimed: entries dropped because the memory manager wanted the pages.
    """

    def __init__(
        self,
        notifiers: Notifiers,
        pager: DeviceFaults,
        n_pages: int,
        *,
        wants_updates: bool = False,
        owner: object = None,
    ) -> None:
        self.n_pages = n_pages
        self.reclaimed = Reclaimed()
        self._notifiers = notifiers
        self.pager = pager
        self._chunks: dict[int, _Chunk] = {}
        self._statistics = MirrorStatistics()
        self._released = False
        self._subscription = notifiers.subscribe(Range(0, n_pages), self, owner=owner, wants_updates=wants_updates)

    def statistics(self) -> MirrorStatistics:
        """Return the figures as they are now."""
        return replace(self._statistics, n_chunks=len(self._chunks))

    def close(self) -> None:
        """Stop mirroring: every entry goes. What was dirty must be asked for before (SYNC). Twice is fine."""
        self._notifiers.unsubscribe(self._subscription)
        self._let_go()

    # Using entries

    def use(self, first: int, n: int, *, write: bool) -> bool:
        """Tell whether the device may access `n` pages (at least 1) from `first` now; note that it does."""
        index, low = first >> CHUNK_SHIFT, first & _CHUNK_MASK
        if low + n > CHUNK_PAGES:
            return self._use_many(first, n, write=write)
        chunk = self._chunks.get(index)
        if chunk is None or (chunk.writable if write else chunk.present).find(0, low, low + n) >= 0:
            return False
        _touch(chunk, low, low + n, write=write)
        return True

    def use_pages(self, pages: NDArray[np.int64], *, write: bool) -> bool:
        """Do the same for scattered pages: (n,) sorted, each once, n at least 1. All are used or none."""
        index = pages >> CHUNK_SHIFT
        cuts = [0, *(np.flatnonzero(index[1:] != index[:-1]) + 1).tolist(), len(pages)]
        uses: list[tuple[_Chunk, NDArray[np.int64]]] = []
        for start, end in pairwise(cuts):
            chunk, within = self._chunks.get(int(index[start])), pages[start:end] & _CHUNK_MASK
            if chunk is None or not np.frombuffer(chunk.writable if write else chunk.present, np.uint8)[within].all():
                return False
            uses.append((chunk, within))
        for chunk, within in uses:
            np.frombuffer(chunk.young, np.uint8)[within] = 1
            if write:
                np.frombuffer(chunk.dirty, np.uint8)[within] = 1
        return True

    def n_missing(self, first: int, n: int, *, write: bool) -> int:
        """Count the pages of a run that the device may not access."""
        n_missing = n
        for index, low, high in _chunks_of(first, n):
            chunk = self._chunks.get(index)
            if chunk is not None:
                n_missing -= (chunk.writable if write else chunk.present).count(1, low, high)
        return n_missing

    def n_held(self, first: int, n: int, *, write: bool) -> int:
        """Count the pages from `first`, up to `n`, that the device may access before the first it may not."""
        for index, low, high in _chunks_of(first, n):
            chunk = self._chunks.get(index)
            missing = low if chunk is None else (chunk.writable if write else chunk.present).find(0, low, high)
            if missing >= 0:
                return (index << CHUNK_SHIFT) + missing - first
        return n

    def holds(self, first: int, n: int, *, write: bool) -> bool:
        """Tell the same as `use`, without using them."""
        low = first & _CHUNK_MASK
        if low + n > CHUNK_PAGES:
            return self.n_held(first, n, write=write) == n
        chunk = self._chunks.get(first >> CHUNK_SHIFT)
        return chunk is not None and (chunk.writable if write else chunk.present).find(0, low, low + n) < 0

    def touch(self, first: int, n: int, *, write: bool) -> None:
        """Note that the device accesses pages. Requires: it holds them, with the right to."""
        assert self.holds(first, n, write=write), "an access that the mirror does not allow"
        for index, low, high in _chunks_of(first, n):
            _touch(self._chunks[index], low, high, write=write)

    def dirty_bitmap(self, pages: PageRun) -> Bytes:
        """Return which pages were written since they were last asked for: ((n + 7) // 8,) uint8, lowest bit first."""
        bits = np.zeros(pages.n, np.uint8)
        for index, low, high in _chunks_of(pages.first, pages.n):
            chunk = self._chunks.get(index)
            if chunk is not None:
                at = (index << CHUNK_SHIFT) + low - pages.first
                bits[at : at + high - low] = np.frombuffer(chunk.dirty, np.uint8)[low:high]
        return np.packbits(bits, bitorder="little")

    # Filling

    def fill(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages and install them: the only way in.

        Returns:
            How many pages from the first are installed and held, and why not all. The caller gives the hold back
            with `unhold`. After BUSY nothing is held.
        """
        backoff_ns = FIRST_BACKOFF_NS
        where = Range(pages.first, pages.end)
        for _ in range(ATTEMPTS):
            if self._released:
                return FaultPages(0, Reason.OWNER_GONE)
            reading = self._notifiers.read_begin(where)
            try:
                came = yield from self.pager.device_fault(pages, write=write)
                stale = self._notifiers.read_retry(reading)
            finally:
                self._notifiers.read_end(reading)
            if not stale and came.reason is not Reason.BUSY:
                if came.n_done:
                    self._install(pages.first, came.n_done, write=write)
                self._statistics.fills += 1
                return came
            self.unhold(pages, came)
            self._statistics.retries += 1
            if came.reason is Reason.BUSY or self._notifiers.running(where):
                yield Backoff(backoff_ns)
            backoff_ns *= 2
        self._statistics.busy += 1
        return FaultPages(0, Reason.BUSY)

    def take_in(self, pages: PageRun, *, write: bool) -> int:
        """Install pages that the pager says are settled, all or none; returns how many were missing. They are not held.

        Requires: it says so in this very step; some are missing.
        """
        first, n = pages.first, pages.n
        if self._released or (self._notifiers.ongoing and self._notifiers.running(Range(first, first + n))):
            return 0
        n_missing = 1 if n == 1 else self.n_missing(first, n, write=write)
        self._install(first, n, write=write)
        self._statistics.fills += 1
        return n_missing

    def unhold(self, pages: PageRun, came: FaultPages) -> None:
        """Give back the hold that `fill` of `pages` returned with. The entries stay until they are invalidated."""
        if came.n_done:
            self.pager.release(PageRun(pages.first, came.n_done))

    def _install(self, first: int, n: int, *, write: bool) -> None:
        """Make entries (at least 1), or add the right to write to them. Called in the step that found them true."""
        index, low = first >> CHUNK_SHIFT, first & _CHUNK_MASK
        high = low + n
        if high > CHUNK_PAGES:
            for index, low, high in _chunks_of(first, n):
                self._install((index << CHUNK_SHIFT) + low, high - low, write=write)
            return
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._chunks[index] = _Chunk()
        n_new = n - chunk.present.count(1, low, high)
        chunk.present[low:high] = _SET[:n]
        if write:
            chunk.writable[low:high] = _SET[:n]
        chunk.n_present += n_new
        statistics = self._statistics
        statistics.n_present += n_new
        statistics.installed += n_new

    # What the notifiers call

    def invalidate_start(self, event: Invalidation) -> None:
        """Drop the entries and hand their bits over."""
        is_reclaim = event.cause.deferrable
        for index, low, high in self._touched(event.ranges):
            chunk = self._chunks[index]
            _collect(chunk.dirty, index, low, high, event.harvest.dirty)
            _collect(chunk.young, index, low, high, event.harvest.young)
            self._drop(index, chunk, low, high, is_reclaim=is_reclaim)

    def protect(self, event: Invalidation) -> None:
        """Drop the right to write, and hand the dirty bits over; reads go on hitting."""
        for index, low, high in self._touched(event.ranges):
            chunk = self._chunks[index]
            _collect(chunk.dirty, index, low, high, event.harvest.dirty)
            self._statistics.protected += chunk.writable.count(1, low, high)
            chunk.writable[low:high] = chunk.dirty[low:high] = _CLEAR[: high - low]

    def sync(self, event: Invalidation) -> None:
        """Hand the dirty bits over and start them anew; entries stay."""
        for index, low, high in self._touched(event.ranges):
            chunk = self._chunks[index]
            _collect(chunk.dirty, index, low, high, event.harvest.dirty)
            chunk.dirty[low:high] = _CLEAR[: high - low]

    def release(self, event: Invalidation) -> None:
        """Drop everything, for good: the arena is gone."""
        del event  # it is everything, and nobody will write back what is gone
        self._released = True
        self._let_go()

    def update(self, where: Range, *, write: bool) -> None:
        """Install pages that became present in this very step."""
        before = self._statistics.installed
        self._install(where.start, where.length, write=write)
        self._statistics.pushed += self._statistics.installed - before
        self._statistics.installed = before

    def age(self, ranges: Sequence[Range], young: set[int], *, clear: bool) -> None:
        """Tell which pages were used since the bits were last cleared."""
        for index, low, high in self._touched(ranges):
            chunk = self._chunks[index]
            _collect(chunk.young, index, low, high, young)
            if clear:
                chunk.young[low:high] = _CLEAR[: high - low]

    def check(self) -> None:
        """Assert what must hold of the table at any time; walks all of it."""
        for chunk in self._chunks.values():
            present = int.from_bytes(chunk.present, "big")
            assert chunk.n_present == chunk.present.count(1) > 0
            for bits in (chunk.writable, chunk.young, chunk.dirty):
                assert not int.from_bytes(bits, "big") & ~present, "a bit of a page that has no entry"
            assert not int.from_bytes(chunk.dirty, "big") & ~int.from_bytes(chunk.writable, "big")
        assert self._statistics.n_present == sum(chunk.n_present for chunk in self._chunks.values())

    # Inside

    def _use_many(self, first: int, n: int, *, write: bool) -> bool:
        if self.n_held(first, n, write=write) < n:
            return False
        for index, low, high in _chunks_of(first, n):
            _touch(self._chunks[index], low, high, write=write)
        return True

    def _touched(self, ranges: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of ranges that lie in chunks there are, as (chunk, low, high)."""
        for where in ranges:
            first, end = where.start, where.end
            index = first >> CHUNK_SHIFT
            if end - 1 >> CHUNK_SHIFT == index:  # the common case
                if index in self._chunks:
                    yield index, first & _CHUNK_MASK, end - (index << CHUNK_SHIFT)
            elif end - first >> CHUNK_SHIFT > len(self._chunks):
                yield from self._touched_of_many(where)
            else:
                yield from (part for part in _chunks_of(first, end - first) if part[0] in self._chunks)

    def _touched_of_many(self, where: Range) -> Iterator[tuple[int, int, int]]:
        """Yield the same of a range with more chunks than there are, by looking at those there are."""
        for index in list(self._chunks):
            start = index << CHUNK_SHIFT
            low, high = max(where.start - start, 0), min(where.end - start, CHUNK_PAGES)
            if low < high:
                yield index, low, high

    def _drop(self, index: int, chunk: _Chunk, low: int, high: int, *, is_reclaim: bool) -> None:
        n_gone = chunk.present.count(1, low, high)
        if is_reclaim and n_gone:
            self.reclaimed.note(index, low, high, chunk.present, n_gone)
        chunk.n_present -= n_gone
        self._statistics.n_present -= n_gone
        self._statistics.invalidated += n_gone
        if not chunk.n_present:
            del self._chunks[index]
            return
        for bits in (chunk.present, chunk.writable, chunk.young, chunk.dirty):
            bits[low:high] = _CLEAR[: high - low]

    def _let_go(self) -> None:
        self._statistics.invalidated += self._statistics.n_present
        self._statistics.n_present = 0
        self._chunks.clear()


def _touch(chunk: _Chunk, low: int, high: int, *, write: bool) -> None:
    if high - low == 1:  # the common case, without making slices
        chunk.young[low] = 1
        if write:
            chunk.dirty[low] = 1
        return
    chunk.young[low:high] = _SET[: high - low]
    if write:
        chunk.dirty[low:high] = _SET[: high - low]


def _collect(bits: bytearray, index: int, low: int, high: int, into: set[int]) -> None:
    """Add the numbers of the pages whose bit is set."""
    base = index << CHUNK_SHIFT
    at = bits.find(1, low, high)
    while at >= 0:
        into.add(base + at)
        at = bits.find(1, at + 1, high)


def _chunks_of(first: int, n: int) -> Iterator[tuple[int, int, int]]:
    """Yield a run cut at chunks, as (chunk, low, high) with page numbers inside the chunk."""
    end = first + n
    while first < end:
        index, low = first >> CHUNK_SHIFT, first & _CHUNK_MASK
        high = min(CHUNK_PAGES, low + end - first)
        yield index, low, high
        first += high - low
