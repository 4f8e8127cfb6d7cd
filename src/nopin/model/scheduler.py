"""The scheduler: virtual time, and who goes next.

Everything that happens on the modelled machine is a *step*: a task (a procedure that yields effects) runs from one
yield to the next, or a callback is called. Steps lie in a heap by (time, number); time is an integer of nanoseconds,
the number counts how many were put there, so a tie is resolved by order of insertion and by nothing else. No clock, no
thread, no hash of an object has a say.

**Two ways to run.** Without a chooser the heap alone decides: the run is a simulation, and every cost counts. With a
chooser, all steps that are due are *ready*, and the chooser picks one: the run is one interleaving of many. Modelled
code that is explored costs nothing, so everything but timers is due at once.

**Effects.** The scheduler performs those about order and time (`Work`, `Backoff`, `Pause`, `Open`, `Quiesce`,
`Acquire`, `Release`); the others go to the port the task was spawned with, which answers with a result and a cost, or
with `LATER` and resumes the task itself when, say, its medium is done.

**Lanes.** A task on a lane shares it with nobody from one wait to the next (see `Lane`). What may wait gives the lane
up: `Backoff`, `Pause`, `Quiesce`, `Acquire`, and `LATER`. What only costs keeps it, which is how the steps of a pager
stay together although processes run between them, and how a busy loop makes others late.

Invariant: a task is in exactly one place: in the heap or among the ready, in a lane's queue, at a gate, lock or fence,
or in its port's hands.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

from nopin.mm.effects import Backoff, Gate, Open, Pause, Quiesce
from nopin.model.choice import Chooser
from nopin.model.effects import Acquire, Lane, Lock, Release, Work
from nopin.model.trace import Trace


class Performed(NamedTuple):
    """What came of an effect: the result the procedure is sent, after so much time."""

    result: Any = None
    cost_ns: int = 0


class _Later:
    """The type of `LATER`."""


LATER = _Later()
"""A port's answer: it will call `Scheduler.resume` itself."""


class Port(Protocol):
    """Carries out the effects of tasks."""

    def perform(self, effect: Any, task: Task) -> Performed | _Later:
        """Carry out an effect, at once or later."""
        ...


class NoPort:
    """The port of tasks that have only effects of the scheduler."""

    def perform(self, effect: Any, task: Task) -> Performed | _Later:
        """There is nobody to do it."""
        raise AssertionError(f"{task.name} yields {effect!r}, and nobody carries that out")


class Task:
    """A procedure on its way.

    Attributes:
        name: stable from run to run; unique among tasks alive at a time.
        waits_for: the effect it waits for, while it does.
        ended: it returned, or was dropped.
        result: what it returned.
    """

    __slots__ = ("done", "ended", "lane", "name", "port", "procedure", "result", "waits_for")

    def __init__(
        self,
        name: str,
        procedure: Generator[Any, Any, Any],
        port: Port,
        lane: Lane | None,
        done: Callable[[Any], None] | None,
    ) -> None:
        self.name = name
        self.procedure = procedure
        self.port = port
        self.lane = lane
        self.done = done
        self.waits_for: Any = None
        self.ended = False
        self.result: Any = None


class Timer:
    """A callback on its way; `cancel` takes it back."""

    __slots__ = ("callback", "name")

    def __init__(self, name: str, callback: Callable[[], None] | None) -> None:
        self.name = name
        self.callback = callback

    def cancel(self) -> None:
        """Do not call. Twice is fine."""
        self.callback = None


_Entry = tuple[int, int, Task | Timer, Any]


