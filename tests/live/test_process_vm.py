"""Copies from and to a real other process: exact counts at every kind of edge, and long scatter lists."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
from owner_process import PROT_NONE, PROT_READ, Owner

from nopin.linux.process_vm import MAX_SEGMENTS, ProcessVm
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def region(owner: Owner) -> int:
    """Four pages with known bytes; page 3 is unmapped."""
    address = int(owner.do("map", 4 * PAGE))
    owner.do("put", address, bytes(range(256)) * 48)
    owner.do("unmap", address + 3 * PAGE, PAGE)
    return address


@pytest.fixture
def buffer() -> np.ndarray:
    return np.full(8 * PAGE, 0xA5, np.uint8)


def test_a_read_that_crosses_pages_is_exact(owner: Owner, region: int, buffer: np.ndarray) -> None:
    assert ProcessVm(owner.pid).read(region + 4000, 200, buffer.ctypes.data) == 200
    assert buffer[:200].tobytes() == owner.do("get", region + 4000, 200)
    assert buffer[200] == 0xA5


def test_a_read_into_a_hole_is_short_by_the_byte(owner: Owner, region: int, buffer: np.ndarray) -> None:
    start = region + 3 * PAGE - 100
    assert ProcessVm(owner.pid).read(start, 300, buffer.ctypes.data) == 100
    assert (buffer[100:] == 0xA5).all()


def test_a_first_byte_in_a_hole_is_efault(owner: Owner, region: int, buffer: np.ndarray) -> None:
    vm = ProcessVm(owner.pid)
    assert vm.read(region + 3 * PAGE, 8, buffer.ctypes.data) == -errno.EFAULT
    assert vm.write(region + 3 * PAGE, 8, buffer.ctypes.data) == -errno.EFAULT


def test_addresses_no_process_can_have_are_efault(owner: Owner, buffer: np.ndarray) -> None:
    vm = ProcessVm(owner.pid)
    for address in (0, 1 << 47, 1 << 63, (1 << 64) - 8):
        assert vm.read(address, 64, buffer.ctypes.data) == -errno.EFAULT


def test_the_protection_of_the_moment_decides(owner: Owner, region: int, buffer: np.ndarray) -> None:
    vm = ProcessVm(owner.pid)
    owner.do("protect", region + PAGE, PAGE, PROT_READ)
    assert vm.read(region, 2 * PAGE, buffer.ctypes.data) == 2 * PAGE
    assert vm.write(region, 2 * PAGE, buffer.ctypes.data) == PAGE
    owner.do("protect", region + PAGE, PAGE, PROT_NONE)
    assert vm.read(region + PAGE - 8, 16, buffer.ctypes.data) == 8
    owner.do("protect", region + PAGE, PAGE, PROT_READ | 2)
    assert vm.write(region, 2 * PAGE, buffer.ctypes.data) == 2 * PAGE


def test_a_write_is_seen_by_the_owner_but_not_by_its_child(owner: Owner, region: int) -> None:
    child = owner.do("fork")
    before = owner.do("get", region, 8)
    word = np.frombuffer(b"parent's", np.uint8)
    assert ProcessVm(owner.pid).write(region, 8, word.ctypes.data) == 8
    assert owner.do("get", region, 8) == b"parent's"
    seen = np.zeros(8, np.uint8)
    assert ProcessVm(child).read(region, 8, seen.ctypes.data) == 8
    assert seen.tobytes() == before


def test_lists_far_over_the_kernels_limit_keep_both_sides_aligned(owner: Owner) -> None:
    n_segments = 3 * MAX_SEGMENTS + 7
    address = int(owner.do("map", 1 << 18))
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, 1 << 18, np.uint8)
    owner.do("put", address, data.tobytes())
    starts = np.sort(rng.choice((1 << 18) - 64, n_segments, replace=False))
    lengths = rng.integers(0, 60, n_segments)
    remote = np.stack([starts + address, lengths], axis=1).astype(np.uint64)
    total = int(lengths.sum())
    sink = np.zeros(total, np.uint8)
    cuts = np.concatenate([[0], np.sort(rng.choice(total, 1500, replace=False)), [total]])
    local = np.stack([cuts[:-1] + sink.ctypes.data, np.diff(cuts)], axis=1).astype(np.uint64)
    expected = b"".join(data[s : s + n].tobytes() for s, n in zip(starts, lengths, strict=True))
    vm = ProcessVm(owner.pid)
    assert vm.read_v(remote, local) == total
    assert sink.tobytes() == expected
    sink[:] = ~sink
    distinct = np.stack([address + np.arange(n_segments) * 64, lengths], axis=1).astype(np.uint64)
    assert vm.write_v(distinct, local) == total
    written = b"".join(owner.do("get", int(a), int(n)) for a, n in distinct[-200:])
    assert written == sink.tobytes()[-len(written) :]


def test_a_list_stops_at_its_first_bad_segment(owner: Owner, region: int, buffer: np.ndarray) -> None:
    hole = region + 3 * PAGE
    remote = np.array([[region, 100], [hole - 50, 100], [region, 100]], np.uint64)
    local = np.array([[buffer.ctypes.data, 300]], np.uint64)
    vm = ProcessVm(owner.pid)
    assert vm.read_v(remote, local) == 150
    assert (buffer[150:] == 0xA5).all()
    assert vm.read_v(remote[1:] + np.array([[50, 0]], np.uint64), local - np.array([[0, 100]], np.uint64)) < 0


def test_a_process_that_is_gone_is_esrch(owner: Owner, region: int, buffer: np.ndarray) -> None:
    vm = ProcessVm(owner.pid)
    owner.kill()
    assert vm.read(region, 8, buffer.ctypes.data) == -errno.ESRCH


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_process_is_eperm(region: int, owner: Owner) -> None:
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        sink = np.zeros(8, np.uint8)
        os._exit(ProcessVm(owner.pid).read(region, 8, sink.ctypes.data) == -errno.EPERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
