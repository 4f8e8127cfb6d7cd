"""Swap and reclaim: what leaves memory comes back, what is used stays, what is refused stays."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.iommu.mirror import Mirror
from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.subscriber import Answer, Invalidation, Veto
from nopin.model.device.faults import ProcessFaults
from nopin.model.device.translations import Translations
from nopin.model.effects import Gate, Procedure
from nopin.model.host.advice import Advice
from nopin.model.host.costs import HostCosts
from nopin.model.host.errors import NoMemory, PageLost
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.reclaim import evict
from nopin.ranges import Range


def pages(*letters: str) -> bytes:
    return b"".join(letter.encode() * PAGE for letter in letters)


def filled(*letters: str, n_frames: int = 64, **settings: Any) -> tuple[Host, Process, int, Listener]:
    host = host_of(n_frames, **settings)
    process = host.spawn_process()
    va = run(host, process.mmap(len(letters)))
    run(host, process.store(va, pages(*letters)))
    return host, process, va, Listener(process, va // PAGE)


def test_what_was_swapped_out_comes_back_with_its_bytes() -> None:
    host, process, va, listener = filled("a", "b", "c")
    n_free = host.frames.n_free
    assert run(host, host.reclaim(3)) == 3
    assert listener.take() == [(Cause.RECLAIM, ((0, 3),))]
    assert (host.frames.n_free, host.swap.n_used) == (n_free + 3, 3)
    assert frames_of(process, va, 3) == [None] * 3
    assert run(host, process.load(va, 3 * PAGE)) == pages("a", "b", "c")
    assert listener.take() == [], "a page that comes back concerns nobody"
    run(host, process.munmap(va, 3 * PAGE))
    assert host.swap.n_used == 0
    host.check()


def test_a_page_that_was_only_read_keeps_its_copy_and_is_not_written_again() -> None:
    host, process, va, _ = filled("a", "b")
    run(host, host.reclaim(2))
    run(host, process.load(va, PAGE))
    run(host, process.store(va + PAGE, b"B"))
    assert host.swap.n_used == 1
    n_written = host.swap_medium.n_written
    run(host, host.reclaim(2))
    assert host.swap_medium.n_written == n_written + 1
    assert run(host, process.load(va, 2 * PAGE)) == pages("a") + b"B" + pages("b")[1:]


def test_young_pages_get_a_second_chance() -> None:
    host, process, va, _ = filled("a", "b", "c", "d")
    run(host, host.reclaim(4))
    run(host, process.load(va, 4 * PAGE))
    for page in list(host.lru):  # as if long ago
        for _, number in page.mappings:
            process.table.get(number).young = False  # type: ignore[union-attr]  # present, all of them
    run(host, process.load(va + PAGE, 1))
    run(host, host.reclaim(3))
    assert [frame is None for frame in frames_of(process, va, 4)] == [True, False, True, True]


@pytest.mark.parametrize("asks", [True, False])
def test_what_a_device_used_is_spared_by_who_asks_it(asks: bool) -> None:
    host, process, va, _ = filled("a", "b", "c", devices_count_as_use=asks)
    mirror = Mirror(process.notifiers, ProcessFaults(process, Translations(host.frames)), 1 << 30)
    run(host, mirror.fill(PageRun(va // PAGE, 3), write=False))
    for page in list(host.lru):
        for _, number in page.mappings:
            process.table.get(number).young = False  # type: ignore[union-attr]  # present, all of them
    assert mirror.use(va // PAGE, 1, write=False)
    run(host, host.reclaim(1))
    gone = [frame is None for frame in frames_of(process, va, 3)]
    assert gone == ([False, True, False] if asks else [True, False, False])
    assert not mirror.holds(va // PAGE + (1 if asks else 0), 1, write=False)


def test_memory_for_more_than_there_is() -> None:
    host = host_of(8)
    process = host.spawn_process()
    va = run(host, process.mmap(64))
    for at in range(64):
        run(host, process.store(va + at * PAGE, bytes([at]) * 16))
    for at in range(64):
        assert run(host, process.load(va + at * PAGE, 16)) == bytes([at]) * 16
    host.check()


def test_a_forked_page_is_one_page_in_swap_and_in_the_cache() -> None:
    host, parent, va, _ = filled("a")
    child = run(host, parent.fork())
    run(host, host.reclaim(1))
    assert host.swap.n_used == 1
    run(host, parent.load(va, 1))
    run(host, child.load(va, 1))
    assert frames_of(parent, va, 1) == frames_of(child, va, 1) != [None]
    run(host, parent.store(va, b"P"))
    run(host, host.reclaim(2))
    run(host, child.store(va, b"C"))
    assert run(host, parent.load(va, 2)) == b"Pa"
    assert run(host, child.load(va, 2)) == b"Ca"
    host.check()


def test_a_store_does_not_change_what_the_other_still_has_in_swap() -> None:
    host, parent, va, _ = filled("a")
    child = run(host, parent.fork())
    run(host, host.reclaim(1))
    run(host, parent.store(va, b"P"))
    assert run(host, child.load(va, 2)) == b"aa"
    run(host, child.exit())
    assert run(host, parent.load(va, 2)) == b"Pa"
    host.check()


def test_swap_entries_survive_forks_and_end_with_their_last_user() -> None:
    host, parent, va, _ = filled("a")
    run(host, host.reclaim(1))
    child = run(host, parent.fork())
    run(host, parent.exit())
    assert run(host, child.load(va, 1)) == b"a"
    run(host, child.exit())
    assert host.swap.n_used == 0
    host.check()


def test_a_frame_is_not_reused_while_a_device_may_still_read_it() -> None:
    host, process, va, listener = filled("a")
    n_free = host.frames.n_free
    listener.slow = True
    task = host.scheduler.spawn("reclaim", host.reclaim(1))
    host.scheduler.run()
    assert not task.ended
    assert host.swap_medium.n_written == 1, "the copy does not wait for the device"
    assert host.frames.n_free == n_free
    assert listener.ended == listener.told, "nor does the end"
    load = host.scheduler.spawn("load", process.load(va, 1))
    host.scheduler.run()
    assert not load.ended, "a page that is on its way out"
    listener.fences[0].signal()
    assert host.scheduler.run()
    assert load.result == b"a"
    host.check()


class Keeper(Listener):
    """Refuses to let go of one page, as long as it may."""

    page = 0

    def invalidate_start(self, event: Invalidation) -> Answer:
        super().invalidate_start(event)
        return Veto(event.within(Range(self.page, self.page + 1))) if event.may_veto else None


def test_what_a_device_refuses_to_let_go_of_stays_mapped() -> None:
    host, process, va, _ = filled("a", "b")
    keeper = Keeper(process, veto_limit=1)
    keeper.page = va // PAGE + 1
    before = frames_of(process, va, 2)
    task = host.scheduler.spawn("evict", evict_all(host))
    assert host.scheduler.run()
    assert task.result == 1
    assert frames_of(process, va, 2) == [None, before[1]]
    assert host.swap.n_used == 1
    assert run(host, host.reclaim(1)) == 1, "not twice in a row"
    assert run(host, process.load(va, 2 * PAGE)) == pages("a", "b")
    host.check()


def evict_all(host: Host) -> Procedure[int]:
    victims = list(host.lru)
    for page in victims:
        page.busy = Gate()
    return evict(host, victims)


def test_a_full_swap_area_leaves_pages_in_memory() -> None:
    host, process, va, _ = filled("a", "b", "c", n_swap_slots=1)
    assert run(host, host.reclaim(3)) == 1
    assert run(host, process.load(va, 3 * PAGE)) == pages("a", "b", "c")
    host.check()


def test_without_memory_and_swap_an_access_fails_and_can_be_tried_again() -> None:
    host, process, va, _ = filled("a", n_frames=2, n_swap_slots=0)
    other = run(host, process.mmap(1))
    with pytest.raises(NoMemory):
        run(host, process.store(other, b"x"))
    run(host, process.munmap(va, PAGE))
    run(host, process.store(other, b"x"))


def test_a_failed_write_loses_nothing_and_a_failed_read_is_said_so() -> None:
    failing: list[str] = ["swap write"]
    host, process, va, _ = filled("a", fires=lambda site: site in failing)
    assert run(host, host.reclaim(1)) == 0
    assert run(host, process.load(va, 1)) == b"a"
    host.check()
    failing[:] = []
    assert run(host, host.reclaim(1)) == 1
    failing[:] = ["swap read"]
    with pytest.raises(PageLost):
        run(host, process.load(va, 1))
    failing[:] = []
    assert run(host, process.load(va, 1)) == b"a", "the trouble was the medium's, not the bytes'"
    host.check()


def test_a_medium_serves_so_many_requests_at_a_time() -> None:
    costs = HostCosts(medium_read_ns=100, medium_write_ns=50, medium_page_ns=10)
    host, process, va, _ = filled("a", "b", "c", "d", medium_depth=2, costs=costs)
    run(host, host.reclaim(4))
    began_ns = host.scheduler.now_ns
    assert began_ns == 50 + 4 * 10, "one request for all"
    for at in range(4):
        host.scheduler.spawn(f"load {at}", process.load(va + at * PAGE, 1))
    host.scheduler.run()
    assert host.scheduler.now_ns - began_ns == 2 * 110


def test_pages_given_up_are_dropped_unwritten_unless_somebody_writes_them() -> None:
    host, process, va, listener = filled("a", "b", "c", "d")
    mirror = Mirror(process.notifiers, ProcessFaults(process, Translations(host.frames)), 1 << 30)
    run(host, mirror.fill(PageRun(va // PAGE + 2, 1), write=True))
    run(host, process.madvise(va, 3 * PAGE, Advice.FREE))
    assert listener.take() == [(Cause.SYNC, ((0, 3),))]
    run(host, process.store(va + PAGE, b"B"))
    assert mirror.use(va // PAGE + 2, 1, write=True), "a device keeps its right, and is heard"
    host.frames.write(frames_of(process, va, 3)[2] or 0, 0, b"C")
    for _ in range(2):
        run(host, host.reclaim(4))
    assert run(host, process.load(va, 4 * PAGE)) == bytes(PAGE) + b"B" + pages("b")[1:] + b"C" + pages("c")[1:] + pages(
        "d"
    )
    assert host.swap_medium.n_written == 3
    host.check()


def test_swapped_pages_that_are_given_up_are_zeros_and_free_their_slots() -> None:
    host, process, va, _ = filled("a", "b")
    run(host, host.reclaim(2))
    run(host, process.madvise(va, 2 * PAGE, Advice.FREE))
    assert host.swap.n_used == 0
    assert run(host, process.load(va, 2 * PAGE)) == bytes(2 * PAGE)
    host.check()


def test_advice_about_use_reaches_reclaim() -> None:
    host, process, va, listener = filled("a", "b", "c")
    run(host, process.madvise(va + 2 * PAGE, PAGE, Advice.COLD))
    assert run(host, host.reclaim(1)) == 1
    assert [frame is None for frame in frames_of(process, va, 3)] == [False, False, True]
    listener.take()
    run(host, process.madvise(va, PAGE, Advice.PAGEOUT))
    assert listener.take() == [(Cause.RECLAIM, ((0, 1),))]
    assert [frame is None for frame in frames_of(process, va, 3)] == [True, False, True]
    run(host, process.madvise(va, 3 * PAGE, Advice.WILLNEED))
    assert None not in frames_of(process, va, 3)
    host.check()


def test_frames_are_reclaimed_in_the_background_before_somebody_waits_for_one() -> None:
    host = host_of(12)
    host.reclaim_in_background(4, 6)
    process = host.spawn_process()
    va = run(host, process.mmap(20))
    for page in range(20):
        run(host, process.store(va + page * PAGE, bytes([page])))
        host.scheduler.run()
        assert host.frames.n_free >= 4
    assert host.swap.n_used
    for page in range(20):
        assert run(host, process.load(va + page * PAGE, 1)) == bytes([page])
    host.check()
