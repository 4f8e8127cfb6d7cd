"""Loads and stores: what a CPU does with a page table, and the faults where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nopin.model.effects import Procedure
from nopin.model.host.fault import fault
from nopin.model.host.table import Present
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def load(process: Process, va: int, length: int) -> Procedure[bytes]:
    """Read memory, page by page: other things happen between the pages of one load."""
    host = process.host
    parts = []
    for number, at, n in pieces(va, length):
        entry = process.table.get(number)
        while type(entry) is not Present or not process.alive:
            yield from fault(process, number, write=False)
            entry = process.table.get(number)
        entry.young = True
        data = host.frames.read(entry.page.frame, at, n)
        host.observer.cpu_loaded(process, (number << PAGE_SHIFT) + at, data)
        parts.append(data)
        yield host.steps.access
    return b"".join(parts)


def store(process: Process, va: int, data: bytes) -> Procedure[None]:
    """Write memory, page by page."""
    host = process.host
    done = 0
    for number, at, n in pieces(va, len(data)):
        entry = process.table.get(number)
        while type(entry) is not Present or not entry.writable or not process.alive:
            yield from fault(process, number, write=True)
            entry = process.table.get(number)
        entry.young = entry.dirty = True
        piece = data[done : done + n]
        host.frames.write(entry.page.frame, at, piece)
        host.observer.cpu_stored(process, (number << PAGE_SHIFT) + at, piece)
        done += n
        yield host.steps.access


def pieces(va: int, length: int) -> Sequence[tuple[int, int, int]]:
    """Cut bytes at pages: (page number, offset in the page, length)."""
    if 0 < length <= PAGE_BYTES - (va & PAGE_MASK):  # the common case
        return ((va >> PAGE_SHIFT, va & PAGE_MASK, length),)
    cut, end = [], va + length
    while va < end:
        n = min(PAGE_BYTES - (va & PAGE_MASK), end - va)
        cut.append((va >> PAGE_SHIFT, va & PAGE_MASK, n))
        va += n
    return cut
