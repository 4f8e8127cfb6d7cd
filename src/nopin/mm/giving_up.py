"""Giving pages up: by their owner's word, by madvise, by munmap. They read as zeros afterwards.

Devices are told first (TRUNCATE) and have stopped before anything changes. They are told before others that have some
of the pages on their way are waited for: who gave pages up goes on meanwhile, and what a device stores for it from then
on must not go to a page that is about to be punched. Entries of the table go before the pages do, because a hole with
an entry would be taken for a swapped page by a successor.

**A server may be killed in the middle.** Who used madvise goes on once its word has been read, and nobody will hear
that again. So its pages are doomed before it is read (`expect`), where it can be seen what it asks for: from there on a
successor gives them up. They are pardoned when they are given up, or when the word that was read was another.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from nopin.mm.arena_pages import ArenaPages, Transit
from nopin.mm.causes import Cause
from nopin.mm.effects import (
    Backoff,
    Effect,
    HasGoneOn,
    Mapper,
    Open,
    PageRun,
    Pause,
    Present,
    Procedure,
    Punch,
    Quiesce,
    Unprotect,
)
from nopin.mm.notifier import Bracket
from nopin.mm.page_table import BUSY, PageState
from nopin.mm.residency import Pages, runs_of
from nopin.ranges import Range
from nopin.units import US_NS

_LOOK_AGAIN_NS = 100 * US_NS
_ZAPPED_WITHIN_NS = 20_000 * US_NS
"""How long a thread that goes on takes at most until the kernel has dropped its first page, or after one the next."""


def discard(arena: ArenaPages, pages: PageRun) -> Procedure[None]:
    """Make pages read as zeros; frames and swap are free afterwards."""
    transit = _claim(arena, pages)
    yield from _take(arena, transit, _let_go(arena, pages))
    yield from _forget(arena, transit)


def expect(arena: ArenaPages, runs: Sequence[PageRun]) -> Pages:
    """Have a successor give pages up: processes wait in madvise until their word is read.

    Returns:
        The pages of which that is new, for `expect_no_more`.
    """
    used = [_used(arena, run) for run in runs]
    return arena.table.doom(np.unique(np.concatenate(used))) if used else np.empty(0, np.int64)


def expect_no_more(arena: ArenaPages, expected: Pages, read: Sequence[PageRun]) -> None:
    """It was read of these runs only; of them `removed` is called next. The others are as they were."""
    for run in read:
        expected = expected[(expected < run.first) | (expected >= run.end)]
    arena.table.pardon(expected)


def removed(arena: ArenaPages, mapper: Mapper, pages: PageRun, *, dropped: bool | None) -> Procedure[None]:
    """Heed a madvise of a process, which drops its pages now, or has done so.

    The pages are taken, from devices too, when this is called, not when the procedure is run: whoever stores to them
    from here on stores after the madvise.

    Args:
        dropped: True: it gave the bytes up (MADV_REMOVE). False: only its view of them (MADV_DONTNEED): nothing is to
            be done. None: that is not known. Then pages that were there and vanish say that they were given up, and
            with them those in swap; if none was there nothing can be seen, and nothing is taken away. Copies of those
            that were there count no more, whichever it was: were they given up later than anybody waits, or with
            nobody left to see it, nothing would tell that they are out of date.
    """
    if dropped is False:
        return _nothing()
    transit = _claim(arena, pages)
    bracket = _let_go(arena, pages)
    if dropped:
        arena.table.doom(transit.pages)
        return _removed(arena, transit, bracket)
    return _perhaps_removed(arena, mapper, transit, bracket)


def _nothing() -> Procedure[None]:
    yield from ()


def _removed(arena: ArenaPages, transit: Transit, bracket: Bracket) -> Procedure[None]:
    yield from _take(arena, transit, bracket)
    yield from _wait_for_zap(_resident(arena, transit))
    yield from _forget(arena, transit)  # which punches what the kernel has not come to yet


def _perhaps_removed(arena: ArenaPages, mapper: Mapper, transit: Transit, bracket: Bracket) -> Procedure[None]:
    yield from _take(arena, transit, bracket)
    resident = _resident(arena, transit)
    copied = resident[arena.table.units[resident] != 0]
    if len(copied):
        arena.drop_copies(copied)
    if (yield from _wait_for_zap(resident, mapper)):
        yield from _forget(arena, transit)
    else:
        yield Open(arena.end_transit(transit))


def _let_go(arena: ArenaPages, pages: PageRun) -> Bracket:
    """Have devices use the pages no more."""
    return arena.notifiers.invalidate_start([Range(pages.first, pages.end)], Cause.TRUNCATE)


def _take(arena: ArenaPages, transit: Transit, bracket: Bracket) -> Generator[Effect, Any, None]:
    """Have claimed pages for oneself."""
    yield Quiesce(bracket.fences)
    bracket.end()  # pages are busy: nothing new can be learned of them
    yield from _those_before(arena, transit)


def _claim(arena: ArenaPages, pages: PageRun) -> Transit:
    """Take the pages that are used now, and no others: what is touched from here on for the first time is new."""
    return arena.claim(_used(arena, pages))


def _used(arena: ArenaPages, pages: PageRun) -> Pages:
    return pages.first + np.flatnonzero(arena.table.states[pages.first : pages.end])


def _those_before(arena: ArenaPages, transit: Transit) -> Generator[Effect, Any, None]:
    """Wait for whoever had claimed pages are on their way with."""
    while (gate := arena.gate_before(transit)) is not None:
        yield Pause(gate)


def _resident(arena: ArenaPages, transit: Transit) -> Pages:
    resident: Pages = transit.pages[arena.table.states[transit.pages] == PageState.RESIDENT | BUSY]
    return resident


def _forget(arena: ArenaPages, transit: Transit) -> Generator[Effect, Any, None]:
    """Make pages EMPTY. Their protection is lifted, and not that of others beside them, which may be clean."""
    table, used = arena.table, transit.pages
    copied = used[table.units[used] != 0]
    if len(copied):
        arena.drop_copies(copied)
    table.forget(used)  # lost pages too
    for run in runs_of(used):
        yield Punch(run)
    resident = _resident(arena, transit)
    table.states[used] = PageState.EMPTY | BUSY
    table.pardon(used)  # before anything new can be there
    gate = arena.end_transit(transit)
    arena.gave_up(resident)
    arena.residency.forget(used)
    for run in runs_of(used):
        yield Unprotect(run)
    yield Open(gate)


def _wait_for_zap(resident: Pages, mapper: Mapper | None = None) -> Generator[Effect, Any, bool]:
    """Wait until pages that were there are gone, as long as it may take; tell whether they are.

    Args:
        mapper: whose thread drops them, perhaps; until it runs nothing can be told. None: whether it runs does not
            matter, because the pages are given up anyway.
    """
    if not len(resident):
        return False
    hull = PageRun(int(resident[0]), int(resident[-1]) + 1 - int(resident[0]))
    n_left, waited_ns = len(resident), 0
    while True:
        present = yield Present(hull)
        n_before, n_left = n_left, int(present[resident - hull.first].sum())
        if not n_left:
            return True
        if waited_ns >= _ZAPPED_WITHIN_NS:
            return False
        yield Backoff(_LOOK_AGAIN_NS)
        waited_ns += _LOOK_AGAIN_NS
        if mapper is not None and (n_left < n_before or not (yield HasGoneOn(mapper))):
            waited_ns = 0
