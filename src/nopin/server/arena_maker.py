"""What a new arena consists of: its two files, the server's mapping, a swap file, budget, notifiers and pager.

Budgets form a tree: the server's, under it one of each client, under it those of its arenas. An arena that needs room
which others of its tree hold asks them to give back (`Pressure`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from nopin.errors import UsageError
from nopin.iommu.mirror import Mirror
from nopin.iommu.windows import DeviceArena
from nopin.linux import memfd
from nopin.linux.fd_store import FdStore
from nopin.linux.swap_file import SwapFile
from nopin.mm.arena_pages import News, PagerSettings
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import PageTable
from nopin.mm.pager import Pager
from nopin.mm.residency import Budget
from nopin.mm.swap import SwapSpace
from nopin.server.arena_machine import ServerMapping
from nopin.server.arena_pager import ArenaPager
from nopin.server.arena_store import VERSION, ArenaEntry, ArenaStore
from nopin.server.config import ServeConfig
from nopin.units import PAGE_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The arenas of one client, which have a budget in common.

    Attributes:
        number: names it to a successor.
    """

    number: int
    budget: Budget


@dataclass(slots=True)
class ArenaParts:
    """What an arena is made of; it owns them.

    Attributes:
        entry: what the store says of it.
        table_fd: the file of the page table.
        news: what its pager has to tell; the arena sets it.
        store: what a successor finds.
        device: the arena as the NIC reaches it: a mirror, and the server's mapping.
    """

    entry: ArenaEntry
    family: Family
    frames: ServerMapping
    table_fd: int
    swap: SwapFile
    budget: Budget
    notifiers: Notifiers
    pager: ArenaPager
    news: News
    device: DeviceArena
    store: ArenaStore

    def join(self, family: Family) -> None:
        """Be of another family."""
        if family is not self.family:
            self.family = family
            self.budget.move_to(family.budget)
            self.remember_budgets(self.entry.budget_pages)

    def remember_budgets(self, own_pages: int | None) -> None:
        """Have a successor know what may be resident: of this arena (None: what its family has), and of its family."""
        pages = self.family.budget.n_pages
        self.entry = msgspec.structs.replace(
            self.entry, budget_pages=own_pages, family=self.family.number, family_pages=pages
        )
        self.store.put_arena(self.entry, self.frames.fd, self.table_fd, self.swap.fileno())

    def close(self) -> None:
        """Tell who holds translations that it is over, and let go of everything."""
        self.notifiers.release()
        self.budget.charge(-self.budget.n_used)
        self.swap.close()
        self.frames.close()
        os.close(self.frames.fd)
        self.store.close()
        os.close(self.table_fd)


@dataclass(slots=True)
class ArenaMaker:
    """Makes the parts of arenas.

    Attributes:
        swap_dir, settings, push_mappings: of every arena.
        budget: of all arenas together.
    """

    swap_dir: Path
    settings: PagerSettings
    budget: Budget
    push_mappings: bool = False
    _left: dict[int, Family] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ServeConfig) -> ArenaMaker:
        """Make one by the server's settings."""
        settings = PagerSettings(compress=config.swap_compress, swap_limit_bytes=config.swap_limit_bytes)
        n_bytes = config.memory_bytes if config.memory_bytes is not None else _memory_bytes() // 2
        return cls(config.swap_dir, settings, Budget(max(1, n_bytes // PAGE_BYTES)), config.push_mappings)

    def new_family(self) -> Family:
        """Make the family of a new client; its budget at first is all there is."""
        return Family(secrets.randbits(63), Budget(self.budget.n_pages, self.budget))

    def family_left(self, entry: ArenaEntry) -> Family:
        """Return the family of an arena that a predecessor left: the same for all that were of one client."""
        family = self._left.get(entry.family)
        if family is None:
            pages = max(1, min(entry.family_pages, self.budget.n_pages))
            family = self._left[entry.family] = Family(entry.family, Budget(pages, self.budget))
        return family

    def make(self, name: str, n_pages: int, n_budget_pages: int | None, family: Family) -> ArenaParts:
        """Make the parts of an arena of `n_pages`, with a budget of its own, or none but its family's.

        Args:

        Raises:
            OSError, HostLacks: the host does not allow it; nothing is kept.
        """
        undo: list[Callable[[], None]] = []
        try:
            memory_fd = memfd.create("nopin-arena", n_pages * PAGE_BYTES)
            undo.append(lambda: os.close(memory_fd))
            table_fd = memfd.create("nopin-arena-table", PageTable.bytes_needed(n_pages))
            undo.append(lambda: os.close(table_fd))
            swap = SwapFile(self.swap_dir)
            undo.append(swap.close)
            store = ArenaStore(FdStore.create())
            undo.append(store.close)
            pages = family.budget.n_pages
            entry = ArenaEntry(VERSION, name, n_pages, n_budget_pages, family.number, pages)
            if not store.put_arena(entry, memory_fd, table_fd, swap.fileno()):
                raise OSError(errno.ENOBUFS, "no room for what a successor of this server would need")
            return self._assemble(entry, memory_fd, table_fd, swap, store, family)
        except BaseException:
            for each in reversed(undo):
                each()
            raise

    def adopt(self, entry: ArenaEntry, fds: list[int], store: ArenaStore) -> ArenaParts:
        """Put parts together around a predecessor's files: bytes, page table, swap. Owns them if it does not raise.

        Raises:
            OSError, HostLacks, UsageError: they are not what they should be.
        """
        memory_fd, table_fd, swap_fd = fds
        sizes = entry.n_pages * PAGE_BYTES, PageTable.bytes_needed(entry.n_pages)
        if entry.n_pages <= 0 or (os.fstat(memory_fd).st_size, os.fstat(table_fd).st_size) != sizes:
            raise UsageError("its files are of another size")
        if entry.budget_pages is not None and entry.budget_pages <= 0:
            raise UsageError(f"its budget is {entry.budget_pages} pages")
        if not all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK for fd in (memory_fd, table_fd)):
            raise UsageError("its files can be cut short, which would end whoever has them mapped")
        return self._assemble(entry, memory_fd, table_fd, SwapFile.adopt(swap_fd), store, self.family_left(entry))

    def _assemble(
        self, entry: ArenaEntry, memory_fd: int, table_fd: int, swap: SwapFile, store: ArenaStore, family: Family
    ) -> ArenaParts:
        n_pages, n_budget_pages = entry.n_pages, entry.budget_pages
        frames = ServerMapping(memory_fd, n_pages)
        table = PageTable(n_pages, memfd.map_array(table_fd))
        budget = Budget(n_pages if n_budget_pages is None else n_budget_pages, family.budget)
        notifiers, news = Notifiers(), News()
        space = SwapSpace(self.settings.swap_limit_bytes)
        pager = Pager(table, space, budget, notifiers, frames, self.settings, news)
        mirror = Mirror(notifiers, pager, n_pages, wants_updates=self.push_mappings)
        device = DeviceArena(mirror, frames.memory)
        return ArenaParts(entry, family, frames, table_fd, swap, budget, notifiers, pager, news, device, store)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
