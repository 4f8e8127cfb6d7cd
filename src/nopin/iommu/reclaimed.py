"""How often the memory manager took pages from a device: kept by page, added up by range when somebody asks.

Regions share the mirror of their arena, and an eviction does not look who has registered what: that would cost it time
for each region. It only counts the pages that had an entry.
"""

from __future__ import annotations

import numpy as np

from nopin.mm.effects import PageRun

_SHIFT = 9
"""So many pages, a *block*, have a sum of their own, so that long ranges are added up quickly: a chunk of the mirror."""


class Reclaimed:
    """The counts of one mirror, since it was made. They take memory where pages are counted only."""

    def __init__(self, n_pages: int) -> None:
        self._by_page = np.zeros(n_pages, np.uint32)
        self._by_block = np.zeros((n_pages >> _SHIFT) + 1, np.uint64)
        self._page: memoryview = self._by_page.data
        self._block: memoryview = self._by_block.data

    def note(self, block: int, low: int, high: int, present: bytearray, n: int) -> None:
        """Count the pages [low, high) of a block that are present, `n` of them: byte 1, not 0, of the block's 512."""
        self._block[block] += n
        first = (block << _SHIFT) + low
        if high - low == 1:  # the common case
            self._page[first] += 1
        else:
            self._by_page[first : first + high - low] += np.frombuffer(present, np.uint8)[low:high]

    def count(self, pages: PageRun) -> int:
        """Add up what was counted in a run."""
        first, end = pages.first, pages.end
        low, high = -(-first >> _SHIFT), end >> _SHIFT  # whole blocks
        if low >= high:
            return int(self._by_page[first:end].sum())
        edges = self._by_page[first : low << _SHIFT].sum() + self._by_page[high << _SHIFT : end].sum()
        return int(edges + self._by_block[low:high].sum())
