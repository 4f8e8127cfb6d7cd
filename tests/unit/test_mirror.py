"""The mirror of one device: what may be accessed, how entries come and go, and what is told of their use."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.iommu.mirror import ATTEMPTS, CHUNK_PAGES, FIRST_BACKOFF_NS
from nopin.iommu.reclaimed import Reclaimed
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import Backoff, PageRun, ReadSwap
from nopin.mm.space import Reason
from nopin.mm.subscriber import Harvest
from nopin.ranges import Range
from nopin.testing.paged_arena import PagedArena
from nopin.units import PAGE_BYTES, S_NS


def filled(*runs: tuple[int, int], write: bool = False, n_pages: int = 2048) -> PagedArena:
    """An arena some pages of which are in the mirror, held by nobody."""
    arena = PagedArena(n_pages)
    for first, n in runs:
        pages = PageRun(first, n)
        arena.mirror.unhold(pages, arena.run(arena.mirror.fill(pages, write=write)))
    return arena


def invalidate(arena: PagedArena, cause: Cause, *ranges: Range) -> Harvest:
    bracket = arena.notifiers.invalidate_start(ranges, cause)
    bracket.end()
    arena.mirror.check()
    return bracket.harvest


def test_nothing_may_be_used_that_was_not_filled() -> None:
    mirror = filled((10, 3)).mirror
    assert mirror.use(10, 3, write=False)
    assert not mirror.use(9, 2, write=False)
    assert not mirror.use(12, 2, write=False)
    assert not mirror.use(5000, 1, write=False)
    assert not mirror.use(10, 1, write=True), "a read fault gives no right to write"
    assert [mirror.n_held(first, 5, write=False) for first in (8, 10, 12)] == [0, 3, 1]
    assert mirror.n_missing(9, 5, write=False) == 2


def test_a_read_entry_is_upgraded_by_a_write_fault_and_not_downgraded_by_a_read_fault() -> None:
    arena = filled((0, 2))
    arena.run(arena.mirror.fill(PageRun(1, 1), write=True))
    arena.run(arena.mirror.fill(PageRun(0, 2), write=False))
    assert [arena.mirror.use(page, 1, write=True) for page in (0, 1)] == [False, True]
    assert arena.mirror.statistics().installed == 2


def test_runs_across_chunks_are_used_whole_or_not_at_all() -> None:
    edge = CHUNK_PAGES
    arena = filled((edge - 2, 4), write=True)
    mirror = arena.mirror
    assert mirror.use(edge - 2, 4, write=True)
    assert not mirror.use(edge - 2, 5, write=True)
    assert mirror.use_pages(np.array([edge - 1, edge + 1]), write=True)
    assert invalidate(arena, Cause.RECLAIM, Range(0, 2048)).dirty == set(range(edge - 2, edge + 2))
    assert not mirror.use_pages(np.array([edge - 1, edge + 1]), write=False)


def test_scattered_pages_that_are_not_all_there_are_not_noted_as_used() -> None:
    arena = filled((3, 1), (700, 1))
    assert not arena.mirror.use_pages(np.array([3, 700, 701]), write=False)
    assert arena.notifiers.age([Range(0, 2048)]) == set()


def test_the_table_grows_with_what_is_used_and_shrinks_with_what_goes() -> None:
    arena = filled((0, 1), (1 << 20, 1), n_pages=1 << 20 | 1)
    assert arena.mirror.statistics().n_chunks == 2
    invalidate(arena, Cause.UNMAP, Range(0, 1 << 19))
    assert (arena.mirror.statistics().n_chunks, arena.mirror.statistics().n_present) == (1, 1)


# How entries go


@pytest.mark.parametrize("cause", [c for c in Cause if c not in (Cause.PROTECT, Cause.SYNC, Cause.RELEASE)])
def test_every_cause_that_takes_a_page_away_drops_its_entry_before_start_returns(cause: Cause) -> None:
    arena = filled((0, 4))
    bracket = arena.notifiers.invalidate_start([Range(1, 2), Range(3, 9)], cause)
    assert [arena.mirror.holds(page, 1, write=False) for page in range(4)] == [True, False, True, False]
    bracket.end()
    assert arena.mirror.statistics().invalidated == 2


def test_partial_invalidation_of_a_whole_chunk_keeps_the_rest() -> None:
    arena = filled((0, CHUNK_PAGES), write=True)
    invalidate(arena, Cause.UNMAP, Range(100, 101))
    assert arena.mirror.n_held(0, CHUNK_PAGES, write=True) == 100
    assert arena.mirror.holds(101, CHUNK_PAGES - 101, write=True)


def test_protection_takes_the_right_to_write_and_reads_go_on_hitting() -> None:
    arena = filled((0, 3), write=True)
    n_faults = arena.n_faults
    arena.mirror.touch(1, 1, write=True)
    assert invalidate(arena, Cause.PROTECT, Range(0, 2)).dirty == {1}
    assert arena.mirror.use(0, 3, write=False)
    assert [arena.mirror.use(page, 1, write=True) for page in range(3)] == [False, False, True]
    assert (arena.n_faults, arena.mirror.statistics().protected) == (n_faults, 2)


def test_sync_hands_dirty_pages_over_and_notices_the_next_write() -> None:
    arena = filled((0, 2), write=True)
    arena.mirror.touch(0, 1, write=True)
    assert invalidate(arena, Cause.SYNC, Range(0, 2)).dirty == {0}
    assert invalidate(arena, Cause.SYNC, Range(0, 2)).dirty == set()
    assert arena.mirror.use(0, 1, write=True), "no fault is needed to write again"
    assert invalidate(arena, Cause.RECLAIM, Range(0, 2)).dirty == {0}


def test_release_drops_everything_and_nothing_comes_in_again() -> None:
    arena = filled((0, 2), (600, 2))
    arena.notifiers.release()
    assert not arena.mirror.holds(0, 1, write=False)
    assert arena.run(arena.mirror.fill(PageRun(0, 1), write=False)) == FaultPages(0, Reason.OWNER_GONE)
    arena.mirror.check()


def test_a_closed_mirror_holds_nothing_and_hears_nothing() -> None:
    arena = filled((0, 2))
    arena.mirror.close()
    arena.mirror.close()
    assert (arena.mirror.holds(0, 1, write=False), len(arena.notifiers)) == (False, 0)


# Dirty and young


def test_the_bitmap_shows_exactly_the_pages_that_were_written() -> None:
    arena = filled((0, 1024), write=True)
    written = [3, 8, 511, 512, 1000]
    for page in written:
        arena.mirror.touch(page, 1, write=True)
    arena.mirror.touch(100, 50, write=False)
    bits = np.unpackbits(arena.mirror.dirty_bitmap(PageRun(1, 1500)), bitorder="little")
    assert (np.flatnonzero(bits) + 1).tolist() == written
    assert len(bits) == 1504


def test_young_pages_are_those_used_since_they_were_last_cleared() -> None:
    arena = filled((0, 8))
    arena.mirror.touch(2, 3, write=False)
    assert arena.notifiers.age([Range(0, 4)], clear=False) == {2, 3}
    assert arena.notifiers.age([Range(0, 4)]) == {2, 3}
    assert arena.notifiers.age([Range(0, 8)]) == {4}
    arena.mirror.touch(3, 1, write=False)
    assert invalidate(arena, Cause.RECLAIM, Range(0, 8)).young == {3}


def test_an_entry_that_comes_again_starts_clean() -> None:
    arena = filled((0, 1), write=True)
    arena.mirror.touch(0, 1, write=True)
    invalidate(arena, Cause.RECLAIM, Range(0, 1))
    arena.run(arena.mirror.fill(PageRun(0, 1), write=True))
    harvest = invalidate(arena, Cause.RECLAIM, Range(0, 1))
    assert (harvest.dirty, harvest.young) == (set(), set())


# Filling


def test_a_fill_waits_for_the_medium_and_returns_with_its_pages_held() -> None:
    arena = PagedArena(8)
    arena.store(4096, b"here")
    arena.evict_now()
    fill = arena.mirror.fill(PageRun(0, 2), write=False)
    assert next(fill) == ReadSwap(PAGE_BYTES, PAGE_BYTES)
    assert not arena.mirror.holds(1, 1, write=False)
    assert arena.run(fill) == FaultPages(2)
    assert arena.mirror.holds(0, 2, write=False)
    assert arena.held == {0: 1, 1: 1}
    arena.mirror.unhold(PageRun(0, 2), FaultPages(2))
    assert not arena.held


def test_what_came_before_a_lost_page_is_installed_and_the_lost_one_is_named() -> None:
    arena = PagedArena(8)
    arena.lost = {2}
    assert arena.run(arena.mirror.fill(PageRun(0, 5), write=False)) == FaultPages(2, Reason.LOST)
    assert arena.mirror.n_held(0, 5, write=False) == 2
    assert arena.held == {0: 1, 1: 1}


def test_a_fill_beaten_by_an_invalidation_of_its_pages_learns_again() -> None:
    arena = PagedArena(8)
    arena.store(0, b"old")
    arena.evict_now()
    fill = arena.mirror.fill(PageRun(0, 1), write=False)
    next(fill)
    arena.discard(PageRun(0, 1))
    assert arena.run(fill) == FaultPages(1)
    assert (arena.n_faults, arena.mirror.statistics().retries) == (2, 1)
    assert arena.held == {0: 1}, "the first attempt's hold was given back"
    assert arena.memory[0] == 0


def test_invalidations_elsewhere_never_make_a_fill_learn_again() -> None:
    arena = PagedArena(64)
    arena.store(0, b"x")
    arena.evict_now()
    running = arena.notifiers.invalidate_start([Range(30, 40)], Cause.RECLAIM)
    fill = arena.mirror.fill(PageRun(0, 1), write=False)
    next(fill)
    for page in range(1, 30):
        arena.discard(PageRun(page, 1))
    assert arena.run(fill) == FaultPages(1)
    running.end()
    assert (arena.n_faults, arena.mirror.statistics().retries) == (1, 0)


def test_a_fill_under_a_storm_ends_with_busy_in_bounded_time_and_holds_nothing() -> None:
    arena = PagedArena(8)
    storm = arena.notifiers.invalidate_start([Range(0, 8)], Cause.UNMAP)
    fill = arena.mirror.fill(PageRun(0, 1), write=False)
    waits = [effect.delay_ns for _ in range(ATTEMPTS) if isinstance(effect := next(fill), Backoff)]
    assert arena.run(fill) == FaultPages(0, Reason.BUSY)
    assert len(waits) == ATTEMPTS
    assert waits[0] == FIRST_BACKOFF_NS
    assert sum(waits) < S_NS
    assert (arena.held, arena.mirror.statistics().n_present) == ({}, 0)
    storm.end()
    assert arena.run(arena.mirror.fill(PageRun(0, 1), write=False)) == FaultPages(1)


def test_a_fill_given_up_half_way_leaves_nothing_behind() -> None:
    arena = PagedArena(8)
    arena.store(0, b"x")
    arena.evict_now()
    fill = arena.mirror.fill(PageRun(0, 1), write=False)
    next(fill)
    fill.close()
    assert (arena.held, arena.mirror.statistics().n_present) == ({}, 0)


def test_pages_that_became_present_are_pushed_only_to_a_mirror_that_asked() -> None:
    for wants in (True, False):
        arena = PagedArena(8, wants_updates=wants)
        arena.notifiers.update(Range(2, 4), write=False)
        assert arena.mirror.holds(2, 2, write=False) is wants
        assert not arena.mirror.holds(2, 1, write=True)
        assert arena.mirror.statistics().pushed == (2 if wants else 0)
        assert arena.mirror.statistics().installed == 0


def test_what_a_device_wrote_comes_back_from_swap() -> None:
    arena = filled((0, 2), write=True)
    arena.evict_now()
    arena.mirror.unhold(PageRun(0, 1), arena.run(arena.mirror.fill(PageRun(0, 1), write=True)))
    arena.dirty.clear()  # as after a write-back: only the mirror's own bit can tell of the next write
    assert arena.mirror.use(0, 1, write=True)
    arena.memory[:4] = 7
    arena.evict_now()
    assert arena.page(0)[:5] == bytes([7, 7, 7, 7, 0])


def test_what_is_reclaimed_is_counted_by_page_and_added_up_by_range() -> None:
    counts, truth = Reclaimed(), np.zeros(2000, np.int64)
    draw = np.random.default_rng(1)
    for _ in range(300):
        block = int(draw.integers(3))
        low, high = sorted(draw.integers(0, CHUNK_PAGES + 1, 2).tolist())
        present = draw.integers(0, 2, CHUNK_PAGES, np.uint8)
        counts.note(block, low, high, bytearray(present), int(present[low:high].sum()))
        truth[block * CHUNK_PAGES :][low:high] += present[low:high]
    for _ in range(300):
        first, end = sorted(draw.integers(0, 2001, 2).tolist())
        assert counts.count(PageRun(first, end - first)) == truth[first:end].sum()


def test_only_what_the_memory_manager_takes_counts_as_reclaimed() -> None:
    arena = filled((0, 8), (510, 4))
    invalidate(arena, Cause.RECLAIM, Range(0, 4), Range(511, 513))
    invalidate(arena, Cause.RECLAIM, Range(0, 4))
    invalidate(arena, Cause.TRUNCATE, Range(0, 2048))
    assert arena.mirror.reclaimed.count(PageRun(0, 2048)) == 6, "where there was an entry"
    assert arena.mirror.reclaimed.count(PageRun(2, 510)) == 3
