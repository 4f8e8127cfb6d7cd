"""A storm over one arena: processes, a device, evictions, prefetches and discards at once, as a seed draws them.

Accesses write a number nobody wrote before (now and then zero, so that pages become all zeros), or read and compare
with what the oracle of cells allows. Everything is a task of one scheduler, whose next step is drawn; so processes run
between any two effects of the pager, and devices, being the server itself, only where procedures wait.

It looks much further than the explorer's scenarios, into states with many pages, and at far fewer orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from nopin.mm.arena_pages import PagerSettings
from nopin.mm.effects import PageRun
from nopin.model.arena.paged import PagedArena, Steps
from nopin.model.arena.slow_reader import SlowReader
from nopin.model.choice import Drawn
from nopin.model.oracle.cells import CELLS
from nopin.model.oracle.violation import violate
from nopin.model.scheduler import Scheduler, Task

MAX_STEPS = 40_000
"""Steps to come to rest in; more is for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StormSettings:
    """What blows.

    Attributes:
        n_mappings: processes. n_threads: accesses of processes under way at once, at most.
        budgets: what the budget may be set to; the first one at the beginning.
        discards, removals: processes give pages up, by word or by madvise.
        pushes: the device is given pages as they become present.
        slow_reads: another device reads, and takes its time.
        pager: settings of the pager.
    """

    n_pages: int = 40
    n_mappings: int = 2
    n_threads: int = 6
    budgets: tuple[int, ...] = (12, 8, 20)
    discards: bool = True
    removals: bool = False
    pushes: bool = False
    slow_reads: bool = False
    pager: PagerSettings = field(default_factory=PagerSettings)


class Storm(PagedArena):
    """See above.

    Attributes:
        slow: a device that takes its time.
        cached_share: of what is read from swap, by chance, as much comes without waiting.
    """

    def __init__(self, seed: int, settings: StormSettings | None = None) -> None:
        self.storm = settings or StormSettings()
        self.random = Random(seed)
        self.scheduler = Scheduler(Drawn(self.random, jumps=True))
        super().__init__(
            self.scheduler,
            n_pages=self.storm.n_pages,
            budget_pages=self.storm.budgets[0],
            n_mappings=self.storm.n_mappings,
            settings=self.storm.pager,
            pushes=self.storm.pushes,
        )
        self.cached_share = 0.5
        self.machine.is_cached = lambda: self.random.random() < self.cached_share
        self.machine.is_seen = lambda: self._coin()
        self.scheduler.after_step = self.check
        self._threads: list[Task] = []
        self._devices: list[Task] = []
        self._n_threads_made = 0

    def begin(self, budget_pages: int) -> None:
        """Make a pager over what is there, and a slow device beside the quick one."""
        super().begin(budget_pages)
        self.slow = SlowReader(self)

    # The storm

    def blow(self, n_steps: int) -> None:
        """Begin random things, and take random steps."""
        for _ in range(n_steps):
            self._begin_something()
            for _ in range(self.random.randrange(5)):
                self.scheduler.step()

    def calm(self) -> None:
        """Let everything that is under way end; a `Violation` if something hangs."""
        self.rest()
        waiting = [task.name for task in self._threads if not task.ended]
        if waiting:
            violate("unanswered_fault", f"nobody wakes {', '.join(waiting)}")
        self.check_idle()

    def rest(self) -> None:
        """Let everything go on that can."""
        if not self.scheduler.run(max_steps=MAX_STEPS):
            violate("no_progress", f"after {MAX_STEPS} steps it still goes on")

    def server_is_killed(self) -> None:
        """Kill the server; a successor takes over. Processes wait meanwhile."""
        self._devices.clear()
        recovers = self.take_over()
        while not recovers.ended:
            self.scheduler.step()

    def read_everything(self) -> None:
        """Read every cell by a process, one after the other."""
        for page in range(self.n_pages):
            self.read(1, page)
        self.calm()

    def read(self, mapper: int, page: int) -> bool:
        """Read a page by a process, or (0) by the device; False if that gets an error."""
        n_failed = self.n_killed + sum(self.refused.values())
        for cell in range(len(CELLS)):
            if mapper:
                self._spawn_thread(mapper, page, None, cell)
            else:
                self.machine.start("device", self.device(PageRun(page, 1), None, cell=cell))
            self.rest()
        return self.n_killed + sum(self.refused.values()) == n_failed

    def store(self, mapper: int, page: int) -> None:
        """Store to all cells of a page by a process."""
        for cell in range(len(CELLS)):
            self._spawn_thread(mapper, page, self.cells.fresh(), cell)
            self.rest()

    def _begin_something(self) -> None:
        choose = self.random.random()
        if choose < 0.70:
            self._cpu_access()
        elif choose < 0.85:
            self._device_access_of_run()
        else:
            self.random.choice(self._rare())()

    def _rare(self) -> list[Callable[[], object]]:
        machine, pager, run = self.machine, self.pager, self._run(8)
        rare: list[Callable[[], object]] = [
            lambda: machine.start("evict", pager.give_back(self.random.randrange(1, 10))),
            lambda: machine.start("reclaim", pager.reclaim()),
            lambda: machine.start("prefetch", pager.prefetch(run, write=self._coin())),
            lambda: machine.drop_mapping(self._mapper(), run),
            lambda: machine.start("budget", pager.set_budget(self.random.choice(self.storm.budgets))),
        ]
        if self.storm.slow_reads:
            rare += [lambda: machine.start("slow device", self.slow.read(self._run(3), self.random.randrange(2)))] * 3
        if self.storm.discards:
            rare.append(lambda: machine.start("discard", self.discard(run)))
        if self.storm.removals:
            dropped = self.random.choice((True, None))
            rare += [lambda: self._spawn("madvise", self.remove(run, mapper=self._mapper(), dropped=dropped))] * 2
        return rare

    def _cpu_access(self) -> None:
        self._threads = [task for task in self._threads if not task.ended]
        if len(self._threads) < self.storm.n_threads:
            value = self._value() if self._coin() else None
            self._spawn_thread(self._mapper(), self._page(), value, self.random.randrange(len(CELLS)))

    def _spawn_thread(self, mapper: int, page: int, value: int | None, cell: int) -> None:
        self._spawn(f"process {mapper}", self.thread(mapper, page, value, cell=cell))

    def _spawn(self, name: str, procedure: Steps) -> None:
        self._n_threads_made += 1
        task = self.scheduler.spawn(f"{name}, thread {self._n_threads_made}", procedure, port=self.machine)
        self._threads.append(task)

    def _device_access_of_run(self) -> None:
        self._devices = [task for task in self._devices if not task.ended]
        if len(self._devices) < 2:
            value = self._value() if self._coin() else None
            access = self.device(self._run(3), value, cell=self.random.randrange(len(CELLS)), at_once=self._coin())
            self._devices.append(self.machine.start("device", access))

    # Chance

    def _coin(self) -> bool:
        return self.random.random() < 0.5

    def _mapper(self) -> int:
        return self.random.randrange(1, self.storm.n_mappings + 1)

    def _page(self) -> int:
        """A page, the first ones more often."""
        return min(self.random.randrange(self.n_pages), self.random.randrange(self.n_pages))

    def _run(self, n_most: int) -> PageRun:
        n = self.random.randrange(1, n_most + 1)
        return PageRun(self.random.randrange(self.n_pages - n + 1), n)

    def _value(self) -> int:
        return 0 if self.random.random() < 0.2 else self.cells.fresh()
