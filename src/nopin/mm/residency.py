"""Residency: which pages may stay, and which go first when room is needed.

The CPU's accesses to a mapped page are invisible to us, so recency cannot be seen; what can be seen is that a page came
back soon after it had left. The order is therefore that of 2Q with the refault distance of Linux (mm/workingset.c):

- A page comes in *on probation*, first in first out. A scan runs through it and leaves the rest alone.
- When a page leaves, the count of evictions so far is noted as its shadow. If it is wanted again before as many others
  have left as the budget holds, it would have been a hit with a little more room: it comes back *protected*.
- Protected pages take at most four fifths of the budget. Beyond that the oldest of them go back on probation, where
  they have a whole pass of the queue to be wanted again.
- What devices use is seen: their page tables have young bits. A page on probation found young gets another pass; found
  young again it is protected. Once is not enough, because each page of a stream is used once.
- Pages held for a parked access are passed over.

Queues hold runs of pages, not pages, so a batch of 512 costs what one page costs; single pages that come one after the
other are gathered, and queued as one. An entry is looked through only when its turn comes; what has left meanwhile, or
moved to the other queue, is skipped then. A page that was given up and comes back would be found at its old place, so
the queues are rid of such pages before they are many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nopin.mm.effects import PageRun
from nopin.mm.page_table import PageState
from nopin.ranges import Range

PROTECTED_SHARE = 0.8
BATCH_PAGES = 512
"""Victims at once: 2 MiB, where protecting, copying and punching cost least a page."""

Young = Callable[[list[Range]], set[int]]
"""Asks devices which of these pages, sorted, they used since they were last asked."""

QUEUE_SLACK = 4096
"""Runs in the queue beyond twice the pages that are resident before it is rid of what has left."""

FORGOTTEN_SHARE, FORGOTTEN_SLACK = 0.125, 512
"""Pages given up, of those resident, and beyond, before the queues are rid of them."""

_GATHERED = 512
"""Single pages queued as one, at most: an entry is looked through as a whole."""
_GATHERED_MAX = 8 * _GATHERED
"""Single pages that are still to be looked at, at most."""

_NONE = np.empty(0, np.int64)
_ON_PROBATION, _PROTECTED, _RECYCLED = 1, 2, 4

Pages = NDArray[np.int64]
"""Page numbers, sorted, each once."""


class Budget:
    """Pages that may be resident, of one arena, or of several that have a `parent` in common.

    Attributes:
        n_pages: the limit.
        n_used: charged. May pass the limit when it is lowered, until reclaim has caught up.
    """

    def __init__(self, n_pages: int, parent: Budget | None = None) -> None:
        self.n_pages = n_pages
        self.n_used = 0
        self.parent = parent

    @property
    def limit(self) -> int:
        """The tightest limit that holds here: its own, or one of those above. Sizes of batches go by it."""
        limit = self.n_pages
        parent = self.parent
        while parent is not None:
            limit = min(limit, parent.n_pages)
            parent = parent.parent
        return limit

    @property
    def room(self) -> int:
        """Pages that may still be charged; negative when too many are."""
        room = self.n_pages - self.n_used
        parent = self.parent
        while parent is not None:
            room = min(room, parent.n_pages - parent.n_used)
            parent = parent.parent
        return room

    def move_to(self, parent: Budget) -> None:
        """Be of another parent, which is charged from now on."""
        n_used = self.n_used
        self.charge(-n_used)
        self.parent = parent
        self.charge(n_used)

    def take(self) -> bool:
        """Charge one page, if there is room for it."""
        budget: Budget | None = self
        while budget is not None:
            if budget.n_used >= budget.n_pages:
                return False
            budget = budget.parent
        budget = self
        while budget is not None:
            budget.n_used += 1
            budget = budget.parent
        return True

    def charge(self, n: int) -> None:
        """Count pages that became resident (negative: that left)."""
        budget: Budget | None = self
        while budget is not None:
            budget.n_used += n
            assert budget.n_used >= 0
            budget = budget.parent


class Residency:
    """The resident pages of one arena, in the order in which they would go.

    Args:
        states: (n,) uint8 of the page table, which says what is resident and not on its way.
        budget: charged by the pager, not here.

    Attributes:
        n_held: holds outstanding, over all pages.
    """

    def __init__(self, states: NDArray[np.uint8], budget: Budget) -> None:
        self.budget = budget
        self._states = states
        self._where = np.zeros(len(states), np.uint8)
        self._shadow = np.zeros(len(states), np.uint64)
        self._holds = np.zeros(len(states), np.uint16)
        self._holds_one: memoryview = self._holds.data
        self._probation: deque[PageRun | Pages] = deque()
        self._gathered: list[int] = []  # admitted, and still to be looked at
        self._protected: deque[PageRun] = deque()
        self._n_protected = 0
        self._n_forgotten = 0  # since the queues were rid of such pages
        self._n_evicted = 0
        self._n_refaults = 0
        self.n_held = 0

    @property
    def n_protected(self) -> int:
        """Protected pages, at most: some may have left unasked."""
        self._settle_gathered()
        return self._n_protected

    @property
    def n_refaults(self) -> int:
        """Pages that came back soon after they had left."""
        self._settle_gathered()
        return self._n_refaults

    def admit(self, run: PageRun) -> None:
        """Pages of a run have become resident."""
        first, n = run.first, run.n
        if n == 1:
            self.admit_one(first)
            return
        self._settle_gathered()
        self._bound_queues()
        refaulted = self._refaulted(slice(first, first + n))
        if not refaulted.any():
            self._where[first : first + n] = _ON_PROBATION
            self._probation.append(run)
            return
        for part in runs_of(first + np.flatnonzero(refaulted)):
            self._protect(part)
        for part in runs_of(first + np.flatnonzero(~refaulted)):
            self._where[part.first : part.end] = _ON_PROBATION
            self._probation.append(part)

    def admit_one(self, page: int) -> None:
        """A page has become resident. It is looked at later, with others: a thread waits for this one."""
        self._gathered.append(page)
        if len(self._gathered) >= _GATHERED_MAX:
            self._settle_gathered()

    def admit_each(self, pages: list[int]) -> None:
        """Do the same for pages in the order in which they came."""
        self._gathered += pages
        if len(self._gathered) >= _GATHERED_MAX:
            self._settle_gathered()

    def evicted(self, pages: Pages) -> None:
        """Pages have left to make room: remember when."""
        self._leave(pages)
        self._shadow[pages] = np.arange(self._n_evicted + 1, self._n_evicted + 1 + len(pages), dtype=np.uint64)
        self._n_evicted += len(pages)

    def forget(self, pages: Pages) -> None:
        """Pages have been given up: they mean nothing any more."""
        self._leave(pages)
        self._shadow[pages] = 0
        self._n_forgotten += len(pages)
        if self._n_forgotten > FORGOTTEN_SLACK + FORGOTTEN_SHARE * self.budget.n_used:
            self._tidy()

    def hold(self, run: PageRun) -> None:
        """Keep pages from being chosen. Counted."""
        self.n_held += run.n
        if run.n == 1:
            self._holds_one[run.first] += 1
        else:
            self._holds[run.first : run.end] += 1

    def unhold(self, run: PageRun) -> None:
        """End one hold."""
        self.n_held -= run.n
        if run.n == 1:
            assert self._holds_one[run.first] > 0, "released more often than held"
            self._holds_one[run.first] -= 1
            return
        holds = self._holds[run.first : run.end]
        assert (holds > 0).all(), "released more often than held"
        holds -= 1

    def victims(self, n_most: int, young: Young, *, hot: bool) -> Pages:
        """Choose up to `n_most` pages that are resident, settled and not held; fewer only when there are no more.

        Args:
            hot: protected pages may be taken too, once nothing else is left.
        """
        self._settle_gathered()
        chosen: list[Pages] = []
        n_left = n_most
        n_looks, last_pass = len(self._probation), False
        while n_left > 0:
            if n_looks <= 0 or not self._probation:  # the rest of the queue is held, or was young a moment ago
                n_looks = self._demote_to_front() if hot else 0
            if not n_looks:
                if last_pass or not self._probation:
                    break
                n_looks, last_pass = len(self._probation), True
            n_looks -= 1
            part, rest = self._look(self._probation.popleft(), n_left, young)
            if len(rest):
                self._probation.appendleft(rest)
                n_looks += 1
            n_left -= len(part)
            if len(part):
                chosen.append(part)
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)

    def spared(self, pages: Pages) -> None:
        """Pages that were chosen stay after all: as if they had just come."""
        self._settle_gathered()
        self._where[pages] = _ON_PROBATION
        self._probation.extend(runs_of(pages))

    def _settle_gathered(self) -> None:
        """Put single pages that came last where they belong: before anything else is done, or any has left."""
        if not self._gathered:
            return
        pages = np.array(self._gathered)
        self._gathered.clear()
        refaulted = self._refaulted(pages)
        if refaulted.any():
            for page in pages[refaulted].tolist():
                self._protect(PageRun(page, 1))
            pages = pages[~refaulted]
        self._where[pages] = _ON_PROBATION
        self._probation.extend(pages[at : at + _GATHERED] for at in range(0, len(pages), _GATHERED))
        self._bound_queues()

    def _refaulted(self, pages: Pages | slice) -> NDArray[np.bool_]:
        """Tell which of pages that come had left not long ago, and count them."""
        shadows = self._shadow[pages]
        distances = self._n_evicted + 1 - shadows.astype(np.int64)
        refaulted: NDArray[np.bool_] = (shadows != 0) & (distances <= self.budget.limit)
        self._shadow[pages] = 0
        self._n_refaults += int(refaulted.sum())
        return refaulted

    def _look(self, entry: PageRun | Pages, n_most: int, young: Young) -> tuple[Pages, Pages]:
        """Take victims out of an entry whose turn has come; what stays is queued again.

        Returns:
            The victims, and the pages that have not been looked at, because there may be no more victims.
        """
        queued = _pages_of(entry)
        there = (self._states[queued] == PageState.RESIDENT) & (self._where[queued] & _ON_PROBATION != 0)
        pages: Pages = queued[there]
        if not len(pages):
            return pages, _NONE
        held = self._holds[pages] > 0
        for part in runs_of(pages[held]):
            self._probation.append(part)
        settled = pages[~held]
        pages, rest = settled[:n_most], settled[n_most:]
        used = young([Range(part.first, part.end) for part in runs_of(np.sort(pages))]) if len(pages) else ()
        if used:
            pages = self._spare_young(pages, np.isin(pages, np.fromiter(used, np.int64)))
        self._where[pages] = 0
        return pages, rest

    def _spare_young(self, pages: Pages, used: NDArray[np.bool_]) -> Pages:
        again = used & (self._where[pages] & _RECYCLED != 0)
        for part in runs_of(pages[again]):
            self._protect(part)
        once = pages[used & ~again]
        self._where[once] |= _RECYCLED
        for part in runs_of(once):
            self._probation.append(part)
        return pages[~used]

    def _protect(self, run: PageRun) -> None:
        self._where[run.first : run.end] = _PROTECTED
        self._protected.append(run)
        self._n_protected += run.n
        while self._n_protected > PROTECTED_SHARE * self.budget.limit and len(self._protected) > 1:
            self._probation.extend(self._demote())

    def _demote_to_front(self) -> int:
        """Have the oldest protected pages looked at next; returns how many runs they are, 0 when there are none."""
        while self._protected:
            parts = self._demote()
            if parts:
                self._probation.extendleft(reversed(parts))
                return len(parts)
        return 0

    def _demote(self) -> list[PageRun]:
        """Take the protection off the oldest protected run; returns what is left of it, to be queued."""
        run = self._protected.popleft()
        pages = run.first + np.flatnonzero(self._where[run.first : run.end] == _PROTECTED)
        self._where[pages] = _ON_PROBATION
        self._n_protected -= len(pages)
        return runs_of(pages)

    def _bound_queues(self) -> None:
        """Keep the queues short: a program that gives up and touches for ever evicts nothing."""
        if len(self._probation) > 2 * self.budget.n_used + QUEUE_SLACK:
            self._tidy()

    def _tidy(self) -> None:
        """Drop what has left from the queues."""
        self._n_forgotten = 0
        for queue, kind in ((self._probation, _ON_PROBATION), (self._protected, _PROTECTED)):
            pages = np.concatenate([_pages_of(entry) for entry in queue] or [_NONE])
            pages = pages[self._where[pages] & kind != 0]
            _, first_seen = np.unique(pages, return_index=True)
            queue.clear()
            queue.extend(runs_of(pages[np.sort(first_seen)]))

    def _leave(self, pages: Pages) -> None:
        self._settle_gathered()  # so that no page is gathered twice
        self._n_protected -= int((self._where[pages] == _PROTECTED).sum())
        self._where[pages] = 0


def _pages_of(entry: PageRun | Pages) -> Pages:
    return np.arange(entry.first, entry.end) if isinstance(entry, PageRun) else entry


def runs_of(pages: Pages) -> list[PageRun]:
    """Join page numbers that follow one another to runs, in the order given."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = pages[np.concatenate(([0], cuts))].tolist()
    lengths = np.diff(np.concatenate(([0], cuts, [len(pages)]))).tolist()
    return [PageRun(first, n) for first, n in zip(starts, lengths, strict=True)]
