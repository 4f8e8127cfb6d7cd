"""mprotect: rights that are raised show at the next fault, rights that are lowered are taken back here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.errors import Segv
from nopin.model.host.mapping import bytes_of, pages_of
from nopin.model.host.table import Entry, Exclusive, Moving, Present, Private, Shut, Swapped
from nopin.model.host.vma import Prot
from nopin.ranges import Range, coalesce

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def mprotect(process: Process, va: int, n_bytes: int, prot: Prot) -> Procedure[None]:
    """Change the rights of a range that is mapped everywhere. Requires: the mmap lock, alone."""
    first, end = pages_of(va, n_bytes)
    if not process.vmas.covers(first, end):
        raise Segv(f"{process}: mprotect of {bytes_of(first, end)}: some of it is not mapped")
    pieces = process.vmas.remove(first, end)
    for vma in pieces:
        process.vmas.insert(replace(vma, prot=prot))
    lowered = [Range(vma.first, vma.end) for vma in pieces if vma.prot & ~prot]
    if lowered:
        yield from _lower(process, coalesce(lowered), prot)
    process.host.observer.protected(process, bytes_of(first, end), read=prot != Prot.NONE, write=Prot.WRITE in prot)


def _lower(process: Process, ranges: list[Range], prot: Prot) -> Procedure[None]:
    """Take rights back.

    PROTECT lets devices go on reading, so taking away all rights is announced as UNMAP: nothing of the range is
    reachable any more, whatever its pages do.
    """
    bracket = process.begin(ranges, Cause.UNMAP if prot == Prot.NONE else Cause.PROTECT)
    yield process.host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    n = 0
    for where in ranges:
        process.table.split_edges(where.start, where.end)
        for number, entry in process.table.entries(where.start, where.end):
            process.table.lower(number, lowered(entry, shut=prot == Prot.NONE))
            n += 1
            if n % process.host.pages_per_step == 0:
                yield process.host.steps.clear
    yield process.host.steps.flush
    bracket.end()


def lowered(entry: Entry, *, shut: bool = False) -> Entry:
    """Return the entry without the right to write, or (`shut`) without any."""
    if isinstance(entry, Swapped | Shut):
        return entry
    if isinstance(entry, Moving):
        was = lowered(entry.was, shut=shut)
        assert not isinstance(was, Swapped | Moving), "what moves was in memory, and stays there"
        return Moving(entry.page, was)
    if shut:
        if isinstance(entry, Present) and entry.dirty:
            entry.page.dirty = True
        return Shut(entry.page)
    if isinstance(entry, Private):
        return Private(entry.page, entry.memory, writable=False)
    if isinstance(entry, Exclusive):
        return Present(entry.page, writable=False, dirty=True)
    return Present(entry.page, writable=False, young=entry.young, dirty=entry.dirty) if entry.writable else entry
