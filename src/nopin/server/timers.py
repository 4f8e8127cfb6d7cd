"""Callbacks at a time, for the few slow things of the server: time limits, lingering, re-arming."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timer:
    """One pending callback."""

    __slots__ = ("callback", "deadline_ns")

    def __init__(self, deadline_ns: int, callback: Callable[[], None]) -> None:
        self.deadline_ns = deadline_ns
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Make sure that the callback does not run. Twice, or after it ran, is fine."""
        self.callback = None


class Timers:
    """A heap of timers. Time is what the caller says it is, in nanoseconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = itertools.count()

    def at(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Run the callback once the time has come."""
        timer = Timer(deadline_ns, callback)
        heapq.heappush(self._heap, (deadline_ns, next(self._order), timer))
        return timer

    def next_deadline(self) -> int | None:
        """Return when the next timer is due."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def run(self, now: int) -> None:
        """Run what is due."""
        if not self._heap or self._heap[0][0] > now:
            return  # asked in each turn of the loop
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            callback = heapq.heappop(self._heap)[2].callback
            assert callback is not None
            callback()
