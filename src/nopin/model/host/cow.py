"""Copy on write: pages that several share until one of them writes.

A page of a private mapping is *alone* when nobody but this entry can reach its bytes: no other mapping, no file, no
swap slot that another process could bring it back from. A page that is alone is written in place, any other is copied
first. Whoever pins a page makes it alone before, and a fork copies pinned pages at once; so a pinned page stays alone,
and the device that pinned it keeps seeing what its process sees.

Source: wp_page_copy, wp_can_reuse_anon_folio and gup_must_unshare of Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.page import Page
from nopin.model.host.table import Exclusive, Present
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def alone(process: Process, page: Page) -> bool:
    """Tell whether one entry of this process is all there is of an anonymous page."""
    host = process.host
    if page is host.zero_page or not page.anonymous or len(page.mappings) > 1:
        return False
    return page.slot is None or host.swap.n_users(page.slot) == 0


def make_writable(process: Process, number: int, entry: Present) -> Procedure[None]:
    """Give the right to write to a private page, or bring things nearer to it: the caller looks again."""
    host, page = process.host, entry.page
    if page.busy is not None:  # who has it may be waiting for a device that still reads these bytes
        yield from host.until_unlocked(page)
    elif alone(process, page):
        if page.slot is not None:
            host.drop_slot(page)
        process.table.replace(number, Present(page, writable=True, dirty=True))
    else:
        yield from copy(process, number, entry, writable=True)


def copy(process: Process, number: int, entry: Present, *, writable: bool) -> Procedure[None]:
    """Replace a page by a copy of its own; does nothing if the entry changes meanwhile.

    The old page is read-only here, so its bytes are what they were when the fault began; whoever else could write it
    in place would have to be alone with it, and is not while this entry is there.
    """
    host, old = process.host, entry.page
    new = yield from host.new_page()
    if process.table.get(number) is not entry:
        host.put_page(new)
        return
    host.frames.copy(old.frame, new.frame)
    bracket = process.begin([Range(number, number + 1)], Cause.COW)
    yield host.steps.copy
    if bracket.fences:
        yield Quiesce(bracket.fences)
    if process.table.get(number) is not entry:
        bracket.end()
        host.put_page(new)
        return
    process.take_out(number)
    process.map(number, new, writable=writable, dirty=True)
    yield host.steps.flush
    bracket.end()
    host.put_page(old)


def unshare(process: Process, number: int, entry: Present) -> Procedure[None]:
    """Bring a page nearer to being alone, without the right to write: the caller looks again (FAULT_FLAG_UNSHARE)."""
    if entry.page.busy is not None:
        yield from process.host.until_unlocked(entry.page)
    else:
        yield from copy(process, number, entry, writable=False)


def take_back(process: Process, number: int, entry: Exclusive) -> Procedure[None]:
    """Take a page back from a device; does nothing if the entry changes meanwhile. Requires: the mmap lock."""
    host, page = process.host, entry.page
    if page.busy is not None:
        yield from host.until_unlocked(page)
        return
    bracket = process.begin([Range(number, number + 1)], Cause.EXCLUSIVE)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    if process.table.get(number) is entry:
        process.table.replace(number, Present(page, writable=True, dirty=True))
    yield host.steps.flush
    bracket.end()
