"""The live runner: carries out what the pager's procedures ask for.

Most effects are system calls of a few microseconds, made here and now, so that a fault is usually answered within one
call of `start`. Those that may wait suspend the procedure, which goes on when the loop says so:

    ReadSwap              on a thread: what the page cache has was asked for by ReadCached
    WriteSwap             at once where it is little; else on a thread
    Quiesce               when the last fence has passed
    Pause                 when the gate opens, in order of arrival
    Backoff               after its time
    WriteProtect          while the process is inside fork, munmap, ... : tried again soon

Procedures do not interleave but at these. One that opens a gate goes on to its next wait before any that waited there,
so a procedure never sees another's half-done step.

A procedure that raises is a mistake of ours. It cannot be repaired, but contained: the arena is declared broken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from nopin.mm.effects import (
    Backoff,
    Fill,
    HasGoneOn,
    MapIn,
    Open,
    Pause,
    Poison,
    Present,
    Procedure,
    Punch,
    Quiesce,
    ReadCached,
    ReadSwap,
    Unprotect,
    Wake,
    WriteProtect,
    WriteSwap,
    Zero,
)
from nopin.mm.space import Bytes
from nopin.server.arena_machine import ArenaMachine
from nopin.units import US_NS

RETRY_NS = 100 * US_NS
"""How soon to try again what a process inside fork or munmap puts off."""

WRITE_INLINE_BYTES = 64 << 10
"""Writes up to this are made by the loop: handing them to a thread and back takes longer."""

Done = Callable[[Any], None]


class Clockwork(Protocol):
    """What the runner needs of the loop."""

    def after(self, delay_ns: int, callback: Callable[[], None]) -> None:
        """Call back once the time has passed."""
        ...

    def on_thread(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Run a job on a thread; its result comes back in the loop."""
        ...


class SwapIo(Protocol):
    """The swap file, as `linux.swap_file.SwapFile`."""

    def read_cached(self, offset_bytes: int, length_bytes: int) -> Bytes | None:
        """Return bytes that need not come from a medium."""
        ...

    def read(self, offset_bytes: int, length_bytes: int) -> Bytes | int:
        """Return bytes, or an errno."""
        ...

    def write(self, offset_bytes: int, pieces: Any) -> int:
        """Return an errno, or 0."""
        ...


class Task:
    """A suspended procedure, and who wants its result."""

    __slots__ = ("done", "procedure")

    def __init__(self, procedure: Procedure[Any], done: Done | None) -> None:
        self.procedure = procedure
        self.done = done


LATER = object()
"""What a waiting effect is answered with when its result comes by `_resume`."""


