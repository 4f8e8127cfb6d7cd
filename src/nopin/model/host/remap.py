"""mremap: a mapping grows, shrinks or moves, and its pages with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.errors import NotSupported, Segv
from nopin.model.host.mapping import LOWEST_PAGE, bytes_of, pages_of, unmap
from nopin.ranges import Range
from nopin.units import PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def mremap(process: Process, va: int, n_bytes: int, new_n_bytes: int, to: int | None) -> Procedure[int]:
    """Return the new address. Requires: the mmap lock, alone."""
    first, end = pages_of(va, n_bytes)
    n = pages_of(va, new_n_bytes)[1] - first
    vma = process.vmas.find(first)
    if vma is None or vma.end < end:
        raise Segv(f"{process}: mremap of {bytes_of(first, end)}: not within one mapping")
    if to is not None and (to & PAGE_MASK or (to >> PAGE_SHIFT < end and first < (to >> PAGE_SHIFT) + n)):
        raise NotSupported(f"mremap of {bytes_of(first, end)} to {to:#x}: not a page, or it overlaps")
    if n < end - first:
        yield from unmap(process, first + n, end)
        end = first + n
    if to is None and n == end - first:
        return va
    if to is None and vma.end == end and not process.vmas.overlapping(end, first + n):
        _grow(process, end, first + n)
        return va
    if to is None:
        target = process.vmas.gap(n, LOWEST_PAGE)
    else:
        target = to >> PAGE_SHIFT
        yield from unmap(process, target, target + n)
    yield from _move(process, first, end, target)
    if n > end - first:
        _grow(process, target + end - first, target + n)
    return target << PAGE_SHIFT


def _grow(process: Process, end: int, new_end: int) -> None:
    """Lengthen the mapping that ends at `end`. Requires: nothing is mapped there."""
    vma = process.vmas.find(end - 1)
    assert vma is not None
    process.vmas.remove(vma.first, vma.end)
    process.vmas.insert(replace(vma, end=new_end))
    process.host.observer.mapped(process, bytes_of(end, new_end))


def _move(process: Process, first: int, end: int, target: int) -> Procedure[None]:
    """Move a piece of a mapping to where nothing is mapped (move_page_tables)."""
    host, n = process.host, end - first
    source_bytes, target_bytes = bytes_of(first, end), bytes_of(target, target + n)
    host.observer.move_begins(process, source_bytes, target_bytes)
    bracket = process.begin([Range(first, end)], Cause.REMAP)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    [vma] = process.vmas.remove(first, end)
    process.vmas.insert(replace(vma, first=target, end=target + n))
    for n_moved, (number, _) in enumerate(process.table.entries(first, end), 1):
        process.move(number, number - first + target)
        if n_moved % host.pages_per_step == 0:
            yield host.steps.clear
    yield host.steps.flush
    bracket.end()
    host.observer.move_ends(process, source_bytes, target_bytes)
