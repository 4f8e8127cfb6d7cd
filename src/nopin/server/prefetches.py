"""Prefetches: pages brought before somebody asks, in the background, piece by piece.

A piece of up to `CHUNK_PAGES` is one procedure of the pager. The next one starts only at the end of a turn of the
loop, when all faults that were there have been answered: demand comes before prefetch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.ranges import Range, coalesce
from nopin.server.arena import Arena
from nopin.units import PAGE_BYTES

CHUNK_PAGES = 512
CANCELLED = "cancelled"


class Prefetch:
    """One prefetch.

    Args:
        ranges: page numbers, sorted and disjoint.
        soon: has a callback called at the end of the turn.
        ended: called once, at the end.

    Attributes:
        bytes_done: made resident so far.
        reason: why it ended early; empty otherwise.
        running: not ended yet.
    """

    def __init__(
        self,
        arena: Arena,
        ranges: Iterable[Range],
        *,
        write: bool,
        soon: Callable[[Callable[[], None]], None],
        ended: Callable[[Prefetch], None],
    ) -> None:
        self.arena = arena
        self.bytes_done = 0
        self.reason = ""
        self.running = True
        self._runs = deque(ranges)
        self._write = write
        self._soon = soon
        self._ended = ended
        self.n_bytes = sum(each.length for each in self._runs) * PAGE_BYTES
        soon(self._next)

    def cancel(self) -> None:
        """Start no further piece; one that is under way ends first."""
        self._runs.clear()
        if self.running:
            self.reason = CANCELLED

    def _next(self) -> None:
        if not self._runs:  # all done, or no more wanted: then the arena may be gone
            self.running = False
            self._ended(self)
            return
        run = self._runs.popleft()
        n = min(run.length, CHUNK_PAGES)
        if n < run.length:
            self._runs.appendleft(Range(run.start + n, run.end))
        self.arena.runner.start(self.arena.pager.prefetch(PageRun(run.start, n), write=self._write), self._piece_done)

    def _piece_done(self, came: FaultPages) -> None:
        self.bytes_done += came.n_done * PAGE_BYTES
        if came.reason is not None:
            self._runs.clear()
            self.reason = self.reason or came.reason.name.lower()
        self._soon(self._next)


def pages_of(ranges: Iterable[tuple[int, int]]) -> list[Range]:
    """Return the pages that (offset, length) in bytes touch, sorted and disjoint."""
    touched = (Range.of_length(offset, length).to_pages() for offset, length in ranges if length)
    return coalesce(Range(each.start // PAGE_BYTES, each.end // PAGE_BYTES) for each in touched)
