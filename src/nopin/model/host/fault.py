"""Faults: how a page comes to be where an access wants it (handle_mm_fault), and what devices learn of it.

A fault looks at the entry, does what is missing, and looks again: between any two steps the page may have gone. It
never decides by what it saw before a yield.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.device_faults import FaultPages
from nopin.mm.space import Reason
from nopin.model.effects import Procedure
from nopin.model.host import files, huge
from nopin.model.host.cow import make_writable, take_back
from nopin.model.host.device_memory import DeviceMemory, bring_back
from nopin.model.host.errors import ModelFault, Segv
from nopin.model.host.swapin import swap_in
from nopin.model.host.table import Entry, Exclusive, Moving, Present, Private, Shut, Swapped
from nopin.model.host.vma import Vma
from nopin.units import PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def lookup(process: Process, page: int) -> Present | None:
    """Return the translation of a page that is present now, as CPUs and any device may use it; never faults.

    A `Present` entry stays as it is only until the next yield of whoever asked.
    """
    entry = process.table.get(page)
    return entry if isinstance(entry, Present) else None


def lookup_own(process: Process, page: int, memory: DeviceMemory) -> Present | Private | None:
    """Return the same for a device with memory of its own, to which pages there are present, too."""
    entry = process.table.get(page)
    if isinstance(entry, Private) and entry.memory is memory:
        return entry
    return lookup(process, page)


def fault(process: Process, number: int, *, write: bool) -> Procedure[None]:
    """Serve a CPU's fault; the access is then tried again, and may fault again.

    Raises:
        ModelFault: what the access fails with.
    """
    process.check_alive()
    yield process.share_mmap_lock
    try:
        yield from resolve(process, number, write=write)
    except ModelFault:
        yield process.release_mmap_lock
        raise
    yield process.release_mmap_lock


def fault_pages(
    process: Process, first: int, n: int, *, write: bool, memory: DeviceMemory | None = None
) -> Procedure[FaultPages]:
    """Serve a device's fault over a run of pages, under the mmap lock once (hmm_range_fault).

    Args:
        memory: the device's own; pages that are there stay there.

    Returns:
        How many pages from the first were brought, with the right to write if `write`. They may have gone again:
        whoever wants to use them asks `Notifiers.read_retry`, and then `lookup`, in one step.
    """
    if not process.alive:
        return FaultPages(0, Reason.OWNER_GONE)
    yield process.share_mmap_lock
    came = FaultPages(n)
    for number in range(first, first + n):
        try:
            yield from resolve(process, number, write=write, memory=memory)
        except ModelFault as failed:
            came = FaultPages(number - first, failed.reason)
            break
    yield process.release_mmap_lock
    return came


def resolve(process: Process, number: int, *, write: bool, memory: DeviceMemory | None = None) -> Procedure[None]:
    """Make a page present, writable if `write`; nothing if it is so already. Requires: the mmap lock.

    Raises:
        ModelFault: what an access there fails with.
    """
    vma, host = process.vmas.find(number), process.host
    entry = process.table.get(number)
    allowed = vma is not None and vma.allows(write=write)
    if allowed and _is_resolved(entry, write, memory):
        return
    host.observer.fault_raised(process, number, write=write)
    try:
        if vma is None or not allowed:
            raise Segv(f"{process}: {'write' if write else 'read'} at {number << PAGE_SHIFT:#x}: {_refusal(vma)}")
        process.check_alive()
        while True:
            yield host.steps.fault
            if process.table.get(number) is entry:
                yield from _bring_nearer(process, vma, number, entry, write=write)
            process.check_alive()
            entry = process.table.get(number)
            if _is_resolved(entry, write, memory):
                return
    finally:
        host.observer.fault_answered(process, number, write=write)


def _is_resolved(entry: Entry | None, write: bool, memory: DeviceMemory | None) -> bool:
    """Tell whether an entry allows an access; if so, note that it is used."""
    if isinstance(entry, Private):
        return entry.memory is memory and (entry.writable or not write)
    if not isinstance(entry, Present) or (write and not entry.writable):
        return False
    entry.young = True
    entry.dirty = entry.dirty or write
    return True


def _bring_nearer(process: Process, vma: Vma, number: int, entry: Entry | None, *, write: bool) -> Procedure[None]:
    """Bring a page nearer to being there, in the way that its entry calls for."""
    host = process.host
    if entry is None:
        if vma.file is not None:
            yield from files.bring(process, vma, number, write=write)
        elif not write:
            process.map(number, host.zero_page, writable=False)
        elif not vma.huge or not (yield from huge.bring(process, vma, number)):
            page = yield from host.new_page()
            if process.table.get(number) is None:
                process.map(number, page, writable=True, dirty=True)
            else:
                host.put_page(page)  # another fault was faster
    elif isinstance(entry, Present) and vma.shared:
        yield from files.make_writable(process, number, entry)
    elif isinstance(entry, Present):
        yield from make_writable(process, number, entry)
    elif isinstance(entry, Swapped):
        yield from swap_in(process, number, entry, write=write)
    elif isinstance(entry, Shut):
        process.table.replace(number, host.readable(entry.page))
    elif isinstance(entry, Private):
        yield from bring_back(process, number, entry)
    elif isinstance(entry, Moving):
        yield from host.until_unlocked(entry.page)
    elif isinstance(entry, Exclusive):
        yield from take_back(process, number, entry)


def _refusal(vma: Vma | None) -> str:
    return "nothing is mapped there" if vma is None else f"it is mapped {vma.prot}"
