"""The scheduler: virtual time, and who goes next.

Everything that happens on the modelled machine is a *step*: a task (a procedure that yields effects) runs from one
yield to the next, or a callback is called. Steps that are due now are *ready*, in a queue; later ones lie in a heap by
(time, number). Time is an integer of nanoseconds, the number counts how many were put there, so a tie is resolved by
order of insertion and by nothing else. No clock, no thread, no hash of an object has a say.

**Two ways to run.** Without a chooser the first that is ready goes next: the run is a simulation, and every cost
counts. With a chooser, it picks any that is ready: the run is one interleaving of many. Modelled code that is explored
costs nothing, so everything but timers is due at once.

**Effects.** The scheduler performs those about order and time (`Work`, `Backoff`, `Pause`, `Open`, `Quiesce`,
`Acquire`, `Release`); the others go to the port the task was spawned with, which answers with a result and a cost, or
with `LATER` and resumes the task itself when, say, its medium is done.

**Lanes.** A task on a lane shares it with nobody from one wait to the next (see `Lane`). What may wait gives the lane
up: `Backoff`, `Pause`, `Quiesce`, `Acquire`, and `LATER`. What only costs keeps it, which is how the steps of a pager
stay together although processes run between them, and how a busy loop makes others late.

Invariants: a task is in exactly one place: in the heap or among the ready, in a lane's queue, at a gate, lock or fence,
or in its port's hands; so what its procedure is sent next lies with the task. Everything in the heap is due later than
now: when time passes, all that is due then becomes ready at once, and what is put there afterwards comes behind it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, NamedTuple, Protocol, final

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


@final
class Task:
    """A procedure on its way.

    Attributes:
        name: stable from run to run; unique among tasks alive at a time.
        value: what its procedure is sent when it goes on.
        waits_for: the effect it waits for, while it does.
        ended: it returned, or was dropped.
        result: what it returned.
    """

    __slots__ = ("done", "ended", "lane", "name", "port", "procedure", "result", "send", "value", "waits_for")

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
        self.send = procedure.send
        self.port = port
        self.lane = lane
        self.done = done
        self.value: Any = None
        self.waits_for: Any = None
        self.ended = False
        self.result: Any = None


@final
class Timer:
    """A callback on its way; `cancel` takes it back."""

    __slots__ = ("callback", "name")

    def __init__(self, name: str, callback: Callable[[], None] | None) -> None:
        self.name = name
        self.callback = callback

    def cancel(self) -> None:
        """Do not call. Twice is fine."""
        self.callback = None


_Step = Task | Timer


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
        self._heap: list[tuple[int, int, _Step]] = []
        self._ready: deque[_Step] = deque()
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
        self._ready.append(task)
        return task

    def call_at(self, at_ns: int, name: str, callback: Callable[[], None]) -> Timer:
        """Call back at a time, now at the earliest."""
        timer = Timer(name, callback)
        self._put(at_ns, timer)
        return timer

    def resume(self, task: Task, result: Any = None, *, delay_ns: int = 0) -> None:
        """Go on with a task that was told `LATER`, or waits for something of a caller's own."""
        assert task.waits_for is not None or task.ended, f"{task.name} waits for nothing"
        if not task.ended:
            task.value = result
            self._put(self.now_ns + delay_ns, task)

    def drop(self, task: Task) -> None:
        """Have a task never go on, wherever it is: its process was killed. Twice is fine.

        What it holds (locks) it holds for ever; the caller knows what of it outlives a process.
        """
        task.ended = True
        self._give_up_lane(task)

    def choose(self, site: str, options: list[str]) -> int:
        """Have an open outcome decided; the first option where nobody chooses."""
        return 0 if self.chooser is None else self.chooser.choose(site, options)

    def _put(self, at_ns: int, what: _Step) -> None:
        if at_ns <= self.now_ns:
            self._ready.append(what)
        else:
            self._n_put += 1
            heapq.heappush(self._heap, (at_ns, self._n_put, what))

    # Running

    def run(self, *, until_ns: int | None = None, max_steps: int | None = None) -> bool:
        """Take steps until nothing is left, time is up, or there were too many; True if nothing is left.

        After time is up `now_ns` is `until_ns`, and steps due exactly then have been taken.
        """
        if self._go(until_ns, max_steps):
            return not (self._heap or self._ready)
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)
        return not self._heap

    def step(self) -> bool:
        """Take one step; False when there is none (until then)."""
        return self._go(None, 1)

    def _go(self, until_ns: int | None, n_steps: int | None) -> bool:
        """Take so many steps, or as many as there are; False if there were fewer.

        A step of a task goes to its next yield, and what that asks is performed. The loop of everything: the ordinary
        effect is dealt with in place, because a call more here is a tenth of a simple step.
        """
        chooser = self.chooser
        for _ in count() if n_steps is None else range(n_steps):
            what = self._next_in_order(until_ns) if chooser is None else self._next_chosen(chooser, until_ns)
            if what is None:
                return False
            self.n_steps += 1
            if type(what) is not Task:
                self._call(what)
            else:
                value, what.value, what.waits_for = what.value, None, None
                try:
                    effect = what.send(value)
                except StopIteration as stop:
                    self._end(what, stop.value)
                else:
                    if self.trace is not None:
                        self.trace.note(self.now_ns, what.name, _word(effect))
                    if type(effect) is not Work:
                        self._perform(effect, what)
                    elif effect.cost_ns:
                        self._put(self.now_ns + effect.cost_ns, what)
                    else:
                        self._ready.append(what)
            if self.after_step is not None:
                self.after_step()
        return True

    def _next_in_order(self, until_ns: int | None) -> _Step | None:
        ready = self._ready
        while ready or self._pass_time(until_ns):
            what = ready.popleft()
            if type(what) is not Task:
                if what.callback is not None:
                    return what
            elif not what.ended and (what.lane is None or _enter(what.lane, what)):
                return what
        return None

    def _next_chosen(self, chooser: Chooser, until_ns: int | None) -> _Step | None:
        candidates = self._candidates()
        while not candidates:  # time passes; a lane may be held by a step that is only due later
            if not self._pass_time(until_ns):
                assert self._heap or not self._ready, "steps wait for a lane whose holder waits for nothing"
                return None
            candidates = self._candidates()
        later = self._soonest_later(until_ns) if chooser.jumps else None
        if later is not None and not _held_up(later):
            candidates.append(later)
        index = 0
        if len(candidates) > 1:
            index = chooser.choose("next", [what.name for what in candidates])
        chosen = candidates[index]
        if chosen is later:
            self._pass_time(until_ns)
        self._ready.remove(chosen)
        if type(chosen) is Task and chosen.lane is not None:
            chosen.lane.holder = chosen
        return chosen

    def _candidates(self) -> list[_Step]:
        """Forget what is void among the ready, and return who of the rest is not held up."""
        left = [what for what in self._ready if not is_void(what)]
        if len(left) < len(self._ready):
            self._ready = deque(left)
        return [what for what in left if not _held_up(what)]

    def _pass_time(self, until_ns: int | None) -> bool:
        """Go on to when something is due next, and make all ready that is; False if nothing is, until then."""
        later = self._soonest_later(until_ns)
        if later is None:
            return False
        heap = self._heap
        self.now_ns = now_ns = heap[0][0]
        while heap and heap[0][0] == now_ns:
            self._ready.append(heapq.heappop(heap)[2])
        return True

    def _soonest_later(self, until_ns: int | None) -> _Step | None:
        """Return what is due next of what is not ready, until then."""
        heap = self._heap
        while heap and is_void(heap[0][2]):
            heapq.heappop(heap)
        return None if not heap or (until_ns is not None and heap[0][0] > until_ns) else heap[0][2]

    def _call(self, timer: Timer) -> None:
        callback, timer.callback = timer.callback, None
        assert callback is not None
        if self.trace is not None:
            self.trace.note(self.now_ns, timer.name, "called")
        callback()

    def _perform(self, effect: Any, task: Task) -> None:
        handler = _OWN.get(type(effect))
        if handler is not None:
            handler(self, task, effect)
            return
        performed = task.port.perform(effect, task)
        if isinstance(performed, Performed):
            task.value = performed.result
            self._put(self.now_ns + performed.cost_ns, task)
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
            following = lane.queue.popleft()
            if not following.ended:
                self._ready.append(following)
                lane.holder = following
                return

    def _backoff(self, task: Task, effect: Backoff) -> None:
        self._wait(task, effect)
        self._put(self.now_ns + effect.delay_ns, task)

    def _pause(self, task: Task, effect: Pause) -> None:
        if effect.gate.is_open:
            self._ready.append(task)
            return
        self._wait(task, effect)
        effect.gate.waiting.append(task)

    def _open(self, task: Task, effect: Open) -> None:
        self.open(effect.gate)
        self._ready.append(task)

    def open(self, gate: Gate) -> None:
        """Open a gate: who waits there goes on."""
        gate.is_open = True
        for task in gate.waiting:
            self.resume(task)
        gate.waiting.clear()

    def _quiesce(self, task: Task, effect: Quiesce) -> None:
        n_left = sum(not fence.passed for fence in effect.fences)
        if not n_left:
            self._ready.append(task)
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
            self._ready.append(task)
            return
        self._wait(task, effect)
        lock.queue.append((task, effect.shared))

    def _release(self, task: Task, effect: Release) -> None:
        lock = effect.lock
        if lock.writer is task:
            lock.writer = None
        else:
            assert task in lock.readers, f"{task.name} gives back {lock.name}, which it does not have"
            lock.readers.remove(task)
        while lock.queue:
            following, shared = lock.queue[0]
            if not following.ended:
                if not _grant(lock, following, shared=shared):
                    break
                self.resume(following)
            lock.queue.popleft()
        self._ready.append(task)


def _grant(lock: Lock, task: Task, *, shared: bool) -> bool:
    if lock.writer is not None or (lock.readers and not shared):
        return False
    if shared:
        lock.readers.append(task)
    else:
        lock.writer = task
    return True


def _enter(lane: Lane, task: Task) -> bool:
    """Have a task go on if the lane is free or its own; if not, it queues there."""
    if lane.holder is not None and lane.holder is not task:
        lane.queue.append(task)
        return False
    lane.holder = task
    return True


def _held_up(what: _Step) -> bool:
    """Tell whether another task has its lane."""
    return type(what) is Task and what.lane is not None and what.lane.holder not in (None, what)


def is_void(what: _Step) -> bool:
    """Tell whether nothing comes of a step any more: it was dropped, or cancelled."""
    return what.ended if type(what) is Task else what.callback is None


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
