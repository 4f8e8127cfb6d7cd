"""Page requests: accesses that wait for absent pages, and what they wait for.

Hardware calls this PRI. An access that finds pages that may take long to bring parks: its waiter (whatever
names the work to resume, for instance a queue pair) is noted with the ranges it needs, and requests for those
ranges go to whoever runs faults. When the last one is answered the waiter may go on.

- **Merging.** A range that an outstanding request covers gets no request of its own; one that overlaps a
  request not yet taken widens it. A thousand queue pairs on one page make one fault.
- **Bound.** At most `limit` requests are outstanding. What does not fit is remembered with its waiter and
  becomes a request as room appears, first come first served: no fault is lost and none is refused.
- **Patience.** A resumed waiter looks again before it copies, because its pages may be gone again, and parks
  again if they are. Under memory pressure that could go on for ever, so after `PARKS_MAX` times in a row it is
  let through. By then every page has been brought as often, so the medium answers, and at worst the access
  waits for it a moment. A page that never comes lets nobody through: its request is never answered. Nor does
  one that a program may hold back (`Absent.held`): it looks and parks as often as that program makes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

from nopin.ranges import Range

PARKS_MAX = 4
"""How often in a row an access parks. One was enough in every run without a limit far below what a copy needs."""


@dataclass(slots=True)
class Meter:
    """Faults and invalidations of one region, by the names of ``rdma stat``.

    Attributes:
        page_faults: pages that were found absent.
        page_faults_handled: fault events dealt with: one an access, or one a slow range of a scatter list.
        page_invalidations: pages that were changed by their owner. What a pager takes away is counted elsewhere.
        page_invalidations_handled: such changes.
    """

    page_faults: int = 0
    page_faults_handled: int = 0
    page_invalidations: int = 0
    page_invalidations_handled: int = 0


@dataclass(slots=True, eq=False)
class PageRequest:
    """Pages somebody waits for. Whoever runs faults reads it and answers with `Iommu.respond`.

    Attributes:
        pasid: whose; negative for managed memory: the `key` of an arena (`windows.py`).
        start, end: page aligned addresses; for managed memory page numbers.
        write: at least one waiter is going to write.
    """

    pasid: int
    start: int
    end: int
    write: bool
    _taken: bool = field(default=False, repr=False)
    _waiters: dict[Hashable, Meter] = field(default_factory=dict, repr=False)

    def covers(self, where: Range, *, write: bool) -> bool:
        """True when answering this request also answers one for `where`."""
        return self.start <= where.start and where.end <= self.end and (self.write or not write)

    def widen(self, where: Range, *, write: bool) -> bool:
        """Take `where` in, if it overlaps and nobody works on this request yet; False if it was not taken."""
        if self._taken or self.end <= where.start or where.end <= self.start:
            return False
        self.start, self.end = min(self.start, where.start), max(self.end, where.end)
        self.write = self.write or write
        return True


@dataclass(frozen=True, slots=True)
class _Backlogged:
    """A range that found no room."""

    waiter: Hashable
    pasid: int
    where: Range
    write: bool
    meter: Meter


class PageRequests:
    """Outstanding requests, those who wait for them, and those who may go on."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a queue of {limit} page requests can hold none")
        self._limit = limit
        self._fresh: list[PageRequest] = []
        self._outstanding: dict[int, list[PageRequest]] = {}  # by PASID
        self._n_outstanding = 0
        self._backlog: deque[_Backlogged] = deque()
        self._n_awaited: dict[Hashable, int] = {}  # requests and backlog entries each waiter waits for
        self._wakeups: dict[Hashable, None] = {}  # in order, each once
        self._n_parks: dict[Hashable, int] = {}  # since the last access, of waiters that were resumed

    def __len__(self) -> int:
        return self._n_outstanding

    @property
    def n_backlogged(self) -> int:
        """Ranges that wait for room."""
        return len(self._backlog)

    def park(self, waiter: Hashable, pasid: int, ranges: Iterable[Range], meter: Meter, *, write: bool) -> None:
        """Have `waiter` wait until all of `ranges`, page aligned, have been dealt with."""
        for where in ranges:
            backlogged = _Backlogged(waiter, pasid, where, write, meter)
            if not self._place(backlogged):
                self._backlog.append(backlogged)
                self._await_one_more(waiter)

    @property
    def stirs(self) -> bool:
        """True if there are requests to take, or waiters to wake."""
        return bool(self._fresh or self._wakeups)

    @property
    def any_resumed(self) -> bool:
        """True if anybody was resumed and has not accessed anything since."""
        return bool(self._n_parks)

    def was_resumed(self, waiter: Hashable) -> bool:
        """True if `waiter` was resumed and has not accessed anything since."""
        return waiter in self._n_parks

    def lets_through(self, waiter: Hashable) -> bool:
        """True if `waiter` has parked often enough: its access is to be made, whatever is absent."""
        return bool(self._n_parks) and self._n_parks.get(waiter, 0) >= PARKS_MAX

    def settle(self, waiter: Hashable) -> None:
        """`waiter` makes the access it parked for."""
        if self._n_parks:
            self._n_parks.pop(waiter, None)

    def take(self, *, managed: bool = False) -> list[PageRequest]:
        """Requests of one kind of memory made since the last call; each must be answered by `answer`."""
        if not self._fresh:
            return []
        taken = [request for request in self._fresh if (request.pasid < 0) == managed]
        self._fresh = [request for request in self._fresh if (request.pasid < 0) != managed]
        for request in taken:
            request._taken = True
        return taken

    def answer(self, request: PageRequest) -> list[Hashable]:
        """A request has been dealt with, well or badly. One that was dropped meanwhile is ignored.

        Returns:
            Who waited for it; they may have to wait for others still.
        """
        peers = self._outstanding.get(request.pasid, [])
        if request not in peers:
            return []
        self._remove(request, peers)
        for waiter, meter in request._waiters.items():
            meter.page_faults_handled += 1
            self._await_one_less(waiter)
        self._refill()
        return list(request._waiters)

    def take_back(self, waiters: Collection[Hashable]) -> bool:
        """Have those who just parked go on at once instead of being woken; False, and nothing is done, if any waits."""
        if any(waiter in self._n_awaited for waiter in waiters):
            return False
        for waiter in waiters:
            self._wakeups.pop(waiter, None)
        return True

    def take_wakeups(self) -> list[Hashable]:
        """Waiters that may go on, each once, in the order they became ready."""
        if not self._wakeups:
            return []
        woken = list(self._wakeups)
        self._wakeups.clear()
        return woken

    def forget(self, waiter: Hashable) -> None:
        """The waiter is gone. What was requested for it alone still runs, and wakes nobody."""
        self._n_parks.pop(waiter, None)
        self._wakeups.pop(waiter, None)
        if self._n_awaited.pop(waiter, 0):
            self._backlog = deque(entry for entry in self._backlog if entry.waiter != waiter)
            for peers in self._outstanding.values():
                for request in peers:
                    request._waiters.pop(waiter, None)

    def drop_space(self, pasid: int) -> None:
        """The address space is gone: drop its requests, and wake who waited, so that they find out."""
        for request in self._outstanding.pop(pasid, []):
            self._n_outstanding -= 1
            for waiter in request._waiters:
                self._await_one_less(waiter)
        self._fresh = [request for request in self._fresh if request.pasid != pasid]
        dropped = [entry for entry in self._backlog if entry.pasid == pasid]
        if dropped:
            self._backlog = deque(entry for entry in self._backlog if entry.pasid != pasid)
        for entry in dropped:
            self._await_one_less(entry.waiter)
        self._refill()

    def _place(self, wanted: _Backlogged) -> bool:
        """Attach to an outstanding request, or make one; False when there is no room."""
        request = self._join(wanted) or self._make(wanted)
        if request is None:
            return False
        if wanted.waiter not in request._waiters:
            request._waiters[wanted.waiter] = wanted.meter
            self._await_one_more(wanted.waiter)
        return True

    def _join(self, wanted: _Backlogged) -> PageRequest | None:
        for request in self._outstanding.get(wanted.pasid, ()):
            if request.covers(wanted.where, write=wanted.write):
                return request
            if request.widen(wanted.where, write=wanted.write):
                return request
        return None

    def _make(self, wanted: _Backlogged) -> PageRequest | None:
        if self._n_outstanding >= self._limit:
            return None
        request = PageRequest(wanted.pasid, wanted.where.start, wanted.where.end, wanted.write)
        self._outstanding.setdefault(wanted.pasid, []).append(request)
        self._fresh.append(request)
        self._n_outstanding += 1
        return request

    def _remove(self, request: PageRequest, peers: list[PageRequest]) -> None:
        peers.remove(request)
        if not peers:
            del self._outstanding[request.pasid]
        self._n_outstanding -= 1
        if not request._taken:  # answered before it was taken: nobody needs to take it now
            self._fresh.remove(request)

    def _refill(self) -> None:
        while self._backlog and self._place(self._backlog[0]):
            self._await_one_less(self._backlog.popleft().waiter)

    def _await_one_more(self, waiter: Hashable) -> None:
        self._n_awaited[waiter] = self._n_awaited.get(waiter, 0) + 1

    def _await_one_less(self, waiter: Hashable) -> None:
        left = self._n_awaited[waiter] - 1
        if left:
            self._n_awaited[waiter] = left
            return
        del self._n_awaited[waiter]
        self._wakeups[waiter] = None
        self._n_parks[waiter] = self._n_parks.get(waiter, 0) + 1
