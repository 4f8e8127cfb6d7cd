"""Half-open ranges of addresses: one range, a counted cover, and an index of overlapping intervals."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from nopin.units import page_ceil, page_floor

T = TypeVar("T")


class Range(msgspec.Struct, frozen=True, order=True, gc=False):
    """Addresses from `start` up to, not including, `end`. Never empty.

    A struct, because it takes a quarter of a frozen dataclass's time to make and to compare, and every fault and
    invalidation makes some.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a range: [{self.start:#x}, {self.end:#x})")

    @classmethod
    def of_length(cls, start: int, length: int) -> Range:
        """The range of `length` bytes from `start`."""
        return cls(start, start + length)

    @property
    def length(self) -> int:
        """Bytes covered."""
        return self.end - self.start

    def overlaps(self, other: Range) -> bool:
        """True when at least one byte is in both."""
        return self.start < other.end and other.start < self.end

    def contains(self, other: Range) -> bool:
        """True when every byte of `other` is in this range."""
        return self.start <= other.start and other.end <= self.end

    def intersection(self, other: Range) -> Range | None:
        """The bytes in both, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else None

    def to_pages(self) -> Range:
        """The smallest range of whole pages that contains this one."""
        return Range(page_floor(self.start), page_ceil(self.end))

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


def coalesce(ranges: Iterable[Range]) -> list[Range]:
    """The union of `ranges`, in order, touching ones joined."""
    pieces = sorted(ranges)
    if len(pieces) < 2:
        return pieces
    joined: list[Range] = []
    for piece in pieces:
        if joined and piece.start <= joined[-1].end:
            joined[-1] = Range(joined[-1].start, max(joined[-1].end, piece.end))
        else:
            joined.append(piece)
    return joined


def subtract(ranges: Iterable[Range], hole: Range) -> list[Range]:
    """What of `ranges` lies outside `hole`, in the order given."""
    left: list[Range] = []
    for piece in ranges:
        if piece.start < hole.start:
            left.append(Range(piece.start, min(piece.end, hole.start)))
        if piece.end > hole.end:
            left.append(Range(max(piece.start, hole.end), piece.end))
    return left


class CountedRanges:
    """How often each address is covered, when covers come and go and overlap.

    Kept as sorted boundaries, each with the count that holds from it to the next one; before the first
    boundary and after the last the count is 0, and neighbours always differ. `add` and `remove` answer with
    the parts whose count left or reached 0: what a caller has to register or unregister below.
    """

    __slots__ = ("_bounds", "_counts")

    def __init__(self) -> None:
        self._bounds: list[int] = []
        self._counts: list[int] = []

    def add(self, cover: Range) -> list[Range]:
        """Cover `cover` once more; returns the parts that nothing covered before."""
        return self._change(cover, +1)

    def remove(self, cover: Range) -> list[Range]:
        """Take one cover away; returns the parts that nothing covers now.

        Raises:
            ValueError: some byte of `cover` is not covered; nothing was changed.
        """
        if any(count == 0 for _, count in self._pieces(cover)):
            raise ValueError(f"{cover} is not covered everywhere")
        return self._change(cover, -1)

    def covered(self, within: Range) -> list[Range]:
        """The parts of `within` that are covered at least once, touching ones joined."""
        return coalesce(piece for piece, count in self._pieces(within) if count)

    def __bool__(self) -> bool:
        return bool(self._bounds)

    def __iter__(self) -> Iterator[tuple[Range, int]]:
        """Covered pieces in order, each with its count."""
        for index in range(len(self._bounds) - 1):
            if self._counts[index]:
                yield Range(self._bounds[index], self._bounds[index + 1]), self._counts[index]

    def _pieces(self, within: Range) -> Iterator[tuple[Range, int]]:
        index = bisect_right(self._bounds, within.start) - 1
        at = within.start
        while at < within.end:
            until = self._bounds[index + 1] if index + 1 < len(self._bounds) else within.end
            until = min(until, within.end)
            yield Range(at, until), self._counts[index] if index >= 0 else 0
            at, index = until, index + 1

    def _change(self, cover: Range, step: int) -> list[Range]:
        first, last = self._split_at(cover.start), self._split_at(cover.end)
        turned: list[Range] = []
        for index in range(first, last):
            before = self._counts[index]
            self._counts[index] = before + step
            if before == 0 or before + step == 0:
                turned.append(Range(self._bounds[index], self._bounds[index + 1]))
        self._join(first, last)
        return coalesce(turned)

    def _split_at(self, address: int) -> int:
        """Make `address` a boundary; returns its index."""
        index = bisect_left(self._bounds, address)
        if index == len(self._bounds) or self._bounds[index] != address:
            self._counts.insert(index, self._counts[index - 1] if index else 0)
            self._bounds.insert(index, address)
        return index

    def _join(self, first: int, last: int) -> None:
        """Drop the boundaries in [first, last] that no longer separate different counts."""
        for index in range(last, first - 1, -1):
            if self._counts[index] == (self._counts[index - 1] if index else 0):
                del self._counts[index], self._bounds[index]


class IntervalIndex(Generic[T]):
    """Values by interval; finds those that overlap a range.

    Sorted by start, with the running maximum of the ends beside it: a search goes back from the last start
    before the range's end and stops where no earlier interval can reach it. The maximum is computed again at
    the first search after a change, so a burst of changes costs one pass. Intervals that nest deeply make a
    search linear; for some thousands of regions that is still microseconds.
    """

    __slots__ = ("_entries", "_next_key", "_reach")

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, int, T]] = []  # start, key, end, value: the key makes it sortable
        self._next_key = 0
        self._reach: list[int] | None = None

    def insert(self, where: Range, value: T) -> int:
        """Add a value; returns the key that removes it."""
        key = self._next_key
        self._next_key += 1
        self._entries.insert(bisect_left(self._entries, (where.start, key)), (where.start, key, where.end, value))
        self._reach = None
        return key

    def remove(self, where: Range, key: int) -> None:
        """Take out what `insert(where, ...)` returned `key` for.

        Raises:
            KeyError: there is no such entry.
        """
        index = bisect_left(self._entries, (where.start, key))
        if index == len(self._entries) or self._entries[index][:2] != (where.start, key):
            raise KeyError(key)
        del self._entries[index]
        self._reach = None

    def overlapping(self, where: Range) -> list[T]:
        """Values whose interval shares a byte with `where`, by start."""
        reach = self._reaches()
        found: list[T] = []
        for index in range(bisect_left(self._entries, (where.end,)) - 1, -1, -1):
            if reach[index] <= where.start:
                break
            _, _, end, value = self._entries[index]
            if end > where.start:
                found.append(value)
        found.reverse()
        return found

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (entry[3] for entry in self._entries)

    def _reaches(self) -> list[int]:
        if self._reach is None:
            furthest = 0
            self._reach = [furthest := max(furthest, entry[2]) for entry in self._entries]
        return self._reach
