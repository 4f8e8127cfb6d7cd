"""Notifiers: how holders of translations hear that memory is about to mean something else.

The idea is Linux's mmu_notifier, reduced to what a walker of the process's own page table needs. Whoever
cares about a range subscribes to it; whoever learns that the owner changed its mappings calls `invalidate`
with the range and the cause; every overlapping subscriber is called before `invalidate` returns.

Rules, and why:

- A subscriber cannot refuse, wait or fail: the owner has decided already. An exception out of a callback is
  a bug here and is not caught.
- Callbacks may subscribe, unsubscribe, and even invalidate. The index must not change under the walk that is
  calling them, so while any invalidation runs, inserts and removes are put on a deferred list and applied
  when the last one ends (as `mmu_interval_notifier_insert` and `_remove` do). Removing still takes effect at
  once for the caller: after `unsubscribe` returns, the callback is not called again.
- A subscription made during an invalidation does not hear that one: it began after the change.
- Generations: the object counts its invalidations, and a subscription remembers the number of the last one
  that hit it. Equal numbers at two moments mean that nothing happened to the range in between, which is what
  a cache of anything derived from that memory needs to know.
- The end of the process is one invalidation of everything with cause RELEASE, exactly once, and the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from nopin.errors import OwnerGone
from nopin.ranges import IntervalIndex, Range
from nopin.units import U64_MAX


class Cause(Enum):
    """What the owner did. Values are the words events and counters use."""

    UNMAP = "unmap"
    """The range is no longer mapped, or something else was mapped over it."""
    REMAP = "remap"
    """The range moved to another address; the old one is no longer mapped."""
    REMOVE = "remove"
    """The pages are being dropped; the range stays mapped and reads as zeros or as the file."""
    FORK = "fork"
    """The process forked: private pages are shared with the child until either side writes."""
    RELEASE = "release"
    """The process is gone, all of it."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One change of an address space.

    Attributes:
        where: the addresses concerned; for FORK and RELEASE, all.
        generation: counts the changes of this address space, from 1.
    """

    where: Range
    cause: Cause
    generation: int


Callback = Callable[[Invalidation], None]

EVERYTHING = Range(0, U64_MAX)


@dataclass(slots=True, eq=False)
class Subscription:
    """Interest of one subscriber in one range.

    Attributes:
        generation: of the last invalidation that hit the range; 0 before the first.
    """

    where: Range
    callback: Callback
    generation: int = 0
    _key: int = field(default=-1, repr=False)  # in the index; -1 while not there
    _alive: bool = field(default=True, repr=False)


class Notifiers:
    """The subscriptions to one address space."""

    def __init__(self) -> None:
        self._index: IntervalIndex[Subscription] = IntervalIndex()
        self._running = 0
        self._deferred: list[Subscription] = []
        self._released = False
        self.generation = 0

    def __len__(self) -> int:
        return len(self._index)

    def subscribe(self, where: Range, callback: Callback) -> Subscription:
        """Have `callback` called for every later invalidation that overlaps `where`.

        Raises:
            OwnerGone: the address space was released.
        """
        if self._released:
            raise OwnerGone(f"cannot watch {where}: the process has exited")
        subscription = Subscription(where, callback)
        self._settle_or_defer(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription: its callback is not called again. Twice is fine."""
        if subscription._alive:
            subscription._alive = False
            self._settle_or_defer(subscription)

    def invalidate(self, where: Range, cause: Cause) -> int:
        """Tell every subscriber that overlaps `where`; returns how many were told."""
        if self._released:
            return 0
        self.generation += 1
        event = Invalidation(where, cause, self.generation)
        n_told = 0
        self._running += 1
        try:
            for subscription in self._index.overlapping(where):
                if subscription._alive:  # an earlier callback may have ended it
                    subscription.generation = event.generation
                    subscription.callback(event)
                    n_told += 1
        finally:
            self._running -= 1
            if not self._running:
                self._apply_deferred()
        return n_told

    def release(self) -> None:
        """The process is gone: tell everybody, once; nothing is told afterwards. Twice is fine."""
        if self._released:
            return
        self.invalidate(EVERYTHING, Cause.RELEASE)
        self._released = True

    def _settle_or_defer(self, subscription: Subscription) -> None:
        if self._running:
            self._deferred.append(subscription)
        else:
            self._settle(subscription)

    def _apply_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for subscription in deferred:
            self._settle(subscription)

    def _settle(self, subscription: Subscription) -> None:
        """Bring the index in line with whether the subscription is alive."""
        indexed = subscription._key >= 0
        if subscription._alive and not indexed:
            subscription._key = self._index.insert(subscription.where, subscription)
        elif indexed and not subscription._alive:
            self._index.remove(subscription.where, subscription._key)
            subscription._key = -1
