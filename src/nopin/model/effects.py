"""What modelled procedures ask of the scheduler, beside the effects of `mm/effects.py`.

`Pause`, `Open`, `Backoff` and `Quiesce` of `mm.effects` are the scheduler's, too. All other effects go to the port that
the task was spawned with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nopin.mm.effects import Backoff, Gate, Open, Pause, Quiesce

__all__ = ["Acquire", "Backoff", "Gate", "Lane", "Lock", "Open", "Pause", "Procedure", "Quiesce", "Release", "Work"]

T = TypeVar("T")

Procedure = Generator[Any, Any, T]
"""A piece of modelled work that yields effects, these here and those of `mm.effects`, and returns a T."""


@dataclass(slots=True, eq=False)
class Lane:
    """Something that does one thing at a time: a thread, a loop, a DMA engine.

    A task on a lane keeps it from its first step until it waits or ends; others of the lane go on then, in order of
    arrival. That is how the steps between two waits of one task have nothing of its lane in between, and how a busy
    resource makes others late.

    Attributes:
        holder: the task that has it.
        queue: tasks that could go on but for the lane.
    """

    name: str
    holder: Any = None
    queue: deque[Any] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Lock:
    """A lock of the modelled machine, shared or exclusive, first come first served.

    Attributes:
        writer: holds it alone. readers: hold it together, in order.
        queue: (task, shared) of those that wait.
    """

    name: str
    writer: Any = None
    readers: list[Any] = field(default_factory=list)
    queue: deque[tuple[Any, bool]] = field(default_factory=deque)


@dataclass(slots=True)
class Work:
    """Something takes time, and others may go on meanwhile: the ordinary step of modelled code.

    Attributes:
        what: for traces.
        cost_ns: 0 where only the order matters.
    """

    what: str
    cost_ns: int = 0


@dataclass(slots=True)
class Acquire:
    """Take a lock; waits for it. A task may wait for one while it holds others."""

    lock: Lock
    shared: bool = False


@dataclass(slots=True)
class Release:
    """Give a lock back. Requires: this task has it."""

    lock: Lock
