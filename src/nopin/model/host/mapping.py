"""mmap and munmap, and the taking away of pages that all who unmap and discard have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.errors import NotSupported
from nopin.model.host.files import File
from nopin.model.host.table import Entry
from nopin.model.host.vma import Prot, Vma
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT, page_ceil

if TYPE_CHECKING:
    from nopin.model.host.process import Process

LOWEST_PAGE = 0x10000
"""Where mappings begin: 256 MiB, so that small numbers are never addresses."""

HUGE_PAGES = 512


def mmap(
    process: Process,
    n_pages: int,
    *,
    prot: Prot,
    shared: bool,
    file: File | None,
    offset: int,
    at: int | None,
    huge: bool,
) -> Procedure[int]:
    """Map memory; returns its address. Requires: the mmap lock, alone."""
    if n_pages <= 0 or (at is not None and at & PAGE_MASK):
        raise NotSupported(f"mmap of {n_pages} pages at {at}: whole pages, at least one")
    if at is None:
        first = process.vmas.gap(n_pages, LOWEST_PAGE, align=HUGE_PAGES if huge else 1)
    else:
        first = at >> PAGE_SHIFT
        yield from unmap(process, first, first + n_pages)
    if shared and file is None:
        file = process.host.new_file("", n_pages * PAGE_BYTES)
    process.vmas.insert(Vma(first, first + n_pages, prot, shared, file, offset, huge))
    where = bytes_of(first, first + n_pages)
    if file is None:
        process.host.observer.mapped(process, where)
    else:
        process.host.observer.file_mapped(process, where, file, offset, shared=shared)
    return first << PAGE_SHIFT


def munmap(process: Process, va: int, n_bytes: int) -> Procedure[None]:
    """Unmap whole pages. Requires: the mmap lock, alone."""
    first, end = pages_of(va, n_bytes)
    yield from unmap(process, first, end)


def unmap(process: Process, first: int, end: int) -> Procedure[None]:
    """Take mappings away. Requires: the mmap lock, alone."""
    taken = process.vmas.remove(first, end)
    if not taken:
        return
    process.host.note_unmapped(taken)
    observer = process.host.observer
    for vma in taken:
        observer.unmap_begins(process, bytes_of(vma.first, vma.end))
    yield from zap(process, [Range(vma.first, vma.end) for vma in taken], Cause.UNMAP)
    for vma in taken:
        observer.unmap_ends(process, bytes_of(vma.first, vma.end))


def zap(
    process: Process, ranges: Sequence[Range], cause: Cause, *, only: Callable[[int], bool] | None = None
) -> Procedure[None]:
    """Take pages away for good, with those who hold translations told before, and the frames freed after.

    Args:
        only: asked for each page in the step in which it would go; for who does not hold the mmap lock, and so may
            find something else there than it announced. None: all go.
    """
    bracket = process.begin(ranges, cause)
    yield process.host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    gone: list[Entry] = []
    for where in ranges:
        yield from _clear(process, where.start, where.end, gone, only)
    yield process.host.steps.flush
    bracket.end()
    yield process.host.steps.free
    for entry in gone:
        process.host.let_go(entry)


def free_range(process: Process, first: int, end: int) -> Procedure[None]:
    """Take pages away of an address space that nobody watches any more."""
    gone: list[Entry] = []
    yield from _clear(process, first, end, gone)
    yield process.host.steps.flush
    for entry in gone:
        process.host.let_go(entry)


def _clear(
    process: Process, first: int, end: int, gone: list[Entry], only: Callable[[int], bool] | None = None
) -> Procedure[None]:
    for number, _ in process.table.entries(first, end):
        if only is not None and not only(number):
            continue
        entry = process.take_out(number)
        assert entry is not None
        gone.append(entry)
        if len(gone) % process.host.pages_per_step == 0:
            yield process.host.steps.clear


def pages_of(va: int, n_bytes: int) -> tuple[int, int]:
    """Return the pages [first, end) of a range of bytes that begins at a page.

    Raises:
        NotSupported: it does not, or is empty.
    """
    if va & PAGE_MASK or n_bytes <= 0:
        raise NotSupported(f"{n_bytes} bytes at {va:#x}: not whole pages, or none")
    return va >> PAGE_SHIFT, page_ceil(va + n_bytes) >> PAGE_SHIFT


def bytes_of(first: int, end: int) -> Range:
    """Return the addresses of pages [first, end)."""
    return Range(first * PAGE_BYTES, end * PAGE_BYTES)
