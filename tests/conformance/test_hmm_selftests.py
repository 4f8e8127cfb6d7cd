"""The kernel's HMM self-tests (tools/testing/selftests/mm/hmm-tests.c) that apply to managed memory, by name.

The device there is a driver that mirrors a process; here it is the NIC (direct and over the wire) or an accelerator
worker. Each test checks the data, how many pages moved, and how many faults that took.

| kernel's test | here |
|---|---|
| open_close | `test_open_close` |
| anon_read, anon_read_prot | `test_anon_read`, `test_anon_read_prot` |
| anon_write, anon_write_prot | `test_anon_write`, `test_anon_write_prot` |
| anon_write_child, anon_write_child_shared | `test_anon_write_child_shared`: children share an arena |
| anon_write_huge | `test_anon_write_huge`: 2 MiB are one run of pages, not one page |
| anon_write_hugetlbfs, compound | do not apply: an arena has pages of 4 KiB only |
| file_read, file_write, mixedmap | do not apply: other memory is not managed (plain memory: docs/outcomes.md) |
| anon_teardown | `test_anon_teardown` |
| snapshot | `test_snapshot` |
| double_map | `test_double_map` |
| hmm_gup_test | `test_gup`: the kernel itself reaches for pages that are out |
| hmm_cow_in_device | `test_cow_in_device` |
| exclusive | `test_exclusive`: FETCH_ADD and CMP_SWAP |
| exclusive_mprotect, exclusive_cow | `test_exclusive_mprotect`, `test_exclusive_cow` |
| migrate, migrate_fault, migrate_release | `test_migrate`, `test_migrate_fault`, `test_migrate_release` |
| migrate_shared | the opposite holds: the kernel refuses shared memory, an arena is shared; `test_migrate_shared` |
| migrate_multiple | `test_migrate_multiple` |
| migrate_mixed | `test_migrate_mixed` |
| migrate_anon_huge_empty, _zero, _free, _fault, _err | `test_migrate_huge_empty`, `_zero`, `_free`, `_fault`, `_err` |
| migrate_partial_unmap_fault, migrate_remap_fault | `test_migrate_partial_unmap_fault`, `test_migrate_remap_fault` |
| benchmark_thp_migration | does not apply: measured by `nopin bench` |

Tests of migration are in test_hmm_migration.py.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hmm_stand import (
    FEW,
    MADV_DONTNEED,
    MADV_REMOVE,
    N_PAGES,
    PROT_NONE,
    PROT_READ,
    PROT_RW,
    WORDS,
    MirrorDevice,
    Nic,
    Stand,
    Worker,
    advise,
    crc,
    in_child,
    pattern,
    protect,
)

import nopin
from nopin.lab.servers import LocalServer
from nopin.linux import memfd
from nopin.linux.libc import unmap
from nopin.mm.page_table import LOST_UNIT
from nopin.nic.abi import Access, WcStatus
from nopin.units import PAGE_BYTES

pytest_plugins = ("hmm_fixtures",)
pytestmark = pytest.mark.needs_userfaultfd


def test_open_close(server: LocalServer) -> None:
    for _ in range(3):
        with nopin.Device(str(server.socket_path)) as device:
            device.arena("1MiB").close()
            assert not [row for row in device.stat() if row["kind"] == "arena"]


def test_anon_read(stand: Stand, mirror: MirrorDevice) -> None:
    array = stand.filled()
    with stand.expect(**mirror.faults):
        assert mirror.checksum(array) == crc(pattern(N_PAGES))
    with stand.expect():
        assert mirror.checksum(array) == crc(pattern(N_PAGES)), "read again, it needs no fault"
    assert stand.present(array).all()
    with stand.expect():
        assert np.array_equal(array, pattern(N_PAGES)), "the CPU's own mapping is as it was"


def test_anon_read_prot(stand: Stand, nic: Nic) -> None:
    """What a device may do is the region's affair; what the owner does to its own mapping concerns the CPU alone."""
    array = stand.filled()
    protect(array, PROT_NONE)
    with stand.expect(nic=1):
        assert nic.checksum(array) == crc(pattern(N_PAGES))
    stand.migrate()
    with stand.expect(nic=1, moved_in=N_PAGES):
        assert nic.checksum(array) == crc(pattern(N_PAGES))
    protect(array, PROT_READ)
    assert np.array_equal(array, pattern(N_PAGES))
    with stand.device.share(array, access="w") as share, nopin.attach(share.url, device=stand.device) as remote:
        remote.access |= Access.REMOTE_READ  # a peer that does not heed its rights
        with stand.expect(), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
            remote[0, 0]


