"""A file that two processes have mapped: every two things that can happen to it at once.

As in `host.py`, but the three pages are a file's, and a second process sees them, too; or the first has them privately,
and copies what it writes. Afterwards the pages are reclaimed before they are read, so that what was not written back is
missed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

from nopin.model.explore.scenario import add
from nopin.model.explore.scenarios.host import ACTORS as OF_ANY_MEMORY
from nopin.model.explore.scenarios.host import BORDER, N_PAGES, Machine, pair
from nopin.model.explore.world import Steps
from nopin.model.host.advice import Advice
from nopin.model.host.files import File
from nopin.model.oracle.memory import WORD_BYTES
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


class PrivateMachine(FileMachine):
    """The same, but the process has mapped the file privately, and has not written to it; the second one writes it."""

    def _map(self) -> Steps:
        self.file = self.host.new_file("file", N_PAGES * PAGE_BYTES)
        self.other = self.host.spawn_process()
        self.va = yield from self.process.mmap(N_PAGES, file=self.file)
        yield from self.other.mmap(N_PAGES, shared=True, file=self.file)

    def _prepare(self) -> Steps:
        yield from self._map()
        yield from self.other.store(self.va + BORDER, self.fresh(2))
        yield from self.other.store(self.va, self.fresh())
        self.cold.attach(self.process)
        yield from self.warm.read(self.process, self.va + BORDER, PAGE_BYTES + 2 * WORD_BYTES)


Actor = Callable[[FileMachine, bytes], Steps]

ACTORS: dict[str, Actor] = {
    **{name: OF_ANY_MEMORY[name] for name in ("fault", "write_fault", "access", "write_access", "munmap", "exit")},
    "store": lambda m, data: m.stores(m.other, m.va + BORDER, data),
    "writeback": lambda m, _: m.host.writeback(m.file),
    "truncate": lambda m, _: m.host.truncate(m.file, PAGE_BYTES),
    "punch": lambda m, _: m.punches(),
    "reclaim": lambda m, _: m.host.reclaim(2),
}


PRIVATE: dict[str, Actor] = {
    **{name: OF_ANY_MEMORY[name] for name in ("fault", "write_fault", "access", "write_access", "load", "store")},
    **{name: OF_ANY_MEMORY[name] for name in ("first_store", "munmap", "fork", "protect", "exit", "atomic")},
    "their_store": ACTORS["store"],
    "truncate": ACTORS["truncate"],
    "punch": lambda m, _: m.host.punch(m.file, 0, 2),
    "reclaim": ACTORS["reclaim"],
}


for _one, _other in combinations_with_replacement(ACTORS, 2):
    _about = f"a file that two processes have mapped: {_one} while {_other}"
    add(f"file_{_one}_vs_{_other}", pair(FileMachine, ACTORS, _one, _other), _about)
for _one, _other in combinations_with_replacement(PRIVATE, 2):
    _about = f"a file that one process has mapped privately, and another shared: {_one} while {_other}"
    add(f"private_{_one}_vs_{_other}", pair(PrivateMachine, PRIVATE, _one, _other), _about)
