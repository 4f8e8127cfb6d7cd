"""First touches: the most common fault of all, answered without a procedure.

A page that nobody has stored to is answered with zeros. That takes one operation on the machine, and nothing to wait
for; a generator around it, and an effect as data, take longer than the operation. So it is asked for by numbers, for
one mapper and several faults in a row:

    open(mapper, n_most)        so many at most follow: room for them is taken now, once
    n = begin(page)             how many zero pages from `page` on answer it. 0: it is something else
    (make them, map them)
    failed(), came(...)         unless it was one page, and it came: then there is nothing to say
    close()                     what came is noted with the rest, and the room that was not used given back

Nothing may come in between: no other step of the pager, no message of a process. So nobody sees what is noted late, and
what is kept is what `mm.faults` and `mm.bring` keep for the same pages, in as few calls as that takes: each one is a
quarter of a microsecond of a thread's waiting, where the caches are cold.
"""

from __future__ import annotations

from nopin.mm.arena_pages import ArenaPages
from nopin.mm.effects import Mapper, PageRun
from nopin.mm.page_table import PageState
from nopin.mm.readahead import JUST_THIS, Ahead, Streams

_EMPTY, _RESIDENT = int(PageState.EMPTY), int(PageState.RESIDENT)  # plain integers compare quicker


class FirstTouch:
    """See above."""

    __slots__ = ("_arena", "_n_room", "_pages", "_state", "_streams")

    def __init__(self, arena: ArenaPages) -> None:
        self._arena = arena
        self._state = arena.state
        self._streams = Streams()
        self._n_room = 0  # charged, and not used yet
        self._pages: list[int] = []  # single pages that came since `open`

    def open(self, mapper: Mapper, n_most: int) -> None:
        """Begin a row of up to `n_most` faults of a process. Requires: the one before is closed."""
        budget = self._arena.budget
        self._n_room = max(0, min(n_most, budget.room))
        budget.charge(self._n_room)
        self._streams = self._arena.readahead.of(mapper)

    def begin(self, page: int) -> int:
        """Say how many pages of zeros answer a missing page; 0 if that is not all it takes."""
        if self._state[page] != _EMPTY or not self._n_room:
            return 0
        ahead = self._streams.advise(page)
        n = 1 if ahead is JUST_THIS else self._n_ahead(page, ahead)
        self._n_room -= 1
        if n == 1:
            self._state[page] = _RESIDENT
            self._pages.append(page)
        return n

    def _n_ahead(self, page: int, ahead: Ahead) -> int:
        """Say the same for a fault of a stream, and charge what comes with the page."""
        if ahead.stride != 1:
            return 1
        arena = self._arena
        room = max(0, arena.budget.room)
        n = arena.table.run_length(page, min(ahead.n, room + self._n_room))
        n_beside = min(n - 1, room)
        arena.budget.charge(n_beside)
        self._n_room -= n - 1 - n_beside
        if n < ahead.n:
            self._streams.brought(page, ahead, n)
        return n

    def failed(self) -> None:
        """The one page that was begun last did not come: a procedure must answer it."""
        self._state[self._pages.pop()] = _EMPTY
        self._n_room += 1

    def came(self, page: int, n: int, n_done: int) -> bool:
        """Take note that `n_done` of several pages came. False: not all, and a procedure must answer the fault."""
        arena = self._arena
        if n_done < n:
            arena.budget.charge(n_done - n)
            if n_done:
                arena.arrived(PageRun(page, n_done))
            return False
        arena.counts.faults_zero += 1
        arena.counts.readahead += n - 1
        arena.arrived(PageRun(page, n))
        return True

    def close(self) -> None:
        """End the row."""
        arena, pages = self._arena, self._pages
        arena.budget.charge(-self._n_room)
        arena.counts.faults_zero += len(pages)
        arena.arrived_singly(pages)
        self._n_room, self._pages = 0, []
