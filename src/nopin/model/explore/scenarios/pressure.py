"""Little memory: everything that can happen to a process's pages while another one fills what is left.

As in `host.py`, but there are few frames, and a second process wants most of them; the host reclaims in the background
when few are left, and whoever finds none reclaims for itself. In the end as many are free as the background promises.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.model.explore.scenario import add
from nopin.model.explore.scenarios.host import ACTORS, Machine
from nopin.model.explore.world import Steps, World
from nopin.model.oracle.violation import violate
from nopin.units import PAGE_BYTES

N_FRAMES = 8
LOW, HIGH = 3, 4
N_WANTED = 3


class SmallMachine(Machine):
    """The machine described above."""

    def __init__(self, world: World) -> None:
        super().__init__(world, n_frames=N_FRAMES)
        self.second = self.host.spawn_process()
        self.host.reclaim_in_background(LOW, HIGH)
        world.at_end(self._check_free)

    def fills(self) -> Steps:
        """Have the second process store to so many pages that few frames are left, and load them again."""
        va = yield from self.second.mmap(N_WANTED)
        for page in range(N_WANTED):
            yield from self.stores(self.second, va + page * PAGE_BYTES, self.fresh())
        for page in range(N_WANTED):
            yield from self.loads(self.second, va + page * PAGE_BYTES)

    def _check_free(self) -> None:
        n_free = self.host.frames.n_free
        if n_free < LOW and not self.oracle.trouble:
            violate("no_progress", f"{n_free} frames are free, nothing is under way, and {LOW} ought to be")


def _pair(actor: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        machine = SmallMachine(world)
        machine.act("a: pressure", machine.fills())
        machine.act(f"b: {actor}", ACTORS[actor](machine, machine.fresh(2)))

    return build


for _name in ACTORS:
    if _name not in ("dereg", "merge"):
        add(f"pressure_vs_{_name}", _pair(_name), f"a host with little memory: {_name} while another process fills it")
