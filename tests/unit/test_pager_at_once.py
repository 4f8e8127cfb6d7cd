"""Pages that a device gets without a wait: zeros, and copies in swap that are cached, while there is room."""

from __future__ import annotations

import pytest

from nopin.mm.effects import PageRun
from nopin.model.arena.storm import Storm, StormSettings


def storm_with_swapped(*pages: int, budget: int = 20, cached: bool = True) -> Storm:
    """Return an arena where pages were stored to, and left."""
    storm = Storm(1, StormSettings(budgets=(budget,)))
    storm.machine.is_cached = lambda: cached
    for page in pages:
        storm.store(1, page)
    assert storm.machine.run(storm.pager.give_back(len(pages))) == len(pages)
    return storm


def settle(storm: Storm, first: int, n: int = 1, *, write: bool = False) -> bool:
    settled: bool = storm.machine.run(storm.pager.settle(PageRun(first, n), write=write))
    return settled


@pytest.mark.parametrize("write", [False, True])
def test_a_cached_page_comes_with_two_effects_and_is_not_held(write: bool) -> None:
    storm = storm_with_swapped(3)
    before = storm.machine.n_effects
    assert settle(storm, 3, write=write)
    assert storm.machine.n_effects == before + 2
    assert storm.machine.present[3]
    assert storm.pager.n_held == 0
    assert storm.pager.settled(PageRun(3, 1), write=False)
    statistics = storm.pager.statistics()
    assert (statistics.swapped_in, statistics.faults_device) == (1, 1)
    assert (statistics.swapped_bytes == 0) == write, "a device that writes makes the copy stale"


def test_the_bytes_of_a_cached_page_are_those_that_left() -> None:
    storm = storm_with_swapped(3, 4)
    assert settle(storm, 3, 2)
    assert storm.read(1, 3)
    assert storm.read(1, 4)
    storm.check()


def test_what_is_on_a_medium_is_left_for_a_fault_that_waits() -> None:
    storm = storm_with_swapped(3, cached=False)
    assert not settle(storm, 3)
    assert not storm.machine.present[3]
    assert storm.budget.n_used == 0, "nothing is charged for what did not come"


def test_nobody_leaves_for_it() -> None:
    storm = storm_with_swapped(3, budget=2)
    for page in (5, 6):
        storm.store(1, page)
    assert not settle(storm, 3)
    assert storm.machine.present[[5, 6]].all()
    assert storm.budget.n_used == 2


def test_a_damaged_copy_is_left_for_a_fault_that_says_so() -> None:
    storm = storm_with_swapped(3)
    storm.machine.swap[:] = bytes(byte ^ 1 for byte in storm.machine.swap)
    assert not settle(storm, 3)
    assert not storm.machine.present[3]
    assert storm.budget.n_used == 0
    came = storm.machine.run(storm.pager.device_fault(PageRun(3, 1), write=False))
    assert came.n_done == 0
    assert storm.lost == {3}


def test_pages_on_their_way_are_waited_for_elsewhere() -> None:
    storm = storm_with_swapped(3, cached=False)
    storm.machine.begin(storm.pager.device_fault(PageRun(3, 1), write=False))
    storm.machine.is_cached = lambda: True
    assert not settle_now(storm, 3)


def settle_now(storm: Storm, page: int) -> bool:
    """Settle a page without letting anything else go on."""
    try:
        next(storm.pager.settle(PageRun(page, 1), write=False))
    except StopIteration as end:
        return bool(end.value)
    raise AssertionError("it asked for something")


@pytest.mark.parametrize("write", [False, True])
def test_a_process_gets_a_cached_page_by_two_effects(write: bool) -> None:
    storm = storm_with_swapped(3, 9)
    n_effects, before = storm.machine.n_effects, storm.pager.statistics()
    storm.machine.run(storm.pager.cpu_fault(1, 3, write=write, minor=False, protected=False))
    assert storm.machine.n_effects == n_effects + 2
    assert storm.machine.present[3]
    after = storm.pager.statistics()
    assert (after.swapped_in, after.faults_swap) == (1, before.faults_swap + 1)
    assert (after.swapped_bytes < before.swapped_bytes) == write, "it stays clean until it is stored to"
