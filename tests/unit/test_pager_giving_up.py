"""Pages given up while others are at work on them, or beside them."""

from __future__ import annotations

import errno

import pytest

from nopin.mm.causes import Cause
from nopin.mm.effects import Outcome, PageRun
from nopin.mm.space import Bytes
from nopin.mm.subscriber import Answer, Fence, Invalidation, Subscriber
from nopin.model.arena.storm import Storm
from nopin.model.scheduler import Task
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, US_NS


class SlowDevice(Subscriber):
    """Needs time to let go of what is given up."""

    def __init__(self) -> None:
        self.fence = Fence()

    def invalidate_start(self, event: Invalidation) -> Answer:
        return self.fence if event.cause is Cause.TRUNCATE else None


@pytest.mark.parametrize("seed", range(12))
def test_a_store_after_madvise_remove_counts_although_an_eviction_was_under_way(seed: int) -> None:
    storm = Storm(seed)
    for page in range(6):
        storm.store(1, page)
    assert not storm.machine.begin(storm.pager.give_back(6)).ended, "the eviction is under way"
    pages = PageRun(0, 6)
    storm.machine.begin(storm.pager.removed(1, pages, dropped=True))
    storm.machine.zap(pages)  # the kernel does it now, and madvise returns
    storm.store(1, 3)
    assert storm.read(2, 3), "the oracle wants what was stored last"


@pytest.mark.parametrize("seed", range(12))
def test_pages_given_up_while_they_are_read_from_swap_do_not_come_back(seed: int) -> None:
    storm = Storm(seed)
    for page in range(6):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(6))
    storm.cached_share = 0.0
    assert not storm.machine.begin(storm.pager.prefetch(PageRun(0, 6), write=False)).ended, "the read is under way"
    storm.machine.run(storm.pager.discard(PageRun(0, 6)))
    assert not storm.machine.present[:6].any()
    assert storm.swap.n_used == 0


def test_a_page_beside_those_given_up_keeps_the_protection_that_makes_stores_heard() -> None:
    storm = Storm(1)
    device = SlowDevice()
    storm.notifiers.subscribe(Range(0, 40), device)
    storm.store(1, 0)
    discard = storm.machine.begin(storm.pager.discard(PageRun(0, 4)))
    assert type(discard.waits_for).__name__ == "Quiesce"
    storm.store(1, 2)  # for the first time, so it is none of what is given up
    storm.machine.run(storm.pager.give_back(1))
    assert storm.read(1, 2), "now it is there and has a valid copy"
    assert storm.table.unit[2]
    device.fence.signal()
    storm.calm()
    storm.store(1, 2)
    storm.machine.run(storm.pager.give_back(4))
    assert storm.read(1, 2)


def test_pages_are_taken_when_word_comes_and_what_is_stored_afterwards_stays() -> None:
    storm = Storm(3)
    for page in range(4):
        storm.store(1, page)
    removal = storm.pager.removed(1, PageRun(0, 4), dropped=True)  # word came in the middle of something; it runs later
    storm.machine.zap(PageRun(0, 4))
    storm.store(2, 1)
    assert not storm.machine.present[1], "the store waits"
    storm.machine.start("removal", removal)
    storm.calm()
    assert storm.read(1, 1)


@pytest.mark.parametrize("evicted", [False, True])
def test_a_successor_finds_no_copies_of_what_was_being_given_up(evicted: bool) -> None:
    storm = Storm(4)
    for page in range(6):
        storm.store(1, page)
    if evicted:
        storm.machine.run(storm.pager.give_back(6))
    else:
        assert not storm.machine.begin(storm.pager.give_back(6)).ended, "the eviction is under way"
    storm.pager.removed(1, PageRun(0, 3), dropped=True)
    storm.machine.zap(PageRun(0, 3))  # the process goes on; and whatever the server still does, it is killed
    storm.rest()
    storm.cells.expect_zeros(PageRun(0, 3))
    storm.server_is_killed()
    assert all(storm.read(1, page) for page in range(6))


