"""Faults: what to do when a process or a device reaches for a page that it cannot have as it is.

A CPU fault is a process's thread waiting at one page. What it meets:

    EMPTY      zeros, and more zeros ahead if it is part of a stream
    SWAPPED    the copy, and those ahead
    RESIDENT   not mapped in this process yet: map it, and neighbours that are there. Or a store to a write-protected
               page: its copy in swap is out of date from now on, so give that up, then let the store go on
    busy       on its way in or out: pause at its gate, then look again. Identical faults merge here
    LOST       SIGBUS

Every wait is followed by another look, because anything may have happened meanwhile. If the table and the file disagree
(a process punched its own file), the file is right.

A device fault is about a run of pages, for a mirror: pages in the file, held until the mirror's user has used them.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import Any

import numpy as np

from nopin.mm.arena_pages import ArenaPages
from nopin.mm.bring import Came, Effort, bring_at_once, bring_swapped, bring_zeros
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import (
    SERVER,
    Effect,
    MapIn,
    Mapper,
    Outcome,
    PageRun,
    Pause,
    Poison,
    Present,
    Procedure,
    Unprotect,
    Wake,
)
from nopin.mm.page_table import BUSY, PageState
from nopin.mm.readahead import JUST_THIS, Ahead
from nopin.mm.residency import BATCH_PAGES, runs_of
from nopin.mm.space import Reason

_EMPTY, _RESIDENT, _LOST = (
    int(PageState.EMPTY),
    int(PageState.RESIDENT),
    int(PageState.LOST),
)  # plain integers compare quicker


def cpu_fault(
    arena: ArenaPages, mapper: Mapper, page: int, *, write: bool, minor: bool, protected: bool
) -> Procedure[None]:
    """Answer a fault of a process."""
    del minor  # what the kernel says may be out of date; the table is not
    state = arena.state
    ahead = arena.readahead.of(mapper).advise(page)
    while True:
        code = state[page]
        if code & BUSY:
            arena.counts.coalesced += 1
            yield Pause(arena.gate_of(page))
        elif code == _RESIDENT:
            if (yield from _map_resident(arena, mapper, page, ahead, write=write, protected=protected)):
                return
        elif protected:  # a store met the marker of a page that has left: lifted, it comes back as an ordinary fault
            yield Unprotect(PageRun(page, 1), mapper)
            return
        elif code == _LOST:
            yield from _refuse(arena, mapper, page)
            return
        elif ahead is JUST_THIS and (yield from bring_at_once(arena, PageRun(page, 1), mapper, write=write)):
            return
        else:
            came = yield from _bring_ahead(arena, mapper, page, ahead, write=write)
            if came.n or came.reason is Reason.OWNER_GONE:
                return
            if came.reason is not None:
                arena.counts.refused += 1
                yield from _refuse(arena, mapper, page)
                return


def _bring_ahead(
    arena: ArenaPages, mapper: Mapper, page: int, ahead: Ahead, *, write: bool
) -> Generator[Effect, Any, Came]:
    """Bring a page that is out, and what a stream will want next."""
    n_most = min(ahead.n if ahead.stride == 1 else 1, max(1, arena.budget.limit // 8))
    run = PageRun(page, arena.table.run_length(page, n_most))
    if run.n < ahead.n and ahead.stride == 1:
        arena.readahead.of(mapper).brought(page, ahead, run.n)
    counts = arena.counts
    if arena.state[page] == _EMPTY:
        counts.faults_zero += 1
        came = yield from bring_zeros(arena, run, mapper, Effort.DEMAND)
    else:
        counts.faults_swap += 1
        came = yield from bring_swapped(arena, run, mapper, Effort.DEMAND, write=write)
    counts.readahead += max(0, came.n - 1)
    if came.n and ahead.stride != 1:
        yield from _bring_strided(arena, mapper, page, ahead.n, ahead.stride)
    return came


def _bring_strided(arena: ArenaPages, mapper: Mapper, page: int, n: int, stride: int) -> Generator[Effect, Any, None]:
    """Bring the next pages of a stride, as far as there is room without evicting."""
    for at in range(page + stride, page + n * stride, stride):
        if not 0 <= at < arena.table.n_pages or arena.budget.room <= 0:
            return
        if arena.state[at] == _EMPTY:
            yield from bring_zeros(arena, PageRun(at, 1), mapper, Effort.AHEAD)
        elif arena.state[at] == PageState.SWAPPED:
            yield from bring_swapped(arena, PageRun(at, 1), mapper, Effort.AHEAD, write=False)
        arena.counts.readahead += 1


def _map_resident(
    arena: ArenaPages, mapper: Mapper, page: int, ahead: Ahead, *, write: bool, protected: bool
) -> Generator[Effect, Any, bool]:
    """Let a process have a page that is in the file; False if it is not there after all."""
    one = PageRun(page, 1)
    if protected:
        arena.counts.faults_protect += 1
        arena.dirtied(one)
        yield Unprotect(one, mapper)
        return True
    arena.counts.faults_minor += 1
    if write:
        arena.dirtied(one)
    run = _neighbours(arena, page, ahead)
    outcome: Outcome = yield MapIn(run, mapper, arena.clean(page))
    if outcome.errno and not outcome.n_done:
        if outcome.errno == errno.EFAULT and (yield from _repair(arena, page)):
            return False
        yield Wake(one, mapper)  # mapped meanwhile, or there after all, or gone
    elif ahead.stride == 1:
        arena.readahead.of(mapper).brought(page, ahead, outcome.n_done)
    return True


def _neighbours(arena: ArenaPages, page: int, ahead: Ahead) -> PageRun:
    """Return the pages from `page` on that can be mapped along: resident, and as clean or dirty as it."""
    n_most = max(arena.settings.fault_around_pages, ahead.n if ahead.stride == 1 else 0)
    n = arena.table.run_length(page, n_most)
    is_clean = arena.table.units[page : page + n] != 0
    other = is_clean != is_clean[0]
    at = int(other.argmax())
    return PageRun(page, at if other[at] else n)


def _repair(arena: ArenaPages, page: int) -> Generator[Effect, Any, bool]:
    """Look whether a resident page is in the file; if it is not, it has become empty. True if it was not."""
    (present,) = yield Present(PageRun(page, 1))
    if present or arena.state[page] != _RESIDENT:
        return False
    arena.counts.repaired += 1
    pages = np.array([page])
    if arena.clean(page):
        arena.drop_copies(pages)
    arena.state[page] = _EMPTY
    arena.gave_up(pages)
    return True


def _refuse(arena: ArenaPages, mapper: Mapper, page: int) -> Generator[Effect, Any, None]:
    """Answer a fault with SIGBUS."""
    arena.counts.poisoned += 1
    outcome: Outcome = yield Poison(PageRun(page, 1), mapper)
    if outcome.errno:
        yield Wake(PageRun(page, 1), mapper)


def device_fault(arena: ArenaPages, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
    """Bring pages into the file and hold them; see `DeviceFaults`.

    What is there is held at once, so that room for the others is not made among them.
    """
    at, end, state = pages.first, pages.end, arena.state
    held = _Holds(arena, pages)
    held.hold(pages.n)
    while at < end:
        code = state[at]
        if code & BUSY:
            arena.counts.coalesced += 1
            yield Pause(arena.gate_of(at))
            continue
        if code == _RESIDENT:
            run = PageRun(at, arena.table.run_length(at, end - at))
            if write:
                arena.dirtied(run)
            at = run.end
            held.hold(at - pages.first)
            continue
        if code == _LOST:
            return held.give_up(at, Reason.LOST)
        came = yield from _bring_for_device(arena, PageRun(at, end - at), Effort.DEVICE, write=write)
        if came.reason is Reason.BUSY and pages.n > arena.budget.limit:
            return held.give_up(at, Reason.NO_ROOM)  # it is in its own way
        if came.reason is not None:
            return held.give_up(at, came.reason)
    return FaultPages(pages.n)


def settle(arena: ArenaPages, pages: PageRun, *, write: bool) -> Procedure[bool]:
    """Make pages such that a device can have them, as far as nothing is waited for; see `DeviceFaults`."""
    for page in range(pages.first, pages.end):
        if arena.state[page] != _RESIDENT:
            if not (yield from bring_at_once(arena, PageRun(page, 1), SERVER, write=write)):
                return False
        elif write:
            arena.dirtied(PageRun(page, 1))
    return True


class _Holds:
    """What of a run one device fault holds: each page once, whatever happens to it meanwhile."""

    def __init__(self, arena: ArenaPages, pages: PageRun) -> None:
        self._arena = arena
        self._pages = pages
        self._held = bytearray(pages.n)

    def hold(self, n: int) -> None:
        """Hold what is resident among the first `n` pages."""
        first = self._pages.first
        if n == 1:  # the common case
            if self._arena.state[first] == _RESIDENT and not self._held[0]:
                self._held[0] = 1
                self._arena.residency.hold(PageRun(first, 1))
            return
        is_held = np.frombuffer(self._held, np.bool_)[:n]
        there = self._arena.table.states[first : first + n] == _RESIDENT
        for run in runs_of(np.flatnonzero(there & ~is_held)):
            self._arena.residency.hold(PageRun(first + run.first, run.n))
        is_held |= there

    def give_up(self, at: int, reason: Reason) -> FaultPages:
        """Let go of what lies behind page `at`, which cannot be had."""
        first = self._pages.first
        self._arena.counts.refused += reason is not Reason.BUSY
        is_held = np.frombuffer(self._held, np.bool_)
        for run in runs_of(at - first + np.flatnonzero(is_held[at - first :])):
            self._arena.residency.unhold(PageRun(first + run.first, run.n))
        return FaultPages(at - first, reason)


def _bring_for_device(
    arena: ArenaPages, wanted: PageRun, effort: Effort, *, write: bool
) -> Generator[Effect, Any, Came]:
    n_most = min(wanted.n, BATCH_PAGES, max(1, arena.budget.limit // 4))
    run = PageRun(wanted.first, arena.table.run_length(wanted.first, n_most))
    arena.counts.faults_device += run.n
    if arena.state[run.first] == _EMPTY:
        return (yield from bring_zeros(arena, run, SERVER, effort))
    return (yield from bring_swapped(arena, run, SERVER, effort, write=write))


def prefetch(arena: ArenaPages, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
    """Bring pages before they are asked for. Protected pages are not displaced; where there is no room it ends."""
    at, end, state = pages.first, pages.end, arena.state
    while at < end:
        code = state[at]
        if code & BUSY:
            yield Pause(arena.gate_of(at))
        elif code == _LOST:
            return FaultPages(at - pages.first, Reason.LOST)
        elif code == _RESIDENT:
            run = PageRun(at, arena.table.run_length(at, end - at))
            if write:
                arena.dirtied(run)
            at = run.end
        else:
            before = arena.counts.faults_device
            came = yield from _bring_for_device(arena, PageRun(at, end - at), Effort.AHEAD, write=write)
            arena.counts.prefetched += came.n
            arena.counts.faults_device = before
            if came.reason is not None:
                return FaultPages(at - pages.first, came.reason)
    return FaultPages(pages.n)
