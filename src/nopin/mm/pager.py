"""The pager: the memory manager of one arena.

An arena is a file of pages that processes map and devices mirror. More of it may be used than may be resident; the
pager decides which pages are in the file, which only in swap, and who hears of it when that changes. It does nothing
itself: each method below is a procedure (`mm.effects`) that a runner carries out.

    a process touches a page          cpu_fault      faults.py, or for the first time first_touch.py
    a device needs pages              device_fault   faults.py, held until `release`
    somebody will need pages          prefetch       faults.py
    room is needed                    (inside)       eviction.py, in what order: residency.py
    pages are not wanted any more     discard, removed           giving_up.py
    a predecessor was killed          recover        recovery.py

**What keeps bytes safe.** Three rules, each argued where it is carried out:

1. *The file is the truth.* A page that is in the file is right, whatever else is written down; a hole is what the table
   says. So a copy is complete and noted before its page is punched, and an entry goes before its page's meaning does.
2. *A copy is valid only while nobody could have written the page.* A page with a valid copy is write-protected in
   every process; devices tell what they wrote when they are invalidated. The first store gives the copy up.
3. *Pages on their way belong to one procedure.* They are busy, and all others wait at their gate, then look again.

A runner never runs two steps at once. So between two effects there are no locks; across an effect there are gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nopin.mm import faults, giving_up, recovery
from nopin.mm.arena_pages import ArenaPages, News, PagerSettings, PagerStatistics
from nopin.mm.bring import bring_at_once
from nopin.mm.device_faults import FaultPages, Frames
from nopin.mm.effects import SERVER, Mapper, PageRun, Procedure
from nopin.mm.eviction import batch_pages, evict
from nopin.mm.first_touch import FirstTouch
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import PageState, PageTable
from nopin.mm.residency import BATCH_PAGES, Budget, Pages
from nopin.mm.swap import SwapSpace

_RESIDENT = int(PageState.RESIDENT)  # plain integers compare quicker
LOW_SHARE, HIGH_SHARE = 0.94, 0.98
"""Of the budget: reclaim begins above the high mark and ends below the low one; so a fault seldom has to evict."""


class Pager:
    """See above.

    Args:
        table: all EMPTY; for `recover`, with the predecessor's shared part.
        swap: all free.
        notifiers: of this arena, in page numbers.
        frames: the server's view of the pages.

    Attributes:
        first_touch: answers what needs no procedure.
    """

    def __init__(
        self,
        table: PageTable,
        swap: SwapSpace,
        budget: Budget,
        notifiers: Notifiers,
        frames: Frames,
        settings: PagerSettings | None = None,
        news: News | None = None,
    ) -> None:
        self.notifiers = notifiers
        self._arena = ArenaPages(
            table, swap, budget, notifiers, frames, settings or PagerSettings(), news if news is not None else News()
        )
        self.first_touch = FirstTouch(self._arena)

    def cpu_fault(self, mapper: Mapper, page: int, *, write: bool, minor: bool, protected: bool) -> Procedure[None]:
        """Answer a fault of a process.

        Args:
            minor: the page was in the file and not mapped. protected: it was, and write-protected.
        """
        return faults.cpu_fault(self._arena, mapper, page, write=write, minor=minor, protected=protected)

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages into the file and hold them; see `DeviceFaults`."""
        return faults.device_fault(self._arena, pages, write=write)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """Tell whether pages are there, and so need no `device_fault`; see `DeviceFaults`."""
        first, n, arena = pages.first, pages.n, self._arena
        if arena.state[first] != _RESIDENT or (n > 1 and arena.table.run_length(first, n) < n):
            return False
        if write:
            arena.dirtied(pages)
        return True

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """Make them so as far as nothing has to be waited for; see `DeviceFaults`."""
        arena = self._arena
        if pages.n == 1 and arena.state[pages.first] != _RESIDENT:  # the common case: with one procedure less around it
            return bring_at_once(arena, pages, SERVER, write=write)
        return faults.settle(arena, pages, write=write)

    def release(self, pages: PageRun) -> None:
        """End one hold of pages."""
        self._arena.residency.unhold(pages)

    def prefetch(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages before somebody asks, without displacing those that proved to be wanted."""
        return faults.prefetch(self._arena, pages, write=write)

    def discard(self, pages: PageRun) -> Procedure[None]:
        """Make pages read as zeros."""
        return giving_up.discard(self._arena, pages)

    def removed(self, mapper: Mapper, pages: PageRun, *, dropped: bool | None) -> Procedure[None]:
        """Heed a process's madvise; see `giving_up.removed`."""
        return giving_up.removed(self._arena, mapper, pages, dropped=dropped)

    def expect_removal(self, runs: Sequence[PageRun]) -> Pages:
        """Have a successor give up what processes are giving up, before their word is read; see `giving_up.expect`."""
        return giving_up.expect(self._arena, runs)

    def expect_no_more(self, expected: Pages, read: Sequence[PageRun]) -> None:
        """Take that back but for what was read of; see `giving_up.expect_no_more`."""
        giving_up.expect_no_more(self._arena, expected, read)

    @property
    def n_held(self) -> int:
        """Holds outstanding."""
        return self._arena.residency.n_held

    @property
    def wants_reclaim(self) -> bool:
        """True while `reclaim` has something to do: residency is above the high mark."""
        budget = self._arena.budget
        limit = budget.limit
        return limit - budget.room > HIGH_SHARE * limit and budget.n_used > 1 and not self._arena.swap_is_full

    @property
    def uses_swap(self) -> bool:
        """True while bytes of some page are in swap, perhaps there alone, or may be on their way there."""
        return self._arena.swap.n_used > 0 or self._arena.any_gate() is not None

    def reclaim(self) -> Procedure[int]:
        """Bring residency below the low mark, as far as it goes; returns the pages that left.

        One page stays: whoever waited for it has perhaps not had it yet, and would wait for ever.
        """
        budget = self._arena.budget
        n_left = 0
        while (limit := budget.limit) - budget.room > LOW_SHARE * limit and budget.n_used > 1:
            n = yield from evict(self._arena, min(batch_pages(limit), budget.n_used - 1))
            if not n:
                break
            n_left += n
        return n_left

    def give_back(self, n_pages: int) -> Procedure[int]:
        """Evict up to `n_pages` because another arena needs the room; returns the pages that left."""
        return evict(self._arena, n_pages)

    def set_budget(self, n_pages: int) -> Procedure[None]:
        """Change the budget; ends once no more is resident, or no more can leave."""
        self._arena.budget.n_pages = n_pages
        while (room := self._arena.budget.room) < 0:
            if not (yield from evict(self._arena, min(BATCH_PAGES, -room))):
                break

    def recover(self) -> Procedure[None]:
        """Take over from a predecessor that was killed."""
        return recovery.recover(self._arena)

    def statistics(self) -> PagerStatistics:
        """Return the counts."""
        arena = self._arena
        return replace(
            arena.counts,
            resident=arena.budget.n_used,
            swapped_bytes=arena.swap.used_bytes,
            refaults=arena.residency.n_refaults,
        )
