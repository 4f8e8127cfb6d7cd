"""The kernel's HMM self-tests of migration, by name: pages leave, whoever touches them brings them back.

The table of all names is in test_hmm_selftests.py. Device memory is swap here; its bytes come back to CPU and devices
alike. A huge page is a run of 512 pages.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hmm_stand import (
    FEW,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    N_PAGES,
    OWN,
    MirrorDevice,
    Nic,
    Stand,
    advise,
    crc,
    in_child,
    move,
    pattern,
    view,
)

import nopin
from nopin.lab.servers import LocalServer
from nopin.linux.libc import unmap

pytest_plugins = ("hmm_fixtures",)
pytestmark = pytest.mark.needs_userfaultfd

N_HUGE = 512
AWAY = 1 << 40
"""Added to an address it gives one where nothing is mapped."""


def test_migrate(stand: Stand) -> None:
    array = stand.filled()
    with stand.expect(cpu=OWN, moved_out=N_PAGES):
        stand.migrate()
    assert not stand.present(array).any()
    with stand.expect(cpu=OWN):
        stand.migrate()


def test_migrate_fault(stand: Stand, mirror: MirrorDevice) -> None:
    array = stand.filled()
    for round_ in range(3):
        stand.migrate()
        with stand.expect(cpu=FEW, moved_in=N_PAGES):
            assert np.array_equal(array, pattern(N_PAGES) + round_)
        with stand.expect(cpu=OWN, dropped=N_PAGES):
            stand.migrate()  # nobody wrote: their copies still count
        with stand.expect(**mirror.faults, moved_in=N_PAGES):
            assert mirror.checksum(array) == crc(pattern(N_PAGES) + round_)
        array += 1


def test_migrate_release(stand: Stand) -> None:
    """Unmapped while it is out: nothing comes back, and swap is free again."""
    array = stand.filled()
    before = stand.swap_bytes()
    stand.migrate()
    assert stand.swap_bytes() > before
    with stand.expect():
        unmap(array.ctypes.data, array.nbytes)
    assert stand.swap_bytes() == before
    assert not stand.present(array).any()


def test_migrate_shared(stand: Stand, mirror: MirrorDevice) -> None:
    array = stand.filled()

    def child() -> bool:
        return np.array_equal(array, pattern(N_PAGES))

    for _ in range(2):
        stand.migrate()
        assert not stand.present(array).any()
        with stand.expect(cpu=FEW, moved_in=N_PAGES):
            assert in_child(child) == 0
    with stand.expect(**mirror.faults):
        assert mirror.checksum(array) == crc(pattern(N_PAGES))


def test_migrate_multiple(stand: Stand, nic: Nic) -> None:
    """Many buffers, one after the other and then all at once."""
    arrays = []
    for _ in range(8):
        arrays.append(stand.filled())
        stand.migrate()
        with stand.expect(nic=1, moved_in=N_PAGES):
            assert nic.checksum(arrays[-1]) == crc(pattern(N_PAGES))
        nic.fill(arrays[-1], len(arrays))
    with stand.expect(cpu=OWN, moved_out=N_PAGES):
        stand.migrate()  # the others were written out when the next one was
    with stand.expect(nic=8, moved_in=8 * N_PAGES):
        for value, array in enumerate(arrays, 1):
            assert nic.checksum(array) == crc(np.full_like(array, value))


def test_migrate_mixed(stand: Stand, nic: Nic) -> None:
    """Pages in every state side by side: those that are there leave, and each comes back as what it was."""
    array = stand.buffer(8)
    expected = np.zeros_like(array)
    array[1:3] = expected[1:3] = 1
    stand.migrate()
    array[3] = expected[3] = 3
    nic.fill(array[4:5], 4)
    expected[4] = 4
    array[5].sum()
    array[1].sum()
    array[6] = 6
    advise(array[6:7], MADV_REMOVE)
    with stand.expect(cpu=OWN, moved_out=2, dropped=1):
        stand.migrate()
    assert not stand.present(array).any()
    with stand.expect(nic=1, moved_in=4):
        assert nic.checksum(array) == crc(expected)
    assert np.array_equal(array, expected)


def test_migrate_huge_empty(stand: Stand, nic: Nic) -> None:
    """A run that nobody has touched: there is nothing to move, and a device finds zeros."""
    array = stand.buffer(N_HUGE)
    with stand.expect(cpu=OWN):
        stand.migrate()
    with stand.expect(nic=1):
        assert nic.checksum(array) == crc(np.zeros_like(array))


def test_migrate_huge_zero(stand: Stand, nic: Nic) -> None:
    """A run that was touched and holds zeros takes no space out there, and no reading to come back."""
    array = stand.buffer(N_HUGE)
    array[...] = 0
    before = stand.swap_bytes()
    with stand.expect(cpu=OWN):
        stand.migrate()
    assert not stand.present(array).any()
    assert stand.swap_bytes() == before
    with stand.expect(cpu=range(1, N_HUGE // 8)):
        assert not array.any()
    with stand.expect(nic=1):
        assert nic.checksum(array) == crc(np.zeros_like(array))


@pytest.mark.parametrize("migrated", [False, True])
def test_migrate_huge_free(stand: Stand, nic: Nic, migrated: bool) -> None:
    """Given up with madvise, wherever its pages are: no byte comes back, nor is space kept for it."""
    array = stand.filled(N_HUGE)
    before = stand.swap_bytes()
    if migrated:
        stand.migrate()
    with stand.expect():
        advise(array, MADV_REMOVE)
    with stand.expect(nic=1):
        assert nic.checksum(array) == crc(np.zeros_like(array))
    assert stand.swap_bytes() == before
    assert not array.any()


def test_migrate_huge_fault(stand: Stand, nic: Nic) -> None:
    array = stand.filled(N_HUGE)
    stand.migrate()
    with stand.expect(nic=1, moved_in=N_HUGE):
        assert nic.checksum(array) == crc(pattern(N_HUGE))
    stand.migrate()
    with stand.expect(cpu=range(1, 32), moved_in=N_HUGE):
        assert np.array_equal(array, pattern(N_HUGE))


def test_migrate_huge_err(server: LocalServer, stand: Stand, nic: Nic) -> None:
    """One page of a run cannot be brought back: an error for it, and its neighbours are as they were."""
    array = stand.filled(N_HUGE)
    stand.migrate()
    table, bad = stand.table(), stand.page_of(array) + 100
    (swap,) = (file for file in Path(f"/proc/{server.pid}/fd").iterdir() if "/var/tmp/" in os.readlink(file))
    with swap.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xa5", int(table.units[bad]) * 512 + 5)
    with stand.expect(nic=1, moved_in=100, lost=1), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
        nic.checksum(array)
    with stand.expect():
        assert nic.checksum(array[:100]) == crc(pattern(N_HUGE)[:100])
    with stand.expect(nic=1, moved_in=N_HUGE - 101):
        assert nic.checksum(array[101:]) == crc(pattern(N_HUGE)[101:])


@pytest.mark.parametrize("where", ["front", "middle", "end"])
def test_migrate_partial_unmap_fault(stand: Stand, nic: Nic, where: str) -> None:
    """Part of a run is unmapped while all of it is out: the rest comes back, that part never does."""
    array = stand.filled(N_HUGE)
    stand.migrate()
    first = {"front": 0, "middle": N_HUGE // 4, "end": N_HUGE // 2}[where]
    gone = slice(first, first + N_HUGE // 2)
    unmap(array[gone].ctypes.data, array[gone].nbytes)
    rest = [part for part in (array[: gone.start], array[gone.stop :]) if len(part)]
    bytes_of = [pattern(N_HUGE)[: gone.start], pattern(N_HUGE)[gone.stop :]]
    expected = [part for part in bytes_of if len(part)]
    with stand.expect(cpu=range(1, 64), moved_in=N_HUGE // 2):
        assert all(np.array_equal(part, wanted) for part, wanted in zip(rest, expected, strict=True))
    with stand.expect(nic=len(rest)):
        assert [nic.checksum(part) for part in rest] == [crc(part) for part in expected]
    with stand.expect(), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
        nic.checksum(array[gone])
    assert not stand.present(array[gone]).any()


REMAPS = list(itertools.product([False, True], ["all", "front", "end"], [0, MREMAP_DONTUNMAP], ["cpu", "nic"]))


@pytest.mark.timeout(120)
def test_migrate_remap_fault(stand: Stand) -> None:
    """Moved by mremap while in memory or out, all or part, away or doubled; then CPU or NIC comes first: 24 ways."""
    for n, (migrated, part, flags, first) in enumerate(REMAPS):
        nic = Nic(stand.device, stand.device)
        array = stand.filled()
        if migrated:
            stand.migrate()
        pages = {"all": slice(0, N_PAGES), "front": slice(0, 100), "end": slice(100, N_PAGES)}[part]
        source, expected = array[pages], pattern(N_PAGES)[pages]
        with stand.expect():
            moved = move(source, source.ctypes.data + AWAY, flags)
        n_in = len(source) if migrated else 0
        if first == "cpu":
            ahead = range(n_in, N_PAGES + 1) if migrated else 0  # pages that were not moved come along
            with stand.expect(cpu=range(len(source)), moved_in=ahead):
                assert np.array_equal(moved, expected), REMAPS[n]
            with stand.expect(nic=1):
                assert nic.checksum(moved) == crc(expected), REMAPS[n]
        else:
            with stand.expect(nic=1, moved_in=n_in):
                assert nic.checksum(moved) == crc(expected), REMAPS[n]
            with stand.expect(cpu=range(len(source))):
                assert np.array_equal(moved, expected), REMAPS[n]
        nic.fill(moved, -n)
        assert (moved == -n).all()
        if flags:
            assert (source == -n).all(), "the same pages are at both places"
        else:
            with stand.expect(), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
                nic.checksum(source)
        stand.migrate()
        assert (view(moved.ctypes.data, len(source)) == -n).all()
        unmap(moved.ctypes.data, moved.nbytes)
