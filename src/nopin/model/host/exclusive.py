"""Exclusive access: a device has a page to itself, for atomics on memory that its bus has none for.

The entry of the process is replaced by one that says so. A CPU that touches the page takes it back, with the device
told before. Source: make_device_exclusive and restore_exclusive_pte of Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.errors import NotSupported
from nopin.model.host.fault import resolve
from nopin.model.host.table import Exclusive, Present
from nopin.ranges import Range
from nopin.units import PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def lookup_exclusive(process: Process, number: int, owner: object) -> int | None:
    """Return the frame of a page that a device has to itself, if it may begin to use it in this step.

    It may as long as its notifier does not say otherwise from here on. While an invalidation of the page runs it may
    not, for it has been told of that already.
    """
    entry = process.table.get(number)
    if not isinstance(entry, Exclusive) or entry.owner is not owner:
        return None
    return None if process.notifiers.running(Range(number, number + 1)) else entry.page.frame


def make_exclusive(process: Process, number: int, owner: object) -> Procedure[None]:
    """Give a page to a device, unless somebody else wants it at the same time: `lookup_exclusive` tells.

    Requires: the mmap lock.

    Raises:
        NotSupported: the page is pinned, or not private anonymous memory.
        ModelFault: as a store there.
    """
    host = process.host
    yield from resolve(process, number, write=True)
    entry, vma = process.table.get(number), process.vmas.find(number)
    assert isinstance(entry, Present)
    assert vma is not None
    if vma.shared or entry.page.n_pins:
        raise NotSupported(f"{process}: {number << PAGE_SHIFT:#x} is shared or pinned: no device can have it alone")
    page = entry.page
    host.frames.get(page.frame)
    yield from host.lock(page)
    bracket = process.begin([Range(number, number + 1)], Cause.EXCLUSIVE, owner=owner)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    if process.table.get(number) is entry and not page.n_pins:
        process.table.replace(number, Exclusive(page, owner))
        page.dirty = True
    yield host.steps.flush
    bracket.end()
    host.unlock(page)
    host.put_page(page)
