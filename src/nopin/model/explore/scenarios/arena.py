"""Managed memory: every two things that can happen to one arena at once.

The arena has four pages and room for three. Page 0 is resident with a valid copy in swap, and mapped by process 1;
page 1 is in swap only; page 2 was written, and has no copy; page 3 was never touched. Afterwards process 1 reads
everything, and the books must balance.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

from nopin.mm.arena_pages import PagerSettings
from nopin.mm.effects import PageRun, Procedure
from nopin.mm.subscriber import Answer, Invalidation, Subscriber, Veto
from nopin.mm.swap import UNIT_BYTES
from nopin.model.arena.paged import PagedArena, Steps
from nopin.model.effects import Work
from nopin.model.explore.scenario import add, scenario
from nopin.model.explore.world import World
from nopin.model.oracle.violation import violate
from nopin.model.scheduler import Task
from nopin.ranges import Range

_ALL = PageRun(0, 4)


class Arena(PagedArena):
    """The arena described above, with actors."""

    def __init__(self, world: World, settings: PagerSettings | None = None) -> None:
        super().__init__(world.scheduler, n_pages=4, budget_pages=3, settings=settings)
        self.world = world
        self.machine.is_cached = self._is_cached
        self.machine.is_seen = lambda: self.world.either("is the sender seen")
        self.machine.read_error = lambda _offset, _length: self._trouble("swap read", errno.EIO)
        self.machine.write_error = lambda _offset, _length: self._trouble("swap write", errno.EIO)
        self.troubled = False
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
        yield from self._run_thread(2, self.cells.fresh())

    def _read_everything(self) -> Steps:
        for page in range(self.n_pages):
            yield from self._run_thread(page, None)

    def _run_thread(self, page: int, value: int | None) -> Steps:
        self.world.scheduler.spawn("thread", self.thread(1, page, value), port=self.machine)
        yield Work("waits for that", 1)

    def _is_cached(self) -> bool:
        return self.world.either("are the bytes cached")

    def _trouble(self, site: str, problem: int) -> int:
        """Fail now and then; what cannot be read is lost, which is then right."""
        fails = self.world.may(site)
        self.troubled = self.troubled or (fails and site == "swap read")
        return problem if fails else 0

    def device_knows(self, run: PageRun) -> Steps:
        """Have the device store to pages, to be run before the actors."""
        self.machine.start("device", self.device(run, self.cells.fresh()))
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
        self.serve(f"{who}: device reads", self.device(run, None, at_once=True))

    def device_stores(self, who: str, run: PageRun) -> None:
        """Have the device store to pages."""
        self.serve(f"{who}: device stores", self.device(run, self.cells.fresh(), at_once=True))

    def serve(self, name: str, procedure: Procedure[Any]) -> None:
        """Have the server do something, which must end unless it is killed."""
        self._devices.append(self.world.adopt(self.machine.start(name, procedure)))

    def is_killed(self) -> Steps:
        """Kill the server at some time."""
        yield Work("kills the server")
        self.world.excuse(*(task for task in self._devices if not task.ended))
        self._devices.clear()
        self.take_over()

    def is_killed_twice(self) -> Steps:
        """Kill the server at some time, and its successor, too, perhaps while it recovers."""
        yield from self.is_killed()
        yield from self.is_killed()

    def drops_translations(self) -> Steps:
        """MADV_DONTNEED of a process: its page table, not the pages."""
        self.machine.drop_mapping(1, _ALL)
        yield Work("has dropped its translations")


Actor = Callable[[Arena, str], object]

ACTORS: dict[str, Actor] = {
    "read": lambda a, who: a.cpu_reads(who, 1),
    "map": lambda a, who: a.cpu_reads(who, 0),
    "store": lambda a, who: a.cpu_stores(who, 1, 2),
    "clean_store": lambda a, who: a.cpu_stores(who, 1, 0),
    "first_store": lambda a, who: a.cpu_stores(who, 2, 3),
    "device_read": lambda a, who: a.device_reads(who, PageRun(0, 2)),
    "device_store": lambda a, who: a.device_stores(who, PageRun(0, 2)),
    "evict": lambda a, who: a.serve(f"{who}: evict", a.pager.give_back(3)),
    "prefetch": lambda a, who: a.serve(f"{who}: prefetch", a.pager.prefetch(PageRun(1, 3), write=False)),
    "discard": lambda a, who: a.serve(f"{who}: discard", a.discard(PageRun(0, 3))),
    "remove": lambda a, who: a.world.spawn(f"{who}: madvise", a.remove(PageRun(0, 3), mapper=2)),
    "dontneed": lambda a, who: a.world.spawn(f"{who}: madvise", a.drops_translations()),
    "takeover": lambda a, who: a.world.spawn(f"{who}: takeover", a.is_killed()),
    "takeovers": lambda a, who: a.world.spawn(f"{who}: takeovers", a.is_killed_twice()),
}


def _pair(one: str, other: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        arena = Arena(world)
        ACTORS[one](arena, "a")
        ACTORS[other](arena, "b")
        world.at_end(lambda: _must_be_there(arena))

    return build


def _must_be_there(arena: Arena) -> None:
    if not arena.troubled and (arena.lost or arena.n_killed or arena.refused):
        killed = f"{arena.n_killed} accesses of processes and {sum(arena.refused.values())} of devices are refused"
        violate("lost_write", f"pages {sorted(arena.lost)} are lost, {killed}, and the medium is good")


for _one, _other in combinations_with_replacement(ACTORS, 2):
    if _one.startswith("takeover") and _other == "takeovers":
        continue  # nothing is done in between
    add(f"arena_{_one}_vs_{_other}", _pair(_one, _other), f"managed memory: {_one} while {_other}")


@scenario("arena_bad_medium")
def arena_bad_medium(world: World) -> None:
    """A copy in swap is damaged while a process and a device want it: an error, and never wrong bytes."""
    arena = Arena(world, PagerSettings(compress=False))
    arena.machine.swap[int(arena.table.units[1]) * UNIT_BYTES] ^= 0x10
    arena.cpu_reads("a", 1)
    arena.device_reads("b", PageRun(1, 1))
    world.at_end(lambda: _must_be_lost(arena))


def _must_be_lost(arena: Arena) -> None:
    if not arena.troubled and (arena.lost != {1} or not arena.n_killed):
        violate("wrong_bytes", f"page 1 is damaged; lost are {sorted(arena.lost)}, killed {arena.n_killed} accesses")


class Keeper(Subscriber):
    """A device that refuses, once, to let go of a page it uses."""

    def __init__(self, arena: Arena, page: int) -> None:
        self._arena = arena
        self._page = page
        self._refused: Invalidation | None = None
        arena.notifiers.subscribe(Range(page, page + 1), self, veto_limit=1)

    def invalidate_start(self, event: Invalidation) -> Answer:
        """See `Subscriber`."""
        if not event.may_veto:
            return None
        self._refused = event
        return Veto([Range(self._page, self._page + 1)])

    def invalidate_end(self, event: Invalidation) -> None:
        """See `Subscriber`."""
        refused = self._refused is not None and self._refused.generation == event.generation
        if refused and not self._arena.machine.present[self._page]:
            violate("stale_access", f"a device uses page {self._page}, which it refused to give, and it is gone")


@scenario("arena_evict_vs_refusal")
def arena_evict_vs_refusal(world: World) -> None:
    """A device refuses to let go of a page that is being evicted while a process stores to it."""
    arena = Arena(world)
    Keeper(arena, 2)
    ACTORS["evict"](arena, "a")
    ACTORS["store"](arena, "b")


@scenario("arena_device_store_after_remove")
def arena_device_store_after_remove(world: World) -> None:
    """A program gives pages up, and has the device store there when madvise has returned; one page is on its way in."""
    arena = Arena(world)
    world.prepare(arena.device_knows(PageRun(0, 1)))
    value = arena.cells.fresh()

    def program() -> Steps:
        yield from arena.remove(PageRun(0, 3), mapper=2)
        arena.serve("a: device stores", arena.device(PageRun(0, 1), value))

    world.spawn("a: program", program())
    ACTORS["read"](arena, "b")


@scenario("arena_store_after_remove_vs_read")
def arena_store_after_remove_vs_read(world: World) -> None:
    """A program gives pages up, and stores there when madvise has returned; another thread of it reads there."""
    arena = Arena(world)

    def program() -> Steps:
        yield from arena.remove(PageRun(0, 3), mapper=2)
        arena.cpu_stores("a", 2, 1)

    world.spawn("a: program", program())
    ACTORS["read"](arena, "b")


@scenario("arena_remove_vs_takeovers_and_evict")
def arena_remove_vs_takeovers_and_evict(world: World) -> None:
    """A program gives pages up, two servers are killed, and the third evicts before the kernel has dropped them."""
    arena = Arena(world)

    def takes_over() -> Steps:
        yield from arena.is_killed_twice()
        ACTORS["evict"](arena, "b")

    ACTORS["remove"](arena, "a")
    world.spawn("b: takeovers", takes_over())


@scenario("arena_store_after_remove_vs_takeover")
def arena_store_after_remove_vs_takeover(world: World) -> None:
    """A program gives pages up and stores there when madvise has returned; its server is killed at some time."""
    arena = Arena(world)

    def program() -> Steps:
        yield from arena.remove(PageRun(0, 3))
        arena.cpu_stores("a", 1, 1)

    world.spawn("a: program", program())
    ACTORS["takeover"](arena, "b")