def test_a_successor_gives_up_what_a_process_was_about_to_give_up() -> None:
    """Its word may have been read by the server that was killed."""
    storm = Storm(4)
    for page in range(6):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(6))
    for page in range(2):
        assert storm.read(1, page), "now it is there, and has a valid copy"
    storm.pager.expect_removal([PageRun(0, 3)])
    storm.cells.begin_giving_up(PageRun(0, 3))
    storm.server_is_killed()
    storm.cells.expect_zeros(PageRun(0, 3))
    assert not storm.machine.present[:3].any(), "the kernel has not come to it yet, and it must not go to swap"
    assert all(storm.read(1, page) for page in range(6))


def test_what_was_seen_of_a_process_that_ended_before_its_word_was_read_is_as_it_was() -> None:
    storm = Storm(5)
    for page in range(6):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(6))
    expected = storm.pager.expect_removal([PageRun(0, 3), PageRun(2, 4)])
    assert expected.tolist() == [0, 1, 2, 3, 4, 5]
    storm.pager.expect_no_more(expected, [])
    storm.server_is_killed()
    assert all(storm.read(1, page) for page in range(6)), "the oracle wants what was stored last"


def test_what_was_given_up_and_stored_again_survives_the_server() -> None:
    storm = Storm(6)
    for page in range(6):
        storm.store(1, page)
    expected = storm.pager.expect_removal([PageRun(0, 4)])
    storm.pager.expect_no_more(expected, [PageRun(0, 2)])
    removal = storm.pager.removed(1, PageRun(0, 2), dropped=True)
    storm.machine.zap(PageRun(0, 2))
    storm.machine.run(removal)
    storm.cells.expect_zeros(PageRun(0, 2))
    storm.store(1, 1)
    storm.server_is_killed()
    assert all(storm.read(1, page) for page in range(6))


