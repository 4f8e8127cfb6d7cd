"""Giving pages up: by their owner's word, by madvise, by munmap. They read as zeros afterwards.

Devices are told first (TRUNCATE) and have stopped before anything changes. Entries of the table go before the pages do,
because a hole with an entry would be taken for a swapped page by a successor.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from nopin.mm.arena_pages import ArenaPages, Transit
from nopin.mm.causes import Cause
from nopin.mm.effects import Backoff, Effect, Open, PageRun, Pause, Present, Procedure, Punch, Quiesce, Unprotect
from nopin.mm.page_table import PageState
from nopin.mm.residency import Pages, runs_of
from nopin.ranges import Range
from nopin.units import US_NS

_LOOK_AGAIN_NS = 100 * US_NS
_ZAPPED_WITHIN_NS = 20_000 * US_NS
"""How long a process that was let go on takes at most, if it runs at all, until the kernel has dropped its pages."""


def discard(arena: ArenaPages, pages: PageRun) -> Procedure[None]:
    """Make pages read as zeros; frames and swap are free afterwards."""
    yield from _wait_for_transits(arena, pages)
    used = _used(arena, pages)
    transit = arena.begin_transit(used)
    yield from _let_go(arena, pages)
    yield from _forget(arena, pages, transit)


def removed(arena: ArenaPages, pages: PageRun, *, dropped: bool | None) -> Procedure[None]:
    """Heed a madvise of a process, which drops its pages now, or has done so.

    Args:
        dropped: True: it gave the bytes up (MADV_REMOVE). False: only its view of them (MADV_DONTNEED): nothing is to
            be done. None: that is not known. Then pages that were there and vanish say that they were given up, and
            with them those in swap; if none was there nothing can be seen, and nothing is taken away.
    """
    if dropped is False:
        return
    yield from _wait_for_transits(arena, pages)
    used = _used(arena, pages)
    resident = used[arena.table.states[used] == PageState.RESIDENT]
    if dropped is None and not len(resident):
        return
    transit = arena.begin_transit(used)
    yield from _let_go(arena, pages)
    vanished = yield from _wait_for_zap(arena, pages, resident)
    if dropped or vanished:
        yield from _forget(arena, pages, transit)  # which punches what the kernel has not come to yet
    else:
        yield Open(arena.end_transit(transit))


def _wait_for_transits(arena: ArenaPages, pages: PageRun) -> Generator[Effect, Any, None]:
    while (gate := arena.any_gate(pages)) is not None:
        yield Pause(gate)


def _used(arena: ArenaPages, pages: PageRun) -> Pages:
    return pages.first + np.flatnonzero(arena.table.states[pages.first : pages.end])


def _let_go(arena: ArenaPages, pages: PageRun) -> Generator[Effect, Any, None]:
    """Have devices stop using the pages."""
    bracket = arena.notifiers.invalidate_start([Range(pages.first, pages.end)], Cause.TRUNCATE)
    yield Quiesce(bracket.fences)
    bracket.end()  # pages are busy: nothing new can be learned of them


def _forget(arena: ArenaPages, pages: PageRun, transit: Transit) -> Generator[Effect, Any, None]:
    """Make the busy ones of `pages` EMPTY. Others, touched for the first time meanwhile, are none of ours."""
    table, used = arena.table, transit.pages
    copied = used[table.units[used] != 0]
    if len(copied):
        arena.drop_copies(copied)
    table.forget(used)  # lost pages too
    for run in runs_of(used):
        yield Punch(run)
    gate = arena.end_transit(transit)
    resident = used[table.states[used] == PageState.RESIDENT]
    table.states[used] = PageState.EMPTY
    arena.gave_up(resident)
    arena.residency.forget(used)
    yield Unprotect(pages)
    yield Open(gate)


def _wait_for_zap(arena: ArenaPages, pages: PageRun, resident: Pages) -> Generator[Effect, Any, bool]:
    """Wait until pages that were there are gone, as long as it may take; tell whether they are."""
    if not len(resident):
        return False
    hull = PageRun(int(resident[0]), int(resident[-1]) + 1 - int(resident[0]))
    waited_ns = 0
    while True:
        present = yield Present(hull)
        if not present[resident - hull.first].any():
            return True
        if waited_ns >= _ZAPPED_WITHIN_NS:
            return False
        yield Backoff(_LOOK_AGAIN_NS)
        waited_ns += _LOOK_AGAIN_NS
