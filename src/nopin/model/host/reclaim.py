"""Reclaim: getting frames back from pages that have not been used lately.

Pages stand in a queue, in order of arrival. The scan takes them from its head: what a CPU or a device used since it
was last asked (the young bits of page tables and mirrors) goes back to the tail with its bits cleared, the rest are
victims. A batch of victims then goes through

    lock          those whose lock is free; reclaim never waits for one, so it may run inside a fault
    swap slots    anonymous pages get one and are found by it from here on
    unmap         per process one bracket over all its victims, RECLAIM: devices stop writing now, and may go on reading
    write out     what has no good copy, in one request, while the devices flush
    quiesce       all fences of the batch together
    free          what is unmapped, clean and referenced by nobody else

A page whose device refused to let go (`Bracket.kept`) stays mapped there. Until the fences have passed the page stays
locked, so nobody can come to write in place what a device still reads: a fault that finds it in the swap cache waits.

Source: shrink_folio_list and try_to_unmap of Linux; refusal and the shared wait are ours.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.mm.subscriber import Fence
from nopin.model.effects import Gate, Procedure, Quiesce
from nopin.model.host.file_changes import write_out
from nopin.model.host.files import drop
from nopin.model.host.page import Page
from nopin.model.host.rmap import Places, places_of, ranges_of
from nopin.model.host.table import Present, Swapped
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

if TYPE_CHECKING:
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process

BATCH = 32
"""Pages looked at together (SWAP_CLUSTER_MAX of Linux)."""


def reclaim(host: Host, n_pages: int) -> Procedure[int]:
    """Free about `n_pages` frames; returns how many became free."""
    n_freed = 0
    n_left = 2 * len(host.lru)  # each page once to clear its bits, and once more
    while n_freed < n_pages and n_left > 0:
        batch = list(islice(host.lru, min(BATCH, n_left)))
        victims = _select(host, batch, n_pages - n_freed)
        n_left -= max(len(batch), 1)
        if victims:
            n_freed += yield from evict(host, victims)
    return n_freed


def _select(host: Host, batch: list[Page], n_wanted: int) -> list[Page]:
    """Send pages back to the tail of the queue, and return those that were not used lately, locked."""
    young = _young(host, batch)
    victims: list[Page] = []
    for page in batch:
        if len(victims) == n_wanted:
            break
        host.to_tail(page)
        if page not in young and reclaimable(page):
            page.busy = Gate()
            victims.append(page)
    return victims


def reclaimable(page: Page) -> bool:
    """Tell whether a page may be tried: nobody works on it, and somebody could bring it back."""
    known = page.mappings or page.slot is not None or page.file is not None
    return page.busy is None and not page.n_pins and bool(known)


def _young(host: Host, pages: list[Page]) -> dict[Page, None]:
    """Return which pages a CPU or a device used since they were last asked about, and clear the bits."""
    young: dict[Page, None] = {}
    for process, places in places_of(host, pages).items():
        by_devices = process.notifiers.age(ranges_of(places)) if host.devices_count_as_use else ()
        for number, page in places.items():
            entry = process.table.get(number)
            if isinstance(entry, Present) and entry.young:
                entry.young = False
                young[page] = None
            if number in by_devices:
                young[page] = None
    return young


def pageout(process: Process, first: int, end: int) -> Procedure[None]:
    """Have what one process alone maps of a range leave memory (MADV_PAGEOUT). Requires: the mmap lock."""
    victims = []
    for _, entry in process.table.entries(first, end):
        if isinstance(entry, Present) and len(entry.page.mappings) == 1 and reclaimable(entry.page):
            entry.page.busy = Gate()
            victims.append(entry.page)
    yield from evict(process.host, victims)


def make_cold(process: Process, first: int, end: int) -> None:
    """Have reclaim look at a range first, as if nobody had used it lately (MADV_COLD)."""
    host = process.host
    process.notifiers.age([Range(first, end)], clear=True)
    for _, entry in process.table.entries(first, end):
        if isinstance(entry, Present) and entry.page in host.lru:
            entry.young = False
            host.lru.move_to_end(entry.page, last=False)


def evict(host: Host, victims: list[Page]) -> Procedure[int]:
    """Have pages leave memory; returns how many did. Requires: they are locked; they are not any more afterwards."""
    n_before = host.frames.n_free
    held = _give_slots(host, victims)
    fences: list[Fence] = []
    gone: list[Page] = []
    for process, places in places_of(host, victims).items():
        fences += yield from _unmap(process, places, gone)
    yield from _write_out(host, [page for page in victims if not page.mappings and page.dirty])
    if fences:
        yield Quiesce(fences)
    yield host.steps.free
    for page in gone:
        host.put_page(page)
    for page in victims:
        _free(host, page, held.get(page))
    return host.frames.n_free - n_before


def _give_slots(host: Host, victims: list[Page]) -> dict[Page, int]:
    """Give slots to anonymous pages that lack one; returns those that are now held for writing."""
    held: dict[Page, int] = {}
    for page in victims:
        if page.anonymous and page.slot is None and not page.discardable:
            slot = None if host.fires("swap slot") else host.swap.allocate()
            if slot is not None:
                host.swap.add(page, slot)
                page.dirty = True
                held[page] = slot
    return held


def _unmap(process: Process, places: Places, gone: list[Page]) -> Procedure[list[Fence]]:
    """Unmap pages from one process, but what its devices keep; returns what is to be waited for before they are freed.

    Adds to `gone` each page whose mapping's reference the caller has to give back.
    """
    host = process.host
    bracket = process.begin(ranges_of(places), Cause.RECLAIM)
    yield host.steps.notify
    n_cleared = 0
    for number, page in places.items():
        if (process.pid, number) not in page.mappings or page.n_pins:
            continue
        if any(kept.start <= number < kept.end for kept in bracket.kept):
            continue
        if _unmap_one(process, number, page):
            gone.append(page)
            n_cleared += 1
            if n_cleared % host.pages_per_step == 0:
                yield host.steps.clear
    yield host.steps.flush
    bracket.end()
    return bracket.fences


def _unmap_one(process: Process, number: int, page: Page) -> bool:
    """Clear one entry, and leave word where the bytes will be; False if they have nowhere to go."""
    entry = process.table.get(number)
    if page.discardable and (page.dirty or (isinstance(entry, Present) and entry.dirty)):
        page.discardable = False  # written after it was given up
    if page.anonymous and page.slot is None and not page.discardable:
        return False
    process.take_out(number)
    if page.slot is not None:
        process.host.swap.hold(page.slot)
        process.table.set(number, Swapped(page.slot))
    return True


def _write_out(host: Host, pages: list[Page]) -> Procedure[None]:
    """Write pages that nobody can write any more to their places; those that cannot be written stay dirty."""
    yield from write_out(host, [page for page in pages if page.file is not None])
    copies = [(page, host.frames.read(page.frame, 0, PAGE_BYTES)) for page in pages if page.slot is not None]
    if not copies:
        return
    yield from host.swap_medium.write(len(copies))
    if host.fires("swap write"):
        return
    for page, data in copies:
        assert page.slot is not None
        host.swap.write(page.slot, data)
        page.dirty = False


def _free(host: Host, page: Page, held: int | None) -> None:
    """Drop a page that is clean and that nobody else refers to; unlock it in any case."""
    if held is not None:
        host.swap.let_go(held)
    unused = not page.mappings and not page.dirty and host.frames.n_references(page.frame) == 1
    if unused and page.file is not None:
        drop(host, page)
    elif unused and page.slot is not None:
        host.drop_slot(page)
    elif page.slot is not None and page.dirty and host.swap.n_users(page.slot) == 0:
        host.drop_slot(page)  # it stayed where it was, so nobody needs the slot
    host.unlock(page)
