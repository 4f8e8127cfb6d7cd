"""Managed memory: every two things that can happen to one arena at once.

The arena has three pages and room for two. Page 0 is resident with a valid copy in swap, and mapped by process 1;
page 1 is in swap only; page 2 was never touched. Afterwards process 1 reads everything, and the books must balance.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

from nopin.mm.effects import PageRun, Procedure
from nopin.model.arena.paged import PagedArena, Steps
from nopin.model.effects import Work
from nopin.model.explore.scenario import add
from nopin.model.explore.world import World
from nopin.model.scheduler import Task

_ALL = PageRun(0, 3)


class Arena(PagedArena):
    """The arena described above, with actors."""

    def __init__(self, world: World) -> None:
        super().__init__(world.scheduler, n_pages=3, budget_pages=2)
        self.world = world
        self._devices: list[Task] = []
        world.prepare(self._prepare())
        world.always(self.check)
        world.afterwards(self._read_everything)
        world.at_end(self.check_idle)

    def _prepare(self) -> Steps:
        for page in (0, 1):
            yield from self._run_thread(page, self.cells.fresh())
        self.machine.start("evict", self.pager.give_back(2))
        yield Work("waits for that", 1)
        yield from self._run_thread(0, None)

    def _read_everything(self) -> Steps:
        for page in range(self.n_pages):
            yield from self._run_thread(page, None)

    def _run_thread(self, page: int, value: int | None) -> Steps:
        self.world.scheduler.spawn("thread", self.thread(1, page, value), port=self.machine)
        yield Work("waits for that", 1)

    # Actors

    def cpu_reads(self, who: str, page: int) -> None:
        """Have process 2 read a page."""
        self.world.spawn(f"{who}: process 2 reads", self.thread(2, page, None), port=self.machine)

    def cpu_stores(self, who: str, mapper: int, page: int) -> None:
        """Have a process store to a page."""
        thread = self.thread(mapper, page, self.cells.fresh())
        self.world.spawn(f"{who}: process {mapper} stores", thread, port=self.machine)

    def device_reads(self, who: str, run: PageRun) -> None:
        """Have the device read pages."""
        self.serve(f"{who}: device reads", self.device(run, None))

    def device_stores(self, who: str, run: PageRun) -> None:
        """Have the device store to pages."""
        self.serve(f"{who}: device stores", self.device(run, self.cells.fresh()))

    def serve(self, name: str, procedure: Procedure[Any]) -> None:
        """Have the server do something, which must end unless it is killed."""
        self._devices.append(self.world.adopt(self.machine.start(name, procedure)))

    def is_killed(self) -> Steps:
        """Kill the server at some time."""
        yield Work("kills the server")
        self.world.excuse(*(task for task in self._devices if not task.ended))
        self._devices.clear()
        self.take_over()

    def drops_translations(self) -> Steps:
        """MADV_DONTNEED of a process: its page table, not the pages."""
        self.machine.drop_mapping(1, _ALL)
        yield Work("has dropped its translations")


Actor = Callable[[Arena, str], object]

ACTORS: dict[str, Actor] = {
    "read": lambda a, who: a.cpu_reads(who, 1),
    "store": lambda a, who: a.cpu_stores(who, 1, 0),
    "first_store": lambda a, who: a.cpu_stores(who, 2, 2),
    "device_read": lambda a, who: a.device_reads(who, PageRun(0, 2)),
    "device_store": lambda a, who: a.device_stores(who, PageRun(0, 2)),
    "evict": lambda a, who: a.serve(f"{who}: evict", a.pager.give_back(2)),
    "prefetch": lambda a, who: a.serve(f"{who}: prefetch", a.pager.prefetch(PageRun(1, 2), write=False)),
    "discard": lambda a, who: a.serve(f"{who}: discard", a.discard(PageRun(0, 2))),
    "remove": lambda a, who: a.world.spawn(f"{who}: madvise", a.remove(PageRun(0, 2))),
    "dontneed": lambda a, who: a.world.spawn(f"{who}: madvise", a.drops_translations()),
    "takeover": lambda a, who: a.world.spawn(f"{who}: takeover", a.is_killed()),
}


def _pair(one: str, other: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        arena = Arena(world)
        ACTORS[one](arena, "a")
        ACTORS[other](arena, "b")

    return build


for _one, _other in combinations_with_replacement(ACTORS, 2):
    add(f"arena_{_one}_vs_{_other}", _pair(_one, _other), f"managed memory: {_one} while {_other}")
