"""A real pin, with its price and its hazards."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest
from owner_process import MADV_DONTNEED, PROT_READ, Owner

from nopin.errors import UsageError
from nopin.linux.io_uring import PinnedBuffer, PinnedFrames
from nopin.linux.pidfd import PidFd
from nopin.linux.probe import probe_all
from nopin.linux.proc import pinned_bytes
from nopin.mm.pinned import PinnedSpace
from nopin.mm.space import FaultResult, Reason, Staging
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

HERE = next(feature for feature in probe_all() if feature.name == "io_uring")
pytestmark = [
    pytest.mark.needs_io_uring,
    pytest.mark.skipif(not HERE.available, reason=f"io_uring: {HERE.detail}"),
]

PAGE = PAGE_BYTES
LENGTH = 1 << 20


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def address(owner: Owner) -> int:
    address = int(owner.do("map", LENGTH))
    owner.do("put", address, b"original" * (LENGTH // 8))
    return address


@pytest.fixture
def space(owner: Owner, address: int) -> Iterator[PinnedSpace]:
    process = PidFd.open(owner.pid)
    frames = PinnedFrames(process, owner.do("pin", address, LENGTH), address)
    space = PinnedSpace(frames, Range.of_length(address, LENGTH))
    yield space
    space.close()
    process.close()


def read(space: PinnedSpace, address: int, length: int = 8) -> bytes:
    staging = Staging.of_size(length)
    assert space.read(address, length, staging, 0) == length
    return staging.array.tobytes()


def write(space: PinnedSpace, address: int, data: bytes) -> None:
    staging = Staging.of_size(len(data))
    staging.array[:] = list(data)
    assert space.write(address, len(data), staging, 0) == len(data)


def test_the_pin_is_charged_and_the_whole_range_is_reached(owner: Owner, address: int, space: PinnedSpace) -> None:
    assert pinned_bytes(owner.pid) == LENGTH
    assert read(space, address, LENGTH) == b"original" * (LENGTH // 8)
    write(space, address + 5, b"from the device" * 50000)
    assert owner.do("get", address + 5, 15 * 50000) == b"from the device" * 50000
    owner.do("put", address, b"by owner")
    assert read(space, address) == b"by owner"
    assert space.absent(address, address + LENGTH) is None


def test_nothing_outside_the_registered_range_exists(owner: Owner, address: int, space: PinnedSpace) -> None:
    staging = Staging.of_size(64)
    assert space.read(address + LENGTH - 4, 64, staging, 0) == 4
    assert space.read(address + LENGTH, 64, staging, 0) == 0
    assert space.write(address - 8, 64, staging, 0) == 0
    end = address + LENGTH
    assert space.fault(end - PAGE, end + PAGE, write=True) == FaultResult(PAGE, end, Reason.NO_ACCESS)


def test_a_range_larger_than_what_was_pinned_is_not_believed(owner: Owner, address: int) -> None:
    process = PidFd.open(owner.pid)
    frames = PinnedFrames(process, owner.do("pin", address, PAGE), address)
    space = PinnedSpace(frames, Range.of_length(address, LENGTH))
    staging = Staging.of_size(LENGTH)
    assert space.read(address + PAGE, 8, staging, 0) == 0
    assert space.write(address + PAGE, 8, staging, 0) == 0
    assert read(space, address) == b"original"
    space.close()
    process.close()


def test_after_dontneed_the_device_keeps_the_old_page(owner: Owner, address: int, space: PinnedSpace) -> None:
    owner.do("advise", address, PAGE, MADV_DONTNEED)
    owner.do("put", address, b"new data")
    assert read(space, address) == b"original"
    write(space, address, b"lost!!!!")
    assert owner.do("get", address, 8) == b"new data"


def test_after_munmap_and_remap_the_device_keeps_the_old_page(owner: Owner, address: int, space: PinnedSpace) -> None:
    owner.do("unmap", address, LENGTH)
    assert read(space, address) == b"original"
    owner.do("map", LENGTH, address)
    owner.do("put", address, b"new data")
    assert read(space, address) == b"original"


def test_after_fork_parent_and_device_stay_together(owner: Owner, address: int, space: PinnedSpace) -> None:
    owner.do("fork")
    owner.do("put", address, b"new data")
    assert read(space, address) == b"new data"


def test_a_dead_owner_is_gone(owner: Owner, address: int, space: PinnedSpace) -> None:
    owner.kill()
    assert space.gone
    assert space.read(address, 8, Staging.of_size(8), 0) == 0


def test_unmapped_and_read_only_memory_cannot_be_pinned(owner: Owner, address: int) -> None:
    owner.do("protect", address, PAGE, PROT_READ)
    with pytest.raises(OSError, match="Bad address"):
        owner.do("pin", address, PAGE)
    owner.do("unmap", address, PAGE)
    with pytest.raises(OSError, match="Bad address"):
        owner.do("pin", address, PAGE)


def test_a_descriptor_that_is_no_disabled_ring_is_refused(owner: Owner) -> None:
    process = PidFd.open(owner.pid)
    address = owner.do("map", PAGE)
    ring_fd = owner.do("pin", address, PAGE)
    PinnedFrames(process, ring_fd, address).close()
    for fd in (ring_fd, 2):  # enabled by the first use; not a ring at all
        with pytest.raises(UsageError, match="not a pinned region"):
            PinnedFrames(process, fd, address)
    process.close()


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user whom the limit binds")
def test_a_user_cannot_pin_beyond_the_memlock_limit() -> None:
    def become_limited() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (LENGTH // 2, LENGTH // 2))
        os.setgid(65534)
        os.setuid(65534)

    with Owner(become_limited) as owner:
        address = owner.do("map", LENGTH)
        owner.do("pin", address, 2 * PAGE)
        assert pinned_bytes(owner.pid) == 2 * PAGE
        with pytest.raises(MemoryError, match="RLIMIT_MEMLOCK"):
            owner.do("pin", address, LENGTH)


def test_closing_gives_the_descriptors_back(owner: Owner, address: int) -> None:
    process = PidFd.open(owner.pid)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        PinnedFrames(process, owner.do("pin", address, PAGE), address).close()
    with contextlib.suppress(UsageError):
        PinnedFrames(process, 2, address)
    assert len(os.listdir("/proc/self/fd")) == before
    process.close()


def test_a_length_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot pin 0 bytes"):
        PinnedBuffer(PAGE, 0)
