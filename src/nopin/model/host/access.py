"""Loads and stores: what a CPU does with a page table, and the faults where it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.model.effects import Procedure
from nopin.model.host.fault import fault
from nopin.model.host.table import Present
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def load(process: Process, va: int, length: int) -> Procedure[bytes]:
    """Read memory, page by page: other things happen between the pages of one load.

    Raises:
        Segv, Bus, NoMemory, Killed: as the page that was tried last has it.
    """
    host = process.host
    parts = []
    while length > 0:
        number, at = va >> PAGE_SHIFT, va & PAGE_MASK
        entry = process.table.get(number)
        while type(entry) is not Present or not process.alive:
            yield from fault(process, number, write=False)
            entry = process.table.get(number)
        entry.young = True
        data = host.frames.read(entry.page.frame, at, min(length, PAGE_BYTES - at))
        host.observer.cpu_loaded(process, va, data)
        parts.append(data)
        va, length = va + len(data), length - len(data)
        yield host.steps.access
    return b"".join(parts)


def store(process: Process, va: int, data: bytes) -> Procedure[None]:
    """Write memory, page by page; when it raises, as `load` does, the pages before stay written."""
    host = process.host
    while data:
        number, at = va >> PAGE_SHIFT, va & PAGE_MASK
        entry = process.table.get(number)
        while type(entry) is not Present or not entry.writable or not process.alive:
            yield from fault(process, number, write=True)
            entry = process.table.get(number)
        entry.young = entry.dirty = True
        part = data[: PAGE_BYTES - at]
        host.frames.write(entry.page.frame, at, part)
        host.observer.cpu_stored(process, va, part)
        va, data = va + len(part), data[len(part) :]
        yield host.steps.access