class Runner:
    """Runs the procedures of one arena.

    Args:
        machine: mappers and frames.
        broken: called with the exception of a procedure that raised.

    Attributes:
        n_suspended: procedures that wait for something.
    """

    def __init__(
        self, machine: ArenaMachine, swap: SwapIo, clockwork: Clockwork, broken: Callable[[Exception], None]
    ) -> None:
        self._machine = machine
        self._swap = swap
        self._clockwork = clockwork
        self._broken = broken
        self._ready: deque[tuple[Task, Any]] = deque()
        self._stepping = False
        self.n_suspended = 0
        self._at_once: dict[type, Callable[[Any], Any]] = {
            Zero: machine.zero,
            Fill: machine.fill,
            MapIn: machine.map_in,
            Unprotect: machine.unprotect,
            Wake: machine.wake,
            Poison: machine.poison,
            Punch: machine.punch,
            Present: machine.present,
            HasGoneOn: machine.has_gone_on,
            ReadCached: self._read_cached,
            Open: self._open,
        }
        self._may_wait: dict[type, Callable[[Any, Task], Any]] = {
            WriteProtect: self._write_protect,
            ReadSwap: self._read_swap,
            WriteSwap: self._write_swap,
            Quiesce: self._quiesce,
            Pause: self._pause,
            Backoff: self._backoff,
        }

    def start(self, procedure: Procedure[Any], done: Done | None = None) -> Task | None:
        """Run a procedure as far as it goes without waiting; `done` gets its result, perhaps before this returns.

        From within a procedure's step or callback it is queued.

        Returns:
            None if it has ended, else what is left of it: its `done` may still be set.
        """
        if self._stepping:
            task = Task(procedure, done)
            self.n_suspended += 1
            self._ready.append((task, None))
            return task
        self._stepping = True
        suspended = self._step(procedure, done, None)
        if self._ready:
            self._run_ready()
        self._stepping = False
        return suspended

    def finish(self, procedure: Procedure[Any]) -> Any:
        """Run a procedure of which no effect waits to its end; returns its result, in the very step in which it ended.

        None, and not begun, from within a procedure's step or callback.
        """
        if self._stepping:
            return None
        self._stepping = True
        send, at_once, result = procedure.send, self._at_once, None
        try:
            while True:
                effect = send(result)
                result = at_once[type(effect)](effect)
        except StopIteration as stop:
            return stop.value
        except Exception as problem:
            self._broken(problem)
        finally:
            self._stepping = False
        return None

    def _step(self, procedure: Procedure[Any], done: Done | None, result: Any, task: Task | None = None) -> Task | None:
        """Carry a procedure on to its end, or to where it waits."""
        send, at_once = procedure.send, self._at_once
        try:
            while True:
                effect = send(result)
                act = at_once.get(type(effect))
                if act is not None:
                    result = act(effect)
                    continue
                task = task or Task(procedure, done)
                result = self._may_wait[type(effect)](effect, task)
                if result is LATER:
                    self.n_suspended += 1
                    return task
        except StopIteration as stop:
            if task is not None:
                done = task.done
            if done is not None:
                done(stop.value)
        except Exception as problem:
            self._broken(problem)
        return None

    def _run_ready(self) -> None:
        while self._ready:
            task, result = self._ready.popleft()
            self.n_suspended -= 1
            self._step(task.procedure, task.done, result, task)

    def _resume(self, task: Task, result: Any = None) -> None:
        """Go on with a suspended procedure: now, or after those that are ready before it."""
        self._ready.append((task, result))
        if not self._stepping:
            self._stepping = True
            self._run_ready()
            self._stepping = False

    def _open(self, effect: Open) -> None:
        gate = effect.gate
        gate.is_open = True
        waiting, gate.waiting = gate.waiting, []
        self._ready.extend((task, None) for task in waiting)

    def _pause(self, effect: Pause, task: Task) -> object:
        if effect.gate.is_open:
            return None
        effect.gate.waiting.append(task)
        return LATER

    def _backoff(self, effect: Backoff, task: Task) -> object:
        self._clockwork.after(effect.delay_ns, lambda: self._resume(task))
        return LATER

    def _quiesce(self, effect: Quiesce, task: Task) -> object:
        fences = [fence for fence in effect.fences if not fence.passed]
        if not fences:
            return None
        n_left = len(fences)

        def passed() -> None:
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                self._resume(task)

        for fence in fences:
            fence.when_passed(passed)
        return LATER

    def _write_protect(self, effect: WriteProtect, task: Task) -> object:
        if self._machine.write_protect(effect):
            return None

        def again() -> None:
            if self._machine.write_protect(effect):
                self._resume(task)
            else:
                self._clockwork.after(RETRY_NS, again)

        self._clockwork.after(RETRY_NS, again)
        return LATER

    def _read_cached(self, effect: ReadCached) -> Bytes | None:
        return self._swap.read_cached(effect.offset_bytes, effect.length_bytes)

    def _read_swap(self, effect: ReadSwap, task: Task) -> object:
        offset_bytes, length_bytes = effect.offset_bytes, effect.length_bytes
        self._clockwork.on_thread(
            lambda: self._swap.read(offset_bytes, length_bytes), lambda result: self._resume(task, result)
        )
        return LATER

    def _write_swap(self, effect: WriteSwap, task: Task) -> object:
        offset_bytes, pieces = effect.offset_bytes, effect.pieces
        if sum(piece.nbytes for piece in pieces) <= WRITE_INLINE_BYTES:
            return self._swap.write(offset_bytes, pieces)
        self._clockwork.on_thread(
            lambda: self._swap.write(offset_bytes, pieces), lambda result: self._resume(task, result)
        )
        return LATER
