"""Bringing pages in: room first, then bytes, whoever asked.

A run of pages in one state is brought at once. It is charged before anything waits, so that two that come at the same
time do not both take the last room. Pages from swap are read in as few pieces as they lie in, checked one by one, and
put into the file whole: nobody ever sees half a page, also when the server is killed in between. Where their bytes are
cached nothing waits, and nobody can come between; only while they come from the medium the pages are busy.

What comes with the page that faulted is clean as long as nobody stores to it: it keeps its copy in swap, and is mapped
write-protected, so that the first store is heard.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.mm.arena_pages import ArenaPages
from nopin.mm.effects import (
    SERVER,
    Backoff,
    Effect,
    Fill,
    Mapper,
    Open,
    Outcome,
    PageRun,
    Pause,
    ReadCached,
    ReadSwap,
    Zero,
)
from nopin.mm.eviction import batch_pages, evict
from nopin.mm.page_table import BUSY, PageState
from nopin.mm.space import Bytes, Reason
from nopin.mm.swap import UNIT_BYTES, decode, n_intact, n_units
from nopin.units import PAGE_BYTES, US_NS


class Came(NamedTuple):
    """What became of an attempt to bring pages.

    Attributes:
        n: pages from the first that are resident now, mapped where they were wanted, and whose waiters are woken.
        reason: why none can be had, if so. With n = 0 and no reason, things have changed meanwhile: look again.
    """

    n: int
    reason: Reason | None = None


class Effort(Enum):
    """What room is worth."""

    DEMAND = "a thread waits at the page: try for as long as the settings say"
    DEVICE = "pages are held for it, and perhaps for others that wait for these: better let go of all, and try again"
    AHEAD = "nobody needs it yet: displace nothing that proved to be wanted, and do not wait"


_NOTHING = np.empty(0, np.uint8)
_NOT_DONE = Outcome(0, 0)
_EMPTY, _SWAPPED = int(PageState.EMPTY), int(PageState.SWAPPED)  # plain integers compare quicker
_FIRST_WAIT_NS = 200 * US_NS
_LAST_WAIT_NS = 20_000 * US_NS
_HOLDING_NS = 1_000 * US_NS
"""How long a device fault waits with pages held while others hold pages too."""


def make_room(arena: ArenaPages, n: int, effort: Effort) -> Generator[Effect, Any, Reason | None]:
    """Evict until `n` more pages fit; returns why that cannot be, or None.

    When nothing can leave, all is held for parked accesses, or refused by a device, or room is missing further up:
    each of it passes. Only with swap full, and nothing to be dropped, waiting is no use.

    Requires: the caller charges them before its next effect.
    """
    budget = arena.budget
    waited_ns, wait_ns, n_tried = 0, _FIRST_WAIT_NS, 0
    while budget.room < n:
        if n > budget.limit:
            return Reason.NO_ROOM
        wanted = max(n - budget.room, batch_pages(budget.limit))
        if (yield from evict(arena, wanted, hot=effort is not Effort.AHEAD)):
            continue
        if budget.room >= n:
            break
        gate = arena.any_gate()
        if gate is not None:
            yield Pause(gate)
            continue
        n_tried += wanted
        if arena.swap_is_full:
            if n_tried < budget.n_used:
                continue  # these need a copy; others may be clean, or zeros
            return Reason.SWAP_FULL
        if effort is Effort.AHEAD or waited_ns >= arena.settings.patience_ns:
            return Reason.NO_ROOM
        if effort is Effort.DEVICE and waited_ns >= _HOLDING_NS and arena.residency.n_held:
            return Reason.BUSY
        arena.news.pressure()  # perhaps other arenas hold what is missing
        yield Backoff(wait_ns)
        waited_ns, wait_ns = waited_ns + wait_ns, min(2 * wait_ns, _LAST_WAIT_NS)
    return None


def bring_zeros(arena: ArenaPages, run: PageRun, mapper: Mapper, effort: Effort) -> Generator[Effect, Any, Came]:
    """Make EMPTY pages resident and map them."""
    reason = yield from make_room(arena, run.n, effort)
    if reason is not None:
        return Came(0, reason)
    if arena.state[run.first] != PageState.EMPTY:
        return Came(0)  # others came while room was made
    run = PageRun(run.first, arena.table.run_length(run.first, run.n))
    arena.budget.charge(run.n)
    outcome: Outcome = yield Zero(run, mapper)
    return (yield from _placed(arena, run, outcome))


def _placed(arena: ArenaPages, run: PageRun, outcome: Outcome) -> Generator[Effect, Any, Came]:
    """Take note of how far a fill of charged pages came."""
    n_done, problem = outcome.n_done, outcome.errno
    unknown = int(problem == errno.EEXIST)  # a page nobody knew of, mapped nowhere by this: the file is right
    arena.counts.repaired += unknown
    arena.budget.charge(n_done + unknown - run.n)
    if n_done + unknown:
        arena.arrived(PageRun(run.first, n_done + unknown))
        arena.n_short_in_a_row = 0
        return Came(n_done)
    if problem == errno.EINTR:
        return Came(0)
    if problem != errno.ENOMEM:
        return Came(0, Reason.OWNER_GONE)
    arena.counts.short_of_memory += 1
    arena.n_short_in_a_row += 1
    if arena.n_short_in_a_row * _LAST_WAIT_NS > arena.settings.patience_ns:
        return Came(0, Reason.NO_ROOM)
    yield from evict(arena, batch_pages(arena.budget.limit))
    yield Backoff(_LAST_WAIT_NS)
    return Came(0)


def bring_at_once(arena: ArenaPages, one: PageRun, mapper: Mapper, *, write: bool) -> Generator[Effect, Any, bool]:
    """Make one page resident and map it, if nothing has to be waited for, or to leave for it; tell whether it is so.

    Two effects, both of them carried out at once, so nothing comes between and the page need not be marked. Whatever is
    special about it (no room, no frame, a damaged copy, a page nobody knew of) leaves all as it was, for
    `bring_zeros` or `bring_swapped` to find again and to deal with.
    """
    page, counts = one.first, arena.counts
    code = arena.state[page]
    if code not in (_EMPTY, _SWAPPED) or not arena.budget.take():
        return False
    outcome = _NOT_DONE
    if code == _EMPTY:
        outcome = yield Zero(one, mapper)
    else:
        table = arena.table
        stored = table.size[page]
        length = n_units(stored) * UNIT_BYTES
        found = yield ReadCached(table.unit[page] * UNIT_BYTES, length)
        data = None if found is None else decode(found, stored, table.crc[page])
        if data is not None:
            outcome = yield Fill(one, data, mapper, not write)
            counts.swapped_in += outcome.n_done
            counts.swap_read_bytes += length
    if not outcome.n_done:
        arena.budget.charge(-1)
        return False
    arena.n_short_in_a_row = 0
    arena.arrived_one(page)
    if write:
        arena.dirtied(one)
    if mapper == SERVER:
        counts.faults_device += 1
    elif code == _EMPTY:
        counts.faults_zero += 1
    else:
        counts.faults_swap += 1
    return True


def bring_swapped(
    arena: ArenaPages, run: PageRun, mapper: Mapper, effort: Effort, *, write: bool
) -> Generator[Effect, Any, Came]:
    """Make SWAPPED pages resident and map them.

    With `write` they count as dirty. Of damaged pages the first ends the run; itself the first, it is LOST afterwards.
    """
    reason = yield from make_room(arena, run.n, effort)
    if reason is not None:
        return Came(0, reason)
    if arena.state[run.first] != PageState.SWAPPED:
        return Came(0)
    run = PageRun(run.first, arena.table.run_length(run.first, run.n))
    arena.budget.charge(run.n)
    cached = yield from _read(arena, run, ReadCached)
    if cached is not None:
        data, n_good = cached
        if not n_good:
            arena.lose(run.first)
        return (yield from _put_in(arena, run, n_good, data, mapper, write=write))
    transit = arena.begin_transit(np.arange(run.first, run.end))
    read = yield from _read(arena, run, ReadSwap)
    assert read is not None, "it would have waited"
    data, n_good = read
    n_wanted = arena.n_unclaimed(transit)
    if n_wanted and not n_good:
        arena.lose(run.first)
    came = yield from _put_in(arena, run, min(n_good, n_wanted), data, mapper, write=write)
    yield Open(arena.end_transit(transit))
    return came


def _put_in(
    arena: ArenaPages, run: PageRun, n_good: int, data: Bytes, mapper: Mapper, *, write: bool
) -> Generator[Effect, Any, Came]:
    """Make the first `n_good` of charged pages from their bytes."""
    arena.budget.charge(n_good - run.n)
    if not n_good:
        return Came(0)
    good = PageRun(run.first, n_good)
    outcome: Outcome = yield Fill(good, data.data[: n_good * PAGE_BYTES], mapper, not write)
    came = yield from _placed(arena, good, outcome)
    if write or outcome.errno == errno.EEXIST:
        span = slice(good.first, good.end)
        written = (arena.table.states[span] & ~np.uint8(BUSY) == PageState.RESIDENT) & (arena.table.units[span] != 0)
        if written.any():
            arena.drop_copies(good.first + np.flatnonzero(written))
    arena.counts.swapped_in += n_good
    return came


def _read(
    arena: ArenaPages, run: PageRun, read: type[ReadCached | ReadSwap]
) -> Generator[Effect, Any, tuple[Bytes, int] | None]:
    """Read copies of pages until one is damaged; returns their bytes, one after the other, and how many are good.

    None: not all of them are cached, for `ReadCached`.
    """
    table, span = arena.table, slice(run.first, run.end)
    units, stored, crcs = table.units[span].tolist(), table.stored[span].tolist(), table.crcs[span].tolist()
    whole: Bytes | None = None
    at = n_bytes = 0
    for end in _cuts(table.units[span], table.stored[span]) if run.n > 1 else (1,):
        length = (units[end - 1] + n_units(stored[end - 1]) - units[at]) * UNIT_BYTES
        found = yield read(units[at] * UNIT_BYTES, length)
        if found is None:
            return None
        n_read = end - at
        if isinstance(found, int) and n_read > 1:  # some of them cannot be read; the one needed first perhaps can
            n_read, length = 1, n_units(stored[at]) * UNIT_BYTES
            found = yield read(units[at] * UNIT_BYTES, length)
        if isinstance(found, int):
            arena.counts.swap_errors += 1
            break
        n_bytes += length
        if n_read == run.n and length == run.n * PAGE_BYTES:  # it is just what is wanted, as it lies there
            whole, at = found, n_intact(found, crcs)
            break
        if whole is None:
            whole = np.empty(run.n * PAGE_BYTES, np.uint8)
        into = whole[at * PAGE_BYTES : (at + n_read) * PAGE_BYTES]
        at += _decode(found, into, stored[at : at + n_read], crcs[at : at + n_read])
        if at < end:
            break
    arena.counts.swap_read_bytes += n_bytes
    return (whole if whole is not None else _NOTHING), at


def _decode(found: Bytes, into: Bytes, stored: list[int], crcs: list[int]) -> int:
    """Bring copies that lie one behind the other into place, until one is damaged; returns how many are good."""
    if min(stored) == PAGE_BYTES:
        into[:] = found
        return n_intact(into, crcs)
    start, target = 0, into.data
    for index, (n_bytes, crc) in enumerate(zip(stored, crcs, strict=True)):
        page = decode(found[start:], n_bytes, crc)
        if page is None:
            return index
        target[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] = page
        start += n_units(n_bytes) * UNIT_BYTES
    return len(stored)


def _cuts(units: NDArray[np.uint32], stored: NDArray[np.uint16]) -> list[int]:
    """Return the index after each row of copies that lie one behind the other."""
    ends = units[:-1] + (stored[:-1].astype(np.uint32) + (UNIT_BYTES - 1)) // UNIT_BYTES
    return [*(np.flatnonzero(units[1:] != ends) + 1).tolist(), len(units)]
