"""Swap space: which parts of the swap file are free, and the form pages have there.

Space is counted in units of 512 bytes from the start of the file; unit 0 is never used, so that 0 can mean "no copy".
A page takes eight units, or fewer when it is stored compressed. The pages of a batch lie one after the other
where there is room, so that what left together comes back with one read.

Free extents are kept by their start and by their end, so giving back joins neighbours at once, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import lz4.block
import numpy as np
from isal import isal_zlib

from nopin.mm.space import Bytes
from nopin.units import PAGE_BYTES

UNIT_BYTES = 512
UNITS_PER_PAGE = PAGE_BYTES // UNIT_BYTES
WORTH_IT_BYTES = PAGE_BYTES - UNIT_BYTES
"""A compressed page must be at most this long: it has to save a unit at least."""
_LOOKS = 64
"""Free extents looked at before the file grows instead."""

page_crc: Callable[[Bytes | memoryview | bytes], int] = isal_zlib.crc32


def n_units(n_bytes: int) -> int:
    """Units that hold so many bytes."""
    return -(-n_bytes // UNIT_BYTES)


class SwapSpace:
    """Allocates units of one swap file.

    Args:
        limit_bytes: the file never grows beyond; below 2 TiB, because unit numbers are kept in 32 bits.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._end_limit = min(limit_bytes // UNIT_BYTES, 0xFFFFFFFE) + 1
        self._end = 1  # nothing beyond was ever given out
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self.n_used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes given out."""
        return self.n_used * UNIT_BYTES

    def allocate(self, n: int) -> int | None:
        """Take `n` units in a row; returns the first, or None where no row is so long."""
        for start, end in islice(self._by_start.items(), _LOOKS):
            if end - start >= n:
                return self._take(start, end, n)
        if self._end + n <= self._end_limit:
            first, self._end = self._end, self._end + n
            self.n_used += n
            return first
        for start, end in self._by_start.items():
            if end - start >= n:
                return self._take(start, end, n)
        return None

    def free(self, first: int, n: int) -> None:
        """Give `n` units back. Requires: they were given out."""
        assert first > 0
        assert first + n <= self._end
        self.n_used -= n
        assert self.n_used >= 0
        end = first + n
        if (before := self._by_end.pop(first, None)) is not None:
            assert before in self._by_start, "space was given back twice"
            del self._by_start[before]
            first = before
        if (after := self._by_start.pop(end, None)) is not None:
            assert after in self._by_end, "space was given back twice"
            del self._by_end[after]
            end = after
        if end == self._end:
            self._end = first
            return
        self._by_start[first] = end
        self._by_end[end] = first

    def rebuild(self, taken: Sequence[tuple[int, int]]) -> list[bool]:
        """Start over with what a predecessor gave out: (first unit, units) each, in any order.

        Returns:
            For each, whether it can be: inside the limit, and no two on the same units (the first one has them).
        """
        self._by_start.clear()
        self._by_end.clear()
        self._end, self.n_used = 1, 0
        good = [False] * len(taken)
        for index in sorted(range(len(taken)), key=lambda at: taken[at]):
            first, n = taken[index]
            if n <= 0 or first < self._end or first + n > self._end_limit:
                continue
            if first > self._end:
                self._by_start[self._end] = first
                self._by_end[first] = self._end
            self._end = first + n
            self.n_used += n
            good[index] = True
        return good

    def _take(self, start: int, end: int, n: int) -> int:
        del self._by_start[start]
        del self._by_end[end]
        if end - start > n:
            self._by_start[start + n] = end
            self._by_end[end] = start + n
        self.n_used += n
        return start


class Encoded(NamedTuple):
    """A page as it is stored: `data` is padded to whole units; its first `stored` bytes count."""

    data: Bytes
    stored: int
    crc: int


def encode(page: Bytes, *, compress: bool) -> Encoded:
    """Give a page, (4096,) uint8, the form it is stored in. The data may be the page itself."""
    crc = page_crc(page)
    if compress:
        packed = lz4.block.compress(page.data, store_size=False)
        if len(packed) <= WORTH_IT_BYTES:
            padded = packed.ljust(n_units(len(packed)) * UNIT_BYTES, b"\0")
            return Encoded(np.frombuffer(padded, np.uint8), len(packed), crc)
    return Encoded(page, PAGE_BYTES, crc)


def n_intact(pages: Bytes, crcs: Sequence[int]) -> int:
    """Return how many pages of (n * 4096,) uint8 come before the first that is damaged."""
    view = pages.data
    for index, crc in enumerate(crcs):
        if page_crc(view[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]) != crc:
            return index
    return len(crcs)


def decode(data: Bytes, stored: int, crc: int) -> bytes | memoryview | None:
    """Return the 4096 bytes of a stored page, perhaps as they lie in `data`; None if they are damaged."""
    page: bytes | memoryview
    if stored == PAGE_BYTES:
        page = data.data[:PAGE_BYTES]
    else:
        try:
            page = lz4.block.decompress(data[:stored], uncompressed_size=PAGE_BYTES)
        except lz4.block.LZ4BlockError:
            return None
        if len(page) != PAGE_BYTES:
            return None
    return page if page_crc(page) == crc else None
