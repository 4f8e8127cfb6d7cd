"""First touches: the most common fault of all, answered without a procedure.

A page that nobody has stored to is answered with zeros. That takes one operation on the machine, and nothing to wait
for; a generator around it, and an effect as data, take longer than the operation. So it is asked for in two halves, by
numbers:

    n = begin(mapper, page)     how many zero pages from `page` on answer it; they are charged. 0: it is something else
    (make them, map them)
    end(page, n, n_done)        what became of it. False: it is no such simple case; a procedure must answer it

Nothing may come between the two: no other step of the pager, no message of a process. What they keep is what
`mm.faults` and `mm.bring` keep for the same page, in as few calls as that takes: each one is a quarter of a
microsecond of a thread's waiting, where the caches are cold.
"""

from __future__ import annotations

from nopin.mm.arena_pages import ArenaPages
from nopin.mm.effects import Mapper, PageRun
from nopin.mm.page_table import PageState
from nopin.mm.readahead import JUST_THIS

_EMPTY, _RESIDENT = int(PageState.EMPTY), int(PageState.RESIDENT)  # plain integers compare quicker


class FirstTouch:
    """See above."""

    __slots__ = ("_admit_one", "_advise", "_arena", "_budget", "_counts", "_notifiers", "_state", "_take")

    def __init__(self, arena: ArenaPages) -> None:
        self._arena = arena
        self._budget = arena.budget
        self._state = arena.state
        self._counts = arena.counts
        self._take = arena.budget.take
        self._advise = arena.readahead.advise
        self._notifiers = arena.notifiers
        self._admit_one = arena.residency.admit_one

    def begin(self, mapper: Mapper, page: int) -> int:
        """Say how many pages of zeros answer a missing page, and charge them; 0 if that is not all it takes."""
        if self._state[page] != _EMPTY or not self._take():
            return 0
        ahead = self._advise(mapper, page)
        if ahead is JUST_THIS:
            return 1
        n_most, stride = ahead
        if stride != 1:
            return 1
        arena, budget = self._arena, self._budget
        n = arena.table.run_length(page, min(n_most, budget.room + 1))
        budget.charge(n - 1)
        if n < n_most:
            arena.readahead.brought(mapper, page, ahead, n)
        return n

    def end(self, page: int, n: int, n_done: int) -> bool:
        """Take note that `n_done` of `n` pages came. Requires: `begin` said `n`, and nothing happened since."""
        if n == 1 == n_done and not self._notifiers.n_wanting:  # as `ArenaPages.arrived` does
            self._counts.faults_zero += 1
            self._state[page] = _RESIDENT
            self._admit_one(page)
            return True
        if n_done < n:
            self._budget.charge(n_done - n)
            if n_done:
                self._arena.arrived(PageRun(page, n_done))
            return False
        self._counts.faults_zero += 1
        self._counts.readahead += n - 1
        self._arena.arrived(PageRun(page, n))
        return True
