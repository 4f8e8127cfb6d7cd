"""Page requests that are carried out when they are raised: who waits for nothing does not park."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nopin.iommu.access import PARKED, Access, Span
from nopin.iommu.iommu import Iommu
from nopin.iommu.page_requests import Meter
from nopin.mm.effects import PageRun, Procedure, ReadSwap
from nopin.mm.space import Staging
from nopin.ranges import Range
from nopin.testing.memory_space import MemorySpace
from nopin.testing.paged_arena import PagedArena, run_through
from nopin.units import PAGE_BYTES as PAGE

N_PAGES = 16
BASE = 0x100000
WINDOW = Range(BASE + 8 * PAGE, BASE + 16 * PAGE)
IN = WINDOW.start


class Rig:
    """A process with plain memory and, above it, a window to an arena whose faults run at once."""

    def __init__(self) -> None:
        self.iommu = Iommu()
        self.plain = MemorySpace(BASE, N_PAGES)
        self.plain.hole = set(range(8, 16))
        self.arena = PagedArena(8)
        self.arena.store(0, np.arange(8 * PAGE, dtype=np.uint32).astype(np.uint8).tobytes())
        self.pasid = self.iommu.bind(self.plain)
        self.arena.device.runner = self
        self.iommu.attach(self.arena.device)
        self.iommu.map_window(self.pasid, WINDOW, self.arena.device, 0)
        self.meter = Meter()
        self.staging = Staging.of_size(N_PAGES * PAGE)
        self.suspended: list[Procedure[None]] = []
        self.evicts: tuple[int, ...] = ()

    def start(self, procedure: Procedure[Any]) -> None:
        """Carry a fault out as far as it goes; bringing pages in may cost others their place."""
        for effect in procedure:
            if isinstance(effect, ReadSwap):
                self.suspended.append(procedure)
                return
        if self.evicts:
            self.arena.evict_now(*self.evicts)

    def finish(self, procedure: Procedure[Any]) -> Any:
        """Carry out what does not wait."""
        return run_through(procedure)

    def read(self, address: int, length: int, waiter: str = "qp") -> int:
        return self.iommu.read(self.pasid, address, length, self.staging, 0, self.meter, waiter)

    def span(self, address: int, waiter: str) -> Span:
        return Span(self.pasid, address, self.meter, waiter)


def test_a_fault_that_waits_for_nothing_parks_nobody() -> None:
    rig = Rig()
    assert rig.read(IN + 10, PAGE) == PAGE
    assert rig.staging.array[:PAGE].tobytes() == rig.arena.contents()[10 : PAGE + 10]
    assert rig.iommu.take_wakeups() == [], "who has gone on is not woken"
    assert not rig.arena.held, "nothing is held for who has what it wanted"
    assert rig.meter == Meter(page_faults=2, page_faults_handled=1)


def test_pages_in_memory_are_taken_in_without_a_fault() -> None:
    rig = Rig()
    assert rig.read(IN, 8) == 8
    assert rig.iommu.write(rig.pasid, IN + 3 * PAGE, 8, rig.staging, 0, rig.meter, "qp") == 8
    assert rig.arena.n_faults == 0
    assert rig.arena.dirty >= {3}, "the memory manager knows who may write"
    rig.arena.evict_now(0)
    assert rig.read(IN, 8) == PARKED, "it has gone from the mirror, too"


def test_a_few_pages_that_nobody_touched_are_brought_without_a_request() -> None:
    rig = Rig()
    rig.arena.discard(PageRun(0, 3))
    assert rig.read(IN + PAGE - 4, 8) == 8
    assert rig.arena.n_faults == 0
    assert not rig.staging.array[:8].any()
    assert rig.meter == Meter(page_faults=2, page_faults_handled=1)
    rig.arena.discard(PageRun(0, 3))
    assert rig.read(IN, 3 * PAGE) == 3 * PAGE
    assert rig.arena.n_faults == 1, "more are better brought together"


def test_a_fault_that_waits_for_the_medium_parks() -> None:
    rig = Rig()
    rig.arena.evict_now()
    assert rig.read(IN, 8) == PARKED
    assert rig.iommu.take_faults() == [], "it runs already"
    assert rig.iommu.take_wakeups() == []
    run_through(rig.suspended.pop())
    assert rig.iommu.take_wakeups() == ["qp"]
    assert rig.read(IN, 8) == 8


def test_who_lacks_plain_pages_too_waits_for_them_and_keeps_what_came_at_once() -> None:
    rig = Rig()
    rig.plain.slow = {7}
    assert rig.read(IN - 8, 16) == PARKED
    rig.arena.evict_now()
    (request,) = rig.iommu.take_requests()
    rig.iommu.respond(request, rig.plain.fault(request.start, request.end, write=False))
    assert rig.iommu.take_wakeups() == ["qp"]
    assert rig.read(IN - 8, 16) == 16


def test_what_a_fault_displaced_is_not_copied_from() -> None:
    rig = Rig()
    assert rig.read(IN, 8) == 8  # page 0 is in the mirror, and held by nobody
    scattered = np.array([[IN, 8], [IN + 5 * PAGE, 8]], np.uint64)
    local = np.array([[0, 8], [8, 8]], np.uint64)

    def read_both() -> int:
        return rig.iommu.read_v(rig.pasid, scattered, rig.staging, local, rig.meter, "qp")

    rig.evicts = (0,)
    assert read_both() == PARKED, "bringing page 5 took page 0 away"
    rig.evicts = (5,)
    (fault,) = rig.iommu.take_faults()
    run_through(fault.procedure)
    rig.arena.evict_now(0, 5)
    assert rig.iommu.take_wakeups() == ["qp"]
    assert read_both() == 16, "both are held by now"
    assert rig.staging.array[:8].tobytes() == rig.arena.contents()[:8]
    assert rig.staging.array[8:16].tobytes() == rig.arena.contents()[5 * PAGE :][:8]


def test_both_sides_of_a_copy_come_at_once() -> None:
    rig = Rig()
    looks = [
        Access(rig.span(IN, "source"), 8, write=False),
        Access(rig.span(IN + PAGE, "target"), 8, write=True),
    ]
    assert rig.iommu.admit_all(looks)
    moved = rig.iommu.relay(rig.span(IN + 2 * PAGE, "source"), rig.span(BASE, "target"), 100, rig.staging, 1024)
    assert moved is not None
    assert moved.n_written == 100
    assert rig.plain.memory[:100].tobytes() == rig.arena.contents()[2 * PAGE :][:100]
    assert rig.iommu.take_wakeups() == []
    assert not rig.arena.held


@pytest.mark.parametrize(("source", "target"), [(IN, BASE), (BASE, IN), (IN, IN + PAGE)], ids=["out", "in", "within"])
def test_a_short_copy_goes_at_once_whichever_side_is_managed(source: int, target: int) -> None:
    rig, meters = Rig(), (Meter(), Meter())
    rig.plain.memory[:PAGE] = 7
    assert rig.iommu.copy_present(rig.pasid, source + 5, rig.pasid, target + 9, 100, rig.staging, meters)
    whole = rig.plain.memory[: 8 * PAGE].tobytes() + rig.arena.contents()
    assert whole[target - BASE + 9 :][:100] == whole[source - BASE + 5 :][:100]
    assert [meter.page_faults for meter in meters] == [int(source >= IN), int(target >= IN)]
    assert rig.arena.n_faults == 0


def test_a_short_copy_that_is_not_all_there_or_in_two_places_is_left_to_the_general_way() -> None:
    rig, meters = Rig(), (Meter(), Meter())
    rig.arena.evict_now(2)

    def copies(source: int, target: int) -> bool:
        return rig.iommu.copy_present(rig.pasid, source, rig.pasid, target, 16, rig.staging, meters)

    assert not copies(IN + 2 * PAGE, BASE), "it is in swap"
    assert not copies(BASE, IN + 2 * PAGE)
    assert not copies(IN - 8, BASE), "it begins before the window"
    assert not copies(BASE, IN - 8)
    rig.plain.slow = {0}
    assert not copies(IN, BASE), "the plain side is slow"
    assert meters == (Meter(page_faults=1, page_faults_handled=1), Meter())
    assert not rig.suspended
    assert not rig.iommu.take_requests()
    assert rig.iommu.take_wakeups() == [], "nobody waits"


def test_of_two_sides_one_that_waits_keeps_both_back() -> None:
    rig = Rig()
    rig.arena.evict_now(1)
    looks = [
        Access(rig.span(IN, "source"), 8, write=False),
        Access(rig.span(IN + PAGE, "target"), 8, write=True),
    ]
    assert not rig.iommu.admit_all(looks)
    assert rig.iommu.take_wakeups() == ["source"]
    run_through(rig.suspended.pop())
    assert rig.iommu.take_wakeups() == ["target"]
    assert rig.iommu.admit_all(looks)
