"""Writing files back, making them shorter, and punching holes into them.

**No write is lost across a writeback.** Under the page's lock SYNC is told, so devices hand over their dirty bits and
start them anew; entries of processes lose the right to write, so that the next store is heard. Then the page is called
clean, and copied, in one step: whatever is stored later makes it dirty again, whoever stores it.

Source: clear_page_dirty_for_io, page_mkclean, truncate_pagecache of Linux.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Acquire, Procedure, Quiesce, Release
from nopin.model.host.files import File, cached, drop
from nopin.model.host.mapping import zap
from nopin.model.host.page import Page
from nopin.model.host.protect import lowered
from nopin.model.host.rmap import Places, places_of, ranges_of, unmap_everywhere
from nopin.model.host.table import Present
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT, page_ceil

if TYPE_CHECKING:
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process

BATCH = 32
"""Pages that are locked and written together."""


def writeback(host: Host, file: File) -> Procedure[int]:
    """Write what is dirty of a file to its medium (fsync); returns how many pages were written."""
    n_written = 0
    indices = sorted(file.cache)
    for at in range(0, len(indices), BATCH):
        pages = yield from _lock_all(host, file, indices[at : at + BATCH])
        yield from _make_clean(host, pages)
        n_written += yield from write_out(host, [page for page in pages if page.dirty])
        _unlock_all(host, pages)
    return n_written


def write_out(host: Host, pages: list[Page]) -> Procedure[int]:
    """Write pages of files in one request; returns how many were. Requires: they are locked."""
    if not pages:
        return 0
    copies = []
    for page in pages:
        page.dirty = False
        copies.append(host.frames.read(page.frame, 0, PAGE_BYTES))
    yield from host.file_medium.write(len(pages))
    if host.fires("file write"):
        for page in pages:
            page.dirty = True
        return 0
    for page, data in zip(pages, copies, strict=True):
        assert page.file is not None
        page.file.stored[page.index] = data
    return len(pages)


def _lock_all(host: Host, file: File, indices: Iterable[int]) -> Procedure[list[Page]]:
    """Lock the pages that are still cached, in order; the caller has a reference of each."""
    pages = []
    for index in indices:
        page = file.cache.get(index)
        if page is None:
            continue
        host.frames.get(page.frame)
        yield from host.lock(page)
        if page.file is file:
            pages.append(page)
        else:
            host.unlock(page)
            host.put_page(page)
    return pages


def _unlock_all(host: Host, pages: list[Page]) -> None:
    for page in pages:
        host.unlock(page)
        host.put_page(page)


def _make_clean(host: Host, pages: list[Page]) -> Procedure[None]:
    """Collect who wrote, and have the next store heard."""
    for process, places in places_of(host, pages).items():
        shared = {number: page for number, page in places.items() if _is_shared(process, number)}
        if shared:
            yield from _make_clean_in(process, shared)


def _is_shared(process: Process, number: int) -> bool:
    vma = process.vmas.find(number)
    return vma is None or vma.shared  # none: it is just being unmapped, and may have been written


def _make_clean_in(process: Process, places: Places) -> Procedure[None]:
    host = process.host
    bracket = process.begin(ranges_of(places), Cause.SYNC)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    for n, (number, page) in enumerate(places.items(), 1):
        entry = process.table.get(number)
        if (process.pid, number) in page.mappings and isinstance(entry, Present):
            page.dirty = page.dirty or entry.dirty
            entry.dirty = False
            process.table.replace(number, lowered(entry))
        if n % host.pages_per_step == 0:
            yield host.steps.clear
    yield host.steps.flush
    bracket.end()


def truncate(host: Host, file: File, length_bytes: int) -> Procedure[None]:
    """Make a file shorter, or longer by zeros. Copies that processes have of what is cut off go, too."""
    yield Acquire(file.lock)
    host.observer.truncate_begins(file, length_bytes)
    shorter = length_bytes < file.length_bytes
    file.length_bytes = length_bytes
    if shorter:
        first = page_ceil(length_bytes) >> PAGE_SHIFT
        yield from _drop_pages(host, file, [index for index in sorted(file.cache) if index >= first])
        yield from _zap_copies(host, file, first)
        for index in [index for index in file.stored if index >= first]:
            del file.stored[index]
        yield from _clear_tail(host, file)
    host.observer.truncate_ends(file, length_bytes)
    yield Release(file.lock)


def punch(host: Host, file: File, first: int, end: int) -> Procedure[None]:
    """Make pages [first, end) of a file zeros, on the medium too; private copies of them stay."""
    yield Acquire(file.lock)
    host.observer.punch_begins(file, first, end)
    yield from _drop_pages(host, file, [index for index in sorted(file.cache) if first <= index < end])
    for index in [index for index in file.stored if first <= index < end]:
        del file.stored[index]
    host.observer.punch_ends(file, first, end)
    yield Release(file.lock)


def _drop_pages(host: Host, file: File, indices: list[int]) -> Procedure[None]:
    """Take pages out of every mapping and of the cache, unwritten."""
    for at in range(0, len(indices), BATCH):
        pages = yield from _lock_all(host, file, indices[at : at + BATCH])
        yield from unmap_everywhere(host, pages, Cause.TRUNCATE)
        for page in pages:
            file.stored.pop(page.index, None)
            drop(host, page)
        _unlock_all(host, pages)


def _zap_copies(host: Host, file: File, first: int) -> Procedure[None]:
    """Take copies away that private mappings have of pages from `first` on. No new ones are made: the file ends there.

    Again and again, because what is looked at may be moved meanwhile; nothing that is mapped there instead is touched.
    """
    while True:
        found = [(process, where) for process in host.processes.values() for where in _copies(process, file, first)]
        if not found:
            return
        for process, where in found:
            yield from zap(process, [where], Cause.TRUNCATE, only=partial(_beyond, process, file, first))


def _copies(process: Process, file: File, first: int) -> list[Range]:
    """Return the ranges of mappings of a file, from page `first` of it on, in which something is mapped."""
    ranges = []
    for vma in process.vmas:
        if vma.file is file and vma.index(vma.end) > first:
            start = max(vma.first, vma.first + first - vma.offset)
            if any(process.table.entries(start, vma.end)):
                ranges.append(Range(start, vma.end))
    return ranges


def _beyond(process: Process, file: File, first: int, number: int) -> bool:
    vma = process.vmas.find(number)
    return vma is not None and vma.file is file and vma.index(number) >= first


def _clear_tail(host: Host, file: File) -> Procedure[None]:
    """Make the rest of the last page zeros, so that a file that grows again shows nothing old."""
    tail = file.length_bytes & PAGE_MASK
    index = file.length_bytes >> PAGE_SHIFT
    if tail and (index in file.cache or index in file.stored):
        page = yield from cached(host, file, index)
        host.frames.write(page.frame, tail, bytes(PAGE_BYTES - tail))
        page.dirty = True
        host.unlock(page)
        host.put_page(page)
