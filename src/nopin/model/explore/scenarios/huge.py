"""A huge page of 2 MiB: every two things that can happen to it at once, in full and to a part of it.

As in `host.py`, but the mapping is of 2 MiB that were brought at once, or have not been touched yet. Accesses go to the
border of its first two pages, as there. A step of the kernel goes over the whole table (a leaf, whose lock Linux has).
Afterwards what the table calls huge must be so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations_with_replacement

from nopin.model.explore.scenario import add
from nopin.model.explore.scenarios.host import ACTORS as OF_ANY_MEMORY
from nopin.model.explore.scenarios.host import BORDER, Machine, pair
from nopin.model.explore.world import Steps, World
from nopin.model.host.pool import RUN_FRAMES
from nopin.units import PAGE_BYTES, PAGE_SHIFT

N_FRAMES = 4 * RUN_FRAMES


class HugeMachine(Machine):
    """The machine described above.

    Args:
        empty: nothing has been brought yet.
    """

    def __init__(self, world: World, *, empty: bool = False) -> None:
        self._empty = empty
        super().__init__(world, n_frames=N_FRAMES, pages_per_step=RUN_FRAMES)

    def _map(self) -> Steps:
        self.va = yield from self.process.mmap(RUN_FRAMES, huge=True)

    def _prepare(self) -> Steps:
        if not self._empty:
            yield from super()._prepare()
            assert self.process.table.is_huge(self.va >> PAGE_SHIFT), "what is explored is not there"
            return
        yield from self._map()
        self.cold.attach(self.process)
        self.warm.attach(self.process)

    def collapses(self) -> Steps:
        """Have khugepaged make small pages a huge one again, after they have been split."""
        self.host.split_huge(self.process, self.va >> PAGE_SHIFT)
        yield from self.host.collapse_huge(self.process, self.va >> PAGE_SHIFT)


Actor = Callable[[HugeMachine, bytes], Steps]

SAME = (
    "fault",
    "write_fault",
    "access",
    "write_access",
    "store",
    "munmap",
    "discard",
    "fork_exit",
    "reclaim",
    "migrate",
)
ACTORS: dict[str, Actor] = {
    **{name: OF_ANY_MEMORY[name] for name in (*SAME, "protect", "exit")},
    "collapse": lambda m, _: m.collapses(),
}

BRINGING: dict[str, Actor] = {
    "store": OF_ANY_MEMORY["store"],
    "write": OF_ANY_MEMORY["write_fault"],
    "read": OF_ANY_MEMORY["fault"],
    "store_elsewhere": lambda m, data: m.stores(m.process, m.va + BORDER + 8 * PAGE_BYTES, data),
}


for _one, _other in combinations_with_replacement(ACTORS, 2):
    add(f"huge_{_one}_vs_{_other}", pair(HugeMachine, ACTORS, _one, _other), f"a huge page: {_one} while {_other}")
for _one, _other in combinations_with_replacement(BRINGING, 2):
    _about = f"2 MiB that have not been touched: {_one} while {_other}"
    add(f"huge_first_{_one}_vs_{_other}", pair(partial(HugeMachine, empty=True), BRINGING, _one, _other), _about)
