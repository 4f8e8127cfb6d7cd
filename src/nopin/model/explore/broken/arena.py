"""Mutants of the pager: eviction, bringing pages in, swap, recovery. See `mm/pager.py` for the rules they break."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from nopin.mm import bring, eviction, faults, giving_up, recovery, swap
from nopin.mm.arena_pages import ArenaPages, Transit
from nopin.mm.effects import Effect, Fill, MapIn, Open, PageRun, Punch, Unprotect, WriteProtect
from nopin.mm.notifier import Bracket
from nopin.mm.page_table import BUSY, PageTable
from nopin.mm.pager import Pager
from nopin.mm.residency import Budget, Pages
from nopin.mm.swap import SwapSpace, n_units
from nopin.model.arena.machine import ArenaMachine
from nopin.model.explore.mutants import Patch, mutant

Steps = Generator[Effect, Any, Any]
_recover = recovery.recover


def without(steps: Steps, kind: type[Effect]) -> Steps:
    """Run a procedure and leave out effects of one kind, whose result nobody looks at."""
    result = None
    while True:
        try:
            effect = steps.send(result)
        except StopIteration as stop:
            return stop.value
        result = None if isinstance(effect, kind) else (yield effect)


# Eviction


@mutant("arena_store_vs_evict")
def stores_go_on_while_a_page_is_copied(patch: Patch) -> None:
    """A dirty page is write-protected before its bytes are copied out."""
    original = eviction._move_out
    patch.setattr(eviction, "_move_out", lambda *args: without(original(*args), WriteProtect))


@mutant("arena_store_vs_evict")
def protection_comes_after_the_copy(patch: Patch) -> None:
    """A dirty page is write-protected before its bytes are copied out, not after."""
    original = eviction._move_out

    def late(arena: ArenaPages, pages: Pages, bracket: Bracket) -> Steps:
        gone = yield from without(original(arena, pages, bracket), WriteProtect)
        yield WriteProtect(PageRun(0, arena.table.n_pages))
        return gone

    patch.setattr(eviction, "_move_out", late)


def dirty_bits_are_not_asked_for(patch: Patch) -> None:
    """Half of the next one, which does no harm alone."""
    move_out = eviction._move_out

    def deaf(arena: ArenaPages, pages: Pages, bracket: Bracket) -> Steps:
        bracket.harvest.dirty.clear()
        return move_out(arena, pages, bracket)

    patch.setattr(eviction, "_move_out", deaf)


def device_faults_do_not_say_that_they_write(patch: Patch) -> None:
    """The other half."""
    device_fault, settled = faults.device_fault, Pager.settled
    patch.setattr(faults, "device_fault", lambda arena, pages, *, write: device_fault(arena, pages, write=False))
    patch.setattr(Pager, "settled", lambda pager, pages, *, write: settled(pager, pages, write=False))


@mutant("arena_device_store_vs_evict", "arena_device_store_vs_prefetch")
def what_devices_write_is_not_heard(patch: Patch) -> None:
    """A page that a device wrote counts as dirty: by its fault, and by its dirty bit."""
    dirty_bits_are_not_asked_for(patch)
    device_faults_do_not_say_that_they_write(patch)


@mutant("arena_evict_vs_takeover")
def pages_are_punched_before_their_entries_are_written(patch: Patch) -> None:
    """A copy is complete and noted before its page is punched: a successor knows nothing else."""
    late: list[tuple[PageTable, tuple[Any, ...]]] = []
    remember, settle = PageTable.remember, eviction._settle

    def only_here(table: PageTable, pages: Pages, units: Any, stored: Any, crcs: Any) -> None:
        table.units[pages], table.stored[pages], table.crcs[pages] = units, stored, crcs
        late.append((table, (pages, units, stored, crcs)))

    def shared_now(arena: ArenaPages, *args: Any) -> Steps:
        for table, entries in late:
            if table is arena.table:
                remember(table, *entries)
        late.clear()
        return settle(arena, *args)

    patch.setattr(PageTable, "remember", only_here)
    patch.setattr(eviction, "_settle", shared_now)


@mutant("arena_store_vs_evict")
def whoever_waits_for_an_eviction_waits_for_ever(patch: Patch) -> None:
    """The gate of pages on their way is opened when they have arrived."""
    original = eviction._settle
    patch.setattr(eviction, "_settle", lambda *args: without(original(*args), Open))


@mutant("arena_evict_vs_evict", "arena_read_vs_evict")
def frames_given_back_are_not_taken_off_the_books(patch: Patch) -> None:
    """What leaves is no longer charged."""
    charge = Budget.charge

    def only_up(budget: Budget, n_pages: int) -> None:
        charge(budget, max(n_pages, 0))

    patch.setattr(Budget, "charge", only_up)


# Giving up


@mutant("arena_device_store_after_remove")
def devices_hear_of_giving_up_late(patch: Patch) -> None:
    """Devices hear of pages given up before those who have some of them on their way are waited for."""
    _take_from_devices(patch, before_others=False)


@mutant("arena_device_store_after_remove")
def devices_hear_of_giving_up_when_it_is_dealt_with(patch: Patch) -> None:
    """Devices hear of pages given up when a process's word is read, also if the rest of the answer has to wait."""
    _take_from_devices(patch, before_others=True)


