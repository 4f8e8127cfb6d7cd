"""The Iommu over a simple space whose residency the test decides."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.iommu.access import PARKED, Access, Span
from nopin.iommu.iommu import Iommu
from nopin.iommu.page_requests import PARKS_MAX, Meter
from nopin.mm.space import Absent, FaultResult, IoVec, LooksThenCopies, Staging
from nopin.units import PAGE_BYTES

METERS = (Meter(), Meter())


class ArraySpace(LooksThenCopies):
    """Memory [0, 16 pages) in an array. Pages in `swapped` are slow, in `untouched` absent but quick.

    While `held`, a program holds back what is swapped.
    """

    def __init__(self) -> None:
        self.memory = np.zeros(16 * PAGE_BYTES, np.uint8)
        self.swapped: set[int] = set()
        self.untouched: set[int] = set()
        self.held = False
        self.n_lookups = 0
        self.gone = False

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        data = self.memory[address : address + length]
        staging.array[offset : offset + len(data)] = data
        return len(data)

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        target = self.memory[address : address + length]
        target[:] = staging.array[offset : offset + len(target)]
        return len(target)

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        pieces = [self.memory[address : address + length] for address, length in remote.tolist()]
        data = np.concatenate(pieces)
        staging.array[local[0, 0] : local[0, 0] + len(data)] = data  # one local segment is enough here
        return len(data)

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        done = 0
        for address, length in remote.tolist():
            done += self.write(address, length, staging, int(local[0, 0]) + done)
        return done

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        self.n_lookups += 1
        pages = range(start // PAGE_BYTES, -(-end // PAGE_BYTES))
        n_absent = sum(page in self.swapped or page in self.untouched for page in pages)
        slow = any(page in self.swapped for page in pages)
        return Absent(n_absent, slow, slow and self.held) if n_absent else None

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        del write
        for page in range(start // PAGE_BYTES, end // PAGE_BYTES):
            self.swapped.discard(page)
        return FaultResult(end - start)

    def close(self) -> None:
        self.gone = True


def service(iommu: Iommu, space: ArraySpace) -> None:
    for request in iommu.take_requests():
        iommu.respond(request, space.fault(request.start, request.end, write=request.write))


@pytest.fixture
def space() -> ArraySpace:
    space = ArraySpace()
    space.memory[:] = np.arange(len(space.memory)) % 251
    return space


def test_present_pages_are_copied_at_once_and_counted_nowhere(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    pasid = iommu.bind(space)
    assert iommu.read(pasid, 4090, 12, staging, 3, meter, "qp") == 12
    assert staging.array[3:15].tolist() == space.memory[4090:4102].tolist()
    assert meter == Meter()


def test_untouched_pages_are_counted_and_copied_at_once(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    space.untouched = {0, 1}
    assert iommu.write(iommu.bind(space), 4090, 12, staging, 0, meter, "qp") == 12
    assert (meter.page_faults, meter.page_faults_handled) == (2, 1)


def test_a_swapped_page_parks_and_the_resumed_access_succeeds(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.swapped = {1}
    assert iommu.read(pasid, 4090, 12, staging, 0, meter, "qp") == PARKED
    assert not staging.array.any()
    assert iommu.take_wakeups() == []
    service(iommu, space)
    assert iommu.take_wakeups() == ["qp"]
    assert iommu.read(pasid, 4090, 12, staging, 0, meter, "qp") == 12
    assert (meter.page_faults, meter.page_faults_handled) == (1, 1)


def test_a_page_evicted_again_before_the_resumed_access_is_waited_for_a_bounded_number_of_times(
    space: ArraySpace,
) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    pasid = iommu.bind(space)
    for _ in range(PARKS_MAX):
        space.swapped = {0}
        assert iommu.read(pasid, 0, 8, staging, 0, meter, "qp") == PARKED
        service(iommu, space)
        assert iommu.take_wakeups() == ["qp"]
    space.swapped = {0}
    assert iommu.read(pasid, 0, 8, staging, 0, meter, "qp") == 8
    assert iommu.read(pasid, 0, 8, staging, 0, meter, "qp") == PARKED, "its patience begins anew"


def test_a_page_that_a_program_may_hold_back_is_never_copied_while_absent(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.held = True
    remote, local = np.array([[0, 8], [8 * PAGE_BYTES, 8]], np.uint64), np.array([[0, 16]], np.uint64)
    for _ in range(PARKS_MAX + 2):
        space.swapped = {0, 8}
        assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "one") == PARKED
        assert iommu.read_v(pasid, remote, staging, local, Meter(), "list") == PARKED
        service(iommu, space)
        assert sorted(map(str, iommu.take_wakeups())) == ["list", "one"]
    assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "one") == 8
    assert iommu.read_v(pasid, remote, staging, local, Meter(), "list") == 16


def test_a_page_that_never_comes_is_never_copied_from(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.swapped = {0, 1}
    for _ in range(2 * PARKS_MAX):
        assert iommu.read(pasid, 0, PAGE_BYTES + 1, staging, 0, Meter(), "qp") == PARKED
        assert iommu.take_wakeups() == []
    assert not staging.array.any()


def test_without_a_waiter_nothing_is_looked_up(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    space.swapped = {0}
    assert iommu.read(iommu.bind(space), 0, 8, staging, 0, Meter(), None) == 8
    assert space.n_lookups == 0


def test_a_short_list_costs_one_lookup_when_present(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    remote = np.array([[0, 8], [9000, 8], [20000, 8]], np.uint64)
    local = np.array([[0, 24]], np.uint64)
    assert iommu.read_v(iommu.bind(space), remote, staging, local, Meter(), "qp") == 24
    assert space.n_lookups == 1


def test_a_swapped_page_between_the_segments_parks_nobody(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    space.swapped = {3}
    remote = np.array([[0, 8], [20000, 8]], np.uint64)
    local = np.array([[0, 16]], np.uint64)
    assert iommu.write_v(iommu.bind(space), remote, staging, local, meter, "qp") == 16
    assert meter == Meter()


def test_a_list_waits_for_all_its_slow_pages_at_once(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.swapped = {0, 8}
    remote = np.array([[0, 8], [8 * PAGE_BYTES, 8]], np.uint64)
    local = np.array([[0, 16]], np.uint64)
    assert iommu.read_v(pasid, remote, staging, local, meter, "qp") == PARKED
    service(iommu, space)
    assert space.swapped == set()
    assert iommu.take_wakeups() == ["qp"]
    assert iommu.read_v(pasid, remote, staging, local, meter, "qp") == 16


def test_prepare_brings_ranges_in_once_and_the_copies_look_again(space: ArraySpace) -> None:
    iommu, meter, staging = Iommu(), Meter(), Staging.of_size(64)
    pasid = iommu.bind(space)
    whole = [Access(Span(pasid, 0, meter, "qp"), 3 * PAGE_BYTES, write=True)]
    assert iommu.prepare(whole, "qp")
    space.swapped = {2}
    assert not iommu.prepare(whole, "qp")
    (request,) = iommu.take_requests()
    assert (request.start, request.end, request.write) == (0, 3 * PAGE_BYTES, True)
    iommu.respond(request, FaultResult(request.end))
    assert iommu.take_wakeups() == ["qp"]
    assert iommu.prepare(whole, "qp")
    assert iommu.write(pasid, 2 * PAGE_BYTES, 8, staging, 0, meter, "qp") == PARKED


def test_ranges_that_are_never_present_together_get_through_all_the_same(space: ArraySpace) -> None:
    """Bringing one page costs another its place, as under a limit that is too tight for the copy."""
    iommu, meter = Iommu(), Meter()
    pasid = iommu.bind(space)
    looks = [
        Access(Span(pasid, 0, meter, "ours"), 8, write=False),
        Access(Span(pasid, 5 * PAGE_BYTES, meter, "theirs"), 8, write=True),
        Access(Span(pasid, 9 * PAGE_BYTES, meter, "theirs"), 8, write=True),
    ]
    n_tries = 1
    space.swapped = {0, 5, 9}
    while not iommu.admit_all(looks):
        for request in iommu.take_requests():
            iommu.respond(request, space.fault(request.start, request.end, write=request.write))
            space.swapped = {0, 5, 9} - {request.start // PAGE_BYTES}
        iommu.take_wakeups()
        n_tries += 1
        assert n_tries <= 2 * PARKS_MAX + 1


def test_an_unbound_pasid_moves_nothing_and_frees_who_waited(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.swapped = {0}
    assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "qp") == PARKED
    iommu.unbind(pasid)
    assert iommu.take_wakeups() == ["qp"]
    assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "qp") == 0
    assert iommu.space(pasid) is None


def test_a_freed_pasid_is_not_handed_out_next(space: ArraySpace) -> None:
    iommu = Iommu()
    pasid = iommu.bind(space)
    iommu.unbind(pasid)
    assert iommu.bind(space) != pasid


def test_a_copy_of_present_memory_is_all_or_left_to_the_general_way(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    pasid = iommu.bind(space)
    assert iommu.copy_present(pasid, 0, pasid, 4090, 12, staging, METERS)
    assert space.memory[4090:4102].tolist() == space.memory[:12].tolist()
    for pages in (space.untouched, space.swapped):
        pages.add(1)
        assert not iommu.copy_present(pasid, 4090, pasid, 0, 12, staging, METERS), "the source is not all there"
        assert not iommu.copy_present(pasid, 0, pasid, 4090, 12, staging, METERS), "nor is the target"
        pages.clear()
    assert not iommu.copy_present(pasid, len(space.memory) - 4, pasid, 0, 12, staging, METERS), "it ends early"
    assert not iommu.copy_present(pasid + 1, 0, pasid, 0, 12, staging, METERS)
    assert not iommu.take_requests(), "and nobody waits"


def test_who_was_resumed_is_left_to_the_general_way_which_knows_its_patience(space: ArraySpace) -> None:
    iommu, staging = Iommu(), Staging.of_size(64)
    pasid = iommu.bind(space)
    space.swapped = {0}
    assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "one") == PARKED
    service(iommu, space)
    assert not iommu.copy_present(pasid, 4096, pasid, 8192, 8, staging, METERS)
    assert iommu.read(pasid, 0, 8, staging, 0, Meter(), "one") == 8
    assert iommu.copy_present(pasid, 4096, pasid, 8192, 8, staging, METERS)
