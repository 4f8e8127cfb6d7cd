"""What the pager's procedures share: the pages of one arena, their table, their order, their budget.

Procedures run one at a time and yield only at effects; between two yields everything here is consistent. A procedure
that needs pages to stay as they are across a yield marks them busy, with a gate that it opens when it is done.

Whoever gives pages up must have them at once: a process that said so goes on, and what it stores next must find the
old bytes gone. So it *claims* them also where they are on their way already, waits for those before it, and has them
busy without a gap. A claimed page on its way in is not put into the file any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np

from nopin.mm.device_faults import Frames
from nopin.mm.effects import Gate, PageRun
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import BUSY, PageState, PageTable
from nopin.mm.readahead import Readahead
from nopin.mm.residency import Budget, Pages, Residency
from nopin.mm.swap import SwapSpace, n_units
from nopin.ranges import Range
from nopin.units import US_NS

_RESIDENT = int(PageState.RESIDENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerSettings:
    """How a pager behaves.

    Attributes:
        compress: store pages compressed where that saves space.
        swap_limit_bytes: the swap file grows no further.
        fault_around_pages: resident pages mapped beside one that a process asked for.
        patience_ns: how long a fault waits for memory that the machine, or other arenas, may give back.
    """

    compress: bool = True
    swap_limit_bytes: int = 1 << 40
    fault_around_pages: int = 16
    patience_ns: int = 5_000_000 * US_NS


@dataclass(slots=True)  # counted in place; handed out as a copy
class PagerStatistics:
    """Counts since the arena was made; pages unless said.

    Attributes:
        resident, swapped_bytes: now; bytes of swap in use.
        faults_zero, faults_swap, faults_minor, faults_protect: CPU faults by what they took.
        faults_device: pages brought for devices that were out.
        coalesced: faults that found their page on its way.
        refaults: pages that came back soon after they had left.
        readahead: pages brought beside those that were asked for.
        prefetched: pages brought by prefetches.
        evicted: of them `evicted_clean` had a valid copy, `evicted_zero` held zeros; the others were written.
        swapped_in, swapped_out: pages read and written; `swap_read_bytes`, `swap_written_bytes` as stored.
        lost: pages whose copy was damaged or unreadable.
        refused: faults that found no room, and got an error.
        poisoned: touches of processes answered with SIGBUS.
        swap_errors: failed reads and writes of the swap file. swap_full: evictions that found it full.
        short_of_memory: times the machine had no frame to give.
        repaired: pages that were not what the table said, because a process went behind it.
    """

    resident: int = 0
    swapped_bytes: int = 0
    faults_zero: int = 0
    faults_swap: int = 0
    faults_minor: int = 0
    faults_protect: int = 0
    faults_device: int = 0
    coalesced: int = 0
    refaults: int = 0
    readahead: int = 0
    prefetched: int = 0
    evicted: int = 0
    evicted_clean: int = 0
    evicted_zero: int = 0
    swapped_in: int = 0
    swapped_out: int = 0
    swap_read_bytes: int = 0
    swap_written_bytes: int = 0
    lost: int = 0
    refused: int = 0
    poisoned: int = 0
    swap_errors: int = 0
    swap_full: int = 0
    short_of_memory: int = 0
    repaired: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to count."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(slots=True)
class News:
    """What the arena's owner is to be told.

    Attributes:
        pages_lost: called with a page whose bytes are gone.
        swap_full: called when pages cannot leave because swap is full, once until they can again.
        pressure: called when other arenas of the same budget hold the room this one needs.
    """

    pages_lost: Callable[[int], None] = lambda _page: None
    swap_full: Callable[[], None] = lambda: None
    pressure: Callable[[], None] = lambda: None


@dataclass(slots=True, eq=False)
class Transit:
    """Pages on their way in or out, and the gate that opens when they have arrived."""

    pages: Pages
    gate: Gate = field(default_factory=Gate)


class ArenaPages:
    """The state of one arena.

    Attributes:
        counts: see `PagerStatistics`; `resident`, `swapped_bytes` and `refaults` are filled in when asked.
        swap_is_full: eviction found no space, and none was given back since.
        n_short_in_a_row: fills that the machine had no frame for, since one that it had.
    """

    def __init__(
        self,
        table: PageTable,
        swap: SwapSpace,
        budget: Budget,
        notifiers: Notifiers,
        frames: Frames,
        settings: PagerSettings,
        news: News,
    ) -> None:
        self.table = table
        self.state = table.state
        self.swap = swap
        self.budget = budget
        self.notifiers = notifiers
        self.frames = frames
        self.settings = settings
        self.news = news
        self.residency = Residency(table.states, budget)
        self.readahead = Readahead()
        self.counts = PagerStatistics()
        self.swap_is_full = False
        self.n_short_in_a_row = 0
        self._transits: list[Transit] = []

    # On their way

    def begin_transit(self, pages: Pages) -> Transit:
        """Mark pages busy. Requires: none is."""
        assert not (self.table.states[pages] & BUSY).any()
        return self.claim(pages)

    def claim(self, pages: Pages) -> Transit:
        """Mark pages busy; those that are so already are to be waited for: see `gate_before`."""
        self.table.states[pages] |= BUSY
        transit = Transit(pages)
        self._transits.append(transit)
        return transit

    def gate_before(self, transit: Transit) -> Gate | None:
        """Return the gate of an earlier transit of some of the same pages; None: they are this one's now."""
        for other in self._transits:
            if other is transit:
                break
            if len(_common(other.pages, transit.pages)):
                return other.gate
        return None

    def n_unclaimed(self, transit: Transit) -> int:
        """Count the pages before the first that somebody waits to give up. Requires: the pages are one run."""
        first, n = int(transit.pages[0]), len(transit.pages)
        for other in self._transits:
            if other is not transit:
                at = int(np.searchsorted(other.pages, first))
                n = min(n, int(other.pages[at]) - first) if at < len(other.pages) else n
        return n

    def end_transit(self, transit: Transit) -> Gate:
        """Take the mark off what nobody else claims; returns the gate, to be opened by the caller's next effect."""
        self._transits.remove(transit)
        settled = transit.pages
        for other in self._transits:
            claimed = _common(settled, other.pages)
            if len(claimed):
                settled = np.setdiff1d(settled, claimed, assume_unique=True)
        self.table.states[settled] &= ~np.uint8(BUSY)
        return transit.gate

    def gate_of(self, page: int) -> Gate:
        """Return the gate at which to wait for a busy page."""
        for transit in self._transits:
            at = int(np.searchsorted(transit.pages, page))
            if at < len(transit.pages) and transit.pages[at] == page:
                return transit.gate
        raise AssertionError(f"page {page} is busy and nobody moves it")

    def any_gate(self) -> Gate | None:
        """Return the gate of some transit, if there is one."""
        return self._transits[0].gate if self._transits else None

    # Coming, going, changing

    def arrived(self, run: PageRun) -> None:
        """Pages are in the file now. They were charged before."""
        if run.n == 1:
            self.arrived_one(run.first)
            return
        states = self.table.states[run.first : run.end]
        states &= BUSY  # of what is claimed meanwhile, or still on its way for its procedure
        states |= _RESIDENT
        self.residency.admit(run)
        if self.notifiers.n_wanting:  # for reading: the first store of a device is to be heard, as that of a process is
            self.notifiers.update(Range(run.first, run.end), write=False)

    def arrived_one(self, page: int) -> None:
        """The same of a single page: what most faults bring."""
        self.state[page] = _RESIDENT | self.state[page] & BUSY
        self.residency.admit_one(page)
        if self.notifiers.n_wanting:
            self.notifiers.update(Range(page, page + 1), write=False)

    def arrived_singly(self, pages: list[int]) -> None:
        """The same of pages here and there whose state says so already."""
        self.residency.admit_each(pages)
        if self.notifiers.n_wanting:
            for page in pages:
                self.notifiers.update(Range(page, page + 1), write=False)

    def gave_up(self, pages: Pages) -> None:
        """Pages that were resident are not any more, and their order is of no interest."""
        if len(pages):
            self.residency.forget(pages)
            self.budget.charge(-len(pages))

    def dirtied(self, run: PageRun) -> None:
        """Resident pages are being written: their copies in swap are out of date."""
        first, n = run.first, run.n
        if n == 1:
            if self.table.unit[first]:
                self._drop_copy(first)
            return
        units = self.table.units[first : first + n]
        if units.any():
            self.drop_copies(first + np.flatnonzero(units))

    def drop_copies(self, pages: Pages) -> None:
        """Give up the copies in swap of pages that have one: first the entries, then the space."""
        table = self.table
        copies = [(unit, n_units(stored)) for unit, stored in zip(*self._copies(pages), strict=True)]
        table.forget(pages)
        for unit, n in copies:
            self.swap.free(unit, n)
        self.swap_is_full = self.swap_is_full and not copies

    def _drop_copy(self, page: int) -> None:
        """Do the same for one page: by far the most common, and without arrays in a tenth of the time."""
        unit, n = self.table.unit[page], n_units(int(self.table.stored[page]))
        self.table.forget(page)
        self.swap.free(unit, n)
        self.swap_is_full = False

    def drop_spare_copies(self) -> bool:
        """Give up the copies in swap of resident pages, which are spare as long as there is room; True if any were.

        Their pages count as dirty from now on. That they stay write-protected costs a fault and changes nothing.
        """
        table = self.table
        spare = np.flatnonzero((table.states == _RESIDENT) & (table.units != 0))
        if len(spare):
            self.drop_copies(spare)
        return len(spare) > 0

    def clean(self, page: int) -> bool:
        """Tell whether a resident page has a valid copy in swap; then stores to it must be heard."""
        return self.table.unit[page] != 0

    def lose(self, page: int) -> None:
        """The bytes of a page cannot be had any more. Its space in swap is given back."""
        unit, n = self.table.unit[page], n_units(int(self.table.stored[page]))
        self.table.lose(page)  # at once: with no entry at all, a successor would take the page for zeros
        self.swap.free(unit, n)
        self.swap_is_full = False
        self.counts.lost += 1
        self.news.pages_lost(page)

    def _copies(self, pages: Pages) -> tuple[list[int], list[int]]:
        return self.table.units[pages].tolist(), self.table.stored[pages].tolist()


def _common(some: Pages, others: Pages) -> Pages:
    """Return the pages in both."""
    if not len(some) or not len(others) or some[-1] < others[0] or others[-1] < some[0]:
        return some[:0]
    return np.intersect1d(some, others, assume_unique=True)
