"""Tickets: what a resumed access brings along from its page requests.

Managed pages can be evicted again between the answer to a page request and the moment its waiter comes for them. Under
pressure that could go on for ever. So the pages of an answered request stay *held*, which the pager respects, until
every waiter of it has made its access, or is gone. Each waiter has a ticket for its share of the hold.

A ticket also remembers which page could not be had, and thereby what the access will find to be bad memory. A page that
is absent for any other reason is simply asked for again.

A waiter that does not come is no reason to keep memory from others: tickets expire after some turns of the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from nopin.iommu.windows import DeviceArena
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason

TURNS = 256
"""A waiter is resumed in the turn it was woken in; this many later it has something else to wait for."""


@dataclass(slots=True, eq=False)
class _Hold:
    """Pages held for the waiters of one request."""

    arena: DeviceArena
    pages: PageRun
    came: FaultPages
    n_tickets: int

    def give_back(self) -> None:
        """One waiter is done; the last lets go."""
        self.n_tickets -= 1
        if not self.n_tickets:
            self.arena.mirror.unhold(self.pages, self.came)


class Tickets:
    """The tickets of all waiters."""

    def __init__(self) -> None:
        self._of: dict[Hashable, list[_Hold]] = {}
        self._issued: deque[tuple[int, Hashable, _Hold]] = deque()
        self._turn = 0

    def __len__(self) -> int:
        return sum(len(holds) for holds in self._of.values())

    def __bool__(self) -> bool:
        """True while anybody has one: asked at every access, where counting is too much."""
        return bool(self._of)

    @property
    def counts_turns(self) -> bool:
        """True while `turn` has something to count for."""
        return bool(self._issued)

    def issue(self, waiters: Iterable[Hashable], arena: DeviceArena, pages: PageRun, came: FaultPages) -> None:
        """Give each waiter of an answered request a ticket. Without waiters the pages are let go at once."""
        hold = _Hold(arena, pages, came, 1)
        for waiter in waiters:
            hold.n_tickets += 1
            self._of.setdefault(waiter, []).append(hold)
            self._issued.append((self._turn, waiter, hold))
        hold.give_back()

    def is_bad(self, waiter: Hashable, arena: DeviceArena, page: int) -> bool:
        """Tell whether a page could not be had for this waiter, and never will be."""
        return any(
            hold.arena is arena
            and hold.pages.first + hold.came.n_done == page < hold.pages.end
            and hold.came.reason is not Reason.BUSY
            for hold in self._of.get(waiter, ())
        )

    def is_busy(self, waiter: Hashable) -> bool:
        """Tell whether this waiter was put off."""
        return any(hold.came.reason is Reason.BUSY for hold in self._of.get(waiter, ()))

    def spend(self, waiter: Hashable) -> None:
        """The waiter has made its access, or will not. Without tickets nothing happens."""
        for hold in self._of.pop(waiter, ()):
            hold.give_back()

    def turn(self) -> None:
        """Count a turn of the loop, and take the tickets of those who did not come."""
        self._turn += 1
        while self._issued and self._issued[0][0] + TURNS < self._turn:
            _, waiter, hold = self._issued.popleft()
            holds = self._of.get(waiter, [])
            if hold in holds:
                holds.remove(hold)
                hold.give_back()
                if not holds:
                    del self._of[waiter]
