"""A device whose reads take a while: one that is under way when its page is invalidated goes on, and is waited for.

It is why an invalidation has fences: until a read has ended its frame must not be given away.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nopin.mm.effects import Backoff, PageRun
from nopin.mm.subscriber import Answer, Fence, Invalidation, Subscriber
from nopin.model.oracle.violation import violate
from nopin.ranges import Range
from nopin.units import US_NS

if TYPE_CHECKING:  # an arena may have one
    from nopin.model.arena.paged import PagedArena

READ_NS = 50 * US_NS


@dataclass(eq=False)
class _Read:
    """A read under way."""

    run: PageRun


@dataclass
class _Awaited:
    """Reads that an invalidation waits for."""

    reads: list[_Read]
    fence: Fence = field(default_factory=Fence)

    def end(self, read: _Read) -> None:
        """One of all reads has ended."""
        if read in self.reads:
            self.reads.remove(read)
        if not self.reads:
            self.fence.signal()


class SlowReader(Subscriber):
    """See above. It has its pages by the arena's mirror.

    Attributes:
        n_waited_for: reads that an invalidation had to wait for.
    """

    def __init__(self, arena: PagedArena) -> None:
        self.n_waited_for = 0
        self._arena = arena
        self._reads: list[_Read] = []
        self._awaited: list[_Awaited] = []
        arena.notifiers.subscribe(Range(0, arena.n_pages), self)

    def read(self, run: PageRun, cell: int) -> Generator[Any, Any, None]:
        """Read one cell of each page of a run. On the server's lane, which it gives up while the read goes on."""
        arena = self._arena
        came = yield from arena.mirror.fill(run, write=False)
        arena.mirror.unhold(run, came)
        if came.n_done < run.n:
            return
        read = _Read(run)
        self._reads.append(read)
        yield Backoff(READ_NS)
        for page in range(run.first, run.end):
            if not arena.machine.present[page] and not arena.cells.is_being_given_up(page):
                violate("stale_access", f"a slow device still reads page {page}, which is not in the file")
            arena.machine.view(PageRun(page, 1))
            arena.cells.access("a slow device", page, cell, None)
        self._reads.remove(read)
        for awaited in self._awaited:
            awaited.end(read)
        self._awaited = [awaited for awaited in self._awaited if not awaited.fence.passed]

    def invalidate_start(self, event: Invalidation) -> Answer:
        """Begin no more, which the mirror sees to; those under way are waited for."""
        pending = [read for read in self._reads if event.within(Range(read.run.first, read.run.end))]
        if not pending:
            return None
        self.n_waited_for += len(pending)
        awaited = _Awaited(pending)
        self._awaited.append(awaited)
        return awaited.fence
