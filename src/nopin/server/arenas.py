"""All arenas of a server, and the loop's part in them.

All userfaultfds sit in an epoll of their own, which the loop's epoll watches.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from nopin.errors import UsageError
from nopin.mm.residency import BATCH_PAGES
from nopin.server.arena import Arena
from nopin.server.arena_maker import ArenaParts
from nopin.server.jobs import Jobs
from nopin.server.mapper import Mapper
from nopin.server.poller import Poller
from nopin.server.timers import Timer, Timers
from nopin.units import S_NS

PROBE_NS = S_NS
"""How often to look for mappers that ended unheard: processes that called exec."""
_N_SWAP_THREADS = 2


class Arenas:
    """The arenas of a server; implements `arena.Host` and the runners' `Clockwork`.

    Attributes:
        all: by number.
        on_broken: called when a procedure of an arena raised: a mistake of ours.
        on_tampered: called when a process made its userfaultfd unusable.
        on_gone: called when an arena has been closed.
    """

    def __init__(self, poller: Poller, timers: Timers, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.all: dict[int, Arena] = {}
        self.on_broken: Callable[[Arena, Exception], None] = _raise
        self.on_tampered: Callable[[Arena, Mapper, UsageError], None] = _drop
        self.on_gone: Callable[[Arena], None] = _ignore
        self._poller = poller
        self._timers = timers
        self._jobs = Jobs(_N_SWAP_THREADS)
        self._epoll = select.epoll()
        self._served: dict[int, tuple[Arena, Mapper]] = {}
        self._only = -1  # the one userfaultfd that had something to say when they were last asked; -1: several had
        self._attended: dict[Arena, None] = {}
        self._soon: deque[Callable[[], None]] = deque()
        self._probe: Timer | None = None
        self._last_number = 0
        poller.watch(self._epoll.fileno(), self._on_faults)
        poller.watch(self._jobs.fd, self._on_results)

    @property
    def clockwork(self) -> Arenas:
        """Timers and threads for the runners."""
        return self

    def create(self, name: str, parts: ArenaParts) -> Arena:
        """Serve a new arena; owns its parts."""
        self._last_number += 1
        arena = self.all[self._last_number] = Arena(self, self._last_number, name, parts)
        return arena

    def close(self) -> None:
        """Stop serving. Processes that wait at a fault go on waiting, for a successor."""
        self._poller.forget(self._epoll.fileno())
        self._poller.forget(self._jobs.fd)
        self._jobs.close()
        self._epoll.close()

    # The loop

    def turn(self) -> None:
        """Do what came up in this turn; to be called once in each."""
        if self._attended:
            attended, self._attended = self._attended, {}
            for arena in attended:
                arena.attend()
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    @property
    def busy(self) -> bool:
        """True while `turn` has something to do."""
        return bool(self._attended or self._soon)

    def _on_faults(self, _mask: int) -> None:
        ready = self._epoll.poll(0)
        before, self._only = self._only, ready[0][0] if len(ready) == 1 else -1
        for fd, _ in ready:
            served = self._served.get(fd)
            if served is not None:
                arena, mapper = served
                try:
                    arena.read(mapper, alone=fd == before == self._only)
                except UsageError as problem:
                    self.on_tampered(arena, mapper, problem)

    def _on_results(self, _mask: int) -> None:
        self._jobs.deliver()

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once at the end of a turn: the next time there is one."""
        self._soon.append(callback)

    # Host

    def serve(self, arena: Arena, mapper: Mapper) -> None:
        """Have a mapper's faults brought to its arena."""
        self._served[mapper.uffd.fileno()] = arena, mapper
        self._epoll.register(mapper.uffd.fileno(), select.EPOLLIN)
        self._poller.watch(mapper.process.fileno(), partial(self._on_exit, arena, mapper))
        self._probe_later()

    def stop_serving(self, mapper: Mapper) -> None:
        """Undo it."""
        del self._served[mapper.uffd.fileno()]
        self._epoll.unregister(mapper.uffd.fileno())
        self._poller.forget(mapper.process.fileno())

    def attend(self, arena: Arena) -> None:
        """Call the arena at the end of this turn."""
        self._attended[arena] = None

    def gone(self, arena: Arena) -> None:
        """Forget an arena that was closed."""
        del self.all[arena.number]
        self._attended.pop(arena, None)
        self.on_gone(arena)

    def broken(self, arena: Arena, problem: Exception) -> None:
        """Tell of a mistake of ours."""
        self.on_broken(arena, problem)

    def pressed(self, arena: Arena) -> None:
        """Have that arena give back some that holds most of what this one may have; next turn, not in its step."""
        rivals = [other for other in self.all.values() if other is not arena]
        same_client = [other for other in rivals if other.parts.budget.parent is arena.parts.budget.parent]
        if rivals:
            largest = max(same_client or rivals, key=lambda other: other.parts.budget.n_used)
            self.soon(partial(largest.give_back, BATCH_PAGES))

    def _on_exit(self, arena: Arena, mapper: Mapper, _mask: int) -> None:
        arena.unmap(mapper)

    def _probe_later(self) -> None:
        if self._probe is None:
            self._probe = self._timers.at(self.clock() + PROBE_NS, self._probe_now)

    def _probe_now(self) -> None:
        self._probe = None
        for arena in list(self.all.values()):
            arena.probe()
        if self._served:
            self._probe_later()

    # Clockwork

    def after(self, delay_ns: int, callback: Callable[[], None]) -> None:
        """Call back once the time has passed."""
        self._timers.at(self.clock() + delay_ns, callback)

    def on_thread(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Run a job on a thread; its result comes back in the loop."""
        self._jobs.submit(job, done)


def _raise(_arena: Arena, problem: Exception) -> None:
    raise problem


def _drop(arena: Arena, mapper: Mapper, _problem: UsageError) -> None:
    arena.unmap(mapper)


def _ignore(_arena: Arena) -> None:
    pass
