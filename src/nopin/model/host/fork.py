"""fork: a child with the same memory, shared until either side writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host import life
from nopin.model.host.errors import NoMemory
from nopin.model.host.protect import lowered
from nopin.model.host.table import Entry, Moving, Present, Private, Shut, Swapped
from nopin.model.host.vma import Vma
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def fork(parent: Process) -> Procedure[Process]:
    """Return the child (dup_mmap). Requires: the parent's mmap lock, alone.

    Raises:
        NoMemory: a pinned page could not be copied; there is no child.
    """
    host = parent.host
    child = host.spawn_process()
    child.memlock_limit_bytes = parent.memlock_limit_bytes
    host.observer.fork_begins(parent)
    private = [Range(vma.first, vma.end) for vma in parent.vmas if not vma.shared and vma.fork == "copy"]
    bracket = parent.begin(private, Cause.FORK) if private else None
    yield host.steps.notify
    if bracket is not None and bracket.fences:
        yield Quiesce(bracket.fences)
    try:
        for vma in parent.vmas:
            if vma.fork != "omit":
                child.vmas.insert(vma)
            if vma.fork == "copy" and not vma.shared:
                yield from _copy_pages(parent, child, vma)
    except NoMemory:
        if bracket is not None:
            bracket.end()
        yield from life.exit(child)
        raise
    yield host.steps.flush
    if bracket is not None:
        bracket.end()
    host.observer.fork_ends(parent, child)
    return child


def _copy_pages(parent: Process, child: Process, vma: Vma) -> Procedure[None]:
    """Give the child the entries of a private mapping. A shared one needs none: it finds its pages in the file."""
    for n, (number, entry) in enumerate(parent.table.entries(vma.first, vma.end), 1):
        if not isinstance(entry, Swapped) and entry.page.n_pins:
            yield from _copy_pinned(parent, child, number)
        else:
            _share(parent, child, number, entry)
        if n % parent.host.pages_per_step == 0:
            yield parent.host.steps.clear


def _share(parent: Process, child: Process, number: int, entry: Entry) -> None:
    """Take the right to write from the parent's entry, and give the child the same."""
    entry = lowered(entry)
    parent.table.lower(number, entry)
    if isinstance(entry, Swapped):
        parent.host.swap.hold(entry.slot)
        child.table.set(number, Swapped(entry.slot))
        return
    if entry.page is not parent.host.zero_page:
        entry.page.mappings[child.pid, number] = None
        parent.host.frames.get(entry.page.frame)
    child.table.set(number, _again(entry))


def _again(entry: Entry) -> Entry:
    """Return another entry like this one, which is not writable."""
    if isinstance(entry, Present):
        return Present(entry.page, writable=False, young=entry.young, dirty=entry.dirty)
    if isinstance(entry, Moving):
        return Moving(entry.page, entry.was)  # an entry that is replaced, never changed, may be had by two
    if isinstance(entry, Private):
        return Private(entry.page, entry.memory, writable=False)
    assert isinstance(entry, Shut)
    return Shut(entry.page)


def _copy_pinned(parent: Process, child: Process, number: int) -> Procedure[None]:
    """Give the child a copy at once: the device that pinned the page keeps the one that the parent has.

    Source: copy_present_page of Linux (folio_needs_cow_for_dma).
    """
    host = parent.host
    parent.table.split(number)  # the others lose the right to write, this one does not
    page = yield from host.new_page()
    entry = parent.table.get(number)
    assert entry is not None, "only faults go on beside a fork, and they take nothing away"
    if isinstance(entry, Present | Shut) and entry.page.n_pins:
        host.frames.copy(entry.page.frame, page.frame)
        child.map(number, page, writable=isinstance(entry, Present) and entry.writable, dirty=True)
        if isinstance(entry, Shut):
            child.table.replace(number, Shut(page))
        return
    host.put_page(page)
    _share(parent, child, number, entry)
