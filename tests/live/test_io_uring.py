"""Rings of clients that lie: nothing moves that should not, and nobody waits long."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from owner_process import Owner

from nopin.linux.io_uring import STEP_BYTES, PinnedFrames
from nopin.linux.pidfd import PidFd
from nopin.linux.probe import probe_all
from nopin.units import PAGE_BYTES

HERE = next(feature for feature in probe_all() if feature.name == "io_uring")
pytestmark = [
    pytest.mark.needs_io_uring,
    pytest.mark.skipif(not HERE.available, reason=f"io_uring: {HERE.detail}"),
]

LENGTH = 4 * STEP_BYTES
RINGS, ENTRIES = 0, 0x1000_0000


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
def frames(owner: Owner, address: int) -> Iterator[PinnedFrames]:
    process = PidFd.open(owner.pid)
    frames = PinnedFrames(process, owner.do("pin", address, LENGTH), address)
    yield frames
    frames.close()
    process.close()


def test_copies_longer_than_the_pipe_are_whole(owner: Owner, address: int, frames: PinnedFrames) -> None:
    data = np.random.default_rng(5).integers(0, 256, LENGTH - 11, np.uint8)
    copy = np.zeros_like(data)
    assert frames.store(address + 7, len(data), data.ctypes.data) == len(data)
    assert owner.do("get", address + 7, len(data)) == data.tobytes()
    assert frames.load(address + 7, len(data), copy.ctypes.data) == len(data)
    assert (copy == data).all()


def test_a_store_that_fails_leaves_nothing_behind_for_the_next(
    owner: Owner, address: int, frames: PinnedFrames
) -> None:
    word = np.frombuffer(b"misplace", np.uint8)
    assert frames.store(address + LENGTH, 8, word.ctypes.data) == 0
    copy = np.zeros(8, np.uint8)
    assert frames.load(address, 8, copy.ctypes.data) == 8
    assert copy.tobytes() == b"original"


@pytest.mark.parametrize("value", [0x00, 0x01, 0xFF])
def test_a_scribbled_ring_moves_nothing_again(owner: Owner, address: int, frames: PinnedFrames, value: int) -> None:
    copy = np.full(8, 0xA5, np.uint8)
    assert frames.load(address, 8, copy.ctypes.data) == 8
    owner.do("scribble_on_ring", RINGS, PAGE_BYTES, value)
    copy[:] = 0xA5
    assert frames.load(address, 8, copy.ctypes.data) == 0
    assert frames.store(address, 8, copy.ctypes.data) == 0
    assert (copy == 0xA5).all()
    assert owner.do("get", address, 8) == b"original"


def test_scribbled_entries_are_written_anew(owner: Owner, address: int, frames: PinnedFrames) -> None:
    owner.do("scribble_on_ring", ENTRIES, 64 * 8, 0xFF)
    copy = np.zeros(8, np.uint8)
    assert frames.load(address, 8, copy.ctypes.data) == 8
    assert copy.tobytes() == b"original"


def test_a_pinned_region_costs_three_descriptors(owner: Owner, address: int) -> None:
    process = PidFd.open(owner.pid)
    before = len(os.listdir("/proc/self/fd"))
    frames = PinnedFrames(process, owner.do("pin", address, LENGTH), address)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    frames.close()
    assert len(os.listdir("/proc/self/fd")) == before
    process.close()
