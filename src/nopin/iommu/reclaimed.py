"""How often the memory manager took pages from a device: kept by page, added up by range when somebody asks.

Regions share the mirror of their arena, and an eviction does not look who has registered what: that would cost it time
for each region. It only counts the pages that had an entry.
"""

from __future__ import annotations

import numpy as np

from nopin.mm.effects import PageRun

_SHIFT = 9
BLOCK_PAGES = 1 << _SHIFT


class _Block:
    """512 pages: a count each, and their sum."""

    __slots__ = ("page", "pages", "total")

    def __init__(self) -> None:
        self.pages = np.zeros(BLOCK_PAGES, np.uint32)
        self.page: memoryview = self.pages.data  # quicker for single ones
        self.total = 0


class Reclaimed:
    """The counts of one mirror, since it was made. They grow with what was taken, not with the mirror."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}

    def note(self, block: int, low: int, high: int, present: bytearray, n: int) -> None:
        """Count the pages [low, high) of a block that are present, `n` of them: byte 1, not 0, of the block's 512."""
        counts = self._blocks.get(block)
        if counts is None:
            counts = self._blocks[block] = _Block()
        counts.total += n
        if high - low == 1:  # the common case
            counts.page[low] += 1
        else:
            counts.pages[low:high] += np.frombuffer(present, np.uint8)[low:high]

    def count(self, pages: PageRun) -> int:
        """Add up what was counted in a run."""
        first, end = pages.first >> _SHIFT, (pages.end - 1 >> _SHIFT) + 1
        total = 0
        for index in range(first, end) if end - first < len(self._blocks) else list(self._blocks):
            block = self._blocks.get(index)
            if block is None or not first <= index < end:
                continue
            start = index << _SHIFT
            low, high = max(pages.first - start, 0), min(pages.end - start, BLOCK_PAGES)
            total += block.total if high - low == BLOCK_PAGES else int(block.pages[low:high].sum())
        return total
