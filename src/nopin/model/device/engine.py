"""The part of a device that is still moving bytes when it is told to stop.

A mirror forgets an entry within the call that says so. The engine may be in the middle of an access that was
translated before. It keeps to what `mm/subscriber.py` asks:

- a *write* under way stops before the call returns, whatever the cause (its rest is translated anew). That includes
  SYNC: the dirty bit was just collected, so bytes written from here on must set it again;
- a *read* under way may go on, and a fence is returned that passes when the last byte has been read;
- the device may also need time of its own until nothing is in its pipes: its *quiesce time*.

It subscribes behind the mirror, so that the mirror's entries are gone when it looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.sequence import overlap_any
from nopin.mm.subscriber import Answer, Fence, Invalidation, Subscriber
from nopin.model.scheduler import Scheduler
from nopin.ranges import Range

QuiesceTime = Callable[[int, Cause], int]
"""How long (ns) a device takes to be quiet after an invalidation that took so many entries from it."""

Quiet = Callable[[Invalidation], None]


@dataclass(slots=True, eq=False)
class Access:
    """An access under way.

    Attributes:
        stopped: it must not touch another byte with the translation it has.
    """

    pages: PageRun
    write: bool
    stopped: bool = False
    _fences: list[_Countdown] = field(default_factory=list)


class _Countdown:
    """A fence that waits for several things."""

    def __init__(self, n_left: int, passed: Callable[[], None]) -> None:
        self.fence = Fence()
        self._n_left = n_left
        self.fence.when_passed(passed)

    def one_less(self) -> None:
        self._n_left -= 1
        if not self._n_left:
            self.fence.signal()


class Engine(Subscriber):
    """See above.

    Args:
        name: of the device, for the scheduler's timers.
        n_dropped: how many entries the mirror has lost so far.
        quiet: called when the device reaches nothing of what an invalidation took.
        quiesce: None: at once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        n_dropped: Callable[[], int],
        quiet: Quiet,
        *,
        quiesce: QuiesceTime | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._name = name
        self._n_dropped = n_dropped
        self._n_dropped_before = 0
        self._quiesce = quiesce
        self._quiet = quiet
        self._accesses: list[Access] = []

    @property
    def n_under_way(self) -> int:
        """Accesses under way."""
        return len(self._accesses)

    def begin(self, pages: PageRun, *, write: bool) -> Access:
        """An access was translated and begins. Requires: in the step in which the mirror allowed it."""
        access = Access(pages, write)
        self._accesses.append(access)
        return access

    def finish(self, access: Access) -> None:
        """It touches nothing any more."""
        self._accesses.remove(access)
        for countdown in access._fences:
            countdown.one_less()
        access._fences.clear()

    # What the notifiers call

    def invalidate_start(self, event: Invalidation) -> Answer:
        """Stop writes; let reads end."""
        return self._stop(event, reads=True)

    def protect(self, event: Invalidation) -> Answer:
        """Stop writes."""
        return self._stop(event, reads=False)

    def sync(self, event: Invalidation) -> Answer:
        """Stop writes, so that they go on by a new use of their entries."""
        self._stop_writes(event)
        return None

    def release(self, event: Invalidation) -> Answer:
        """Stop for good."""
        return self._stop(event, reads=True)

    def _stop(self, event: Invalidation, *, reads: bool) -> Answer:
        self._stop_writes(event)
        delay_ns = 0
        if self._quiesce is not None:
            dropped = self._n_dropped()
            n_entries, self._n_dropped_before = dropped - self._n_dropped_before, dropped
            delay_ns = self._quiesce(n_entries, event.cause)
        reading = [access for access in self._accesses if reads and not access.write and _hit(access, event)]
        if not reading and not delay_ns:
            self._quiet(event)
            return None
        countdown = _Countdown(len(reading) + bool(delay_ns), lambda: self._quiet(event))
        for access in reading:
            access._fences.append(countdown)
        if delay_ns:
            at_ns = self._scheduler.now_ns + delay_ns
            self._scheduler.call_at(at_ns, f"{self._name} quiesces", countdown.one_less)
        return countdown.fence

    def _stop_writes(self, event: Invalidation) -> None:
        for access in self._accesses:
            if access.write and _hit(access, event):
                access.stopped = True


def _hit(access: Access, event: Invalidation) -> bool:
    return overlap_any(event.ranges, Range(access.pages.first, access.pages.end))
