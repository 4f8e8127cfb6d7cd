"""Bringing a page back from swap (do_swap_page)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.model.effects import Procedure
from nopin.model.host.errors import PageLost
from nopin.model.host.page import Page
from nopin.model.host.table import Swapped
from nopin.units import PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def swap_in(process: Process, number: int, entry: Swapped, *, write: bool) -> Procedure[None]:
    """Map what an entry says is in swap; does nothing if the entry changes meanwhile.

    Raises:
        PageLost: the medium failed.
        NoMemory: there is no frame for it.
    """
    host, slot = process.host, entry.slot
    page = host.swap.cache.get(slot)
    if page is None:
        page = yield from _read(process, number, entry)
        if page is None:
            return
    else:
        host.frames.get(page.frame)  # or it might be dropped while its lock is waited for
        yield from host.lock(page)
        if page.slot != slot:
            host.unlock(page)
            host.put_page(page)
            return
    if process.table.get(number) is entry:
        _map(process, number, page, write=write)
    else:
        host.put_page(page)
    host.unlock(page)


def _read(process: Process, number: int, entry: Swapped) -> Procedure[Page | None]:
    """Read the page; returns it in the cache, locked, with a reference for the caller. None: look again."""
    host, slot = process.host, entry.slot
    page = yield from host.new_page()
    if process.table.get(number) is not entry or slot in host.swap.cache:
        host.put_page(page)
        return None
    yield from host.lock(page)  # of a new page: at once
    host.swap.add(page, slot)
    yield from host.swap_medium.read(1)
    if host.fires("swap read"):
        host.drop_slot(page)
        host.unlock(page)
        host.put_page(page)
        raise PageLost(f"{process}: the page at {number << PAGE_SHIFT:#x} cannot be read from swap")
    host.frames.write(page.frame, 0, host.swap.read(slot))
    return page


def _map(process: Process, number: int, page: Page, *, write: bool) -> None:
    """Enter the page for its slot, alone and writable if it can be. Takes over the caller's reference."""
    host = process.host
    assert page.slot is not None
    host.swap.let_go(page.slot)
    alone = write and not page.mappings and host.swap.n_users(page.slot) == 0
    if alone:
        host.drop_slot(page)
    process.map(number, page, writable=alone, dirty=alone)
