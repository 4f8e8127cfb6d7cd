"""Merging: pages with the same bytes become one, shared until somebody writes (KSM).

Both pages are locked and lose the right to write everywhere, with COW told for the brackets of all their mappings at
once; only then are they compared for good, for until then anybody could have written them. Where they are still alike,
the entries of one come to mean the other.

Source: try_to_merge_with_ksm_page, write_protect_page and replace_page of Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.mm.notifier import Bracket
from nopin.model.effects import Gate, Procedure, Quiesce
from nopin.model.host.page import Page
from nopin.model.host.protect import lowered
from nopin.model.host.rmap import Places, places_of, ranges_of
from nopin.model.host.table import Present
from nopin.units import PAGE_BYTES

if TYPE_CHECKING:
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process


def merge_identical(host: Host) -> Procedure[int]:
    """Merge pages of mergeable mappings of all processes; returns how many frames that freed."""
    n_before = host.frames.n_free
    by_bytes: dict[bytes, Page] = {}
    for page in _candidates(host):
        data = host.frames.read(page.frame, 0, PAGE_BYTES)
        kept = by_bytes.setdefault(data, page)
        if kept is not page and _may_merge(host, kept) and _may_merge(host, page):
            yield from _merge(host, kept, page)
        yield host.steps.access
    return host.frames.n_free - n_before


def _candidates(host: Host) -> list[Page]:
    """Return the anonymous pages of mergeable mappings, each once, by process and address."""
    found: dict[Page, None] = {}
    for process in host.processes.values():
        for vma in process.vmas:
            if not vma.mergeable or vma.shared:
                continue
            for _, entry in process.table.entries(vma.first, vma.end):
                if isinstance(entry, Present) and entry.page is not host.zero_page and entry.page.anonymous:
                    found[entry.page] = None
    return list(found)


def _may_merge(host: Host, page: Page) -> bool:
    """Tell whether a page is nothing but mapped: not free by now, nor pinned, swapped, given up or worked on."""
    in_use = page in host.lru and bool(page.mappings)
    return (
        in_use and page.anonymous and not page.n_pins and page.slot is None and not page.discardable and not page.busy
    )


def _merge(host: Host, kept: Page, other: Page) -> Procedure[None]:
    """Have the mappings of `other` mean `kept`, if their bytes turn out to be the same when nobody can write them."""
    kept.busy, other.busy = Gate(), Gate()
    for page in (kept, other):
        host.frames.get(page.frame)
    places = places_of(host, [kept, other])
    brackets = [process.begin(ranges_of(here), Cause.COW) for process, here in places.items()]
    yield host.steps.notify
    yield from _quiesce(brackets)
    for process, here in places.items():
        _write_protect(process, here)
    yield host.steps.clear
    gone = 0
    if _still_alike(host, kept, other):
        for process, here in places.items():
            gone += _replace(process, here, kept, other)
    yield host.steps.flush
    for bracket in brackets:
        bracket.end()
    for _ in range(gone):
        host.put_page(other)
    for page in (other, kept):
        host.unlock(page)
        host.put_page(page)


def _quiesce(brackets: list[Bracket]) -> Procedure[None]:
    fences = [fence for bracket in brackets for fence in bracket.fences]
    if fences:
        yield Quiesce(fences)


def _write_protect(process: Process, places: Places) -> None:
    for number, page in places.items():
        entry = process.table.get(number)
        if (process.pid, number) in page.mappings and entry is not None:
            process.table.replace(number, lowered(entry))


def _still_alike(host: Host, kept: Page, other: Page) -> bool:
    """Compare. A page that was pinned, or mapped elsewhere with the right to write, meanwhile, is not taken."""
    for page in (kept, other):
        entries = [host.processes[pid].table.get(number) for pid, number in page.mappings]
        if page.n_pins or any(isinstance(entry, Present) and entry.writable for entry in entries):
            return False
    return host.frames.read(kept.frame, 0, PAGE_BYTES) == host.frames.read(other.frame, 0, PAGE_BYTES)


def _replace(process: Process, places: Places, kept: Page, other: Page) -> int:
    """Replace the entries of one page in a process by ones of the other; returns how many."""
    n_replaced = 0
    for number, page in places.items():
        entry = process.table.get(number)
        if page is other and (process.pid, number) in other.mappings and isinstance(entry, Present):
            del other.mappings[process.pid, number]
            kept.mappings[process.pid, number] = None
            process.host.frames.get(kept.frame)
            process.table.replace(number, Present(kept, writable=False, young=entry.young))
            n_replaced += 1
    return n_replaced