class Scheduler:
    """See above.

    Args:
        chooser: picks among steps that are ready; None: in order of time and insertion.
        trace: what happened.

    Attributes:
        now_ns: virtual time.
        n_steps: taken so far.
        after_step: called after each step, for who checks.
    """

    def __init__(self, chooser: Chooser | None = None, trace: Trace | None = None) -> None:
        self.now_ns = 0
        self.n_steps = 0
        self.chooser = chooser
        self.trace = trace
        self.after_step: Callable[[], None] | None = None
        self._heap: list[_Entry] = []
        self._ready: list[_Entry] = []
        self._n_put = 0
        self._no_port = NoPort()

    # Putting

    def spawn(
        self,
        name: str,
        procedure: Generator[Any, Any, Any],
        *,
        port: Port | None = None,
        lane: Lane | None = None,
        done: Callable[[Any], None] | None = None,
    ) -> Task:
        """Have a procedure run from now on.

        Args:
            port: carries out its effects.
            done: called with what it returns, in its last step.
        """
        task = Task(name, procedure, port or self._no_port, lane, done)
        self._put(self.now_ns, task, None)
        return task

    def call_at(self, at_ns: int, name: str, callback: Callable[[], None]) -> Timer:
        """Call back at a time, now at the earliest."""
        timer = Timer(name, callback)
        self._put(max(at_ns, self.now_ns), timer, None)
        return timer

    def resume(self, task: Task, result: Any = None, *, delay_ns: int = 0) -> None:
        """Go on with a task that was told `LATER`, or waits for something of a caller's own."""
        assert task.waits_for is not None or task.ended, f"{task.name} waits for nothing"
        if not task.ended:
            self._put(self.now_ns + delay_ns, task, result)

    def drop(self, task: Task) -> None:
        """Have a task never go on, wherever it is: its process was killed. Twice is fine.

        What it holds (locks) it holds for ever; the caller knows what of it outlives a process.
        """
        task.ended = True
        self._give_up_lane(task)

    def choose(self, site: str, options: list[str]) -> int:
        """Have an open outcome decided; the first option where nobody chooses."""
        return 0 if self.chooser is None else self.chooser.choose(site, options)

    def _put(self, at_ns: int, what: Task | Timer, value: Any) -> None:
        self._n_put += 1
        heapq.heappush(self._heap, (at_ns, self._n_put, what, value))

    # Running

    def run(self, *, until_ns: int | None = None, max_steps: int | None = None) -> bool:
        """Take steps until nothing is left, time is up, or there were too many; True if nothing is left.

        After time is up `now_ns` is `until_ns`, and steps due exactly then have been taken.
        """
        last = None if max_steps is None else self.n_steps + max_steps
        while last is None or self.n_steps < last:
            if not self.step(until_ns=until_ns):
                left = bool(self._heap)
                if until_ns is not None:
                    self.now_ns = max(self.now_ns, until_ns)
                return not left
        return not (self._heap or self._ready)

    def step(self, *, until_ns: int | None = None) -> bool:
        """Take one step; False when there is none (until then)."""
        entry = self._next_in_order(until_ns) if self.chooser is None else self._next_chosen(self.chooser, until_ns)
        if entry is None:
            return False
        at_ns, _, what, value = entry
        if at_ns > self.now_ns:
            self.now_ns = at_ns
        self.n_steps += 1
        if isinstance(what, Task):
            self._advance(what, value)
        else:
            self._call(what)
        if self.after_step is not None:
            self.after_step()
        return True

    def _next_in_order(self, until_ns: int | None) -> _Entry | None:
        while self._heap:
            if until_ns is not None and self._heap[0][0] > until_ns:
                return None
            entry = heapq.heappop(self._heap)
            if self._may_go(entry):
                return entry
        return None

    def _next_chosen(self, chooser: Chooser, until_ns: int | None) -> _Entry | None:
        self._gather(self.now_ns)
        candidates = [entry for entry in self._ready if not _held_up(entry[2])]
        while not candidates:  # time passes; a lane may be held by a step that is only due later
            if not self._heap or (until_ns is not None and self._heap[0][0] > until_ns):
                assert self._heap or not self._ready, "steps wait for a lane whose holder waits for nothing"
                return None
            self._gather(self._heap[0][0])
            candidates = [entry for entry in self._ready if not _held_up(entry[2])]
        later = self._soonest_later(until_ns) if chooser.jumps else None
        if later is not None:
            candidates.append(later)
        index = 0
        if len(candidates) > 1:
            index = chooser.choose("next", [entry[2].name for entry in candidates])
        chosen = candidates[index]
        if chosen is later:
            self._heap.remove(chosen)
            heapq.heapify(self._heap)
        else:
            self._ready.remove(chosen)
        if isinstance(chosen[2], Task) and chosen[2].lane is not None:
            chosen[2].lane.holder = chosen[2]
        return chosen

    def _gather(self, now_ns: int) -> None:
        """Move what is due to the ready ones; with a chooser they queue for lanes there, so that it sees them all."""
        while self._heap and self._heap[0][0] <= now_ns:
            entry = heapq.heappop(self._heap)
            if not _is_void(entry[2]):
                self._ready.append(entry)
        self._ready = [entry for entry in self._ready if not _is_void(entry[2])]

    def _soonest_later(self, until_ns: int | None) -> _Entry | None:
        while self._heap and _is_void(self._heap[0][2]):
            heapq.heappop(self._heap)
        if not self._heap or (until_ns is not None and self._heap[0][0] > until_ns) or _held_up(self._heap[0][2]):
            return None
        return self._heap[0]

    def _may_go(self, entry: _Entry) -> bool:
        """Tell whether a step can be taken; one whose lane is held queues there."""
        what = entry[2]
        if not isinstance(what, Task):
            return what.callback is not None
        if what.ended:
            return False
        lane = what.lane
        if lane is None or lane.holder is what:
            return True
        if lane.holder is None:
            lane.holder = what
            return True
        lane.queue.append((what, entry[3]))
        return False

    def _call(self, timer: Timer) -> None:
        callback, timer.callback = timer.callback, None
        assert callback is not None
        if self.trace is not None:
            self.trace.note(self.now_ns, timer.name, "called")
        callback()

    def _advance(self, task: Task, value: Any) -> None:
        """Take one step of a task: to its next yield, and perform what that asks."""
        task.waits_for = None
        try:
            effect = task.procedure.send(value)
        except StopIteration as stop:
            self._end(task, stop.value)
            return
        if self.trace is not None:
            self.trace.note(self.now_ns, task.name, _word(effect))
        kind = type(effect)
        if kind is Work:
            self._put(self.now_ns + effect.cost_ns, task, None)
            return
        handler = _OWN.get(kind)
        if handler is not None:
            handler(self, task, effect)
            return
        performed = task.port.perform(effect, task)
        if isinstance(performed, Performed):
            self._put(self.now_ns + performed.cost_ns, task, performed.result)
            return
        self._wait(task, effect)

    def _end(self, task: Task, result: Any) -> None:
        task.ended = True
        task.result = result
        if self.trace is not None:
            self.trace.note(self.now_ns, task.name, "ends")
        self._give_up_lane(task)
        if task.done is not None:
            task.done(result)

    # Waiting

    def _wait(self, task: Task, effect: Any) -> None:
        task.waits_for = effect
        self._give_up_lane(task)

    def _give_up_lane(self, task: Task) -> None:
        lane = task.lane
        if lane is None or lane.holder is not task:
            return
        lane.holder = None
        while lane.queue:
            following, value = lane.queue.popleft()
            if not following.ended:
                self._put(self.now_ns, following, value)
                lane.holder = following
                return

    def _backoff(self, task: Task, effect: Backoff) -> None:
        self._wait(task, effect)
        self._put(self.now_ns + effect.delay_ns, task, None)

    def _pause(self, task: Task, effect: Pause) -> None:
        if effect.gate.is_open:
            self._put(self.now_ns, task, None)
            return
        self._wait(task, effect)
        effect.gate.waiting.append(task)

    def _open(self, task: Task, effect: Open) -> None:
        self.open(effect.gate)
        self._put(self.now_ns, task, None)

    def open(self, gate: Gate) -> None:
        """Open a gate: who waits there goes on."""
        gate.is_open = True
        for task in gate.waiting:
            self.resume(task)
        gate.waiting.clear()

    def _quiesce(self, task: Task, effect: Quiesce) -> None:
        n_left = sum(not fence.passed for fence in effect.fences)
        if not n_left:
            self._put(self.now_ns, task, None)
            return
        self._wait(task, effect)

        def passed() -> None:
            nonlocal n_left
            n_left -= 1
            if not n_left:
                self.resume(task)

        for fence in effect.fences:
            if not fence.passed:
                fence.when_passed(passed)

    # Locks

    def _acquire(self, task: Task, effect: Acquire) -> None:
        lock = effect.lock
        if not lock.queue and _grant(lock, task, shared=effect.shared):
            self._put(self.now_ns, task, None)
            return
        self._wait(task, effect)
        lock.queue.append((task, effect.shared))

    def _release(self, task: Task, effect: Release) -> None:
        self._let_go(effect.lock, task)
        self._put(self.now_ns, task, None)

    def _let_go(self, lock: Lock, task: Task) -> None:
        if lock.writer is task:
            lock.writer = None
        else:
            assert task in lock.readers, f"{task.name} gives back {lock.name}, which it does not have"
            lock.readers.remove(task)
        while lock.queue:
            following, shared = lock.queue[0]
            if not following.ended:
                if not _grant(lock, following, shared=shared):
                    return
                self.resume(following)
            lock.queue.popleft()


def _grant(lock: Lock, task: Task, *, shared: bool) -> bool:
    if lock.writer is not None or (lock.readers and not shared):
        return False
    if shared:
        lock.readers.append(task)
    else:
        lock.writer = task
    return True


def _held_up(what: Task | Timer) -> bool:
    """Tell whether another task has its lane."""
    return isinstance(what, Task) and what.lane is not None and what.lane.holder not in (None, what)


def _is_void(what: Task | Timer) -> bool:
    return what.ended if isinstance(what, Task) else what.callback is None


def _word(effect: Any) -> str:
    """Name an effect for the trace."""
    if type(effect) is Work:
        return effect.what
    name, pages = type(effect).__name__, getattr(effect, "pages", None)
    return name if pages is None else f"{name} {pages.first}..{pages.end - 1}"


_OWN: dict[type, Callable[[Scheduler, Task, Any], None]] = {
    Backoff: Scheduler._backoff,
    Pause: Scheduler._pause,
    Open: Scheduler._open,
    Quiesce: Scheduler._quiesce,
    Acquire: Scheduler._acquire,
    Release: Scheduler._release,
}
