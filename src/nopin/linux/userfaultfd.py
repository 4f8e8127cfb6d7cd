"""userfaultfd, used only to hear what a process does to its mappings.

Ranges are registered for write protection that is never applied, with WP_ASYNC where the kernel has it: no
fault of the owner ever waits for us, and only munmap, mremap, madvise and fork send messages. The owner waits
in those calls until its message has been read (not until it was acted upon), so whoever holds the descriptor
must read promptly. When the last descriptor is closed the registrations vanish and a waiting owner goes on.

The owner opens the descriptor, because it belongs to the address space that opened it, and passes it to the
reader, which registers and reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from dataclasses import dataclass

from nopin.errors import UsageError
from nopin.linux.uffd_handshake import EVENTS, LINK, MESSAGE, EventKind, Feature, open_with
from nopin.ranges import Range

_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_REGISTER_MODE_WP = 2
_READ_MESSAGES = 128

NEEDED = EVENTS | Feature.FLAG_WP
WANTED = NEEDED | Feature.EVENT_FORK | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED | Feature.WP_ASYNC


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A range that is no longer mapped (munmap, or something was mapped over it)."""

    where: Range


@dataclass(frozen=True, slots=True)
class Removed:
    """A range whose pages are about to be dropped (MADV_DONTNEED, MADV_FREE, MADV_REMOVE)."""

    where: Range


@dataclass(frozen=True, slots=True)
class Remapped:
    """A range that moved; `Unmapped` for the old place follows."""

    where: Range
    moved_to: int


@dataclass(frozen=True, slots=True)
class Forked:
    """The process forked. The child's own descriptor has been closed, so the child is not watched."""


Message = Unmapped | Removed | Remapped | Forked


class Userfaultfd:
    """A watching userfaultfd. Takes over the descriptor if it does not raise.

    The other process may be hostile and may have kept a duplicate, so nothing about it is believed: it must
    be a userfaultfd, ready for use, and non-blocking at every read.

    Raises:
        UsageError: it is something else.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray(MESSAGE.size * _READ_MESSAGES)
        if os.readlink(f"/proc/self/fd/{fd}") != LINK:
            raise UsageError("the descriptor is not a userfaultfd")
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if any(events & select.POLLERR for _, events in poller.poll(0)):  # no handshake yet, or blocking
            raise UsageError("the userfaultfd is not open for events, or it is blocking")

    def fileno(self) -> int:
        """The descriptor; readable when messages wait."""
        return self._fd

    def register(self, where: Range) -> None:
        """Watch the mappings in `where`, whole pages. Holes in it stay unwatched.

        Raises:
            OSError: EINVAL when nothing is mapped there or a mapping is of a kind that cannot be watched,
                EBUSY when another userfaultfd has it, ENOMEM or ESRCH when the process is gone.
        """
        argument = bytearray(struct.pack("<4Q", where.start, where.length, _REGISTER_MODE_WP, 0))
        fcntl.ioctl(self._fd, _UFFDIO_REGISTER, argument, True)

    def unregister(self, where: Range) -> None:
        """Stop watching `where`, whole pages.

        Raises:
            OSError: as for `register`.
        """
        fcntl.ioctl(self._fd, _UFFDIO_UNREGISTER, struct.pack("<2Q", where.start, where.length))

    def read(self) -> list[Message]:
        """All messages that wait, without waiting; the owner goes on once they are read.

        Raises:
            UsageError: the owner made the descriptor blocking, or otherwise unusable.
        """
        messages: list[Message] = []
        n_bytes = 1
        while n_bytes:
            try:
                n_bytes = self._read_now()
            except BlockingIOError:
                break
            except OSError as error:
                raise UsageError(f"the userfaultfd cannot be read: {error.strerror}") from None
            parsed = map(_parse, MESSAGE.iter_unpack(memoryview(self._buffer)[:n_bytes]))
            messages += [message for message in parsed if message is not None]
        if os.get_blocking(self._fd):  # it would report an error for ever, and the loop would spin
            raise UsageError("the userfaultfd was made blocking by its owner")
        return messages

    def _read_now(self) -> int:
        try:
            return os.preadv(self._fd, [self._buffer], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        return os.readv(self._fd, [self._buffer])  # Linux before 6.10: only the descriptor's own flag counts

    def close(self) -> None:
        """Drop every registration. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parse(fields: tuple[int, int, int, int]) -> Message | None:
    kind, first, second, third = fields
    if kind == EventKind.FORK:
        os.close(first & 0xFFFFFFFF)  # the kernel opened it in this process just now
        return Forked()
    if kind == EventKind.REMAP:
        return Remapped(Range.of_length(first, third), second)
    if kind == EventKind.REMOVE:
        return Removed(Range(first, second))
    if kind == EventKind.UNMAP:
        return Unmapped(Range(first, second))
    return None  # a page fault message: not asked for, nothing to do


def open_watch() -> tuple[int, Feature]:
    """Open a userfaultfd on our own address space, ready to be passed to the process that will watch.

    Without privilege the kernel grants it for user-mode faults only, which makes no difference to a watch,
    and refuses fork events: then forks go unheard, and the child's memory is simply not watched.

    Returns:
        The descriptor (close-on-exec, non-blocking) and the features it was opened with.

    Raises:
        HostLacks: no userfaultfd here, or not the events we need.
    """
    return open_with((WANTED, WANTED & ~Feature.EVENT_FORK), NEEDED)