def test_anon_write(stand: Stand, mirror: MirrorDevice) -> None:
    array = stand.filled()
    with stand.expect(**mirror.faults):
        mirror.fill(array, 7)
    with stand.expect():
        mirror.fill(array, 8)
    with stand.expect():
        assert (array == 8).all(), "the CPU sees it without a fault: it is the same page"
    stand.migrate()
    with stand.expect(cpu=FEW, moved_in=N_PAGES):
        assert (array == 8).all(), "what the device wrote went out and came back"


def test_anon_write_prot(stand: Stand, nic: Nic) -> None:
    array = stand.filled()
    with stand.device.share(array, access="r") as share, nopin.attach(share.url, device=stand.device) as remote:
        remote.access |= Access.REMOTE_WRITE
        with stand.expect(), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
            remote[...] = 7
    assert np.array_equal(array, pattern(N_PAGES)), "not a byte of it was written"
    protect(array, PROT_READ)
    with stand.expect(nic=1):
        nic.fill(array, 7)
    assert (array == 7).all()
    protect(array, PROT_RW)
    array[0, 0] = 9
    with stand.expect():
        assert nic.checksum(array[:1]) == crc(array[:1])


def test_anon_write_child_shared(stand: Stand, mirror: MirrorDevice) -> None:
    array = stand.filled()
    stand.migrate()

    def child() -> bool:
        assert np.array_equal(array[: N_PAGES // 2], pattern(N_PAGES)[: N_PAGES // 2])
        array[N_PAGES // 2 :] = -1
        return True

    with stand.expect(cpu=range(N_PAGES // 2, N_PAGES), moved_in=N_PAGES):
        assert in_child(child) == 0, "each store to a page that is clean is heard, as a fault"
    expected = pattern(N_PAGES)
    expected[N_PAGES // 2 :] = -1
    with stand.expect(**mirror.faults):
        assert mirror.checksum(array) == crc(expected)
    with stand.expect(nic=range(17), worker=range(N_PAGES)):
        mirror.fill(array, 3)
    assert in_child(lambda: (array == 3).all()) == 0
    assert (array == 3).all()


def test_anon_write_huge(stand: Stand, nic: Nic) -> None:
    n_pages = 1024
    array = stand.filled(n_pages)
    skipped = -stand.page_of(array) % 512
    huge = array[skipped : skipped + 512]
    with stand.expect(nic=1):
        nic.fill(huge, 7)
    stand.migrate()
    with stand.expect(nic=1, moved_in=512):
        assert nic.checksum(huge) == crc(np.full_like(huge, 7))
    assert stand.present(array).sum() == 512
    assert np.array_equal(array[:skipped], pattern(n_pages)[:skipped])
    assert np.array_equal(array[skipped + 512 :], pattern(n_pages)[skipped + 512 :])


def test_anon_teardown(stand: Stand, nic: Nic) -> None:
    """Half of a buffer is unmapped while it is read: right bytes or an access error; the other half stays."""
    half = N_PAGES // 2
    with ThreadPoolExecutor(1) as pool:
        for round_ in range(24):
            array = stand.filled()
            if round_ % 2:
                stand.migrate()
            remote = nic.remote(array)
            unmapping = pool.submit(unmap, array[half:].ctypes.data, half * PAGE_BYTES)
            try:
                assert np.array_equal(remote[...], pattern(N_PAGES))
            except nopin.WorkError as error:
                assert error.status == WcStatus.REM_ACCESS_ERR  # noqa: PT017 - it may end either way
            unmapping.result()
            kept = array[:half]
            with stand.expect(nic=range(2), cpu=range(half), moved_in=range(half + 1)):
                assert nic.checksum(kept) == crc(pattern(N_PAGES)[:half])
                assert np.array_equal(kept, pattern(N_PAGES)[:half])
            with stand.expect(nic=range(2)), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
                Nic(stand.device, stand.device).checksum(array)
            assert stand.present(array[half:]).sum() == 0, "what nobody maps takes no memory"


def test_snapshot(stand: Stand, nic: Nic) -> None:
    """The states a page can be in, seen without a fault: in the file or not, and what its entry in the table says."""
    array = stand.filled(8)
    advise(array[1:2], MADV_REMOVE)
    stand.migrate()
    array[2].sum()
    array[3, 0] = -1
    array[4] = 0
    nic.checksum(array[5:6])
    stand.buffer(1)
    first = stand.page_of(array)
    with stand.expect():
        table = stand.table()
        has_copy = (table.units[first : first + 8] != 0).tolist()
        is_present = stand.present(array).tolist()
    absent, copied = (False, False), (False, True)
    clean, dirty = (True, True), (True, False)
    assert list(zip(is_present, has_copy, strict=True)) == [
        copied,  # migrated
        absent,  # given up: nothing is there, and reads are zeros
        clean,  # read back: its copy still counts
        dirty,  # stored to
        dirty,
        clean,  # read by a device
        copied,
        copied,
    ]
    assert LOST_UNIT not in table.units


def test_double_map(stand: Stand, nic: Nic, worker: Worker) -> None:
    """Two devices and the CPU on the same pages, which leave now and then: each sees what was written last."""
    array = stand.filled()
    with stand.expect(nic=1, worker=FEW):
        assert nic.checksum(array) == worker.checksum(array) == crc(pattern(N_PAGES))
    with stand.expect(nic=1):  # which had the right to read only
        nic.fill(array, 2)
        worker.add(array, 1)
        assert (array == 3).all()
        assert nic.checksum(array) == crc(np.full_like(array, 3))
    stand.migrate()
    with stand.expect(nic=2, worker=FEW, moved_in=N_PAGES):
        worker.fill(array, 4)
        nic.add(array, 1)
    with stand.expect(cpu=FEW):
        assert (array == 5).all()
    stand.migrate()
    with stand.expect(nic=1, worker=FEW, moved_in=N_PAGES):
        nic.fill(array, 6)
        assert worker.checksum(array) == crc(np.full_like(array, 6))


@pytest.mark.needs_root
def test_gup(stand: Stand) -> None:
    """The kernel reaches for pages on a process's behalf: read and write system calls bring pages as a touch would."""
    array = stand.filled()
    stand.migrate()
    file = memfd.create("gup", array.nbytes)
    try:
        with stand.expect(cpu=FEW, moved_in=N_PAGES):
            assert os.pwrite(file, array.data, 0) == array.nbytes
        assert os.pread(file, array.nbytes, 0) == pattern(N_PAGES).tobytes()
        os.pwrite(file, np.full_like(array, 5).data, 0)
        stand.migrate()
        with stand.expect(cpu=range(1, 2 * N_PAGES), moved_in=N_PAGES):
            assert os.preadv(file, [array.data], 0) == array.nbytes
        assert (array == 5).all()
    finally:
        os.close(file)


def test_cow_in_device(stand: Stand, mirror: MirrorDevice) -> None:
    """A fork while all pages are out: parent, child and device find the same bytes, before and after a store."""
    array = stand.filled()
    stand.migrate()
    ready, says_ready = os.pipe()
    go, says_go = os.pipe()
    pid = os.fork()
    if pid == 0:
        right = np.array_equal(array, pattern(N_PAGES))
        os.write(says_ready, b"!")
        os.read(go, 1)
        os._exit(0 if right and (array == 9).all() else 1)
    os.read(ready, 1)
    with stand.expect(**mirror.faults):
        assert mirror.checksum(array) == crc(pattern(N_PAGES))
    mirror.fill(array, 9)
    stand.migrate()
    os.write(says_go, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (array == 9).all()
    for fd in (ready, says_ready, go, says_go):
        os.close(fd)


def test_exclusive(stand: Stand, nic: Nic) -> None:
    """Atomics of a device on pages that the CPU takes away between: each counts once."""
    array = stand.filled()
    remote = nic.remote(array)
    n_rounds, swapped = 3, int(pattern(8)[7, 6])
    for round_ in range(n_rounds):
        with stand.expect(nic=N_PAGES, moved_in=N_PAGES if round_ else 0):
            before = [remote.fetch_add((page, 5), 1) for page in range(N_PAGES)]
        assert before == (pattern(N_PAGES)[:, 5] + round_).tolist()
        with stand.expect():
            assert remote.compare_swap((7, 6), swapped, -1 - round_) == swapped
        swapped = -1 - round_
        stand.migrate()
    with stand.expect(cpu=FEW, moved_in=N_PAGES):
        assert np.array_equal(array[:, 5], pattern(N_PAGES)[:, 5] + n_rounds)
    others = np.delete(array, [5, 6], axis=1)
    assert np.array_equal(others, np.delete(pattern(N_PAGES), [5, 6], axis=1))


def test_exclusive_mprotect(stand: Stand) -> None:
    array = stand.filled()
    with stand.device.share(array, access="r") as share, nopin.attach(share.url, device=stand.device) as remote:
        remote.access |= Access.REMOTE_ATOMIC
        with stand.expect(), pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
            remote.fetch_add((0, 0), 1)
    assert np.array_equal(array, pattern(N_PAGES))


def test_exclusive_cow(stand: Stand, nic: Nic) -> None:
    array = stand.filled()
    remote = nic.remote(array)
    remote.fetch_add((0, 0), 1)
    with stand.expect(cpu=range(3), nic=1):
        assert in_child(lambda: array[0, 0] == 2) == 0
        assert remote.fetch_add((0, 0), 1) == 2
        assert remote.fetch_add((1, 0), 1) == WORDS + 1
    advise(array, MADV_DONTNEED)
    assert array[:2, 0].tolist() == [3, WORDS + 2]
