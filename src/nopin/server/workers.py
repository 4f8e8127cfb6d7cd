"""Threads that make pages present where that can wait for a medium.

A page that never comes (a dead network file system) must not stop other address spaces: one space gets at
most half of the threads. Threads are daemons, so that one that hangs in the kernel does not keep the server
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

Job = tuple[PageRequest, AddressSpace]


@dataclass(slots=True)
class _Lane:
    """The requests of one address space, by PASID."""

    waiting: deque[Job] = field(default_factory=deque)
    n_running: int = 0
    when_idle: Callable[[], None] | None = None


class Workers:
    """A small pool. All methods belong to the loop's thread; only `_serve` runs elsewhere.

    Attributes:
        fd: an eventfd, readable when `collect` has something.
    """

    def __init__(self, n_threads: int) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._n_free = n_threads
        self._lane_max = max(1, n_threads // 2)
        self._lanes: dict[int, _Lane] = {}
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[PageRequest, FaultResult]] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"nopin-fault-{n}", daemon=True) for n in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: PageRequest, space: AddressSpace) -> None:
        """Queue a request; its result comes by `collect`."""
        self._lanes.setdefault(request.pasid, _Lane()).waiting.append((request, space))
        self._dispatch()

    def collect(self) -> list[tuple[PageRequest, FaultResult]]:
        """Return the results that have arrived."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        done: list[tuple[PageRequest, FaultResult]] = []
        while not self._results.empty():
            done.append(self._results.get_nowait())
            self._finished(done[-1][0].pasid)
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
        for _ in self._threads:
            self._jobs.put(None)

    def _dispatch(self) -> None:
        """Hand jobs to free threads, address spaces in turn."""
        while self._n_free and (pasid := self._next_lane()) is not None:
            lane = self._lanes[pasid] = self._lanes.pop(pasid)  # to the end: its next turn comes last
            lane.n_running += 1
            self._n_free -= 1
            self._jobs.put(lane.waiting.popleft())

    def _next_lane(self) -> int | None:
        for pasid, lane in self._lanes.items():
            if lane.waiting and lane.n_running < self._lane_max:
                return pasid
        return None

    def _finished(self, pasid: int) -> None:
        self._n_free += 1
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
            request, space = job
            try:
                result = space.fault(request.start, request.end, write=request.write)
            except OSError:  # the process is going away; an access finds out how
                result = FaultResult(0, request.start, Reason.OWNER_GONE)
            self._results.put((request, result))
            os.eventfd_write(self.fd, 1)
