"""A modelled process: its address space, and the system calls and accesses it makes.

All procedures are to be yielded from within a task (`yield from process.store(va, data)`), or spawned. A process may
have many at a time: they are its threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from nopin.mm.causes import Cause
from nopin.mm.notifier import Bracket, Notifiers
from nopin.model.effects import Acquire, Lock, Procedure, Release
from nopin.model.host import access, life, mapping, protect, remap
from nopin.model.host.advice import SHARED, Advice, apply
from nopin.model.host.errors import Killed, ModelFault
from nopin.model.host.exclusive import make_exclusive
from nopin.model.host.files import File
from nopin.model.host.fork import fork
from nopin.model.host.page import Page
from nopin.model.host.pins import Pin, pin, unpin
from nopin.model.host.table import Entry, Moving, Present, Swapped, Table
from nopin.model.host.vma import RW, Prot, Vmas
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.host import Host

T = TypeVar("T")


class Process:
    """See above.

    Attributes:
        pid: unique on its host, from 1. name: the same in words.
        vmas, table: its mappings, and where their pages are.
        notifiers: of this address space, in page numbers (va >> 12).
        mmap_lock: see `host.py`. share_mmap_lock, own_mmap_lock, release_mmap_lock: the effects, made once.
        alive: False once it exits or is killed.
        memlock_limit_bytes: how much may be pinned; None: any amount.
        pinned: its pinned pages, each once however often it is pinned, with how often that is.
    """

    def __init__(self, pid: int, host: Host) -> None:
        self.pid = pid
        self.name = f"process {pid}"
        self.host = host
        self.vmas = Vmas()
        self.table = Table()
        self.notifiers = Notifiers()
        self.mmap_lock = Lock(f"mmap {pid}")
        self.share_mmap_lock = Acquire(self.mmap_lock, shared=True)
        self.own_mmap_lock = Acquire(self.mmap_lock)
        self.release_mmap_lock = Release(self.mmap_lock)
        self.alive = True
        self.memlock_limit_bytes: int | None = None
        self.pinned: dict[Page, int] = {}

    def __str__(self) -> str:
        return f"{self.name} of {self.host.name}"

    # System calls

    def mmap(
        self,
        n_pages: int,
        *,
        prot: Prot = RW,
        shared: bool = False,
        file: File | None = None,
        offset: int = 0,
        at: int | None = None,
        huge: bool = False,
    ) -> Procedure[int]:
        """Map memory; returns its address.

        Args:
            shared: what is stored, others see who map the same: the file, or, without one, children of this process.
            file: what is mapped, from its page `offset` on; it may be shorter, and grow later. None: zeros.
            at: where; what was mapped there is unmapped (MAP_FIXED). None: in the lowest gap.
            huge: 2 MiB may be brought at once.
        """
        body = mapping.mmap(self, n_pages, prot=prot, shared=shared, file=file, offset=offset, at=at, huge=huge)
        return self._call(body)

    def munmap(self, va: int, n_bytes: int) -> Procedure[None]:
        """Unmap whole pages; holes are fine."""
        return self._call(mapping.munmap(self, va, n_bytes))

    def mprotect(self, va: int, n_bytes: int, prot: Prot) -> Procedure[None]:
        """Change the rights of whole pages. Raises `Segv` if some are not mapped; nothing is changed then."""
        return self._call(protect.mprotect(self, va, n_bytes, prot))

    def mremap(self, va: int, n_bytes: int, new_n_bytes: int, *, to: int | None = None) -> Procedure[int]:
        """Grow, shrink or move a mapping; returns where it is. What was mapped at `to` is unmapped.

        Without `to` it moves only if it grows and something is in the way.
        """
        return self._call(remap.mremap(self, va, n_bytes, new_n_bytes, to))

    def madvise(self, va: int, n_bytes: int, advice: Advice) -> Procedure[None]:
        """Say what whole pages will be used for. Raises `Segv` if some are not mapped; nothing is changed then."""
        return self._call(apply(self, va, n_bytes, advice), shared=advice in SHARED)

    def fork(self) -> Procedure[Process]:
        """Make a child with a copy of the memory. Raises `NoMemory` if a pinned page cannot be copied."""
        return self._call(fork(self))

    def pin(self, va: int, n_bytes: int, *, write: bool) -> Procedure[Pin]:
        """Bring pages and hold them where they are, until `unpin`, whatever becomes of the mapping.

        Raises:
            OverMemlock: it would lock more than `memlock_limit_bytes`; `Segv`, `Bus`, `NoMemory`: as an access.
                Nothing is pinned then.
        """
        return self._call(pin(self, va, n_bytes, write=write), shared=True)

    def unpin(self, held: Pin) -> None:
        """Let go of what `pin` held. Once; also after the process has exited."""
        unpin(held)

    def make_exclusive(self, number: int, owner: object) -> Procedure[None]:
        """Give a page to one device for atomics; `exclusive.lookup_exclusive` tells whether it has it.

        Raises `NotSupported`, and what a store there raises.
        """
        return self._call(make_exclusive(self, number, owner), shared=True)

    def exit(self) -> Procedure[None]:
        """End, or be killed, at any point of whatever else the process does. Twice is fine."""
        return life.exit(self)

    # Accesses

    load = access.load
    store = access.store

    # What the memory management does to it

    def _call(self, procedure: Procedure[T], *, shared: bool = False) -> Procedure[T]:
        """Run the body of a system call under the mmap lock, unless the process has been killed."""
        yield self.host.steps.syscall
        yield self.share_mmap_lock if shared else self.own_mmap_lock
        try:
            self.check_alive()
            result = yield from procedure
        except ModelFault:
            yield self.release_mmap_lock
            raise
        yield self.release_mmap_lock
        yield from self.host.end_shared_memory()
        return result

    def check_alive(self) -> None:
        """Raise `Killed` once it is not."""
        if not self.alive:
            raise Killed(f"{self} has been killed")

    def begin(self, ranges: Iterable[Range], cause: Cause, *, owner: object = None) -> Bracket:
        """Tell the notifiers of a change (page numbers), and note in the table at once what devices wrote.

        At once, because in the next step the entry may be another's.
        """
        bracket = self.notifiers.invalidate_start(ranges, cause, owner=owner)
        for page in sorted(bracket.harvest.dirty):
            entry = self.table.get(page)
            if isinstance(entry, Present):
                entry.dirty = True
            elif entry is not None and not isinstance(entry, Swapped):
                entry.page.dirty = True
        return bracket

    def map(self, number: int, page: Page, *, writable: bool, dirty: bool = False) -> None:
        """Enter a page, for which the caller gives up one reference. Requires: the entry is absent or `Swapped`."""
        if page is not self.host.zero_page:
            page.mappings[self.pid, number] = None
        self.table.set(number, Present(page, writable, dirty=dirty))

    def take_out(self, number: int) -> Entry | None:
        """Clear an entry, and note whether the page was written; the caller then has what it held (`Host.let_go`)."""
        entry = self.table.clear(number)
        if entry is None or isinstance(entry, Swapped):
            return entry
        was = entry.was if isinstance(entry, Moving) else entry
        if isinstance(was, Present) and was.dirty:
            entry.page.dirty = True
        entry.page.mappings.pop((self.pid, number), None)
        return entry

    def move(self, number: int, to: int) -> None:
        """Move an entry to where none is."""
        entry = self.table.clear(number)
        assert entry is not None
        if not isinstance(entry, Swapped) and (self.pid, number) in entry.page.mappings:
            del entry.page.mappings[self.pid, number]
            entry.page.mappings[self.pid, to] = None
        self.table.set(to, entry)
