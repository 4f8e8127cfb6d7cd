"""Pages of 2 MiB: brought at once where the mapping asks for it, made of small ones, and split again.

A huge page is 512 pages in consecutive frames that a leaf of the table calls one. Whatever concerns only some of them
(an munmap, an mprotect, a reclaim of one) splits it; the others stay where they are, so nobody needs to be told.

Source: do_huge_pmd_anonymous_page, collapse_huge_page of Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.model.effects import Procedure, Work
from nopin.model.host.migrate import lock_mapped, move
from nopin.model.host.page import Page
from nopin.model.host.pool import RUN_FRAMES
from nopin.model.host.table import Present
from nopin.model.host.vma import Vma

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def start_of(number: int) -> int:
    """Return the first page of the 2 MiB that contain a page."""
    return number & ~(RUN_FRAMES - 1)


def bring(process: Process, vma: Vma, number: int) -> Procedure[bool]:
    """Bring zeros for 2 MiB around a page, writable; False if they do not fit: then it is done page by page."""
    host, start = process.host, start_of(number)
    if start < vma.first or start + RUN_FRAMES > vma.end or _something_there(process, start):
        return False
    yield Work("zero huge", host.steps.zero.cost_ns * RUN_FRAMES)
    first = None if _something_there(process, start) or host.fires("frame") else host.frames.allocate_run()
    if first is None:
        return False
    for at in range(RUN_FRAMES):
        page = Page(first + at)
        host.lru[page] = None
        process.map(start + at, page, writable=True, dirty=True)
    process.table.set_huge(start)
    return True


def _something_there(process: Process, start: int) -> bool:
    return any(process.table.entries(start, start + RUN_FRAMES))


def collapse(process: Process, number: int) -> Procedure[bool]:
    """Make the 2 MiB around a page one huge page, by moving its pages together (khugepaged).

    Returns:
        False if some are absent, shared, pinned or refused, or no room is found; they stay small pages then.
    """
    host, start = process.host, start_of(number)
    numbers = range(start, start + RUN_FRAMES)
    pages = lock_mapped(process, numbers)
    alone = all(len(page.mappings) == 1 and page.anonymous and not page.n_pins for page in pages)
    first = host.frames.allocate_run() if len(pages) == RUN_FRAMES and alone else None
    if first is not None:
        yield from move(host, pages, range(first, first + RUN_FRAMES))
    for page in pages:
        host.unlock(page)
        host.put_page(page)
    if not _in_a_run(process, start):
        return False
    process.table.set_huge(start)
    return True


def _in_a_run(process: Process, start: int) -> bool:
    """Tell whether all 2 MiB are present in consecutive frames, in one mapping, with the same right to write."""
    vma = process.vmas.find(start)
    if vma is None or start < vma.first or start + RUN_FRAMES > vma.end:
        return False
    entries = [entry for _, entry in process.table.entries(start, start + RUN_FRAMES)]
    if len(entries) < RUN_FRAMES or not isinstance(entries[0], Present) or entries[0].frame % RUN_FRAMES:
        return False
    base, writable = entries[0].frame, entries[0].writable
    return all(
        isinstance(entry, Present) and entry.frame == base + at and entry.writable is writable
        for at, entry in enumerate(entries)
    )


def split(process: Process, number: int) -> None:
    """Call the pages of a huge one pages of their own."""
    process.table.split(number)
