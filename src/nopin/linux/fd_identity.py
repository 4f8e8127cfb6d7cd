"""Which descriptor of which process is what: one socket or memfd, found under whatever number, wherever it is.

What a process inherited or was given has no number that others know. The kernel's inode behind it has one, and tells it
to whoever may look into /proc/PID/fd.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

Identity = tuple[int, int]
"""Device and inode, which no other living socket or memfd has."""

_KINDS = ("socket:", "/memfd:")
"""Of the others nothing is asked: a descriptor into a file system that hangs would make us wait."""


def identity_of(fd: int) -> Identity:
    """Return what a descriptor of ours is."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def find_fds(pid: int, wanted: Collection[Identity]) -> dict[Identity, int]:
    """Return the numbers that these have in a process; those it does not hold are missing.

    Nothing is found in a process that is gone, or that we may not look into.
    """
    found: dict[Identity, int] = {}
    folder = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except OSError:
        return found
    for number in numbers:
        identity = _identity_at(f"{folder}/{number}")
        if identity is not None and identity in wanted:
            found[identity] = int(number)
    return found


def holders(wanted: Collection[Identity]) -> Iterator[int]:
    """Yield the numbers of all processes that hold all of these, in no particular order."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and len(find_fds(int(name), wanted)) == len(wanted):
            yield int(name)


def _identity_at(path: str) -> Identity | None:
    try:
        if not os.readlink(path).startswith(_KINDS):
            return None
        found = os.stat(path)
    except OSError:  # closed meanwhile
        return None
    return found.st_dev, found.st_ino
