"""Somebody who stores to its own cells and reads everybody's, by whatever way it has to the memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np

from nopin.lab.stress.log import CELLS, PAGE_WORDS, Log, Violation, Words

PAGES_AT_ONCE = 4


class Way(Protocol):
    """A way to the memory."""

    def load(self, pages: slice) -> Words:
        """Return a copy of whole pages, (n, 64, 8)."""
        ...

    def store(self, page: int, cell: int, words: Words) -> None:
        """Store the (8,) words of a cell; they are there when it returns."""
        ...


class Tally(msgspec.Struct):
    """What somebody did.

    Attributes:
        words_checked: of those read.
        interrupted: accesses that ended with a dead server. operations: everything else, by kind.
    """

    who: str
    reads: int = 0
    writes: int = 0
    words_checked: int = 0
    interrupted: int = 0
    operations: dict[str, int] = {}


class Broken(Exception):
    """A word was wrong."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


class Actor:
    """See above.

    Args:
        index: of `n_actors`; its cells are those whose number leaves this remainder.
        way: how it reaches the memory.
    """

    def __init__(self, log: Log, who: str, index: int, n_actors: int, seed: int, way: Way) -> None:
        self.log = log
        self.tally = Tally(who)
        self.draw = random.Random(f"{seed} {who}")  # text is hashed the same in every process
        self.way = way
        self._cells = range(index, CELLS, n_actors)
        self._at = 0

    def run(self, until: float, step: Callable[[], None] | None = None) -> None:
        """Step until then (by the monotonic clock), or until somebody found something wrong."""
        step = step or self.step
        while time.monotonic() < until and not self.log.is_stopped:
            step()

    def step(self) -> None:
        """Store or read, here and there or one page after the other."""
        if self.draw.random() < 0.5:
            self.write(self._next_page(self.log.layout.n_plain))
        else:
            n_pages = self.log.layout.n_cells_pages
            first = self._next_page(n_pages)
            self.read(slice(first, min(n_pages, first + self.draw.randrange(1, PAGES_AT_ONCE + 1))))

    def write(self, page: int) -> None:
        """Store to one cell of its own in a page."""
        cell = self.draw.choice(self._cells)
        self.write_cell(page, cell)

    def write_cell(self, page: int, cell: int) -> None:
        """Store to a cell, of which it is the writer."""
        words = self.log.announce(page, cell)
        self.way.store(page, cell, words)
        self.log.note(page, cell)
        self.tally.writes += 1

    def read(self, pages: slice) -> None:
        """Read pages and have them judged.

        Raises:
            Broken: a word could not be there.
        """
        least = self.log.before(pages)
        found = self.way.load(pages)
        self._judged(self.log.judge(self.tally.who, pages, found, least))
        self.tally.reads += 1
        self.tally.words_checked += found.size

    def read_counters(self) -> None:
        """Read the pages of counters and have them judged. Raises as `read`."""
        least = self.log.sum_done()
        layout = self.log.layout
        found = self.way.load(slice(layout.n_cells_pages, layout.n_pages)).reshape(-1)
        self._judged(self.log.judge_sums(self.tally.who, found, least))
        self.tally.words_checked += found.size

    def add_to_counter(self, adder: int, fetch_add: Callable[[tuple[int, int, int]], int]) -> None:
        """Add one to a counter, atomically, and have what it was before judged. Raises as `read`."""
        log = self.log
        at = self.draw.randrange(log.layout.n_counting * PAGE_WORDS)
        page, within = divmod(at, PAGE_WORDS)
        least = int(log.done[:, at].sum())
        log.begun[adder, at] += 1
        before = fetch_add((log.layout.n_cells_pages + page, *divmod(within, 8)))
        most = int(log.begun[:, at].sum()) - 1
        log.done[adder, at] += 1
        if not least <= before <= most:
            self._judged(log.violation_of_counter(self.tally.who, at, before, least, most))
        self.count("atomics")

    def count(self, operation: str) -> None:
        """Count an operation by name."""
        self.tally.operations[operation] = self.tally.operations.get(operation, 0) + 1

    def _judged(self, violation: Violation | None) -> None:
        if violation is not None:
            self.log.stop()
            raise Broken(violation)

    def _next_page(self, n_pages: int) -> int:
        """A page somewhere, or the one behind the last, so that streams arise."""
        self._at = self._at + 1 if self.draw.random() < 0.5 else self.draw.randrange(n_pages)
        self._at %= n_pages
        return self._at


class ByCpu:
    """Loads and stores of this process."""

    def __init__(self, array: Words) -> None:
        self._array = array

    def load(self, pages: slice) -> Words:
        """See `Way`."""
        return np.array(self._array[pages])

    def store(self, page: int, cell: int, words: Words) -> None:
        """See `Way`."""
        self._array[page, cell] = words
