"""Cells: the few words of each page that accesses go to, and what may be read in them.

Each store writes a number nobody wrote before (or zero, so that pages become all zeros), so what is read tells who
wrote it. What may be read is exactly what was stored last, but in pages that are being given up: there zero, too, from
the moment that begins. When it has ended zero is right, and what was stored meanwhile; if it cannot be known what it
came to (its server was killed), the first read decides.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from nopin.mm.effects import PageRun
from nopin.mm.space import Bytes
from nopin.model.oracle.violation import violate
from nopin.units import PAGE_BYTES, U64_MAX

CELLS = (0, PAGE_BYTES - 8)
"""Offsets in a page: its first word and its last."""


class Cells:
    """See above.

    Args:
        memory: the frames, where the words are looked at.
    """

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self._allowed: dict[tuple[int, int], list[int]] = {}
        self._stored_at: dict[tuple[int, int], int] = {}
        self._giving_up: Counter[int] = Counter()
        self._clock = 0
        self._next_value = 1

    def fresh(self) -> int:
        """Return a number nobody wrote before, of which every byte matters."""
        self._next_value += 1
        return self._next_value * 0x9E3779B97F4A7C15 & U64_MAX

    def access(self, who: str, page: int, cell: int, value: int | None) -> int:
        """Store a value, or (None) read, at the page's frame, and check; returns the word."""
        at = page * PAGE_BYTES + CELLS[cell]
        word = self.memory[at : at + 8].view(np.uint64)
        allowed = self._allowed.setdefault((page, cell), [0])
        if value is not None:
            word[0] = value
            self._stored_at[page, cell] = self._clock
            allowed[:] = [value, 0] if self._giving_up[page] and value else [value]
            return value
        found = int(word[0])
        if found not in allowed:
            which = "lost_write" if not found else "wrong_bytes"
            may_be = " or ".join(f"{each:#x}" for each in allowed)
            violate(which, f"{who} reads {found:#x} in page {page}, word {cell}; it may be {may_be}")
        if not self._giving_up[page]:
            allowed[:] = [found]
        return found

    def begin_giving_up(self, run: PageRun) -> int:
        """From here on pages may read as zeros. Returns what `end_giving_up` wants to know."""
        self._clock += 1
        for page in range(run.first, run.end):
            self._giving_up[page] += 1
            for cell in range(len(CELLS)):
                allowed = self._allowed.setdefault((page, cell), [0])
                if 0 not in allowed:
                    allowed.append(0)
        return self._clock

    def end_giving_up(self, run: PageRun, began_at: int | None) -> None:
        """What is stored from here on stays; what was not stored since it began is zeros (None: perhaps)."""
        for page in range(run.first, run.end):
            self._giving_up[page] = max(0, self._giving_up[page] - 1)
            for cell in range(len(CELLS)):
                if began_at is not None and self._stored_at.get((page, cell), 0) < began_at:
                    self._allowed[page, cell] = [0]

    def expect_zeros(self, run: PageRun) -> None:
        """Pages have been given up: they read as zeros until somebody stores to them."""
        self.end_giving_up(run, self._clock + 1)

    def is_being_given_up(self, page: int) -> bool:
        """Tell whether the kernel may be dropping a page right now."""
        return self._giving_up[page] > 0

    def forget_giving_up(self) -> None:
        """Who was giving pages up was killed: it is undone or half done, and both are right."""
        self._giving_up.clear()