def _take_from_devices(patch: Patch, *, before_others: bool) -> None:
    """Tell devices in the procedure, not before."""
    let_go, take, wait = giving_up._let_go, giving_up._take, giving_up._those_before

    def later(arena: ArenaPages, transit: Transit, pages: Any) -> Steps:
        if not before_others:
            yield from wait(arena, transit)
        yield from take(arena, transit, let_go(arena, pages))

    patch.setattr(giving_up, "_let_go", lambda _arena, pages: pages)
    patch.setattr(giving_up, "_take", later)


@mutant("arena_store_after_remove_vs_read")
def a_fill_goes_on_although_a_message_was_read(patch: Patch) -> None:
    """A fill ends when a message had to be read on its way: perhaps these pages are given up by it."""
    read = ArenaMachine._read_on_the_way
    patch.setattr(ArenaMachine, "_read_on_the_way", lambda machine, number: read(machine, number) and False)
    arrivals_take_claims_off(patch)


def arrivals_take_claims_off(patch: Patch) -> None:
    """The other half: a page that arrives stays busy for whoever has claimed it meanwhile."""
    arrived, arrived_one = ArenaPages.arrived, ArenaPages.arrived_one

    def several(arena: ArenaPages, run: PageRun) -> None:
        arrived(arena, run)
        arena.table.states[run.first : run.end] &= ~np.uint8(BUSY)

    def one(arena: ArenaPages, page: int) -> None:
        arrived_one(arena, page)
        arena.table.states[page] &= ~np.uint8(BUSY)

    patch.setattr(ArenaPages, "arrived", several)
    patch.setattr(ArenaPages, "arrived_one", one)


@mutant("arena_remove_vs_takeover")
def a_successor_finds_copies_of_what_was_given_up(patch: Patch) -> None:
    """Copies of pages that a process was told are given up are no copies to a successor either."""
    patch.setattr(PageTable, "doom", lambda _table, pages: pages[:0])


@mutant("arena_remove_vs_takeover")
def what_is_given_up_is_noted_when_its_word_has_been_read(patch: Patch) -> None:
    """What a process gives up is noted for a successor before its word is read, because then it goes on."""
    patch.setattr(giving_up, "expect", lambda _arena, _runs: np.empty(0, np.int64))


@mutant("arena_remove_vs_takeovers_and_evict")
def a_successor_leaves_doomed_pages_in_the_file(patch: Patch) -> None:
    """A successor gives doomed pages up: their process may not have come to that yet, and they would go to swap."""
    patch.setattr(recovery, "recover", lambda arena: without(_recover(arena), Punch))


@mutant("arena_store_after_remove_vs_takeover")
def pages_given_up_stay_doomed(patch: Patch) -> None:
    """Pages are pardoned once they are given up: what is stored there from then on is there to stay."""
    patch.setattr(PageTable, "pardon", lambda _table, _pages: None)


# Bringing pages in


@mutant("arena_read_vs_store", "arena_clean_store_vs_evict")
def clean_pages_are_brought_without_protection(patch: Patch) -> None:
    """A page with a valid copy is write-protected, so that the first store is heard."""
    patch.setattr(bring, "Fill", lambda run, data, mapper, _protect: Fill(run, data, mapper, protect=False))


