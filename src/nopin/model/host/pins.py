"""Pins: pages that a device was promised never move, nor go, nor change hands.

A pin holds pages, not addresses: after an munmap of the range the device goes on with the old pages, whatever is
mapped there next. What is pinned is charged to the process's limit, each page once.

Source: pin_user_pages with FOLL_LONGTERM of Linux; there every pin is charged anew, which iommufd mended for its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nopin.model.effects import Procedure
from nopin.model.host.cow import alone, unshare
from nopin.model.host.errors import ModelFault, NotSupported, OverMemlock
from nopin.model.host.fault import resolve
from nopin.model.host.mapping import pages_of
from nopin.model.host.page import Page
from nopin.model.host.table import Present
from nopin.units import PAGE_BYTES, page_floor

if TYPE_CHECKING:
    from nopin.model.host.process import Process


@dataclass(slots=True, eq=False)
class Pin:
    """Pages that are held.

    Attributes:
        first: number of the page that the first of `pages` was mapped at.
        write: the device may write them.
    """

    process: Process
    first: int
    pages: list[Page]
    write: bool

    def frame(self, number: int) -> int:
        """Return the frame of a page by the number that it was mapped at."""
        return self.pages[number - self.first].frame


def pin(process: Process, va: int, n_bytes: int, *, write: bool) -> Procedure[Pin]:
    """Pin the pages of a range. Requires: the mmap lock."""
    start = page_floor(va)
    first, end = pages_of(start, va + n_bytes - start)
    held = Pin(process, first, [], write)
    try:
        for number in range(first, end):
            held.pages.append((yield from _pin_one(process, number, write=write)))
    except ModelFault:
        unpin(held)
        raise
    return held


def _pin_one(process: Process, number: int, *, write: bool) -> Procedure[Page]:
    while True:
        yield from resolve(process, number, write=write)
        entry, vma = process.table.get(number), process.vmas.find(number)
        assert isinstance(entry, Present)
        assert vma is not None
        if vma.file is not None and vma.file.memory is not None:
            raise NotSupported(f"{process}: {vma.file.memory.name}'s memory cannot be pinned")
        if vma.shared or alone(process, entry.page):
            break
        yield from unshare(process, number, entry)
    page = entry.page
    if page not in process.pinned:
        _check_limit(process)
    process.pinned[page] = process.pinned.get(page, 0) + 1
    page.n_pins += 1
    process.host.frames.get(page.frame)
    return page


def _check_limit(process: Process) -> None:
    limit = process.memlock_limit_bytes
    if limit is not None and (len(process.pinned) + 1) * PAGE_BYTES > limit:
        raise OverMemlock(f"{process} has {len(process.pinned)} pages pinned, and may lock {limit} bytes")


def unpin(held: Pin) -> None:
    """Let go of pages. Requires: once."""
    pages, held.pages = held.pages, []
    for page in pages:
        page.n_pins -= 1
        process = held.process
        process.pinned[page] -= 1
        if not process.pinned[page]:
            del process.pinned[page]
        process.host.put_page(page)
