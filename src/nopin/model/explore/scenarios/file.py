"""A file that two processes have mapped: every two things that can happen to it at once.

As in `host.py`, but the three pages are a file's, and a second process sees them, too. Afterwards its pages are
reclaimed before they are read, so that what was not written back is missed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

from nopin.model.explore.scenario import add
from nopin.model.explore.scenarios.host import ACTORS as OF_ANY_MEMORY
from nopin.model.explore.scenarios.host import BORDER, N_PAGES, Machine
from nopin.model.explore.world import Steps, World
from nopin.model.host.advice import Advice
from nopin.model.host.files import File
from nopin.units import PAGE_BYTES


class FileMachine(Machine):
    """The machine described above."""

    file: File

    def _map(self) -> Steps:
        self.file = self.host.new_file("file", N_PAGES * PAGE_BYTES)
        self.other = self.host.spawn_process()
        for process in (self.process, self.other):
            self.va = yield from process.mmap(N_PAGES, shared=True, file=self.file)

    def _read_everything(self) -> Steps:
        yield from self.host.reclaim(N_PAGES)  # so that what is read comes from the medium
        yield from super()._read_everything()

    def punches(self) -> Steps:
        """Make the first two pages zeros."""
        yield from self.process.madvise(self.va, 2 * PAGE_BYTES, Advice.REMOVE)


Actor = Callable[[FileMachine, bytes], Steps]

ACTORS: dict[str, Actor] = {
    **{name: OF_ANY_MEMORY[name] for name in ("fault", "write_fault", "access", "write_access", "munmap", "exit")},
    "store": lambda m, data: m.stores(m.other, m.va + BORDER, data),
    "writeback": lambda m, _: m.host.writeback(m.file),
    "truncate": lambda m, _: m.host.truncate(m.file, PAGE_BYTES),
    "punch": lambda m, _: m.punches(),
    "reclaim": lambda m, _: m.host.reclaim(2),
}


def _pair(one: str, other: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        machine = FileMachine(world)
        machine.act(f"a: {one}", ACTORS[one](machine, machine.fresh(2)))
        machine.act(f"b: {other}", ACTORS[other](machine, machine.fresh(2)))

    return build


for _one, _other in combinations_with_replacement(ACTORS, 2):
    add(
        f"file_{_one}_vs_{_other}", _pair(_one, _other), f"a file that two processes have mapped: {_one} while {_other}"
    )
