"""The plain space and the iommu over a real process: what is slow, what is bad, and who is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from owner_process import MADV_DONTNEED, PROT_NONE, Owner
from zram_swap import zram_swap

from nopin.iommu.access import PARKED
from nopin.iommu.iommu import Iommu
from nopin.iommu.page_requests import Meter
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import Maps, pinned_bytes
from nopin.linux.process_memory import ProcessMemory
from nopin.linux.process_vm import ProcessVm
from nopin.mm.plain import PlainSpace
from nopin.mm.space import Absent, FaultResult, Reason, Staging
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, U64_MAX

PAGE = PAGE_BYTES


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def space(owner: Owner) -> Iterator[PlainSpace]:
    space = PlainSpace(ProcessMemory(PidFd.open(owner.pid), lambda _where: True))
    yield space
    space.close()


def test_untouched_memory_reads_as_zeros_and_is_not_slow(owner: Owner, space: PlainSpace) -> None:
    address = owner.do("map", 4 * PAGE)
    assert space.absent(address + 100, address + PAGE + 1) == Absent(2, slow=False)
    staging = Staging(np.full(2 * PAGE, 0xA5, np.uint8))
    assert space.read(address, 2 * PAGE, staging, 0) == 2 * PAGE
    assert not staging.array.any()
    assert space.absent(address, address + 2 * PAGE) is None


@pytest.mark.needs_root
def test_untouched_memory_that_a_program_may_hold_back_is_slow(owner: Owner) -> None:
    space = PlainSpace(ProcessMemory.open(owner.pid))
    address = owner.do("map", 2 * PAGE)
    assert space.absent(address, address + PAGE) == Absent(1, slow=True, held=True)
    assert space.fault(address, address + PAGE, write=True) == FaultResult(PAGE)
    assert space.absent(address, address + PAGE) is None
    space.close()


def test_dropped_and_remapped_memory_is_what_it_is_now(owner: Owner, space: PlainSpace) -> None:
    address, staging = owner.do("map", PAGE), Staging.of_size(8)
    owner.do("put", address, b"original")
    owner.do("advise", address, PAGE, MADV_DONTNEED)
    assert space.read(address, 8, staging, 0) == 8
    assert staging.array.tobytes() == bytes(8)
    owner.do("map", PAGE, address)
    owner.do("put", address, b"remapped")
    assert space.read(address, 8, staging, 0) == 8
    assert staging.array.tobytes() == b"remapped"


def test_moved_memory_is_gone_from_the_old_address(owner: Owner, space: PlainSpace) -> None:
    address, staging = owner.do("map", 2 * PAGE), Staging.of_size(8)
    owner.do("put", address, b"the data")
    owner.do("move", address, PAGE, address + PAGE)
    assert space.read(address, 8, staging, 0) == 0
    assert space.read(address + PAGE, 8, staging, 0) == 8
    assert staging.array.tobytes() == b"the data"


def test_a_file_page_not_mapped_in_is_slow_and_truncation_makes_it_bad(
    owner: Owner, space: PlainSpace, tmp_path: Path
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"\x07" * (4 * PAGE))
    address, staging = owner.do("map_file", str(file), 4 * PAGE), Staging.of_size(4 * PAGE)
    assert space.absent(address, address + PAGE) == Absent(1, slow=True)
    assert space.fault(address, address + 4 * PAGE, write=False) == FaultResult(4 * PAGE)
    assert space.absent(address, address + 4 * PAGE) is None
    with file.open("r+b") as stream:
        stream.truncate(2 * PAGE)
    assert space.read(address, 4 * PAGE, staging, 0) == 2 * PAGE
    assert space.fault(address, address + 4 * PAGE, write=False).first_bad == address + 2 * PAGE


def test_faulting_in_changes_no_byte_and_names_the_first_bad_address(owner: Owner, space: PlainSpace) -> None:
    n_pages = 3000  # more than are touched in one call
    address = owner.do("map", n_pages * PAGE)
    owner.do("put", address + 5 * PAGE, b"keep me")
    owner.do("protect", address + 2500 * PAGE, PAGE, PROT_NONE)
    bad = address + 2500 * PAGE
    result = space.fault(address + 10, address + n_pages * PAGE, write=True)
    assert result == FaultResult(bad - address - 10, bad, Reason.NO_ACCESS)
    assert space.absent(address, bad) is None
    assert owner.do("get", address + 5 * PAGE, 7) == b"keep me"
    assert owner.do("get", address, PAGE) == bytes(PAGE)


def test_nonsense_addresses_move_nothing(space: PlainSpace) -> None:
    staging = Staging.of_size(64)
    for address in (0, 1 << 47, U64_MAX - 63, U64_MAX):
        assert space.absent(address, address + 64) is None
        assert space.read(address, 64, staging, 0) == 0
        assert space.write(address, 64, staging, 0) == 0


def test_a_dead_owner_is_gone_for_good_and_nothing_moves(owner: Owner, space: PlainSpace) -> None:
    address, staging = owner.do("map", PAGE), Staging.of_size(8)
    owner.do("put", address, b"original")
    assert not space.gone
    owner.kill()
    assert space.gone
    assert space.read(address, 8, staging, 0) == 0
    assert space.write(address, 8, staging, 0) == 0
    assert space.fault(address, address + 8, write=False) == FaultResult(0, address, Reason.OWNER_GONE)


def test_a_zombie_counts_as_gone_while_its_number_is_still_taken(owner: Owner, space: PlainSpace) -> None:
    address = owner.do("map", PAGE)
    child = owner.do("fork")
    its_space = PlainSpace(ProcessMemory.open(child))
    assert not its_space.gone
    owner.do("end_children")
    assert its_space.gone
    assert its_space.read(address, 8, Staging.of_size(8), 0) == 0
    its_space.close()


def test_a_process_that_became_another_program_is_gone_and_the_new_one_is_not_reached(
    owner: Owner, space: PlainSpace
) -> None:
    iommu, staging = Iommu(), Staging.of_size(8)
    pasid = iommu.bind(space)
    address = owner.do("map", PAGE)
    assert iommu.read(pasid, address, 8, staging, 0, Meter(), "qp") == 8
    owner.begin("become", "/bin/sleep", "60")
    its_command = Path(f"/proc/{owner.pid}/comm")
    while its_command.read_text() != "sleep\n":
        time.sleep(0.001)
    maps = Maps(owner.pid)
    new = next(mapping.where.start for mapping in maps.within(Range(0, 1 << 47)) if mapping.writable)
    maps.close()
    assert ProcessVm(owner.pid).read(new, 8, staging.address) == 8, "by its number it can be reached"
    assert iommu.write(pasid, new, 8, staging, 0, Meter(), "qp") == 0
    assert iommu.read(pasid, new, 8, staging, 0, Meter(), "qp") == 0
    assert space.gone
    owner.kill()


def test_a_closed_space_moves_nothing(owner: Owner) -> None:
    space = PlainSpace(ProcessMemory.open(owner.pid))
    address = owner.do("map", PAGE)
    space.close()
    space.close()
    assert space.gone
    assert space.absent(address, address + PAGE) is None
    assert space.read(address, 8, Staging.of_size(8), 0) == 0


@pytest.mark.needs_root
def test_swapped_pages_park_come_back_whole_and_pin_nothing(owner: Owner, space: PlainSpace) -> None:
    data = np.random.default_rng(3).integers(0, 256, 64 * PAGE, np.uint8)
    with zram_swap():
        iommu, meter, staging = Iommu(), Meter(), Staging.of_size(len(data))
        pasid = iommu.bind(space)
        address = owner.do("map", len(data))
        owner.do("put", address, data.tobytes())
        owner.do("page_out", address, len(data))
        assert space.absent(address, address + len(data)) == Absent(64, slow=True)
        assert iommu.read(pasid, address, len(data), staging, 0, meter, "qp") == PARKED
        assert not staging.array.any()
        (request,) = iommu.take_requests()
        iommu.respond(request, space.fault(request.start, request.end, write=request.write))
        assert iommu.take_wakeups() == ["qp"]
        assert iommu.read(pasid, address, len(data), staging, 0, meter, "qp") == len(data)
        assert (staging.array == data).all()
        assert (meter.page_faults, meter.page_faults_handled) == (64, 1)
        assert pinned_bytes(owner.pid) == 0


def test_a_short_copy_in_one_step_is_made_only_where_all_of_it_is_present(owner: Owner, space: PlainSpace) -> None:
    address, staging = owner.do("map", 4 * PAGE), Staging(np.full(2 * PAGE, 0xA5, np.uint8))
    owner.do("put", address, b"abcd")
    assert not space.read_present(address + PAGE - 2, 4, staging, 0), "the second page was never touched"
    assert not space.write_present(address + PAGE - 2, 4, staging, 0)
    assert space.absent(address + PAGE, address + 2 * PAGE) == Absent(1, slow=False), "nothing was brought"
    owner.do("put", address + PAGE, b"efgh")
    assert space.write_present(address + PAGE - 2, 4, staging, 0)
    assert owner.do("get", address + PAGE - 2, 6) == b"\xa5\xa5\xa5\xa5gh"
    assert space.read_present(address, 4, staging, 8)
    assert bytes(staging.array[8:12]) == b"abcd"


def test_a_short_copy_in_one_step_obeys_rights_and_ends_with_its_owner(owner: Owner, space: PlainSpace) -> None:
    address, staging = owner.do("map", PAGE), Staging.of_size(PAGE)
    owner.do("put", address, b"abcd")
    owner.do("protect", address, PAGE, PROT_NONE)
    assert not space.read_present(address, 4, staging, 0)
    assert not space.write_present(address, 4, staging, 0)
    for nowhere in (0, 1 << 47, 1 << 63, U64_MAX - 3):
        assert not space.read_present(nowhere, 4, staging, 0)
    owner.kill()
    assert not space.read_present(address, 4, staging, 0)
