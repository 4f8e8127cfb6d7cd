"""userfaultfd as the page fault handler of a memfd mapping: faults come as messages, pages go by ioctl.

The process that maps the file opens the descriptor (`open_paging`), registers its mapping, and passes a duplicate to
the pager, which answers its faults. It must keep one itself: when the last descriptor closes, the kernel drops the
registration, and a blocked process goes on to read zeros.

A fault is told once, to whoever reads it first; the toucher sleeps until an ioctl maps its page or wakes it. What the
ioctls do on a shared file:

    copy, zero     a hole of the file gets a page, which is mapped here; EEXIST if the file has one already
    map_in         a page of the file is mapped here; EFAULT at a hole, EEXIST if it is mapped already
    protect        stores wait from here on; leaves a mark where nothing is mapped
    lift           stores go on, marks vanish, who waits is woken
    poison         accesses to the hole get SIGBUS
    wake           who waits tries again

All but `wake` fail with EAGAIN while the process is inside fork, munmap, mremap or madvise: between the moment when
it begins and the moment when it runs again after its message was read. Read, then retry.

Each takes a few microseconds, of which Python is about one: arguments are packed into buffers made once, and results
are numbers, not exceptions.

Source: fs/userfaultfd.c and mm/userfaultfd.c of Linux, userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

from nopin.errors import UsageError
from nopin.linux.uffd_handshake import EVENTS, LINK, MESSAGE, Feature, open_with
from nopin.ranges import Range

_REGISTER = 0xC020AA00
_UNREGISTER = 0x8010AA01
_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_WRITEPROTECT = 0xC018AA06
_CONTINUE = 0xC020AA07
_POISON = 0xC020AA08

_MODE_MISSING, _MODE_WP, _MODE_MINOR = 1, 2, 4
_COPY_MODE_WP = _CONTINUE_MODE_WP = 2
_WRITEPROTECT_MODE_WP = 1

FAULT_WRITE, FAULT_WP, FAULT_MINOR = 1, 2, 4
"""Flags of a fault message: a store; to a protected page; to a page that the file has."""

READ_MESSAGES = 256
_PENDING = b"pending:\t"

_PAGING = EVENTS | Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
NEEDED = _PAGING | Feature.POISON
_FILLING = Feature.FLAG_WP | Feature.WP_HUGETLBFS_SHMEM

Message = tuple[int, int, int, int]
"""Kind and three words. PAGEFAULT: flags, address, thread. REMAP: from, to, length. REMOVE, UNMAP: start, end."""

_unpack_one = MESSAGE.unpack_from
_unpack_all = MESSAGE.iter_unpack
_pack_range = struct.Struct("<2Q").pack_into
_pack_range_mode = struct.Struct("<3Q").pack_into
_pack_range_mode_done = struct.Struct("<3Qq").pack_into
_pack_copy = struct.Struct("<4Qq").pack_into
_done_at_24 = struct.Struct("<24xq").unpack_from
_done_at_32 = struct.Struct("<32xq").unpack_from


def open_paging() -> tuple[int, Feature]:
    """Open one on our own address space, to be registered here and served elsewhere.

    It tells nobody of forks: a forked child would read zeros where pages are out, so no child may inherit what is
    registered (`arena_file.map_piece`).

    Returns:
        The descriptor (close-on-exec, non-blocking) and the features it was opened with.

    Raises:
        HostLacks: no userfaultfd here, or not what paging needs.
    """
    return open_with((NEEDED,), NEEDED)


def require_paging() -> None:
    """Check that this host lets a process have its faults served. Raises as `open_paging`."""
    os.close(open_paging()[0])


def open_for_filling() -> int:
    """Open one that hears nothing and is there for its ioctls: pages can be filled in through a mapping of ours.

    Raises:
        HostLacks: no userfaultfd here, or not for shared memory.
    """
    return open_with((_FILLING,), _FILLING)[0]


def register_paging(fd: int, where: Range) -> None:
    """Have all three kinds of faults in a mapping told.

    Raises:
        OSError: EINVAL when it is no such mapping, EBUSY when another userfaultfd has it, EPERM when its file was
            opened read-only.
    """
    _register(fd, where, _MODE_MISSING | _MODE_WP | _MODE_MINOR)


def register_missing(fd: int, where: Range) -> None:
    """Have only touches of holes told. Raises as `register_paging`."""
    _register(fd, where, _MODE_MISSING)


def register_for_filling(fd: int, where: Range) -> None:
    """Let pages be filled in; no access there ever waits: only stores to pages write-protected here would."""
    _register(fd, where, _MODE_WP)


def unregister(fd: int, where: Range) -> None:
    """Have nothing told any more of our own mapping: faults there are answered by the kernel.

    Raises:
        OSError: EINVAL when nothing of it is mapped.
    """
    fcntl.ioctl(fd, _UNREGISTER, struct.pack("<2Q", where.start, where.length))


def _register(fd: int, where: Range, mode: int) -> None:
    fcntl.ioctl(fd, _REGISTER, bytearray(struct.pack("<4Q", where.start, where.length, mode, 0)), True)


class PagingUffd:
    """The pager's side of one mapping process. Owns the descriptor if it does not raise. One thread at a time.

    Operations return (bytes done, errno); errno is 0 when all was done. ESRCH: the process is gone.

    Raises:
        UsageError: the descriptor is something else, is blocking, or its handshake is still to be done.
    """

    __slots__ = (
        "_buffer",
        "_copy",
        "_fd",
        "_info_fd",
        "_iov",
        "_iov_of_all",
        "_iov_of_one",
        "_poll",
        "_range",
        "_range_mode",
        "_range_mode_done",
        "_read_flags",
    )

    def __init__(self, fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") != LINK:
            raise UsageError("the descriptor is not a userfaultfd")
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        if any(events & select.POLLERR for _, events in self._poll.poll(0)):
            raise UsageError("the userfaultfd is not open for faults, or it is blocking")
        self._fd = fd
        self._info_fd = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = bytearray(MESSAGE.size * READ_MESSAGES)
        self._iov = [self._buffer]
        self._iov_of_all = memoryview(self._buffer)
        self._iov_of_one = [self._iov_of_all[: MESSAGE.size]]
        self._read_flags = os.RWF_NOWAIT
        self._range = bytearray(16)
        self._range_mode = bytearray(24)
        self._range_mode_done = bytearray(32)
        self._copy = bytearray(40)

    def fileno(self) -> int:
        """The descriptor; readable when messages wait."""
        return self._fd

    def read(self, n_most: int = READ_MESSAGES) -> list[Message]:
        """Up to so many messages that wait, 256 at most, faults first; empty if none do. Never waits.

        Raises:
            UsageError: the process made the descriptor blocking, or otherwise unusable.
        """
        try:
            iov = self._iov if n_most == READ_MESSAGES else self._room_for(n_most)
            n_bytes = os.preadv(self._fd, iov, -1, self._read_flags)
        except BlockingIOError:
            self._check_still_usable()
            return []
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and self._read_flags:
                # Linux before 6.10: only the descriptor's own flag counts.
                self._check_still_usable()
                self._read_flags = 0
                return self.read(n_most)
            raise UsageError(f"the userfaultfd cannot be read: {error.strerror}") from None
        if n_bytes == 32:
            return [_unpack_one(self._buffer)]
        return list(_unpack_all(memoryview(self._buffer)[:n_bytes]))

    def read_one(self) -> Message | None:
        """Do the same for the one message that comes first, in fewer calls: between two faults of a thread."""
        try:
            os.preadv(self._fd, self._iov_of_one, -1, self._read_flags)
        except BlockingIOError:
            self._check_still_usable()
            return None
        except OSError:
            messages = self.read(1)  # which tells what it is
            return messages[0] if messages else None
        return _unpack_one(self._buffer)

    def _room_for(self, n_messages: int) -> list[memoryview]:
        return self._iov_of_one if n_messages == 1 else [self._iov_of_all[: n_messages * MESSAGE.size]]

    def n_faults(self) -> int:
        """Count the page faults that wait to be read. Takes longer than `read` itself."""
        info = os.pread(self._info_fd, 256, 0)
        start = info.index(_PENDING) + len(_PENDING)
        return int(info[start : info.index(b"\n", start)])

    def waits(self) -> bool:
        """Tell whether anything waits to be read; where no faults do, it is something else."""
        return bool(self._poll.poll(0))

    def copy(self, target: int, source: int, length: int, *, protect: bool) -> tuple[int, int]:
        """Make pages at holes from bytes at `source` in this process."""
        argument = self._copy
        _pack_copy(argument, 0, target, source, length, _COPY_MODE_WP if protect else 0, 0)
        try:
            fcntl.ioctl(self._fd, UFFDIO_COPY, argument, True)
        except OSError as error:
            return _progress(_done_at_32(argument)[0], error)
        return length, 0

    def zero(self, start: int, length: int) -> tuple[int, int]:
        """Make zero pages at holes."""
        argument = self._range_mode_done
        _pack_range_mode_done(argument, 0, start, length, 0, 0)
        try:
            fcntl.ioctl(self._fd, _ZEROPAGE, argument, True)
        except OSError as error:
            return _progress(_done_at_24(argument)[0], error)
        return length, 0

    def map_in(self, start: int, length: int, *, protect: bool) -> tuple[int, int]:
        """Map pages that the file has."""
        argument = self._range_mode_done
        _pack_range_mode_done(argument, 0, start, length, _CONTINUE_MODE_WP if protect else 0, 0)
        try:
            fcntl.ioctl(self._fd, _CONTINUE, argument, True)
        except OSError as error:
            return _progress(_done_at_24(argument)[0], error)
        return length, 0

    def poison(self, start: int, length: int) -> tuple[int, int]:
        """Have accesses to holes answered by SIGBUS."""
        argument = self._range_mode_done
        _pack_range_mode_done(argument, 0, start, length, 0, 0)
        try:
            fcntl.ioctl(self._fd, _POISON, argument, True)
        except OSError as error:
            return _progress(_done_at_24(argument)[0], error)
        return length, 0

    def protect(self, start: int, length: int) -> int:
        """Make stores wait; returns the errno."""
        return self._write_protect(start, length, _WRITEPROTECT_MODE_WP)

    def lift(self, start: int, length: int) -> int:
        """Let stores go on, and wake who waits; returns the errno."""
        return self._write_protect(start, length, 0)

    def wake(self, start: int, length: int) -> None:
        """Have whoever waits in a range try again; the range need not be mapped any more."""
        _pack_range(self._range, 0, start, length)
        fcntl.ioctl(self._fd, _WAKE, self._range, True)

    def gone(self) -> bool:
        """Tell whether the address space has ended. False also while it is inside fork, munmap, mremap or madvise."""
        return self._state() == errno.ESRCH

    def has_gone_on(self) -> bool:
        """Tell whether nobody is inside fork, munmap, mremap or madvise who waits, or has not run since the read."""
        return self._state() != errno.EAGAIN

    def _state(self) -> int:
        """Return the errno of an operation that can do nothing."""
        return self.map_in(0, 4096, protect=False)[1]

    def close(self) -> None:
        """Close the descriptor. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._info_fd)
            self._fd = -1

    def _write_protect(self, start: int, length: int, mode: int) -> int:
        _pack_range_mode(self._range_mode, 0, start, length, mode)
        try:
            fcntl.ioctl(self._fd, _WRITEPROTECT, self._range_mode, True)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _check_still_usable(self) -> None:
        if os.get_blocking(self._fd):  # it would report an error for ever, and the loop would spin
            raise UsageError("the userfaultfd was made blocking by its owner")


def _progress(done: int, error: OSError) -> tuple[int, int]:
    """Read a failed operation's result: bytes done, or the negative errno when it was none."""
    number = error.errno or errno.EIO
    return max(0, done), number
