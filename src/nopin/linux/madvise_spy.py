"""What a thread that waits inside madvise asked for.

The kernel's message says that a range is about to be dropped, not whether by MADV_DONTNEED, which keeps the bytes of
shared memory, or by MADV_REMOVE, which makes zeros of them. Until the message is read the thread waits inside the
system call, and /proc shows its arguments. Afterwards it is too late. It shows them only while the thread sleeps. It
mostly does; but each message that is read wakes the senders of all others for a moment, or longer where others want the
CPU. So when no thread is found that waits for its message to be read, the look is repeated, and the message is better
left unread for now.

A thread whose message was read already may sleep inside madvise for other reasons. What it asked for says nothing of
the messages that wait, so it is looked where in the kernel a thread sleeps.

Source: fs/userfaultfd.c userfaultfd_remove, userfaultfd_event_wait_completion; proc_pid_syscall(5), proc_pid_wchan(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nopin.ranges import Range

_SYS_MADVISE = 28
_TELLING = {9, 11, 25, _SYS_MADVISE}
"""System calls that send messages: mmap, munmap, mremap, madvise."""
_MADV_REMOVE = 9
_LOOKS = 16
_UNSAID = {"0", ""}
"""Where a thread sleeps, if the kernel does not say so."""


class Advice(NamedTuple):
    """A thread waits in madvise: whole pages, and whether their bytes are given up or only the view of them."""

    where: Range
    gives_up: bool
    thread: int


class _Call(NamedTuple):
    number: int
    where: Range
    advice: int
    thread: int


def advice_of(pid: int, mapped: Sequence[Range]) -> list[Advice] | None:
    """Return what threads of a process wait in madvise for. Call it when a message is known to wait.

    Args:
        mapped: addresses that messages are sent about.

    Returns:
        None if no thread was found that could have sent one, and may yet be. Nothing, if it is not ours to look.
    """
    folder = f"/proc/{pid}/task"
    for _ in range(_LOOKS):
        try:
            calls = list(_waiting(folder, mapped))
        except (PermissionError, FileNotFoundError, ProcessLookupError):  # not ours to look at, or gone
            return []
        except OSError:  # out of descriptors, say
            calls = []
        if calls:
            return [
                Advice(call.where.to_pages(), call.advice == _MADV_REMOVE, call.thread)
                for call in calls
                if call.number == _SYS_MADVISE
            ]
        os.sched_yield()
    return None


def gives_up(advice: Iterable[Advice], where: Range) -> bool | None:
    """Tell whether the bytes of a range are given up; None if no thread was seen to ask for either.

    Where threads ask for both at once they are: one is inside the call that gives them up, whichever spoke first.
    """
    asked = [each.gives_up for each in advice if each.where.contains(where)]
    return any(asked) if asked else None


def _waiting(folder: str, mapped: Sequence[Range]) -> Iterator[_Call]:
    """Yield the calls of threads that wait for a message about mapped addresses to be read."""
    for thread in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            call = _call_of(folder, int(thread))
            if (
                call is not None
                and any(call.where.overlaps(where) for where in mapped)
                and _waits_to_be_heard(f"{folder}/{thread}")
            ):
                yield call


def _call_of(folder: str, thread: int) -> _Call | None:
    """Return the call that a thread sleeps in, if it is of a kind that sends messages."""
    with open(f"{folder}/{thread}/syscall") as file:
        fields = file.read().split()
    if len(fields) < 5 or int(fields[0]) not in _TELLING:  # "running", or asleep elsewhere
        return None
    start, length, advice = (int(field, 16) for field in fields[1:4])
    return _Call(int(fields[0]), Range(start, start + length), advice, thread) if length else None


def _waits_to_be_heard(thread: str) -> bool:
    try:
        with open(f"{thread}/wchan") as file:
            symbol = file.read()
    except FileNotFoundError:  # a kernel without it
        return True
    return symbol in _UNSAID or "userfaultfd" in symbol
