"""Threads that make pages present where that can wait for a medium.

A page that never comes (a dead network file system, a userfaultfd that nobody serves) must not stop other address
spaces. So one space gets at most half of the threads, and where all threads are taken and somebody waits, those
that are long in one request are written off and replaced, up to a bound. When a written-off request is answered
after all, one thread ends. Threads are daemons, so that one that hangs in the kernel does not keep the server
from ending.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from nopin.iommu.page_requests import PageRequest
from nopin.mm.space import AddressSpace, FaultResult, Reason
from nopin.server.timers import Timer, Timers
from nopin.units import S_NS

STUCK_NS = S_NS
"""How long a request takes before its thread is written off, if others wait: no healthy medium needs as long."""

REPLACED_MAX = 64
"""Threads beyond the pool at most. One costs some 30 KiB; each needs a page that does not come."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way; `since_ns` is when a thread got it."""

    request: PageRequest
    space: AddressSpace
    since_ns: int = 0
    written_off: bool = False


@dataclass(slots=True)
class _Lane:
    """The requests of one address space, by PASID."""

    waiting: deque[_Job] = field(default_factory=deque)
    n_running: int = 0
    when_idle: Callable[[], None] | None = None


class Workers:
    """A small pool. All methods belong to the loop's thread; only `_serve` runs elsewhere.

    Attributes:
        fd: an eventfd, readable when `collect` has something.
    """

    def __init__(self, n_threads: int, timers: Timers, clock: Callable[[], int]) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._timers = timers
        self._clock = clock
        self._n_threads = 0
        self._n_free = n_threads
        self._n_replaced = 0
        self._lane_max = max(1, n_threads // 2)
        self._lanes: dict[int, _Lane] = {}
        self._running: dict[_Job, None] = {}  # oldest first, without those written off
        self._look_again: Timer | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[_Job, FaultResult]] = SimpleQueue()
        for _ in range(n_threads):
            self._start_thread()

    def submit(self, request: PageRequest, space: AddressSpace) -> None:
        """Queue a request; its result comes by `collect`."""
        self._lanes.setdefault(request.pasid, _Lane()).waiting.append(_Job(request, space))
        self._dispatch()

    def collect(self) -> list[tuple[PageRequest, FaultResult]]:
        """Return the results that have arrived."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        done: list[tuple[PageRequest, FaultResult]] = []
        while not self._results.empty():
            job, result = self._results.get_nowait()
            done.append((job.request, result))
            self._finished(job)
        self._dispatch()
        return done

    def when_idle(self, pasid: int, callback: Callable[[], None]) -> None:
        """Drop what waits for an address space and call back once no thread is inside it: perhaps now."""
        lane = self._lanes.get(pasid)
        if lane is None:
            callback()
            return
        lane.waiting.clear()
        lane.when_idle = callback
        self._retire(pasid, lane)

    def close(self) -> None:
        """Let the threads end when they can; does not wait for them."""
        for _ in range(self._n_threads):
            self._jobs.put(None)

    def _start_thread(self) -> None:
        self._n_threads += 1
        threading.Thread(target=self._serve, name=f"nopin-fault-{self._n_threads}", daemon=True).start()

    def _dispatch(self) -> None:
        """Hand jobs to free threads, address spaces in turn."""
        while (pasid := self._next_lane()) is not None:
            if not self._n_free and not self._replace_stuck():
                return
            lane = self._lanes[pasid] = self._lanes.pop(pasid)  # to the end: its next turn comes last
            lane.n_running += 1
            self._n_free -= 1
            job = lane.waiting.popleft()
            job.since_ns = self._clock()
            self._running[job] = None
            self._jobs.put(job)

    def _replace_stuck(self) -> bool:
        """Write off the thread that is longest in one request and start another; False if it is not stuck, or not yet.

        Its address space keeps counting it, so no space ever holds more than its share.
        """
        oldest = next(iter(self._running), None)
        if oldest is None or self._n_replaced >= REPLACED_MAX:
            return False  # looked at again when one comes back
        stuck_at = oldest.since_ns + STUCK_NS
        if self._clock() < stuck_at:
            if self._look_again is None:
                self._look_again = self._timers.at(stuck_at, self._on_timer)
            return False
        del self._running[oldest]
        oldest.written_off = True
        self._n_replaced += 1
        self._n_free += 1
        self._start_thread()
        return True

    def _on_timer(self) -> None:
        self._look_again = None
        self._dispatch()

    def _next_lane(self) -> int | None:
        for pasid, lane in self._lanes.items():
            if lane.waiting and lane.n_running < self._lane_max:
                return pasid
        return None

    def _finished(self, job: _Job) -> None:
        if job.written_off:
            self._n_replaced -= 1
            self._n_threads -= 1
            self._jobs.put(None)  # one thread too many now: whichever takes this ends
        else:
            del self._running[job]
            self._n_free += 1
        pasid = job.request.pasid
        lane = self._lanes[pasid]
        lane.n_running -= 1
        self._retire(pasid, lane)

    def _retire(self, pasid: int, lane: _Lane) -> None:
        if lane.n_running or lane.waiting:
            return
        del self._lanes[pasid]
        if lane.when_idle is not None:
            lane.when_idle()

    def _serve(self) -> None:
        """Life of a thread."""
        while (job := self._jobs.get()) is not None:
            request = job.request
            try:
                result = job.space.fault(request.start, request.end, write=request.write)
            except OSError:  # the process is going away; an access finds out how
                result = FaultResult(0, request.start, Reason.OWNER_GONE)
            self._results.put((job, result))
            os.eventfd_write(self.fd, 1)
