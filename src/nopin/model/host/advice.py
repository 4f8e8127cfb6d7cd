"""madvise: what a process says about the use of its memory."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure
from nopin.model.host.errors import NotSupported, Segv
from nopin.model.host.fault import resolve
from nopin.model.host.file_changes import punch
from nopin.model.host.files import cached
from nopin.model.host.lazyfree import give_up
from nopin.model.host.mapping import bytes_of, pages_of, zap
from nopin.model.host.reclaim import make_cold, pageout
from nopin.model.host.table import Swapped
from nopin.model.host.vma import Vma
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.process import Process


class Advice(Enum):
    """Kinds of advice, those of madvise(2)."""

    DONTNEED = "dontneed"
    """Drop the pages: zeros, or the file's bytes, take their place."""
    REMOVE = "remove"
    """Of a shared mapping: punch the range out of the file, for all who map it."""
    FREE = "free"
    """Pages may be dropped until they are written again."""
    COLD = "cold"
    """Reclaim may take the pages first."""
    PAGEOUT = "pageout"
    """Have the pages leave memory now, those that nobody else maps."""
    WILLNEED = "willneed"
    """Read the pages from their medium."""
    POPULATE_READ = "populate_read"
    """Bring the pages, as loads would."""
    POPULATE_WRITE = "populate_write"
    """Bring the pages, as stores would, without storing."""
    DONTFORK = "dontfork"
    """A child does not have the range at all; DOFORK takes it back."""
    DOFORK = "dofork"
    WIPEONFORK = "wipeonfork"
    """A child has zeros there; KEEPONFORK takes it back."""
    KEEPONFORK = "keeponfork"
    MERGEABLE = "mergeable"
    """Pages may be merged with others of the same bytes."""
    UNMERGEABLE = "unmergeable"
    HUGEPAGE = "hugepage"
    """Whole 2 MiB may be brought at once."""
    NOHUGEPAGE = "nohugepage"


SHARED = frozenset(
    {
        Advice.DONTNEED,
        Advice.REMOVE,
        Advice.FREE,
        Advice.COLD,
        Advice.PAGEOUT,
        Advice.WILLNEED,
        Advice.POPULATE_READ,
        Advice.POPULATE_WRITE,
    }
)
"""Advice that changes pages, not mappings: others may fault meanwhile."""

_CHANGES: dict[Advice, dict[str, Any]] = {
    Advice.DONTFORK: {"fork": "omit"},
    Advice.DOFORK: {"fork": "copy"},
    Advice.WIPEONFORK: {"fork": "wipe"},
    Advice.KEEPONFORK: {"fork": "copy"},
    Advice.MERGEABLE: {"mergeable": True},
    Advice.UNMERGEABLE: {"mergeable": False},
    Advice.HUGEPAGE: {"huge": True},
    Advice.NOHUGEPAGE: {"huge": False},
}


def apply(process: Process, va: int, n_bytes: int, advice: Advice) -> Procedure[None]:
    """Follow a piece of advice. Requires: the mmap lock, shared if it is one of `SHARED`, else alone."""
    first, end = pages_of(va, n_bytes)
    if not process.vmas.covers(first, end):
        raise Segv(f"{process}: {advice.name} of {bytes_of(first, end)}: some of it is not mapped")
    if advice in _CHANGES:
        for vma in process.vmas.remove(first, end):
            process.vmas.insert(replace(vma, **_CHANGES[advice]))
        return
    for vma in process.vmas.overlapping(first, end):
        yield from _FOLLOW[advice](process, vma.cut(first, end))


def _drop(process: Process, vma: Vma) -> Procedure[None]:
    where = bytes_of(vma.first, vma.end)
    process.host.observer.discard_begins(process, where)
    yield from zap(process, [Range(vma.first, vma.end)], Cause.REMOVE)
    process.host.observer.discard_ends(process, where)


def _remove(process: Process, vma: Vma) -> Procedure[None]:
    if vma.file is None or not vma.shared:
        raise NotSupported(f"{process}: REMOVE of {bytes_of(vma.first, vma.end)}: not a shared mapping of a file")
    yield from punch(process.host, vma.file, vma.offset, vma.index(vma.end))


def _cool(process: Process, vma: Vma) -> Procedure[None]:
    make_cold(process, vma.first, vma.end)
    yield process.host.steps.clear


def _page_out(process: Process, vma: Vma) -> Procedure[None]:
    yield from pageout(process, vma.first, vma.end)


def _read_ahead(process: Process, vma: Vma) -> Procedure[None]:
    host = process.host
    for number, entry in process.table.entries(vma.first, vma.end):
        if isinstance(entry, Swapped):
            yield from resolve(process, number, write=False)
    if vma.file is not None:
        for index in range(vma.offset, vma.index(vma.end)):
            if vma.file.has(index) and index not in vma.file.cache:
                page = yield from cached(host, vma.file, index)
                host.unlock(page)
                host.put_page(page)


def _populate_read(process: Process, vma: Vma) -> Procedure[None]:
    for number in range(vma.first, vma.end):
        yield from resolve(process, number, write=False)


def _populate_write(process: Process, vma: Vma) -> Procedure[None]:
    for number in range(vma.first, vma.end):
        yield from resolve(process, number, write=True)


_FOLLOW: dict[Advice, Callable[[Process, Vma], Procedure[None]]] = {
    Advice.DONTNEED: _drop,
    Advice.REMOVE: _remove,
    Advice.FREE: give_up,
    Advice.COLD: _cool,
    Advice.PAGEOUT: _page_out,
    Advice.WILLNEED: _read_ahead,
    Advice.POPULATE_READ: _populate_read,
    Advice.POPULATE_WRITE: _populate_write,
}
