"""Which pages of another process are not present, from /proc/PID/pagemap, without touching them.

The PAGEMAP_SCAN ioctl (Linux 6.7) lists runs of pages by category in one call. Where it is missing the table
is read, eight bytes a page. Both look at the address space the process had when the file was opened.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

import numpy as np

from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT

_PAGEMAP_SCAN = 0xC0606610
_IS_PRESENT, _IS_SWAPPED = 8, 16  # PAGE_IS_*, include/uapi/linux/fs.h
_MAX_ROWS = 512

# struct pm_scan_arg as twelve words; those not named stay 0
_SIZE, _START, _END, _WALK_END, _VEC, _VEC_LEN = 0, 2, 3, 4, 5, 6
_INVERTED, _MASK, _RETURN = 8, 9, 11

_PRESENT_BYTE = 1 << 7  # of the last byte of an entry
_ENTRY_PRESENT = np.uint64(1 << 63)
_ENTRY_SWAPPED = np.uint64(1 << 62)
_READ_PAGES = 1 << 16


@dataclass(frozen=True, slots=True)
class AbsentRun:
    """Neighbouring pages that are not present.

    Attributes:
        where: whole pages.
        swapped: True if they lie in swap or are on their way (migration); False if the page table holds
            nothing: never touched, dropped, or of a file or shared memory that is not mapped in now.
    """

    where: Range
    swapped: bool


class Pagemap:
    """The page table of one process, read only. Owns a descriptor; one thread at a time.

    Raises:
        OSError: EACCES when we may not look at that process, ENOENT when it is gone.
    """

    def __init__(self, pid: int, *, use_scan: bool = True) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._rows = np.zeros((_MAX_ROWS, 3), np.uint64)
        self._argument = bytearray(96)
        self._words = memoryview(self._argument).cast("Q")
        self._words[_SIZE] = 96
        self._words[_VEC] = self._rows.ctypes.data
        self._words[_VEC_LEN] = _MAX_ROWS
        self._words[_INVERTED] = _IS_PRESENT
        self._words[_MASK] = _IS_PRESENT
        self._words[_RETURN] = _IS_SWAPPED
        self.has_scan = use_scan and self._probe_scan()

    def absent(self, start: int, end: int) -> list[AbsentRun]:
        """Runs of pages not present in [start, end), which is page aligned; empty when all are.

        With the scan, addresses that nothing is mapped at are left out; without it they show as not swapped.

        Raises:
            ProcessLookupError: the address space is gone: the process has ended, or become another program.
        """
        try:
            if not self.has_scan:
                return self._absent_by_entries(start, end)
            n_rows = self._scan(start, end)
            return self._collect(n_rows, end) if n_rows else []  # none by far the most often: one call
        except ProcessLookupError:
            raise
        except OSError:
            # Addresses no process can have (EFAULT), or a table that is closed: residency is advice, so say
            # nothing and let the copy tell.
            return []

    def has_all(self, address: int, length: int) -> bool:
        """Say whether all pages of a short range are present: half the price of `absent`, for a few.

        False, too, of what cannot be looked up.
        """
        first = address >> PAGE_SHIFT
        n_pages = (address + length - 1 >> PAGE_SHIFT) - first + 1
        try:
            entries = os.pread(self._fd, n_pages * 8, first * 8)
        except (OSError, OverflowError):
            return False
        if n_pages == 1:  # what latency is made of: the general way adds a fifth
            return len(entries) == 8 and entries[7] >= _PRESENT_BYTE
        return len(entries) == n_pages * 8 and min(entries[7::8]) >= _PRESENT_BYTE

    def close(self) -> None:
        """Close the table. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _probe_scan(self) -> bool:
        try:
            self._scan(0, PAGE_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return False
            raise
        return True

    def _scan(self, start: int, end: int) -> int:
        """One PAGEMAP_SCAN; returns the rows found, and leaves where it stopped in the argument."""
        self._words[_START] = start
        self._words[_END] = end
        n_rows: int = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, self._argument, True)
        return n_rows

    def _collect(self, n_rows: int, end: int) -> list[AbsentRun]:
        """The rows of the scan just made, and of those that carry it on to the end."""
        runs = self._take_rows(n_rows)
        while (start := self._words[_WALK_END]) < end:
            runs += self._take_rows(self._scan(start, end))
        return runs

    def _take_rows(self, n_rows: int) -> list[AbsentRun]:
        rows: list[list[int]] = self._rows[:n_rows].tolist()
        return [AbsentRun(Range(start, end), bool(kind & _IS_SWAPPED)) for start, end, kind in rows]

    def _absent_by_entries(self, start: int, end: int) -> list[AbsentRun]:
        runs: list[AbsentRun] = []
        for first in range(start, end, _READ_PAGES * PAGE_BYTES):
            n_pages = min(_READ_PAGES, (end - first) // PAGE_BYTES)
            table = os.pread(self._fd, n_pages * 8, first // PAGE_BYTES * 8)
            if not table:
                raise ProcessLookupError(errno.ESRCH, "the address space is gone")
            entries = np.frombuffer(table, np.uint64)
            runs += _runs_of(entries, first)
        return runs


def _runs_of(entries: np.ndarray[tuple[int], np.dtype[np.uint64]], first: int) -> list[AbsentRun]:
    # 0 present, 1 absent, 2 swapped; a run ends where the kind changes
    kinds = np.where(entries & _ENTRY_PRESENT, 0, np.where(entries & _ENTRY_SWAPPED, 2, 1))
    edges = np.flatnonzero(np.diff(kinds)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), len(kinds)]
    return [
        AbsentRun(Range(first + a * PAGE_BYTES, first + b * PAGE_BYTES), bool(kinds[a] == 2))
        for a, b in zip(starts, ends, strict=True)
        if b > a and kinds[a]
    ]
