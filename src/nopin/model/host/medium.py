"""A medium that pages are written to and read from: so many requests at a time, each taking so long."""

from __future__ import annotations

from collections import deque

from nopin.model.effects import Gate, Pause, Procedure, Work
from nopin.model.host.costs import HostCosts
from nopin.model.scheduler import Scheduler


class Medium:
    """See above.

    Args:
        name: for traces.
        scheduler: opens the gates of those who wait for their turn.
        costs: `medium_*` of them.
        depth: requests at a time; others wait in order of arrival.

    Attributes:
        n_read, n_written: pages so far.
    """

    def __init__(self, name: str, scheduler: Scheduler, costs: HostCosts, *, depth: int = 32) -> None:
        assert depth > 0
        self.name = name
        self.n_read = 0
        self.n_written = 0
        self._scheduler = scheduler
        self._costs = costs
        self._depth = depth
        self._n_active = 0
        self._queue: deque[Gate] = deque()

    def read(self, n_pages: int) -> Procedure[None]:
        """Take the time that reading pages takes, in one request."""
        self.n_read += n_pages
        return self._transfer(f"{self.name} read", self._costs.medium_read_ns + n_pages * self._costs.medium_page_ns)

    def write(self, n_pages: int) -> Procedure[None]:
        """Take the time that writing pages takes, in one request."""
        self.n_written += n_pages
        return self._transfer(f"{self.name} write", self._costs.medium_write_ns + n_pages * self._costs.medium_page_ns)

    def _transfer(self, what: str, cost_ns: int) -> Procedure[None]:
        if self._n_active == self._depth:
            turn = Gate()
            self._queue.append(turn)
            yield Pause(turn)  # whoever opens it leaves its place
        else:
            self._n_active += 1
        yield Work(what, cost_ns)
        if self._queue:
            self._scheduler.open(self._queue.popleft())
        else:
            self._n_active -= 1
