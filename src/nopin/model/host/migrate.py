"""Migration: bytes move to other frames, for compaction, for a better place, or to make a huge page of small ones.

    lock          those whose lock is free; nobody waits for a page's lock while holding another's here
    unmap         per process one bracket over all of them, MIGRATE; entries say "moving", and who touches one waits
    copy          nobody can write any more: CPUs have no entry, devices stopped writing at the start
    quiesce       then nobody reads the old frames either
    remap         entries say where the bytes are now; the old frames are free

A page that a device will not let go of, or that is pinned, stays where it is; the others move.

Entries come back only after the fences have passed: with an entry a CPU could store to the new frame while a device
still reads the old one.

Source: migrate_pages and remove_migration_ptes of Linux.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.mm.subscriber import Fence
from nopin.model.effects import Gate, Procedure, Quiesce, Work
from nopin.model.host.errors import NoMemory
from nopin.model.host.page import Page
from nopin.model.host.rmap import Places, places_of, ranges_of
from nopin.model.host.table import Entry, Exclusive, Moving, Present, Private, Shut, Swapped

if TYPE_CHECKING:
    from nopin.model.host.device_memory import DeviceMemory
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process


def migrate(
    process: Process, numbers: Sequence[int], *, owner: object = None, to: DeviceMemory | None = None
) -> Procedure[int]:
    """Move pages of a process to other frames; returns how many moved.

    Args:
        owner: whose own devices are not told.
        to: memory of a device; None: the host's.
    """
    host = process.host
    pages = lock_mapped(process, numbers)
    if to is not None and to.private:
        pages = _only_private(host, pages)
    frames: list[int] = []
    try:
        for _ in pages:
            frames.append((yield from host.new_frame(to)))
    except NoMemory:
        pass  # as many as there is room for
    n_moved = yield from move(host, pages[: len(frames)], frames, owner=owner)
    for page in pages:
        host.unlock(page)
        host.put_page(page)
    return n_moved


def _only_private(host: Host, pages: list[Page]) -> list[Page]:
    """Leave out, and unlock, pages that others reach by a way that cannot lead into a device: a file, swap, a fork."""
    kept = []
    for page in pages:
        if page.anonymous and page.slot is None and len(page.mappings) == 1:
            kept.append(page)
        else:
            host.unlock(page)
            host.put_page(page)
    return kept


def lock_mapped(process: Process, numbers: Sequence[int]) -> list[Page]:
    """Lock the pages that are mapped there and whose lock is free; the caller has a reference of each."""
    host = process.host
    pages: list[Page] = []
    for number in numbers:
        entry = process.table.get(number)
        if entry is None or isinstance(entry, Swapped) or entry.page is host.zero_page:
            continue
        if entry.page.busy is None:
            entry.page.busy = Gate()
            host.frames.get(entry.page.frame)
            pages.append(entry.page)
    return pages


def move(host: Host, pages: Sequence[Page], frames: Sequence[int], *, owner: object = None) -> Procedure[int]:
    """Move pages to frames, of which the caller gives up its references; returns how many moved.

    Requires: the pages are locked, and the caller has a reference of each.
    """
    fences: list[Fence] = []
    for process, places in places_of(host, pages).items():
        fences += yield from _set_moving(process, places, owner)
    targets = dict(zip(pages, frames, strict=True))
    moving = {page: frame for page, frame in targets.items() if _is_moving(host, page)}
    for n, (page, frame) in enumerate(moving.items(), 1):
        if n % host.pages_per_step == 0 or n == len(moving):
            yield Work("copy", host.steps.copy.cost_ns * (n % host.pages_per_step or host.pages_per_step))
        host.frames.copy(page.frame, frame)
    if fences:
        yield Quiesce(fences)
    for page, frame in targets.items():
        left = frame
        if page in moving:
            left = page.frame
            host.frames.hand_over(page.frame, frame)
            page.frame = frame
            host.enqueue(page)
        _restore(host, page)
        host.frames.put(left)
    yield host.steps.free
    return len(moving)


def _set_moving(process: Process, places: Places, owner: object) -> Procedure[list[Fence]]:
    """Take translations away until the pages have moved, but what devices keep; returns what is to be waited for."""
    host = process.host
    bracket = process.begin(ranges_of(places), Cause.MIGRATE, owner=owner)
    yield host.steps.notify
    n_set = 0
    for number, page in places.items():
        entry = process.table.get(number)
        if (process.pid, number) not in page.mappings or not isinstance(entry, Present | Shut | Exclusive | Private):
            continue
        if page.n_pins or any(kept.start <= number < kept.end for kept in bracket.kept):
            continue
        process.table.replace(number, Moving(page, entry))
        n_set += 1
        if n_set % host.pages_per_step == 0:
            yield host.steps.clear
    yield host.steps.flush
    bracket.end()
    return bracket.fences


def _is_moving(host: Host, page: Page) -> bool:
    """Tell whether nobody can reach a page through an entry, nor has it pinned."""
    entries = (host.processes[pid].table.get(number) for pid, number in page.mappings)
    return not page.n_pins and all(isinstance(entry, Moving) for entry in entries)


def _restore(host: Host, page: Page) -> None:
    """Give every entry of a page back what it was; those of a device's own become a CPU's."""
    for pid, number in page.mappings:
        table = host.processes[pid].table
        entry = table.get(number)
        if not isinstance(entry, Moving):
            continue
        table.replace(number, _again(host, page, entry.was))


def _again(host: Host, page: Page, was: Present | Shut | Exclusive | Private) -> Entry:
    """Return what an entry was, for where the page is now."""
    if isinstance(was, Shut):
        return Shut(page)
    writable = was.writable if isinstance(was, Present | Private) else True
    memory = host.memory_of(page.frame)
    if memory is not None and memory.private:
        return Private(page, memory, writable)
    if isinstance(was, Present):
        return Present(page, writable, young=was.young, dirty=was.dirty)
    return Present(page, writable, dirty=True)
