"""Opening a userfaultfd: what its two users, the watch and paging, have in common."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from enum import IntFlag

from nopin.errors import HostLacks
from nopin.linux.libc import syscall

LINK = "anon_inode:[userfaultfd]"
"""What /proc/self/fd shows for one."""
_SYS_USERFAULTFD = 323
_USER_MODE_ONLY = 1
_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_REMEDY = (
    "allow userfaultfd in the container's seccomp profile, run as root or set sysctl vm.unprivileged_userfaultfd=1; "
    "without it sharing works unwatched, and there is no managed memory"
)


class Feature(IntFlag):
    """UFFD_FEATURE_* bits used here."""

    FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    MINOR_SHMEM = 1 << 10
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15


EVENTS = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


class EventKind:
    """Byte 0 of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


MESSAGE = struct.Struct("<B7x3Q")
"""A message: its kind and three words, whose meaning depends on it."""


def open_with(wishes: Sequence[Feature], needed: Feature) -> tuple[int, Feature]:
    """Open a userfaultfd on our own address space with the first of `wishes` that the kernel grants.

    Without privilege it is granted for faults in user mode only, and never with fork events.

    Args:
        wishes: feature sets, best first; bits this kernel does not know are left out, those of `needed` excepted.

    Returns:
        The descriptor (close-on-exec, non-blocking) and the features it was opened with.

    Raises:
        HostLacks: no userfaultfd here, or not what is needed.
    """
    offered = _offered()
    if offered & needed != needed:
        lacking = str(needed & ~offered)
        raise HostLacks("userfaultfd", f"this kernel lacks {lacking}", "use a newer Linux")
    for wish in wishes:
        fd = open_fd()
        with contextlib.suppress(PermissionError):
            handshake(fd, offered & wish)
            return fd, offered & wish
        os.close(fd)
    raise HostLacks("userfaultfd", "the kernel refuses its events to this user", _REMEDY)


def open_fd() -> int:
    """Make the descriptor, the handshake still to be done.

    Raises:
        HostLacks: the kernel has none, or none for this user.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return syscall(_SYS_USERFAULTFD, "userfaultfd", flags)
    except PermissionError:
        pass
    except OSError as error:
        raise HostLacks("userfaultfd", _reason(error), "use a kernel built with CONFIG_USERFAULTFD") from None
    try:
        return syscall(_SYS_USERFAULTFD, "userfaultfd", flags | _USER_MODE_ONLY)
    except OSError as error:
        if error.errno == errno.EINVAL:
            reason = "not allowed for this user, and this kernel (before 5.11) has no user-mode form"
        else:
            reason = _reason(error)
        raise HostLacks("userfaultfd", reason, _REMEDY) from None


def _reason(error: OSError) -> str:
    """Return the kernel's words without the name of the call, which the feature has."""
    return os.strerror(error.errno) if error.errno else str(error)


def handshake(fd: int, features: Feature) -> Feature:
    """Agree on features; works once for a descriptor. Returns those the kernel offers.

    Raises:
        PermissionError: this user may not have one of them.
    """
    argument = bytearray(struct.pack("<3Q", _API, features, 0))
    fcntl.ioctl(fd, _UFFDIO_API, argument, True)
    return Feature(struct.unpack_from("<Q", argument, 8)[0])


def _offered() -> Feature:
    """What this kernel has, asked on a descriptor of its own: the handshake works once."""
    fd = open_fd()
    try:
        return handshake(fd, Feature(0))
    finally:
        os.close(fd)
