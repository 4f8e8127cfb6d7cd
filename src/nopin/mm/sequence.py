"""Eras: how a fill finds out that the translation it is about to install has become stale.

A fill learns where a page is and then installs that as a translation. Between the two anything may happen. It cannot
lock the memory manager out, which may be what it waits for; so it asks afterwards: did an invalidation of my pages
run at any moment since I began? If so, what it learned is worth nothing, and it begins again.

Linux answers with one sequence number per address space, odd while any invalidation runs (mmu_interval_read_begin and
mmu_interval_read_retry). It is small, and coarse: the number moves for invalidations anywhere, and a steady stream of
overlapping ones anywhere keeps every hit subscription waiting. Once it was also kept in a variable too narrow for
it (KVM, 2023: after 2^31 invalidations a stale answer was taken for a fresh one, for ever).

Here the question is answered for exactly the pages asked about. The clock is a Python integer, so it cannot wrap.
While readings are open, each start and each end of an invalidation is noted with its ranges and its time; a
reading is stale if one of its pages lies in a range noted since it began, or in one that still runs. With no reading
open nothing is noted, so an invalidation then costs nothing here.

    clock      7      8      9     10
               start  begin  end   retry?      an invalidation of other pages: no
               of A   of X   of A              A overlaps X: yes, it ran when X began (its end is noted at 9)

Invariant: `retry` never says False when an invalidation of a page of the reading ran at any time since `begin`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from nopin.ranges import Range

_start = attrgetter("start")


def overlap_any(ranges: Sequence[Range], where: Range) -> bool:
    """Tell whether `where` shares an address with one of `ranges`, which are sorted and disjoint. O(log n)."""
    index = bisect_left(ranges, where.end, key=_start)
    return index > 0 and ranges[index - 1].end > where.start


@dataclass(slots=True, eq=False)
class Reading:
    """One attempt to learn where the pages of a range are.

    Attributes:
        began_at: the clock when it began.
    """

    where: Range
    began_at: int


@dataclass(slots=True, eq=False)
class Era:
    """One invalidation between its start and its end."""

    ranges: Sequence[Range]


class Eras:
    """Invalidations that run, and those that open readings must know of.

    Args:
        clock: where to start counting; any integer does, which a test of the width shows.

    Attributes:
        ongoing: those that run; most of the time there is none.
    """

    def __init__(self, clock: int = 0) -> None:
        self._clock = clock
        self.ongoing: dict[Era, None] = {}
        self._readings: dict[Reading, None] = {}  # open ones, by `began_at`
        self._noted: deque[tuple[int, Sequence[Range]]] = deque()

    @property
    def n_noted(self) -> int:
        """Starts and ends kept for open readings."""
        return len(self._noted)

    def start(self, ranges: Sequence[Range]) -> Era:
        """Note that an invalidation of sorted, disjoint ranges begins."""
        era = Era(ranges)
        self.ongoing[era] = None
        self._note(ranges)
        return era

    def end(self, era: Era) -> None:
        """Note that it is over. Requires: it was started, and not ended."""
        del self.ongoing[era]
        self._note(era.ranges)

    def running(self, where: Range) -> bool:
        """Tell whether an invalidation of some address of `where` runs now."""
        return any(overlap_any(era.ranges, where) for era in self.ongoing)

    def begin(self, where: Range) -> Reading:
        """Open a reading; to be closed with `close`."""
        reading = Reading(where, self._clock)
        self._readings[reading] = None
        return reading

    def retry(self, reading: Reading) -> bool:
        """Tell whether what was learned since `begin` may be stale. Requires: the reading is open."""
        assert reading in self._readings, "a closed reading no longer knows what ran"
        if self.running(reading.where):
            return True
        since = (ranges for time, ranges in self._noted if time > reading.began_at)
        return any(overlap_any(ranges, reading.where) for ranges in since)

    def close(self, reading: Reading) -> None:
        """Close a reading, and forget what no open one needs."""
        del self._readings[reading]
        oldest = next(iter(self._readings), None)
        if oldest is None:
            self._noted.clear()
            return
        while self._noted and self._noted[0][0] <= oldest.began_at:
            self._noted.popleft()

    def _note(self, ranges: Sequence[Range]) -> None:
        self._clock += 1
        if self._readings:
            self._noted.append((self._clock, ranges))