@pytest.mark.parametrize("n_filled", [0, 1, 2])
def test_pages_given_up_in_the_middle_of_a_fill_do_not_come_back(
    n_filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is inside madvise when pages are filled for it; its word has to be read before that can go on."""
    storm = Storm(1)
    pages = PageRun(0, 3)
    for page in range(3):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(3))
    storm.cached_share = 1.0
    carry_out = storm.machine._fill
    told: list[PageRun] = []

    def fill(run: PageRun, mapper: int, data: Bytes | None, *, protect: bool) -> Outcome:
        if told or data is None:
            return carry_out(run, mapper, data, protect=protect)
        first = PageRun(run.first, min(n_filled, run.n))
        done = carry_out(first, mapper, data, protect=protect).n_done if first.n else 0
        told.append(run)
        storm.machine.start("removal", storm.pager.removed(1, pages, dropped=True))
        storm.machine.zap(pages)  # the kernel does it now, and madvise returns
        return Outcome(done, 0 if done == run.n else errno.EINTR)

    monkeypatch.setattr(storm.machine, "_fill", fill)
    storm.machine.run(storm.pager.prefetch(pages, write=False))
    assert told
    storm.rest()
    assert not storm.machine.memory[: 3 * PAGE_BYTES].any()
    assert storm.swap.n_used == 0
    assert storm.pager.statistics().resident == storm.machine.present.sum()


def stored_and_read_back(storm: Storm, pages: PageRun) -> None:
    """Have pages resident, with valid copies in swap."""
    for page in range(pages.first, pages.end):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(pages.n))
    for page in range(pages.first, pages.end):
        assert storm.read(1, page)
    assert storm.table.units[pages.first : pages.end].all()


def stored_and_partly_in_swap(seed: int, n_pages: int) -> Storm:
    storm = Storm(seed)
    for page in range(n_pages):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(2))
    assert storm.swap.n_used
    return storm


def hears_of_a_madvise_that_nobody_saw(storm: Storm, pages: PageRun) -> Task:
    """Have the server read of it; the thread has not run yet."""
    storm.machine.mappings[1].inside += 1
    return storm.machine.begin(storm.pager.removed(1, pages, dropped=None))


def goes_on_after(storm: Storm, removal: Task, wait_ns: int) -> None:
    storm.scheduler.run(until_ns=storm.scheduler.now_ns + wait_ns)
    assert not removal.ended, "nothing can be told until the thread has run"
    storm.machine.goes_on(1)


def test_who_does_not_get_the_cpu_after_a_madvise_that_nobody_saw_is_waited_for() -> None:
    storm, pages = stored_and_partly_in_swap(7, 4), PageRun(0, 4)
    removal = hears_of_a_madvise_that_nobody_saw(storm, pages)
    goes_on_after(storm, removal, 500_000 * US_NS)
    storm.machine.zap(pages)
    storm.cells.expect_zeros(pages)
    storm.calm()
    assert all(storm.read(2, page) for page in range(4)), "those in swap, too"


def test_a_kernel_that_drops_pages_slowly_is_waited_for() -> None:
    storm, pages = stored_and_partly_in_swap(8, 6), PageRun(0, 6)
    removal = hears_of_a_madvise_that_nobody_saw(storm, pages)
    goes_on_after(storm, removal, 100 * US_NS)
    for page in reversed(range(6)):  # those in swap are the first ones
        storm.scheduler.run(until_ns=storm.scheduler.now_ns + 15_000 * US_NS)
        storm.machine.zap(PageRun(page, 1))
    storm.cells.expect_zeros(pages)
    storm.calm()
    assert all(storm.read(2, page) for page in range(6))


@pytest.mark.parametrize("killed", [False, True])
def test_old_copies_do_not_come_back_where_the_kernel_dropped_pages_later_than_anybody_waited(killed: bool) -> None:
    storm = Storm(9)
    pages = PageRun(0, 3)
    stored_and_read_back(storm, pages)
    removal = hears_of_a_madvise_that_nobody_saw(storm, pages)
    goes_on_after(storm, removal, 100 * US_NS)
    storm.rest()
    assert removal.ended, "it looked like MADV_DONTNEED"
    storm.machine.zap(pages)
    storm.cells.expect_zeros(pages)
    if killed:
        storm.server_is_killed()
    else:
        storm.machine.run(storm.pager.give_back(3))
    assert all(storm.read(2, page) for page in range(3))


def test_bytes_stay_where_a_madvise_that_nobody_saw_dropped_the_view_of_them_only() -> None:
    storm = Storm(10)
    pages = PageRun(0, 4)
    stored_and_read_back(storm, PageRun(0, 4))
    storm.machine.run(storm.pager.give_back(2))
    removal = hears_of_a_madvise_that_nobody_saw(storm, pages)
    storm.machine.drop_mapping(1, pages)
    goes_on_after(storm, removal, 100 * US_NS)
    storm.rest()
    assert removal.ended
    assert all(storm.read(2, page) for page in range(4)), "the oracle wants what was stored last"


def test_devices_are_told_when_word_of_a_madvise_is_read_also_in_the_middle_of_something() -> None:
    storm = Storm(11)
    for page in range(3):
        storm.store(1, page)
    storm.machine.run(storm.device(PageRun(0, 3), None))
    assert storm.mirror.use(0, 3, write=False)
    storm.pager.removed(1, PageRun(0, 3), dropped=True)
    assert not storm.mirror.use(0, 3, write=False), "it would store to a page that is about to be punched"


@pytest.mark.parametrize("seen_by_a_device", [False, True])
def test_what_left_the_file_unheard_does_not_come_back_from_swap(seen_by_a_device: bool) -> None:
    """A process punched its own file, or was killed inside of madvise after the kernel had begun."""
    storm = Storm(12)
    pages = PageRun(0, 4)
    stored_and_read_back(storm, pages)
    storm.machine.zap(pages)
    storm.cells.expect_zeros(pages)
    if seen_by_a_device:
        assert not storm.machine.view(PageRun(0, 2)).any(), "a device that had it mapped finds zeros"
    storm.machine.run(storm.pager.give_back(4))
    assert storm.swap.n_used == 0
    assert all(storm.read(2, page) for page in range(4))
