"""What the kernel's HMM self-tests have in /dev/hmm_dmirror: buffers, devices that mirror them, and exact counts.

A buffer lies in an arena. To *migrate* it is to have the pager move all of its pages out to swap: as with
device-private memory its bytes are elsewhere then, and whoever touches a page brings it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import nopin
from nopin.linux import memfd
from nopin.linux.arena_file import present
from nopin.linux.libc import LIBC, checked
from nopin.mm.page_table import PageTable
from nopin.units import PAGE_BYTES
from nopin.verbs.arena import Arena

N_PAGES = 256
"""1 MiB, HMM_BUFFER_SIZE of the kernel's tests."""
WORDS = PAGE_BYTES // 8
WAIT_S = 30
BUDGET = 64 << 20
"""Far more than a test uses: pages leave when a test says so, and at no other time."""
CAPACITY = 128 << 20
OWN = range(2)
"""CPU faults of `Stand.migrate` itself."""

PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MADV_DONTNEED, MADV_REMOVE = 4, 9
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4

Words = NDArray[np.int64]
Expected = int | range
FEW = range(1, N_PAGES // 8 + 1)
"""Faults of a process that goes through a whole buffer: neighbours come along, how many is the pager's affair."""

LIBC.mremap.restype = ctypes.c_void_p


class MirrorDevice(Protocol):
    """A device with page tables of its own over the arena.

    Attributes:
        faults: what one pass through a buffer costs when none of its pages is in the device's page table.
    """

    faults: dict[str, Expected]

    def checksum(self, array: Words) -> int:
        """Read all of a contiguous array; returns the CRC-32 of its bytes."""
        ...

    def add(self, array: Words, value: int) -> None:
        """Add to every element: the device reads, then writes."""
        ...

    def fill(self, array: Words, value: int) -> None:
        """Set every element."""
        ...


class Nic:
    """The NIC: a peer reads and writes the arena by RDMA, through the mirror.

    Args:
        owner: whose arena it is.
        peer: through which it is reached: the same for the direct path, one at another server for the wire.
    """

    def __init__(self, owner: nopin.Device, peer: nopin.Device) -> None:
        self.faults: dict[str, Expected] = {"nic": 1 if owner is peer else range(1, 17)}  # an access, or a batch of one
        self._owner = owner
        self._peer = peer
        self._remotes: dict[tuple[int, int], nopin.RemoteArray] = {}

    def remote(self, array: Words) -> nopin.RemoteArray:
        """The array as the peer has it."""
        key = array.ctypes.data, array.nbytes
        if key not in self._remotes:
            self._remotes[key] = nopin.attach(self._owner.share(array).url, device=self._peer)
        return self._remotes[key]

    def checksum(self, array: Words) -> int:
        return crc(self.remote(array)[...])

    def add(self, array: Words, value: int) -> None:
        self.remote(array)[...] = self.remote(array)[...] + value

    def fill(self, array: Words, value: int) -> None:
        self.remote(array)[...] = value


class Worker:
    """The accelerator: a process whose own page table, at the same addresses, is the mirror."""

    def __init__(self, owner: nopin.Device) -> None:
        self.faults: dict[str, Expected] = {"worker": FEW}
        self._accelerator = owner.accelerator()

    def checksum(self, array: Words) -> int:
        return int(self._accelerator.launch("zlib.crc32", array).result(WAIT_S))

    def add(self, array: Words, value: int) -> None:
        self._accelerator.launch("add", array, value, array).result(WAIT_S)

    def fill(self, array: Words, value: int) -> None:
        self._accelerator.launch("fill", array, value).result(WAIT_S)


class Stand:
    """An arena, what lies in it, and the counts of who faulted and what moved."""

    def __init__(self, device: nopin.Device) -> None:
        self.device = device
        self.arena: Arena = device.arena(CAPACITY)
        self._ballast = self.arena.zeros(PAGE_BYTES, np.uint8)
        self._kept: list[Words] = []  # tests unmap parts of them: their addresses are never given out again

    def buffer(self, n_pages: int = N_PAGES) -> Words:
        """A buffer that nobody has touched yet, (n_pages, 512)."""
        array: Words = self.arena.zeros((n_pages, WORDS), np.int64)
        self._kept.append(array)
        return array

    def filled(self, n_pages: int = N_PAGES) -> Words:
        """A buffer that the CPU has filled: word i of it is i + 1, so that no page is zeros."""
        array = self.buffer(n_pages)
        array[...] = pattern(n_pages)
        return array

    def migrate(self) -> None:
        """Move every page that is in memory out to swap."""
        self.device.set_budget(PAGE_BYTES)
        self._ballast[0]  # wants the room of the last one; itself it is zeros, and needs no swap
        self.device.set_budget(BUDGET)

    def page_of(self, array: Words) -> int:
        """Number of an array's first page in the arena."""
        return int(array.ctypes.data - self.arena.where.start) // PAGE_BYTES

    def present(self, array: Words) -> NDArray[np.bool_]:
        """Tell which pages of a buffer are in memory. Moves nothing."""
        return present(self.arena.memory_fd, self.page_of(array), len(array))

    def swap_bytes(self) -> int:
        """Bytes of swap in use."""
        return int(self._row(self.device.stat())["swapped_bytes"])

    def table(self) -> PageTable:
        """The page table as a successor of the server would find it: of each page, where its copy in swap is."""
        n_pages = CAPACITY // PAGE_BYTES
        shared = memfd.map_array(self.arena.table_fd, PageTable.bytes_needed(n_pages))
        table = PageTable(n_pages, shared)
        table.load_shared()
        return table

    def _row(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return next(row for row in rows if row["kind"] == "arena" and row["arena"] == self.arena.handle)

    def counts(self) -> dict[str, int]:
        """Count so far.

        cpu, worker: faults of processes, and of accelerator workers. nic: accesses that found pages missing in the
        NIC's page table, of regions that are shares (a peer's own region is its whole process). moved_in, moved_out:
        pages read from and written to swap. dropped: pages that left with no write. lost: pages lost.
        """
        rows = self.device.stat()
        arena = self._row(rows)
        kinds = ("faults_zero", "faults_swap", "faults_minor", "faults_protect")
        return {
            "cpu": sum(arena[kind] for kind in kinds) - arena["faults_worker"],
            "worker": arena["faults_worker"],
            "nic": sum(row["page_faults_handled"] for row in rows if row["kind"] == "mr" and row["mrlen"] <= CAPACITY),
            "moved_in": arena["swapped_in"],
            "moved_out": arena["swapped_out"],
            "dropped": arena["evicted_clean"],
            "lost": arena["lost"],
        }

    @contextlib.contextmanager
    def expect(self, **expected: Expected) -> Iterator[None]:
        """Check how much each named count grows inside; faults and moves that are not named must not happen."""
        before = self.counts()
        yield
        after = self.counts()
        wanted: dict[str, Expected] = dict.fromkeys(("cpu", "worker", "nic", "moved_in", "moved_out", "lost"), 0)
        wanted |= expected
        grown = {name: after[name] - before[name] for name in wanted}
        wrong = {name: n for name, n in grown.items() if not _fits(n, wanted[name])}
        assert not wrong, f"counted {grown}; expected {wanted}"


def _fits(n: int, expected: Expected) -> bool:
    return n in expected if isinstance(expected, range) else n == expected


def pattern(n_pages: int) -> Words:
    """What `Stand.filled` stores."""
    return np.arange(1, n_pages * WORDS + 1).reshape(n_pages, WORDS)


def crc(array: Words) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).data)


def view(address: int, n_pages: int) -> Words:
    """Memory at an address as a buffer."""
    words = (ctypes.c_int64 * (n_pages * WORDS)).from_address(address)
    return np.ctypeslib.as_array(words).reshape(n_pages, WORDS)


def protect(array: Words, protection: int) -> None:
    """Change the protection of a buffer's pages in this process: mprotect."""
    checked(LIBC.mprotect(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), protection), "mprotect")


def advise(array: Words, advice: int) -> None:
    """Advise the kernel about a buffer's pages: madvise."""
    checked(LIBC.madvise(array.ctypes.data, array.nbytes, advice), "madvise")


def move(array: Words, target: int, flags: int = 0) -> Words:
    """Move a buffer's pages to an address with mremap; returns them there."""
    size = ctypes.c_size_t(array.nbytes)
    flags |= MREMAP_MAYMOVE | MREMAP_FIXED
    found = LIBC.mremap(ctypes.c_void_p(array.ctypes.data), size, size, ctypes.c_int(flags), ctypes.c_void_p(target))
    if found != target:
        checked(-1, "mremap")
    return view(target, len(array))


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; returns 0 if it returned something true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
