"""A world: one run of a scenario, from its first step to the checks at its end.

A scenario builds what it needs in a world, spawns actors and says what must hold. The run has three parts: the actors,
in whatever order the guide chooses, until nothing is left to do; what the scenario wants done `afterwards`, one thing
at a time (read everything back, say); and the checks at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from nopin.model.effects import Lane
from nopin.model.explore.guide import OUTCOME, Guide
from nopin.model.oracle.violation import violate
from nopin.model.scheduler import Port, Scheduler, Task
from nopin.model.trace import Trace

MAX_STEPS = 5_000
"""Steps of a run before it counts as endless; the longest of ours take a fifth of it."""

Steps = Generator[Any, Any, Any]


class World:
    """See above.

    Args:
        guide: decides what is open.
        trace: of all steps.
    """

    def __init__(self, guide: Guide, trace: Trace | None = None) -> None:
        self.guide = guide
        self.trace = trace
        self.scheduler = Scheduler(guide, trace)
        self.scheduler.after_step = self._look
        self._actors: list[Task] = []
        self._always: list[Callable[[], None]] = []
        self._afterwards: list[Callable[[], Steps]] = []
        self._at_end: list[Callable[[], None]] = []

    # What scenarios say

    def spawn(self, name: str, procedure: Steps, *, port: Port | None = None, lane: Lane | None = None) -> Task:
        """Have an actor run; one that has not ended when nothing is left to do is a violation."""
        task = self.scheduler.spawn(name, procedure, port=port, lane=lane)
        self._actors.append(task)
        return task

    def adopt(self, task: Task) -> Task:
        """Have a task count as an actor that somebody else spawned."""
        self._actors.append(task)
        return task

    def prepare(self, procedure: Steps) -> None:
        """Run something to its end now, before the exploration: what the actors find."""
        was_calm, self.guide.calm = self.guide.calm, True
        task = self.scheduler.spawn("prepares", procedure)
        assert self.scheduler.run(max_steps=MAX_STEPS), "a scenario must not prepare for ever"
        assert task.ended, f"a scenario's own preparation waits for {task.waits_for}"
        self.guide.calm = was_calm

    def excuse(self, *tasks: Task) -> None:
        """Actors that were killed need not end."""
        for task in tasks:
            self._actors.remove(task)

    def may(self, site: str) -> bool:
        """Tell whether trouble happens here: decided like the order of steps is. Never unless trouble is explored."""
        return self.scheduler.choose(site, ["no", "yes"]) == 1

    def either(self, question: str) -> bool:
        """Answer a question whose answers are both ordinary: explored like the order of steps is."""
        return self.scheduler.choose(OUTCOME + question, ["no", "yes"]) == 1

    def note(self, who: str, what: str) -> None:
        """Have something in the trace that is no step."""
        if self.trace is not None:
            self.trace.note(self.scheduler.now_ns, who, what)

    def always(self, check: Callable[[], None]) -> None:
        """Call after each step."""
        self._always.append(check)

    def afterwards(self, procedure: Callable[[], Steps]) -> None:
        """Run when nothing of the actors is left, in order of these calls; may spawn actors of its own."""
        self._afterwards.append(procedure)

    def at_end(self, check: Callable[[], None]) -> None:
        """Call last of all."""
        self._at_end.append(check)

    # Running

    def run(self) -> None:
        """Run all of it.

        Raises:
            Violation, or whatever else the code under test raises.
        """
        self._settle()
        self.guide.calm = True
        for procedure in self._afterwards:
            self.spawn("afterwards", procedure())
            self._settle()
        for check in self._at_end:
            check()

    def _settle(self) -> None:
        if not self.scheduler.run(max_steps=MAX_STEPS):
            violate("no_progress", f"after {MAX_STEPS} steps it still goes on: {self._who_waits() or 'somebody runs'}")
        waiting = self._who_waits()
        if waiting:
            violate("unanswered_fault", f"nothing is left to do, and there waits {waiting}")

    def _who_waits(self) -> str:
        waiting = [task for task in self._actors if not task.ended]
        return ", ".join(f"{task.name} for {_named(task.waits_for)}" for task in waiting)

    def _look(self) -> None:
        for check in self._always:
            check()


def _named(effect: Any) -> str:
    return type(effect).__name__