@mutant("arena_read_vs_map", "arena_map_vs_evict")
def clean_pages_are_mapped_without_protection(patch: Patch) -> None:
    """A page with a valid copy is mapped write-protected in every process that maps it later, too."""
    patch.setattr(faults, "MapIn", lambda run, mapper, _protect: MapIn(run, mapper, protect=False))


@mutant("arena_clean_store_vs_evict")
def the_first_store_to_a_clean_page_is_not_noted(patch: Patch) -> None:
    """The first store to a clean page gives its copy up."""
    patch.setattr(ArenaPages, "dirtied", lambda _arena, _run: None)


@mutant("arena_bad_medium")
def copies_are_not_checked(patch: Patch) -> None:
    """A copy is believed only if its checksum is right."""
    patch.setattr(swap, "page_crc", lambda _page: 0)


@mutant("arena_store_vs_evict", "arena_read_vs_evict", "arena_evict_vs_evict")
def pages_on_their_way_are_not_marked(patch: Patch) -> None:
    """Pages on their way belong to one procedure; all others wait."""
    original = ArenaPages.begin_transit

    def unmarked(arena: ArenaPages, pages: Pages) -> Transit:
        transit = original(arena, pages)
        arena.table.states[pages] &= ~np.uint8(BUSY)
        return transit

    patch.setattr(ArenaPages, "begin_transit", unmarked)


# Swap space and the table


@mutant("arena_read_vs_read", "arena_read_vs_evict")
def space_is_given_back_while_its_copy_counts(patch: Patch) -> None:
    """Space in swap is given back after the entry that names it is gone."""
    original = ArenaPages.arrived

    def early(arena: ArenaPages, run: PageRun) -> None:
        original(arena, run)
        for page in range(run.first, run.end):
            if arena.clean(page):
                arena.swap.free(int(arena.table.units[page]), n_units(int(arena.table.stored[page])))

    patch.setattr(ArenaPages, "arrived", early)


@mutant("arena_evict_vs_evict", "arena_first_store_vs_evict")
def space_in_use_is_given_out_again(patch: Patch) -> None:
    """Each unit of swap holds one copy."""
    original = SwapSpace.allocate

    def forgetful(space: SwapSpace, n: int) -> int | None:
        space._end = 1
        return original(space, n)

    patch.setattr(SwapSpace, "allocate", forgetful)


@mutant("arena_discard_vs_takeover", "arena_remove_vs_takeover")
def entries_outlive_their_pages(patch: Patch) -> None:
    """An entry of the shared table goes before its page's meaning does."""

    def only_here(table: PageTable, pages: Pages) -> None:
        table.units[pages] = 0

    patch.setattr(PageTable, "forget", only_here)
    patch.setattr(PageTable, "pardon", lambda _table, _pages: None)


@mutant("arena_store_vs_takeover")
def a_successor_believes_entries_of_pages_in_the_file(patch: Patch) -> None:
    """The file is the truth: a page in it is right, whatever its entry says."""
    original = recovery.recover

    def believing(arena: ArenaPages) -> Steps:
        vars(arena.table)["forget"] = lambda _pages: None
        yield from original(arena)
        del vars(arena.table)["forget"]

    patch.setattr(recovery, "recover", believing)


@mutant("arena_evict_vs_takeover", "arena_first_store_vs_takeover")
def a_successor_takes_all_swap_for_free(patch: Patch) -> None:
    """A successor keeps the space of copies it has found."""
    patch.setattr(SwapSpace, "rebuild", lambda _space, taken: [True] * len(taken))


@mutant("arena_clean_store_vs_dontneed", "arena_clean_store_vs_evict")
def stores_stay_forbidden_where_pages_have_left(patch: Patch) -> None:
    """Markers of protection are lifted from pages that have left, or a store there is refused for ever."""
    patch.setattr(faults, "Unprotect", _unprotect_nothing)


def _unprotect_nothing(run: PageRun, mapper: int | None = None) -> Unprotect:
    return Unprotect(PageRun(run.first, 0), mapper)
