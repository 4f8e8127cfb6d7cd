"""What a thread that waits inside madvise asked for.

The kernel's message says that a range is about to be dropped, not whether by MADV_DONTNEED, which keeps the bytes of
shared memory, or by MADV_REMOVE, which makes zeros of them. Until the message is read the thread waits inside the
system call, and /proc shows its arguments.
"""

from __future__ import annotations

import contextlib
import os

from nopin.ranges import Range

_SYS_MADVISE = 28
_MADV_REMOVE = 9


class MadviseSpy:
    """Looks at the threads of a process."""

    def __init__(self, pid: int) -> None:
        self._tasks = f"/proc/{pid}/task"

    def removes(self) -> list[Range]:
        """Return the ranges that threads which wait just now give up by MADV_REMOVE."""
        found: list[Range] = []
        with contextlib.suppress(OSError):  # gone, or not ours to look at
            for thread in os.listdir(self._tasks):
                where = self._removed_by(thread)
                if where is not None:
                    found.append(where)
        return found

    def _removed_by(self, thread: str) -> Range | None:
        try:
            with open(f"{self._tasks}/{thread}/syscall") as file:
                fields = file.read().split()
        except OSError:
            return None
        if len(fields) < 4 or fields[0] != str(_SYS_MADVISE):  # "running", or in another call
            return None
        start, length, advice = (int(field, 16) for field in fields[1:4])
        return Range.of_length(start, length).to_pages() if advice == _MADV_REMOVE and length else None
