"""What a thread that waits inside madvise asked for.

The kernel's message says that a range is about to be dropped, not whether by MADV_DONTNEED, which keeps the bytes of
shared memory, or by MADV_REMOVE, which makes zeros of them. Until the message is read the thread waits inside the
system call, and /proc shows its arguments. Afterwards it is too late. It shows them only once the thread sleeps, which
is a moment after its message came, or longer where others want the CPU: so when no thread is found where it could have
sent one, the look is repeated, and the message is better left unread for now.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nopin.ranges import Range

_SYS_MADVISE = 28
_TELLING = {9, 11, 25, _SYS_MADVISE}
"""System calls that send messages: mmap, munmap, mremap, madvise."""
_MADV_REMOVE = 9
_LOOKS = 16


class Advice(NamedTuple):
    """A thread waits in madvise: whole pages, and whether their bytes are given up or only the view of them."""

    where: Range
    gives_up: bool


def advice_of(pid: int, mapped: Sequence[Range]) -> list[Advice] | None:
    """Return what threads of a process wait in madvise for. Call it when a message is known to wait.

    Args:
        mapped: addresses that messages are sent about.

    Returns:
        None if no thread was found that could have sent one, and may yet be. Nothing, if it is not ours to look.
    """
    folder = f"/proc/{pid}/task"
    for _ in range(_LOOKS):
        calls = _system_calls(folder)
        if calls is None:
            return []
        telling = [(number, Range(start, start + length), advice) for number, start, length, advice in calls if length]
        telling = [call for call in telling if any(call[1].overlaps(where) for where in mapped)]
        if telling:
            return [
                Advice(where.to_pages(), advice == _MADV_REMOVE)
                for number, where, advice in telling
                if number == _SYS_MADVISE
            ]
        os.sched_yield()
    return None


def gives_up(advice: Iterable[Advice], where: Range) -> bool | None:
    """Tell whether the bytes of a range are given up; None if that was not seen, or both were."""
    answers = {each.gives_up for each in advice if each.where.contains(where)}
    return answers.pop() if len(answers) == 1 else None


def _system_calls(folder: str) -> list[list[int]] | None:
    """Return number and arguments of the calls that send messages, of the threads that wait in one; None: forbidden."""
    calls: list[list[int]] = []
    try:
        for thread in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"{folder}/{thread}/syscall") as file:
                fields = file.read().split()
                if len(fields) > 4 and int(fields[0]) in _TELLING:  # else "running", or waiting elsewhere
                    calls.append([int(fields[0]), *(int(field, 16) for field in fields[1:4])])
    except OSError:  # the process is gone, or not ours to look at
        return None
    return calls
