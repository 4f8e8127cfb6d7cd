"""MADV_FREE: pages that may be dropped unwritten, until somebody writes them again.

Dirty bits tell whether somebody did, so they are started anew here: SYNC has devices hand theirs over and notice their
next write, and the entries' own are cleared. Reclaim drops a page that is still clean then (`Page.discardable`), and
treats any other like one that was never given up.

Source: madvise_free_pte_range of Linux, which tells notifiers CLEAR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.errors import NotSupported
from nopin.model.host.mapping import bytes_of
from nopin.model.host.table import Entry, Present, Swapped
from nopin.model.host.vma import Vma
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def give_up(process: Process, vma: Vma) -> Procedure[None]:
    """Let the pages of a mapping be dropped. Requires: the mmap lock."""
    host, where = process.host, bytes_of(vma.first, vma.end)
    if vma.file is not None:
        raise NotSupported(f"{process}: FREE of {where}: not private anonymous memory")
    host.observer.give_up_begins(process, where)
    bracket = process.begin([Range(vma.first, vma.end)], Cause.SYNC)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    gone: list[Entry] = []
    for n, (number, entry) in enumerate(process.table.entries(vma.first, vma.end), 1):
        if isinstance(entry, Swapped):
            process.table.clear(number)
            gone.append(entry)
        elif isinstance(entry, Present):
            _call_clean(process, entry)
        if n % host.pages_per_step == 0:
            yield host.steps.clear
    yield host.steps.flush
    bracket.end()
    for left in gone:
        host.let_go(left)
    host.observer.give_up_ends(process, where)


def _call_clean(process: Process, entry: Present) -> None:
    """Let one page be dropped, if it is nobody else's too and nobody works on it."""
    host, page = process.host, entry.page
    if page is host.zero_page or len(page.mappings) > 1 or page.n_pins or page.busy is not None:
        return
    if page.slot is not None:
        if host.swap.n_users(page.slot):
            return
        host.drop_slot(page)
    page.discardable = True
    page.dirty = entry.dirty = False
