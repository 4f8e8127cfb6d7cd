"""Would the oracle notice? Each mutant breaks one rule that keeps bytes safe, and must be caught.

A property test that passes says little unless it fails when the code is wrong. So each rule that `mm/pager.py` and the
files it names rely upon is broken here, one at a time, and random work on the machine in memory must end in a failed
check within a bounded number of seeds: a stale or lost byte, a touch of a page that is not there, books that do not
agree, or work that never ends. The same seeds pass with the code as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

from nopin.iommu.mirror import Mirror
from nopin.mm import bring, eviction, faults, recovery, swap
from nopin.mm.arena_pages import ArenaPages, Transit
from nopin.mm.effects import (
    Effect,
    Fill,
    MapIn,
    Open,
    PageRun,
    Unprotect,
    WriteProtect,
)
from nopin.mm.notifier import Bracket, Notifiers
from nopin.mm.page_table import BUSY, PageTable
from nopin.mm.residency import Budget, Pages
from nopin.mm.subscriber import Invalidation
from nopin.mm.swap import SwapSpace, n_units
from nopin.ranges import Range
from nopin.testing.arena_storm import Storm

N_SEEDS = 12
Mutant = Callable[[pytest.MonkeyPatch], None]
Work = Callable[[int], None]
Steps = Generator[Effect, Any, Any]


def without(steps: Steps, kind: type[Effect]) -> Steps:
    """Run a procedure and leave out effects of one kind, whose result nobody looks at."""
    result = None
    while True:
        try:
            effect = steps.send(result)
        except StopIteration as stop:
            return stop.value
        result = None if isinstance(effect, kind) else (yield effect)


# Work


def plain_work(seed: int) -> None:
    finish(storm_of(seed))


def work_with_kills(seed: int) -> None:
    """Kill the server between two effects, three times."""
    storm = Storm(seed)
    for _ in range(3):
        kill_after(storm, storm.random.randrange(20, 300))
        with contextlib.suppress(ServerKilled):
            storm.blow(200)
        storm.machine.after_effect = lambda: None
        storm.take_over()
    finish(storm)
    assert not storm.lost


def work_with_a_bad_medium(seed: int) -> None:
    """Flip a bit in each unit of swap: pages may be lost, and none may be wrong."""
    storm = storm_of(seed)
    storm.calm()
    for at in range(5, len(storm.machine.swap), 512):
        storm.machine.swap[at] ^= 0x10
    storm.read_everything()


class ServerKilled(BaseException):
    """Stands for SIGKILL."""


def kill_after(storm: Storm, n_effects: int) -> None:
    last = storm.machine.n_effects + n_effects

    def after_effect() -> None:
        if storm.machine.n_effects >= last:
            raise ServerKilled

    storm.machine.after_effect = after_effect


def storm_of(seed: int) -> Storm:
    storm = Storm(seed)
    storm.blow(250)
    return storm


def finish(storm: Storm) -> None:
    storm.calm()
    storm.read_everything()


# Mutants: eviction


def stores_go_on_while_a_page_is_copied(patch: pytest.MonkeyPatch) -> None:
    original = eviction._move_out
    patch.setattr(eviction, "_move_out", lambda *args: without(original(*args), WriteProtect))


def protection_comes_after_the_copy(patch: pytest.MonkeyPatch) -> None:
    original = eviction._move_out

    def late(arena: ArenaPages, pages: Pages, bracket: Bracket) -> Steps:
        gone = yield from without(original(arena, pages, bracket), WriteProtect)
        yield WriteProtect(PageRun(0, arena.table.n_pages))
        return gone

    patch.setattr(eviction, "_move_out", late)


def dirty_bits_are_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    original = eviction._move_out

    def deaf(arena: ArenaPages, pages: Pages, bracket: Bracket) -> Steps:
        bracket.harvest.dirty.clear()
        return original(arena, pages, bracket)

    patch.setattr(eviction, "_move_out", deaf)


def device_faults_do_not_say_that_they_write(patch: pytest.MonkeyPatch) -> None:
    for name in ("device_fault", "settled"):
        original = getattr(faults, name)
        patch.setattr(
            faults, name, lambda arena, pages, *, write, original=original: original(arena, pages, write=False)
        )


def what_devices_write_is_not_heard_at_all(patch: pytest.MonkeyPatch) -> None:
    dirty_bits_are_not_asked_for(patch)
    device_faults_do_not_say_that_they_write(patch)


def pages_are_punched_before_their_entries_are_written(patch: pytest.MonkeyPatch) -> None:
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


def whoever_waits_for_an_eviction_waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    original = eviction._settle
    patch.setattr(eviction, "_settle", lambda *args: without(original(*args), Open))


def frames_given_back_are_not_taken_off_the_books(patch: pytest.MonkeyPatch) -> None:
    charge = Budget.charge

    def only_up(budget: Budget, n_pages: int) -> None:
        charge(budget, max(n_pages, 0))

    patch.setattr(Budget, "charge", only_up)


# Mutants: bringing pages in


def clean_pages_are_brought_without_protection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bring, "Fill", lambda run, data, mapper, _protect: Fill(run, data, mapper, protect=False))


def clean_pages_are_mapped_without_protection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(faults, "MapIn", lambda run, mapper, _protect: MapIn(run, mapper, protect=False))


def the_first_store_to_a_clean_page_is_not_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ArenaPages, "dirtied", lambda _arena, _run: None)


def copies_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(swap, "page_crc", lambda _page: 0)


def pages_on_their_way_are_not_marked(patch: pytest.MonkeyPatch) -> None:
    original = ArenaPages.begin_transit

    def unmarked(arena: ArenaPages, pages: Pages) -> Transit:
        transit = original(arena, pages)
        arena.table.states[pages] &= ~np.uint8(BUSY)
        return transit

    patch.setattr(ArenaPages, "begin_transit", unmarked)


# Mutants: swap space and table


def space_is_given_back_while_its_copy_counts(patch: pytest.MonkeyPatch) -> None:
    original = ArenaPages.arrived

    def early(arena: ArenaPages, run: PageRun) -> None:
        original(arena, run)
        for page in range(run.first, run.end):
            if arena.clean(page):
                arena.swap.free(int(arena.table.units[page]), n_units(int(arena.table.stored[page])))

    patch.setattr(ArenaPages, "arrived", early)


def space_in_use_is_given_out_again(patch: pytest.MonkeyPatch) -> None:
    original = SwapSpace.allocate

    def forgetful(space: SwapSpace, n: int) -> int | None:
        space._end = 1
        return original(space, n)

    patch.setattr(SwapSpace, "allocate", forgetful)


def entries_outlive_their_pages(patch: pytest.MonkeyPatch) -> None:
    def only_here(table: PageTable, pages: Pages) -> None:
        table.units[pages] = 0

    patch.setattr(PageTable, "forget", only_here)


def a_successor_believes_entries_of_pages_in_the_file(patch: pytest.MonkeyPatch) -> None:
    original = recovery.recover

    def believing(arena: ArenaPages) -> Steps:
        vars(arena.table)["forget"] = lambda _pages: None
        yield from original(arena)
        del vars(arena.table)["forget"]

    patch.setattr(recovery, "recover", believing)


def a_successor_takes_all_swap_for_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SwapSpace, "rebuild", lambda _space, taken: [True] * len(taken))


# Mutants: notifiers and the mirror


def only_the_first_page_of_a_range_is_invalidated(patch: pytest.MonkeyPatch) -> None:
    original = Notifiers.invalidate_start

    def short(notifiers: Notifiers, ranges: Any, *args: Any, **named: Any) -> Bracket:
        return original(notifiers, [Range(each.start, each.start + 1) for each in ranges], *args, **named)

    patch.setattr(Notifiers, "invalidate_start", short)


def entries_stay_when_their_pages_go(patch: pytest.MonkeyPatch) -> None:
    def deaf(_mirror: Mirror, _event: Invalidation) -> None:
        return

    patch.setattr(Mirror, "invalidate_start", deaf)


def a_fill_installs_what_has_become_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Notifiers, "read_retry", lambda _notifiers, _reading: False)


MUTANTS: list[tuple[Mutant, Work]] = [
    (stores_go_on_while_a_page_is_copied, plain_work),
    (protection_comes_after_the_copy, plain_work),
    (what_devices_write_is_not_heard_at_all, plain_work),
    (pages_are_punched_before_their_entries_are_written, work_with_kills),
    (whoever_waits_for_an_eviction_waits_for_ever, plain_work),
    (frames_given_back_are_not_taken_off_the_books, plain_work),
    (clean_pages_are_brought_without_protection, plain_work),
    (clean_pages_are_mapped_without_protection, plain_work),
    (the_first_store_to_a_clean_page_is_not_noted, plain_work),
    (copies_are_not_checked, work_with_a_bad_medium),
    (pages_on_their_way_are_not_marked, plain_work),
    (space_is_given_back_while_its_copy_counts, plain_work),
    (space_in_use_is_given_out_again, plain_work),
    (entries_outlive_their_pages, work_with_kills),
    (a_successor_believes_entries_of_pages_in_the_file, work_with_kills),
    (a_successor_takes_all_swap_for_free, work_with_kills),
    (only_the_first_page_of_a_range_is_invalidated, plain_work),
    (entries_stay_when_their_pages_go, plain_work),
    (a_fill_installs_what_has_become_stale, plain_work),
]


@pytest.mark.parametrize(("mutant", "work"), MUTANTS, ids=lambda each: each.__name__)
def test_a_broken_rule_is_caught(mutant: Mutant, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in range(N_SEEDS):
        try:
            work(seed)
        except AssertionError:
            return
    pytest.fail(f"{N_SEEDS} runs saw nothing wrong")


@pytest.mark.parametrize("work", [plain_work, work_with_kills, work_with_a_bad_medium])
def test_the_same_work_passes_with_the_code_as_it_is(work: Work) -> None:
    for seed in range(N_SEEDS):
        work(seed)


def test_protection_that_stays_too_long_costs_faults_and_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    original = eviction._give_frames_back
    monkeypatch.setattr(eviction, "_give_frames_back", lambda *args: without(original(*args), Unprotect))
    for seed in range(N_SEEDS):
        plain_work(seed)


@pytest.mark.parametrize("mutant", [dirty_bits_are_not_asked_for, device_faults_do_not_say_that_they_write])
def test_device_writes_are_heard_in_two_ways_and_either_is_enough(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    for seed in range(N_SEEDS):
        plain_work(seed)
