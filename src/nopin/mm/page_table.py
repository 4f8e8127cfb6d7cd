"""The page table of an arena: what each page is, and where its bytes are when it is not in the file.

It is kept twice. The pager works with arrays of its own, which nobody else can touch. What a successor would need to
know is also written to shared memory that the arena's owner holds: of each page, where its copy in swap is, or that
it is lost. The owner may scribble there at any time, so it is written only, and read by a successor alone, which
believes nothing of it.

**Invariant for successors**, at every moment between two effects: a page that is in the file is right there, whatever
the table says; a hole whose entry names a copy in swap has its bytes in that copy, complete and checked by its sum; a
hole without entry reads as zeros. So an entry is written before its page is punched, and cleared before the page is
given up or its copy's space is given back. The one exception is a page that is *doomed*: a process gives it up, in a
madvise that may go on when the server is killed. It reads as zeros, in the file or not.

Both grow with the pages used, not with the arena: untouched parts of the arrays are never written, and take no memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nopin.codes import Code
from nopin.mm.space import Bytes


class PageState(Code):
    """What a page is."""

    EMPTY = 0
    """Never written, or given up: it reads as zeros. No frame, no copy."""
    RESIDENT = 1
    """In the file."""
    SWAPPED = 2
    """Only its copy in swap is left."""
    LOST = 3
    """Its copy is damaged. Accesses get an error, never zeros."""


BUSY = 0x80
"""Beside a state: the page is on its way in or out; whoever needs it pauses at its gate."""

LOST_UNIT, DOOMED_UNIT = 0xFFFFFFFF, 0xFFFFFFFE
"""Of entries that name no copy."""
_ENTRY_BYTES = 10


class PageTable:
    """States and entries of `n_pages` pages.

    Args:
        shared: (bytes_needed(n_pages),) uint8, zeros for a new arena: where a successor looks.

    Attributes:
        state: a PageState each, perhaps with BUSY. As a memoryview for single pages, `states` the same as an array.
        unit: where the copy in swap begins, in units of 512 bytes; 0: there is none. `units` the same as an array.
        size: bytes of the copy, likewise, and `stored`. crc: CRC-32 of the page, likewise, and `crcs`.
    """

    def __init__(self, n_pages: int, shared: Bytes) -> None:
        assert len(shared) >= self.bytes_needed(n_pages)
        self.n_pages = n_pages
        self.states = np.zeros(n_pages, np.uint8)
        self.units = np.zeros(n_pages, np.uint32)
        self.stored = np.zeros(n_pages, np.uint16)
        self.crcs = np.zeros(n_pages, np.uint32)
        self._marks = np.zeros(n_pages, np.uint32)  # DOOMED_UNIT or 0: what an entry without a copy says
        self.state: memoryview = self.states.data
        self.unit: memoryview = self.units.data
        self.size: memoryview = self.stored.data
        self.crc: memoryview = self.crcs.data
        self._shared_units: NDArray[np.uint32] = shared[: 4 * n_pages].view(np.uint32)
        self._shared_crcs: NDArray[np.uint32] = shared[4 * n_pages : 8 * n_pages].view(np.uint32)
        self._shared_stored: NDArray[np.uint16] = shared[8 * n_pages : 10 * n_pages].view(np.uint16)
        self._shared_unit: memoryview = self._shared_units.data

    @staticmethod
    def bytes_needed(n_pages: int) -> int:
        """Size of the shared part."""
        return n_pages * _ENTRY_BYTES

    def run_length(self, first: int, n_most: int) -> int:
        """Count the pages from `first`, up to `n_most`, that are exactly in the state of the first."""
        if n_most == 1:
            return 1
        states = self.states[first : first + n_most]
        other = states != states[0]
        at = int(other.argmax())
        return at if other[at] else len(states)

    def remember(
        self, pages: NDArray[np.int64], units: NDArray[np.uint32], stored: NDArray[np.uint16], crcs: NDArray[np.uint32]
    ) -> None:
        """Note where complete copies are: the unit last, because it makes the entry count. Not of doomed pages."""
        self.units[pages], self.stored[pages], self.crcs[pages] = units, stored, crcs
        self._shared_crcs[pages], self._shared_stored[pages] = crcs, stored
        self._shared_units[pages] = np.maximum(units, self._marks[pages])

    def doom(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Have a successor give pages up, until they are pardoned; returns those of which that is new."""
        fresh: NDArray[np.int64] = pages[self._marks[pages] == 0]
        self._marks[fresh] = self._shared_units[fresh] = DOOMED_UNIT
        return fresh

    def pardon(self, pages: NDArray[np.int64]) -> None:
        """Have a successor find pages as they are: given up by now, or not at all."""
        self._marks[pages] = 0
        is_lost = self.states[pages] & ~np.uint8(BUSY) == PageState.LOST
        self._shared_units[pages] = np.where(is_lost, LOST_UNIT, self.units[pages])

    def forget(self, pages: NDArray[np.int64] | int) -> None:
        """Drop the entries of pages, or of one."""
        self.units[pages] = 0
        self._shared_units[pages] = self._marks[pages]

    def lose(self, page: int) -> None:
        """Note that the bytes of a page are gone for good."""
        self.state[page] = PageState.LOST
        self.unit[page] = 0
        self._shared_unit[page] = int(self._marks[page]) or LOST_UNIT

    def load_shared(self) -> NDArray[np.int64]:
        """Take over the entries that a predecessor wrote; returns the pages that have one, sorted.

        They are still to be judged: see `mm.recovery`.
        """
        pages = np.flatnonzero(self._shared_units)
        self.units[pages] = self._shared_units[pages]
        self.stored[pages] = self._shared_stored[pages]
        self.crcs[pages] = self._shared_crcs[pages]
        return pages
