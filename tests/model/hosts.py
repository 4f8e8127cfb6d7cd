"""A modelled host with one process, run to the end of what it is told to do."""

from __future__ import annotations

from collections.abc import Generator
from random import Random
from typing import Any, TypeVar

from nopin.mm.causes import Cause
from nopin.mm.subscriber import Answer, Fence, Invalidation, Subscriber
from nopin.model.choice import Drawn
from nopin.model.host.fault import lookup
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.scheduler import Scheduler
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

T = TypeVar("T")

PAGE = PAGE_BYTES

Told = tuple[Cause, tuple[tuple[int, int], ...]]


def host_of(n_frames: int = 64, *, seed: int | None = None, **settings: Any) -> Host:
    """Make a host whose steps are taken in order, or as the seed draws."""
    chooser = None if seed is None else Drawn(Random(seed))
    return Host("h", Scheduler(chooser), n_frames, **settings)


def run(host: Host, procedure: Generator[Any, Any, T]) -> T:
    """Run one procedure, and whatever else is under way, to the end."""
    task = host.scheduler.spawn("main", procedure)
    assert host.scheduler.run(max_steps=1_000_000)
    assert task.ended, f"it waits for {task.waits_for}"
    result: T = task.result
    return result


class Listener(Subscriber):
    """Writes down what it is told, in pages from `base`; answers with fences while `slow`."""

    def __init__(self, process: Process, base: int = 0, *, veto_limit: int = 0) -> None:
        self.told: list[Told] = []
        self.ended: list[Told] = []
        self.slow = False
        self.fences: list[Fence] = []
        self.dirty: set[int] = set()
        self._base = base
        process.notifiers.subscribe(Range(0, 1 << 52), self, veto_limit=veto_limit)

    def invalidate_start(self, event: Invalidation) -> Answer:
        self.told.append(self._word(event))
        event.harvest.dirty |= {page for page in self.dirty if any(r.start <= page < r.end for r in event.ranges)}
        self.dirty -= event.harvest.dirty
        if not self.slow:
            return None
        self.fences.append(Fence())
        return self.fences[-1]

    def invalidate_end(self, event: Invalidation) -> None:
        self.ended.append(self._word(event))

    def _word(self, event: Invalidation) -> Told:
        return event.cause, tuple((r.start - self._base, r.length) for r in event.ranges)

    def take(self) -> list[Told]:
        """Return what was told since this was last asked, each bracket once, all of them ended."""
        assert self.told == self.ended, "a bracket is still open, or they nest"
        told, self.told, self.ended = self.told, [], []
        return told


def frames_of(process: Process, va: int, n: int) -> list[int | None]:
    """Return the frames of n pages, None where none is mapped."""
    entries = [lookup(process, va // PAGE + at) for at in range(n)]
    return [None if entry is None else entry.frame for entry in entries]
