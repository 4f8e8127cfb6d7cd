"""The Iommu where a process has windows of managed memory among its plain memory."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.iommu.access import PARKED, Access, Span
from nopin.iommu.iommu import Iommu
from nopin.iommu.page_requests import Meter
from nopin.iommu.tickets import TURNS
from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun, ReadSwap
from nopin.mm.space import Staging
from nopin.ranges import Range
from nopin.testing.memory_space import MemorySpace
from nopin.testing.paged_arena import PagedArena, run_through
from nopin.units import PAGE_BYTES as PAGE

BASE = 0x10_0000
N_PAGES = 32
WINDOW = Range(BASE + 8 * PAGE, BASE + 24 * PAGE)
"""Pages 8 to 23 of the process are pages 4 to 19 of the arena; before and behind them it has plain memory."""


class Rig:
    """A process with plain memory and one window; what lies under the window must never be touched."""

    def __init__(self) -> None:
        self.iommu = Iommu()
        self.plain = MemorySpace(BASE, N_PAGES)
        self.plain.memory[:] = np.random.default_rng(1).integers(0, 256, N_PAGES * PAGE, np.uint8)
        self.plain.hole = set(range(8, 24))
        self.arena = PagedArena(N_PAGES)
        self.arena.store(0, np.random.default_rng(2).integers(0, 256, N_PAGES * PAGE, np.uint8).tobytes())
        self.arena.evict_now()
        self.pasid = self.iommu.bind(self.plain)
        self.iommu.attach(self.arena.device)
        self.iommu.map_window(self.pasid, WINDOW, self.arena.device, 4 * PAGE)
        self.meter = Meter()
        self.staging = Staging.of_size(N_PAGES * PAGE)

    def expected(self, address: int, length: int) -> bytes:
        """What the process would see."""
        whole = self.plain.memory.tobytes()
        managed = self.arena.contents()[4 * PAGE : 20 * PAGE]
        seen = whole[: 8 * PAGE] + managed + whole[24 * PAGE :]
        return seen[address - BASE : address - BASE + length]

    def read(self, address: int, length: int, waiter: object | None = "qp") -> int:
        self.staging.array[:] = 0
        where = (self.pasid, address, length)
        return self.iommu.read(*where, self.staging, 0, self.meter, waiter)

    def write(self, address: int, data: bytes, waiter: object | None = "qp") -> int:
        self.staging.array[: len(data)] = np.frombuffer(data, np.uint8)
        where = (self.pasid, address, len(data))
        return self.iommu.write(*where, self.staging, 0, self.meter, waiter)

    def serve(self) -> list[object]:
        """Answer all page requests; returns who was woken."""
        for request in self.iommu.take_requests():
            done = self.plain.fault(request.start, request.end, write=request.write)
            self.iommu.respond(request, done)
        for fault in self.iommu.take_faults():
            run_through(fault.procedure)
        return list(self.iommu.take_wakeups())


@pytest.fixture
def rig() -> Rig:
    return Rig()


IN = WINDOW.start


def test_a_page_that_is_out_parks_and_the_resumed_access_needs_nobody_else(rig: Rig) -> None:
    assert rig.read(IN + 100, 50) == PARKED
    assert not rig.staging.array.any()
    assert rig.serve() == ["qp"]
    assert rig.read(IN + 100, 50) == 50
    assert rig.staging.array[:50].tobytes() == rig.expected(IN + 100, 50)
    assert (rig.meter.page_faults, rig.meter.page_faults_handled, rig.arena.n_faults) == (1, 1, 1)
    assert rig.plain.n_copies == 0, "managed memory is not reached through the process"


def test_pages_the_mirror_holds_are_copied_at_once_and_counted_nowhere(rig: Rig) -> None:
    rig.read(IN, 3 * PAGE)
    rig.serve()
    rig.read(IN, 3 * PAGE)
    before = rig.meter.page_faults
    assert rig.read(IN + 5, 2 * PAGE) == 2 * PAGE
    assert rig.meter.page_faults == before
    assert rig.iommu.take_requests() == []
    assert rig.iommu.take_faults() == []


@pytest.mark.parametrize(("address", "length"), [(BASE, N_PAGES * PAGE), (IN - 10, 20), (WINDOW.end - 7, PAGE)])
def test_an_access_across_borders_is_one_access(rig: Rig, address: int, length: int) -> None:
    assert rig.read(address, length) == PARKED
    assert rig.serve() == ["qp"]
    assert rig.read(address, length) == length
    assert rig.staging.array[:length].tobytes() == rig.expected(address, length)
    data = bytes(255 - byte for byte in rig.expected(address, length))
    while rig.write(address, data) == PARKED:
        assert rig.serve() == ["qp"]
    assert rig.expected(address, length) == data
    rig.arena.evict_now()
    assert rig.expected(address, length) == data, "what was written survives eviction"


def test_an_access_waits_for_plain_and_managed_pages_together(rig: Rig) -> None:
    rig.plain.slow = {7}
    assert rig.read(IN - 10, 20) == PARKED
    (request,) = rig.iommu.take_requests()
    (fault,) = rig.iommu.take_faults()
    assert request.pasid == rig.pasid
    run_through(fault.procedure)
    assert rig.iommu.take_wakeups() == [], "the plain page is still out"
    rig.iommu.respond(request, rig.plain.fault(request.start, request.end, write=False))
    assert rig.iommu.take_wakeups() == ["qp"]
    assert rig.read(IN - 10, 20) == 20


def test_reading_gives_no_right_to_write(rig: Rig) -> None:
    rig.read(IN, 8)
    rig.serve()
    rig.read(IN, 8)
    assert rig.write(IN, b"w" * 8) == PARKED
    rig.serve()
    assert rig.write(IN, b"w" * 8) == 8
    assert rig.arena.page(4)[:8] == b"w" * 8


def test_one_page_wanted_through_two_processes_is_one_fault(rig: Rig) -> None:
    child = rig.iommu.bind(MemorySpace(BASE, N_PAGES))
    elsewhere = Range(BASE, BASE + PAGE)
    rig.iommu.map_window(child, elsewhere, rig.arena.device, 4 * PAGE)
    assert rig.read(IN, 8, "parent") == PARKED
    assert rig.iommu.read(child, BASE, 8, rig.staging, 0, Meter(), "child") == PARKED
    assert rig.serve() == ["parent", "child"]
    assert rig.arena.n_faults == 1
    assert rig.iommu.read(child, BASE, 8, rig.staging, 0, Meter(), "child") == 8
    assert rig.staging.array[:8].tobytes() == rig.expected(IN, 8)
    assert rig.arena.held == {4: 1}, "until the other has come as well"
    assert rig.read(IN, 8, "parent") == 8
    assert not rig.arena.held


# Memory that cannot be had


def test_a_lost_page_ends_the_access_at_its_first_byte(rig: Rig) -> None:
    rig.arena.lost = {6}
    assert rig.read(IN + 10, 4 * PAGE) == PARKED
    assert rig.serve() == ["qp"]
    assert rig.read(IN + 10, 4 * PAGE) == 2 * PAGE - 10
    assert rig.staging.array[: 2 * PAGE - 10].tobytes() == rig.expected(IN + 10, 2 * PAGE - 10)
    assert not rig.staging.array[2 * PAGE - 10 :].any(), "nothing behind it is touched"
    assert not rig.arena.held


def test_the_part_of_an_arena_that_was_unmapped_is_plain_memory_again(rig: Rig) -> None:
    rig.read(IN, 4 * PAGE)
    rig.serve()
    rig.iommu.unmap_window(rig.pasid, Range(IN + PAGE, IN + 2 * PAGE))
    assert rig.read(IN, 4 * PAGE) == PAGE
    rig.plain.hole -= {9}
    rig.read(IN + PAGE, 8)
    assert rig.staging.array[:8].tobytes() == rig.plain.memory[9 * PAGE :][:8].tobytes()


def test_a_window_that_moved_shows_the_same_pages_at_its_new_place(rig: Rig) -> None:
    seen = rig.expected(IN, PAGE)
    rig.iommu.unmap_window(rig.pasid, Range(IN, IN + PAGE))
    rig.iommu.map_window(rig.pasid, Range(BASE, BASE + PAGE), rig.arena.device, 4 * PAGE)
    rig.read(BASE, PAGE)
    rig.serve()
    assert rig.read(BASE, PAGE) == PAGE
    assert rig.staging.array[:PAGE].tobytes() == seen


def test_detaching_an_arena_wakes_who_waits_and_leaves_plain_addresses(rig: Rig) -> None:
    assert rig.read(IN, 8) == PARKED
    rig.iommu.take_requests()
    (fault,) = rig.iommu.take_faults()
    rig.iommu.detach(rig.arena.device)
    rig.iommu.detach(rig.arena.device)
    assert rig.iommu.take_wakeups() == ["qp"]
    assert rig.read(IN, 8) == 0
    run_through(fault.procedure)
    assert not rig.arena.held, "an answer that comes late finds nobody, and holds nothing"


def test_an_unbound_process_moves_nothing(rig: Rig) -> None:
    rig.read(IN, 8)
    rig.serve()
    rig.iommu.unbind(rig.pasid)
    assert rig.read(IN, 8) == 0
    assert rig.iommu.windows(rig.pasid) == []


def test_without_a_waiter_what_is_not_held_is_not_accessed(rig: Rig) -> None:
    assert rig.read(IN - 4, 8, None) == 4
    assert rig.iommu.take_faults() == []


# Pressure


def test_pages_stay_until_the_resumed_access_was_made(rig: Rig) -> None:
    rig.read(IN, 2 * PAGE)
    rig.serve()
    rig.arena.evict_now()
    assert rig.read(IN, 2 * PAGE) == 2 * PAGE
    rig.arena.evict_now()
    assert rig.read(IN, 2 * PAGE) == PARKED


def test_pages_discarded_before_the_resumed_access_are_asked_for_again(rig: Rig) -> None:
    rig.read(IN, PAGE)
    rig.serve()
    rig.arena.discard(PageRun(4, 1))
    assert rig.read(IN, PAGE) == PARKED, "absent for now is not bad memory"
    assert rig.serve() == ["qp"]
    assert rig.read(IN, PAGE) == PAGE
    assert not rig.staging.array.any()
    assert not rig.arena.held


def test_a_waiter_that_is_gone_or_never_comes_holds_nothing_for_long(rig: Rig) -> None:
    rig.read(IN, 8, "dead")
    rig.read(IN + PAGE, 8, "lazy")
    rig.serve()
    assert rig.arena.held == {4: 1, 5: 1}
    rig.iommu.forget("dead")
    assert rig.arena.held == {5: 1}
    for _ in range(TURNS + 1):
        rig.iommu.take_wakeups()
    assert not rig.arena.held


def test_a_busy_arena_puts_a_waiter_off_and_is_no_error(rig: Rig) -> None:
    storm = rig.arena.notifiers.invalidate_start([Range(0, N_PAGES)], Cause.UNMAP)
    assert rig.read(IN, 8) == PARKED
    assert rig.serve() == ["qp"]
    assert rig.read(IN, 8) == PARKED
    storm.end()
    assert rig.serve() == ["qp"]
    assert rig.read(IN, 8) == 8


def test_ranges_of_one_step_wait_together(rig: Rig) -> None:
    looks = [
        Access(Span(rig.pasid, IN, rig.meter, "source"), 8, write=False),
        Access(Span(rig.pasid, IN + 9 * PAGE, rig.meter, "target"), 8, write=True),
    ]
    assert not rig.iommu.admit_all(looks)
    assert rig.serve() == ["source", "target"]
    rig.arena.evict_now()
    assert rig.iommu.admit_all(looks)
    assert rig.read(IN, 8, None) == 8
    assert rig.write(IN + 9 * PAGE, b"x" * 8, None) == 8


def test_the_first_of_two_to_come_keeps_its_pages_while_it_waits_for_the_other(rig: Rig) -> None:
    looks = [
        Access(Span(rig.pasid, IN, rig.meter, "source"), 8, write=False),
        Access(Span(rig.pasid, IN + 9 * PAGE, rig.meter, "target"), 8, write=True),
    ]
    assert not rig.iommu.admit_all(looks)
    rig.iommu.take_requests()
    first, second = rig.iommu.take_faults()
    run_through(first.procedure)
    assert rig.iommu.take_wakeups() == ["source"]
    rig.arena.evict_now()
    assert not rig.iommu.admit_all(looks)
    assert rig.iommu.take_faults() == [], "nothing is asked for twice"
    run_through(second.procedure)
    rig.arena.evict_now()
    assert rig.iommu.admit_all(looks)
    assert not rig.arena.held


def test_a_fault_waits_for_the_medium_while_others_go_on(rig: Rig) -> None:
    rig.read(IN, 8, "slow")
    rig.iommu.take_requests()
    (fault,) = rig.iommu.take_faults()
    assert isinstance(next(fault.procedure), ReadSwap)
    rig.read(IN + PAGE, 8, "quick")
    assert rig.serve() == ["quick"]
    assert rig.read(IN + PAGE, 8, "quick") == 8
    run_through(fault.procedure)
    assert rig.iommu.take_wakeups() == ["slow"]


# Scatter lists


LISTS = {
    "one range": [(IN + 3, 5000)],
    "within one page": [(IN + 8 * k, 8) for k in range(20)],
    "many pages": [(IN + k * PAGE + 4090, 12) for k in range(15)],
    "in no order": [(IN + (k * 7 % 15) * PAGE + k, 40 + k) for k in range(15)],
    "across borders": [(IN - 4, 8), (BASE + 3, 9), (WINDOW.end - 10, 30), (IN + PAGE, 2 * PAGE)],
}


@pytest.mark.parametrize("name", LISTS)
def test_scatter_lists_move_what_single_copies_would(rig: Rig, name: str) -> None:
    segments = LISTS[name]
    total = sum(length for _, length in segments)
    remote = np.array(segments, np.uint64)
    local = np.array([(50, total // 3), (total, total - total // 3)], np.uint64)
    expected = b"".join(rig.expected(*segment) for segment in segments)
    staging = Staging.of_size(4 * total + 100)

    def until_done(copy: object) -> int:
        assert callable(copy)
        while (done := copy(rig.pasid, remote, staging, local, rig.meter, "qp")) == PARKED:
            assert rig.serve() == ["qp"]
        assert isinstance(done, int)
        return done

    def staged() -> bytes:
        return b"".join(staging.array[at : at + length].tobytes() for at, length in local.tolist())

    assert until_done(rig.iommu.read_v) == total
    assert staged() == expected
    staging.array[:] = np.random.default_rng(3).integers(0, 256, len(staging.array), np.uint8)
    assert until_done(rig.iommu.write_v) == total
    assert b"".join(rig.expected(*segment) for segment in segments) == staged()
    written = {int(b) // PAGE - 8 + 4 for a, n in segments for b in range(a - BASE, a - BASE + n) if a >= IN}
    dirty = np.flatnonzero(np.unpackbits(rig.arena.mirror.dirty_bitmap(PageRun(0, N_PAGES)), bitorder="little"))
    assert {page for page in written if 4 <= page < 20} <= set(dirty.tolist())


def test_a_list_that_meets_a_lost_page_ends_there(rig: Rig) -> None:
    rig.arena.lost = {6}
    remote = np.array([(IN, 8), (IN + 2 * PAGE - 4, 8), (IN + 3 * PAGE, 8)], np.uint64)
    local = np.array([(0, 24)], np.uint64)
    assert rig.iommu.read_v(rig.pasid, remote, rig.staging, local, rig.meter, "qp") == PARKED
    rig.serve()
    done = rig.iommu.read_v(rig.pasid, remote, rig.staging, local, rig.meter, "qp")
    assert done == 12
    assert rig.staging.array[:12].tobytes() == rig.expected(IN, 8) + rig.expected(IN + 2 * PAGE - 4, 4)
    assert not rig.staging.array[12:].any()


# Relays


@pytest.mark.parametrize("source", [BASE, IN, IN - 3 * PAGE, WINDOW.end - PAGE - 5])
@pytest.mark.parametrize("target", [BASE + 3, IN + 8 * PAGE + 1, IN - 2 * PAGE, WINDOW.end - 2 * PAGE])
def test_relays_between_plain_and_managed_memory_copy_every_byte(source: int, target: int) -> None:
    rig, peer = Rig(), Rig()
    length = 5 * PAGE - 11
    other = rig.iommu.bind(peer.plain)
    rig.iommu.attach(device := PagedArena(N_PAGES).device)
    rig.iommu.map_window(other, WINDOW, device, 4 * PAGE)
    spans = Span(rig.pasid, source, rig.meter, "source"), Span(other, target, rig.meter, "target")
    small = Staging.of_size(3000)
    expected = rig.expected(source, length)
    while (outcome := rig.iommu.relay(*spans, length, small, 1024)) is None:
        assert rig.serve()
    assert outcome == (length, length)
    while rig.iommu.read(other, target, length, rig.staging, 0, rig.meter, "check") == PARKED:
        rig.serve()
    assert rig.staging.array[:length].tobytes() == expected


@pytest.mark.parametrize(("bad", "n_left"), [(5, PAGE), (6, 2 * PAGE)])
def test_a_relay_from_a_lost_page_is_cut_to_whole_packets(rig: Rig, bad: int, n_left: int) -> None:
    rig.arena.lost = {bad}
    spans = Span(rig.pasid, IN + 100, rig.meter, "source"), Span(rig.pasid, BASE, rig.meter, "target")
    before = rig.plain.memory.copy()
    while (outcome := rig.iommu.relay(*spans, 3 * PAGE, rig.staging, 1000)) is None:
        rig.serve()
    whole = (n_left - 100) // 1000 * 1000
    assert outcome == (n_left - 100, whole)
    assert rig.plain.memory[:whole].tobytes() == rig.expected(IN + 100, whole)
    assert (rig.plain.memory[whole : 4 * PAGE] == before[whole : 4 * PAGE]).all()


def test_a_relay_to_a_lost_page_writes_what_lies_before_it(rig: Rig) -> None:
    rig.arena.lost = {5}
    spans = Span(rig.pasid, BASE, rig.meter, "source"), Span(rig.pasid, IN + 100, rig.meter, "target")
    while (outcome := rig.iommu.relay(*spans, 3 * PAGE, rig.staging, 1000)) is None:
        rig.serve()
    assert outcome == (3 * PAGE, PAGE - 100)
    assert rig.expected(IN + 100, PAGE - 100) == rig.plain.memory[: PAGE - 100].tobytes()
