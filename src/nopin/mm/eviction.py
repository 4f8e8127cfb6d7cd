"""Eviction: pages leave to make room.

The order of a batch, and why:

 1. **Choose** victims, and mark them busy: whoever needs one of them from here on pauses at the batch's gate.
 2. **Invalidate** the devices (RECLAIM). Their writes stop at once; what they wrote is told, and counts as dirty. What
    they refuse to give stays.
 3. **Write-protect** the dirty pages in every process. Stores wait from here on (a WP fault, which pauses at the gate),
    so the bytes are final. Clean pages are write-protected already: that is what clean means.
 4. **Look**: a page of zeros needs no copy, a clean page has one. The others are encoded with a checksum.
 5. **Write** them to swap. Reads by processes go on meanwhile, and see the same bytes.
 6. **Wait for the fences** of step 2: a frame is not given away while a device may still read it.
 7. **Note** in the table where the copies are; only then
 8. **punch** the pages out of the file, which also takes them out of every mapping. A server killed between the two
    leaves pages in the file with an entry: the file is right, the successor drops the entry.
 9. **Lift** the protection, whose markers outlive the page. A store that waited comes back as a fault on a hole, waits
    for the gate if it is quick, and is answered with a fresh copy: it is never lost.
10. End the invalidation, open the gate.

A write that fails, or finds no space, ends at step 5: the pages that needed it stay, dirty, their protection lifted.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from nopin.mm.arena_pages import ArenaPages, Transit
from nopin.mm.causes import Cause
from nopin.mm.effects import Effect, Open, PageRun, Procedure, Punch, Quiesce, Unprotect, WriteProtect, WriteSwap
from nopin.mm.notifier import Bracket
from nopin.mm.page_table import BUSY, PageState
from nopin.mm.residency import BATCH_PAGES, Pages, runs_of
from nopin.mm.space import Bytes
from nopin.mm.swap import UNIT_BYTES, Encoded, encode, n_units
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

_NONE = np.empty(0, np.int64)


def batch_pages(budget_pages: int) -> int:
    """Victims at once: a small budget is not emptied for one page."""
    return max(1, min(BATCH_PAGES, budget_pages // 8))


def evict(arena: ArenaPages, n_most: int, *, hot: bool = True) -> Procedure[int]:
    """Make up to `n_most` pages leave; returns how many did: 0 when none can.

    Args:
        hot: protected pages may leave, too.
    """
    pages = arena.residency.victims(n_most, arena.notifiers.age, hot=hot)
    if not len(pages):
        return 0
    transit = arena.begin_transit(pages)
    bracket = arena.notifiers.invalidate_start([Range(*_bounds(run)) for run in runs_of(pages)], Cause.RECLAIM)
    kept = _kept(pages, bracket)
    arena.residency.spared(kept)
    pages = np.setdiff1d(pages, kept, assume_unique=True)
    gone = yield from _move_out(arena, pages, bracket)
    yield Quiesce(bracket.fences)
    yield from _give_frames_back(arena, gone)
    bracket.end()
    yield from _settle(arena, transit, np.setdiff1d(pages, gone, assume_unique=True), gone)
    return len(gone)


def _bounds(run: PageRun) -> tuple[int, int]:
    return run.first, run.end


def _kept(pages: Pages, bracket: Bracket) -> Pages:
    """Return the victims that devices refused to let go of."""
    if not bracket.kept:
        return _NONE
    kept = np.zeros(len(pages), np.bool_)
    for where in bracket.kept:
        kept[np.searchsorted(pages, where.start) : np.searchsorted(pages, where.end)] = True
    return pages[kept]


def _move_out(arena: ArenaPages, pages: Pages, bracket: Bracket) -> Generator[Effect, Any, Pages]:
    """Give every page that can a valid copy, or none because it is zeros; returns those that may leave."""
    written = [page for page in bracket.harvest.dirty if arena.table.unit[page]]
    if written:
        arena.drop_copies(np.sort(np.array(written, np.int64)))
    _forget_copies_of_zeros(arena, pages)
    is_clean = arena.table.units[pages] != 0
    dirty = pages[~is_clean]
    for run in runs_of(dirty):
        yield WriteProtect(run)
    empty, full = _by_content(arena, dirty)
    saved = yield from _save(arena, full)
    counts = arena.counts
    counts.evicted_clean += int(is_clean.sum())
    counts.evicted_zero += len(empty)
    return np.sort(np.concatenate((pages[is_clean], empty, saved)))


def _forget_copies_of_zeros(arena: ArenaPages, pages: Pages) -> None:
    """Have clean pages count as dirty that hold zeros. Pages of zeros get no copy, so they held something else.

    It was taken out of the file unheard: by a process that punched it there, or that was killed inside of madvise.
    """
    clean = pages[arena.table.units[pages] != 0]
    suspects = clean[arena.frames.begin_with_zeros(clean)]
    if not len(suspects):
        return
    zeros, _ = _by_content(arena, suspects)
    if len(zeros):
        arena.drop_copies(zeros)
        arena.counts.repaired += len(zeros)


def _by_content(arena: ArenaPages, pages: Pages) -> tuple[Pages, Pages]:
    """Divide pages into those of zeros and the others."""
    full = [arena.frames.view(run).reshape(run.n, PAGE_BYTES).view(np.uint64).any(axis=1) for run in runs_of(pages)]
    is_full = np.concatenate(full) if full else np.empty(0, np.bool_)
    return pages[~is_full], pages[is_full]


def _save(arena: ArenaPages, pages: Pages) -> Generator[Effect, Any, Pages]:
    """Write pages to swap and note where; returns those for which that was done."""
    if not len(pages):
        return pages
    compress = arena.settings.compress
    encoded: list[Encoded] = []
    for run in runs_of(pages):
        view = arena.frames.view(run)
        encoded += [encode(view[at : at + PAGE_BYTES], compress=compress) for at in range(0, len(view), PAGE_BYTES)]
    units = _allocate(arena, encoded)
    n_placed = len(units)
    n_written = 0
    for start, end in _adjoining(units, encoded):
        pieces = _joined([each.data for each in encoded[start:end]])
        problem = yield WriteSwap(units[start] * UNIT_BYTES, pieces)
        if problem:
            arena.counts.swap_errors += 1
            break
        n_written = end
    for unit, each in zip(units[n_written:], encoded[n_written:n_placed], strict=True):
        arena.swap.free(unit, n_units(each.stored))
    done = pages[:n_written]
    if n_written:
        good = encoded[:n_written]
        stored = np.array([each.stored for each in good], np.uint16)
        crcs = np.array([each.crc for each in good], np.uint32)
        arena.table.remember(done, np.array(units[:n_written], np.uint32), stored, crcs)
        arena.counts.swapped_out += n_written
        arena.counts.swap_written_bytes += int(stored.sum())
    return done


def _allocate(arena: ArenaPages, encoded: Sequence[Encoded]) -> list[int]:
    """Find space for as many as there is: all in a row, or one by one; spare copies make way. Says when it is full."""
    swap = arena.swap
    sizes = [n_units(each.stored) for each in encoded]
    first = swap.allocate(sum(sizes))
    if first is not None:
        return [first, *(first + np.cumsum(sizes[:-1])).tolist()]
    units: list[int] = []
    for size in sizes:
        unit = swap.allocate(size)
        if unit is None and arena.drop_spare_copies():
            unit = swap.allocate(size)
        if unit is None:
            arena.counts.swap_full += 1
            if not arena.swap_is_full:
                arena.swap_is_full = True
                arena.news.swap_full()
            break
        units.append(unit)
    return units


def _adjoining(units: Sequence[int], encoded: Sequence[Encoded]) -> list[tuple[int, int]]:
    """Cut into parts [start, end) whose copies lie one after the other."""
    cuts = [0]
    for at in range(1, len(units)):
        if units[at] != units[at - 1] + n_units(encoded[at - 1].stored):
            cuts.append(at)
    return list(zip(cuts, [*cuts[1:], len(units)], strict=True)) if units else []


def _joined(pieces: list[Bytes]) -> list[Bytes]:
    """Join pieces that lie side by side in memory: raw pages of a run go as one."""
    joined: list[Bytes] = []
    for piece in pieces:
        if joined and piece.base is not None and piece.base is joined[-1].base and _follows(piece, joined[-1]):
            whole = joined.pop()
            start = whole.ctypes.data - piece.base.ctypes.data
            piece = piece.base[start : start + len(whole) + len(piece)]
        joined.append(piece)
    return joined


def _follows(piece: Bytes, before: Bytes) -> bool:
    return piece.ctypes.data == before.ctypes.data + len(before)


def _give_frames_back(arena: ArenaPages, pages: Pages) -> Generator[Effect, Any, None]:
    """Punch, then lift what is left of protection."""
    runs = runs_of(pages)
    for run in runs:
        yield Punch(run)
    for run in runs:
        yield Unprotect(run)


def _settle(arena: ArenaPages, transit: Transit, stayed: Pages, gone: Pages) -> Generator[Effect, Any, None]:
    """Make the table say what is, let the pages that stayed be written again, open the gate."""
    table = arena.table
    table.states[gone] = np.where(table.units[gone] != 0, PageState.SWAPPED, PageState.EMPTY) | BUSY
    gate = arena.end_transit(transit)
    arena.residency.evicted(gone)
    arena.residency.spared(stayed)
    arena.budget.charge(-len(gone))
    arena.counts.evicted += len(gone)
    for run in runs_of(stayed[table.units[stayed] == 0]):
        yield Unprotect(run)
    yield Open(gate)
