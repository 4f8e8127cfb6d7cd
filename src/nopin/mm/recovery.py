"""Recovery: a successor finds out what its killed predecessor knew.

The file is right about what is in it; the shared table says what the holes are (`mm.page_table` has the invariant). The
table lies in memory of the arena's owner and may say anything: an entry outside the swap file, or one that claims
another's space, is no entry but damage, and its page is lost, to its owner alone.

What a process was giving up is given up: its word may have been read, and nobody else will hear of it.

Nothing is known of who has what mapped how, so every page in the file counts as dirty and may be stored to.
"""

from __future__ import annotations

import numpy as np

from nopin.mm.arena_pages import ArenaPages
from nopin.mm.effects import PageRun, Present, Procedure, Punch, Unprotect
from nopin.mm.page_table import DOOMED_UNIT, LOST_UNIT, PageState
from nopin.mm.residency import runs_of
from nopin.mm.swap import n_units
from nopin.units import PAGE_BYTES


def recover(arena: ArenaPages) -> Procedure[None]:
    """Rebuild the state of an arena from its file and its shared table. Requires: nothing was done with it yet."""
    table = arena.table
    entries = table.load_shared()
    doomed = entries[table.units[entries] == DOOMED_UNIT]
    for run in runs_of(doomed):
        yield Punch(run)
    table.forget(doomed)  # not before: we may be killed as well
    entries = np.setdiff1d(entries, doomed, assume_unique=True)
    present = yield Present(PageRun(0, table.n_pages))
    resident = np.flatnonzero(present)
    stale = entries[present[entries]]
    table.forget(stale)
    holes = entries[~present[entries]]
    lost = table.units[holes] == LOST_UNIT
    taken = [(unit, n_units(stored)) for unit, stored in _extents(arena, holes[~lost])]
    good = np.array(arena.swap.rebuild(taken), np.bool_)
    table.states[holes[~lost][good]] = PageState.SWAPPED
    for page in np.concatenate((holes[lost], holes[~lost][~good])).tolist():
        table.lose(page)
        arena.counts.lost += 1
    arena.budget.charge(len(resident))
    for run in runs_of(resident):
        arena.arrived(run)
    yield Unprotect(PageRun(0, table.n_pages))


def _extents(arena: ArenaPages, pages: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """Return (unit, bytes) of each entry; of those with an impossible length, nothing anywhere."""
    table = arena.table
    stored = table.stored[pages].astype(np.int64)
    possible = (stored > 0) & (stored <= PAGE_BYTES)
    return list(zip(np.where(possible, table.units[pages], 0).tolist(), stored.tolist(), strict=True))
