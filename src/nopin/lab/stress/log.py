"""The checker: it says of every word that was read whether it could be there, and knows nothing of pages.

Memory is cut into *cells* of 64 bytes. Each has one writer, which numbers what it stores. Before it stores number n it
announces n here, in plain shared memory that no pager touches; afterwards it notes n as stored. A reader that looks
here before and after its read knows the bounds: at least what was stored when it began, at most what was announced when
it ended. Anything else was lost, stale or made up. A cell may be read while it is written, and its words may then be of
different numbers; a word is written at once, so each is judged by itself. Every word also says where it belongs, so
bytes of another place show.

Bytes that are given up (MADV_REMOVE) read as zeros: that is a number, too, noted as the last removal.

*Counters* are words that several add to, atomically. Each of them notes what it has begun and has done, and the sum is
between the two sums.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes
from nopin.units import PAGE_BYTES

CELLS = 64
"""In a page."""
WORDS = 8
"""In a cell."""
PAGE_WORDS = CELLS * WORDS
PLACE_BITS = 20
N_PAGES_MAX = (1 << PLACE_BITS) // PAGE_WORDS
N_ADDERS = 4

Words = NDArray[np.int64]
"""(pages, 64, 8), or parts of that."""


class Layout(msgspec.Struct, frozen=True):
    """How the pages of the arena are used: cells, then cells whose bytes are given up now and then, then counters."""

    n_plain: int
    n_given_up: int
    n_counting: int

    @property
    def n_cells_pages(self) -> int:
        """Pages of cells."""
        return self.n_plain + self.n_given_up

    @property
    def n_pages(self) -> int:
        """All pages."""
        return self.n_cells_pages + self.n_counting

    @property
    def log_bytes(self) -> int:
        """Size of the log's memory."""
        return 8 * (3 * self.n_cells_pages * CELLS + 2 * N_ADDERS * self.n_counting * PAGE_WORDS + 1)


class Violation(msgspec.Struct, frozen=True):
    """A word that could not be there.

    Attributes:
        who: read it. page, cell, word: where; of a counter the cell and word that hold it.
        found: the word; in a cell it says number `found_number` of place `found_place`.
        least, most: numbers that it could have. removed: the last removal; from `least` on zeros are right, too.
    """

    who: str
    page: int
    cell: int
    word: int
    found: int
    found_number: int
    found_place: int
    least: int
    most: int
    removed: int

    def __str__(self) -> str:
        where = f"page {self.page} cell {self.cell} word {self.word}"
        allowed = f"numbers {self.least} to {self.most} could be there"
        if self.removed >= self.least:
            allowed += f", or zeros (removal {self.removed})"
        says = f"number {self.found_number} of place {self.found_place}"
        return f"{self.who}: {where} is {self.found:#x} ({says}); {allowed}"


class Log:
    """See above. Whoever has the memory shares it.

    Attributes:
        announced, stored, removed: (pages, 64) numbers.
        begun, done: (adders, counters) additions.
    """

    def __init__(self, memory: Bytes, layout: Layout) -> None:
        assert layout.n_pages <= N_PAGES_MAX, "a word has no room for the number of its place"
        self.layout = layout
        words = memory[: layout.log_bytes].view(np.int64)
        n_cells, n_counters = layout.n_cells_pages * CELLS, layout.n_counting * PAGE_WORDS
        cells = words[: 3 * n_cells].reshape(3, layout.n_cells_pages, CELLS)
        adds = words[3 * n_cells : -1].reshape(2, N_ADDERS, n_counters)
        self.announced, self.stored, self.removed = cells
        self.begun, self.done = adds
        self._stop = words[-1:]
        self._places = np.arange(layout.n_cells_pages * PAGE_WORDS).reshape(-1, CELLS, WORDS)

    @property
    def is_stopped(self) -> bool:
        """Somebody has seen enough: all end."""
        return bool(self._stop[0])

    def stop(self) -> None:
        """Have all end."""
        self._stop[0] = 1

    # Writing

    def announce(self, page: int, cell: int) -> Words:
        """Begin to store the next number in a cell; returns the (8,) words to be stored."""
        number = int(self.announced[page, cell]) + 1
        self.announced[page, cell] = number
        words: Words = (number << PLACE_BITS) | self._places[page, cell]
        return words

    def note(self, page: int, cell: int) -> None:
        """What was announced last is stored."""
        self.stored[page, cell] = self.announced[page, cell]

    def announce_removal(self, pages: slice) -> None:
        """Begin to give up the bytes of pages."""
        numbers = self.announced[pages] + 1
        self.announced[pages] = numbers
        self.removed[pages] = numbers

    def note_removal(self, pages: slice) -> None:
        """They are gone."""
        self.stored[pages] = self.announced[pages]

    # Reading

    def before(self, pages: slice) -> NDArray[np.int64]:
        """Return what is stored at least, by a read that begins now."""
        return self.stored[pages].copy()

    def judge(self, who: str, pages: slice, found: Words, least: NDArray[np.int64]) -> Violation | None:
        """Judge (n, 64, 8) words of whole pages, read since `before` returned `least`; returns one that is wrong."""
        most, removed = self.announced[pages], self.removed[pages]
        low, high, gone = (bounds[:, :, np.newaxis] for bounds in (least, most, removed))
        number, place = found >> PLACE_BITS, found & ((1 << PLACE_BITS) - 1)
        is_zero = found == 0
        right = np.where(
            is_zero, (low == 0) | (gone >= low), (place == self._places[pages]) & (number >= low) & (number <= high)
        )
        if right.all():
            return None
        at, cell, word = (int(each) for each in np.argwhere(~right)[0])
        return Violation(
            who=who,
            page=pages.start + at,
            cell=cell,
            word=word,
            found=int(found[at, cell, word]),
            found_number=int(number[at, cell, word]),
            found_place=int(place[at, cell, word]),
            least=int(least[at, cell]),
            most=int(most[at, cell]),
            removed=int(removed[at, cell]),
        )

    # Counters

    def sum_done(self) -> Words:
        """Return (counters,) what each counter is at least, by a read that begins now."""
        done: Words = self.done.sum(axis=0)
        return done

    def judge_sums(self, who: str, found: Words, least: Words) -> Violation | None:
        """Judge all counters, (counters,), read since `sum_done` returned `least`."""
        most = self.begun.sum(axis=0)
        wrong = np.flatnonzero((found < least) | (found > most))
        if not len(wrong):
            return None
        at = int(wrong[0])
        return self.violation_of_counter(who, at, int(found[at]), int(least[at]), int(most[at]))

    def violation_of_counter(self, who: str, at: int, found: int, least: int, most: int) -> Violation:
        """Say what is wrong with one counter."""
        page, within = divmod(at, PAGE_WORDS)
        cell, word = divmod(within, WORDS)
        page += self.layout.n_cells_pages
        return Violation(who, page, cell, word, found, found, 0, least, most, -1)


def memory_of(layout: Layout) -> dict[str, Any]:
    """Return what an array for a layout is made with: shape and dtype."""
    assert CELLS * WORDS * 8 == PAGE_BYTES
    return {"shape": (layout.n_pages, CELLS, WORDS), "dtype": np.int64}
