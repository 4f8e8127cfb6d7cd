"""The memory of one other process: the mechanism under `nopin.mm.plain.PlainSpace`.

Copies go by process number, because that is the only way the kernel offers, and a number can be reused. So
every access first asks the pidfd: while it says "running", the number is still its own. Numbers are handed
out round robin, so the instant between question and copy cannot see one come back.

A page table that can be read has memory that somebody uses. While one is read from, the number can have changed hands
only if its process has ended and a child of vfork has that memory still; the server sees such an end, too, before its
next turn.

A process that runs another program (execve) keeps its number and gets other memory. The page table we hold open is
still that of the old memory and says that it is gone; as it is asked about residency just before each copy, that
costs nothing.

An absent page is quick only if it is certain that the kernel fills it with zeros by itself: in private anonymous
memory, not in swap, and not held back. Held back is what a userfaultfd other than our watch may have: then a copy
waits until some program, which need not exist any longer, hands the page out. Everything but quick pages is for a
thread that may wait.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nopin.linux.pagemap import AbsentRun, Pagemap
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import Maps
from nopin.linux.process_vm import ProcessVm
from nopin.linux.uffd_rights import may_hold_back_copies
from nopin.mm.space import Absent, IoVec
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

_TOUCH_PAGES = 1024
"""Pages touched per call; also how late a worker notices that the space was closed under it."""


class ProcessMemory:
    """Copies, residency and faulting-in for one process. Owns its descriptors, the pidfd included.

    One thread at a time, except that `touch` may run on any other.

    Args:
        unclaimed: tells whether mapped pages are certain to belong to no userfaultfd but our own; asked only of
            processes that `may_hold_back_copies`.

    Raises:
        OSError: EACCES or EPERM when we may not look at that process, ENOENT or ESRCH when it is gone.
    """

    def __init__(self, process: PidFd, unclaimed: Callable[[Range], bool] = lambda _where: False) -> None:
        self._process = process
        self._closed = False
        self._replaced = False
        self._vm = ProcessVm(process.pid)
        self._maps = Maps(process.pid)
        self._unclaimed = unclaimed
        self._may_hold_back = may_hold_back_copies(process.pid)
        try:
            self._pagemap = Pagemap(process.pid)
        except OSError:
            self._maps.close()
            raise

    @classmethod
    def open(cls, pid: int) -> ProcessMemory:
        """Reach the memory of a running process by its number."""
        process = PidFd.open(pid)
        try:
            return cls(process)
        except OSError:
            process.close()
            raise

    @property
    def pid(self) -> int:
        """The process's number; its own only while `alive`."""
        return self._process.pid

    def alive(self) -> bool:
        """False once the process has exited, has been seen to run another program, or this was closed."""
        return not self._replaced and not self._process.exited()

    def read(self, address: int, length: int, local: int) -> int:
        """Copy from the process to our address `local`; returns bytes moved."""
        return max(self._vm.read(address, length, local), 0)

    def write(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to the process; returns bytes moved."""
        return max(self._vm.write(address, length, local), 0)

    def read_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy process segments to our segments; returns bytes moved."""
        return max(self._vm.read_v(remote, local), 0)

    def write_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy our segments to process segments; returns bytes moved."""
        return max(self._vm.write_v(remote, local), 0)

    def absent(self, start: int, end: int) -> Absent | None:
        """Pages of [start, end) that are not present, and whether bringing them may wait for anybody."""
        try:
            runs = self._pagemap.absent(start, end)
        except ProcessLookupError:
            self._replaced = True
            return None
        if not runs:
            return None
        n_pages = sum(run.where.length for run in runs) // PAGE_BYTES
        held = self._may_hold_back and any(self._is_held(run) for run in runs)
        return Absent(n_pages, held or any(run.swapped or self._has_file(run) for run in runs), held)

    def read_present(self, address: int, length: int, local: int) -> bool:
        """Copy a short range to our address `local` if its pages are present; True if it was copied.

        The page table itself says that the process's memory still lives, so the process is not asked for.
        """
        return self._pagemap.has_all(address, length) and self._vm.read(address, length, local) == length

    def write_present(self, address: int, length: int, local: int) -> bool:
        """Copy from our address `local` to a short range if its pages are present; True if it was copied."""
        return self._pagemap.has_all(address, length) and self._vm.write(address, length, local) == length

    def touch(self, start: int, end: int) -> int | None:
        """Read one byte of each page of [start, end); the address of the first that cannot be, or None."""
        vm = ProcessVm(self._process.pid)  # our own segments: this may be another thread
        sink = np.zeros(_TOUCH_PAGES, np.uint8)
        pages = np.ones((_TOUCH_PAGES, 2), np.uint64)
        here = np.array([[sink.ctypes.data, 0]], np.uint64)
        for first in range(start, end, _TOUCH_PAGES * PAGE_BYTES):
            n_pages = min(_TOUCH_PAGES, (end - first) // PAGE_BYTES)
            pages[:n_pages, 0] = np.arange(n_pages, dtype=np.uint64) * PAGE_BYTES + first
            here[0, 1] = n_pages
            if self._closed:
                return first
            n_done = max(vm.read_v(pages[:n_pages], here), 0)
            if n_done < n_pages:
                return first + n_done * PAGE_BYTES
        return None

    def close(self) -> None:
        """Let go of the process. Twice is fine."""
        self._closed = True
        self._pagemap.close()
        self._maps.close()
        self._process.close()

    def _is_held(self, run: AbsentRun) -> bool:
        parts = (mapping.where.intersection(run.where) for mapping in self._maps.within(run.where))
        return not all(part is None or self._unclaimed(part) for part in parts)

    def _has_file(self, run: AbsentRun) -> bool:
        """True if the run touches memory that comes from a file (or is shared, which swaps out unseen)."""
        return any(mapping.file_backed for mapping in self._maps.within(run.where))
