"""The file of an arena: a sparse memfd of pages, mapped at the same address by all who share pointers."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.linux.fd_identity import Identity, identity_of
from nopin.linux.libc import LIBC, PROT_READ, PROT_WRITE, checked
from nopin.linux.proc import Maps
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

WINDOW_START = 0x2000_0000_0000
"""Where arenas are looked for room: a part of the address space that nothing else uses by itself (mmap places from
the top downwards, brk from below), so that an accelerator worker finds the same addresses free."""
WINDOW_END = 0x3000_0000_0000
_WINDOW_ALIGN = 1 << 30
_USER_END = 1 << 47

_MAP_SHARED_NORESERVE = 0x01 | 0x4000
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_FIXED_RESERVE = 0x02 | 0x10 | 0x20 | 0x4000  # MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE
_FALLOC_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_MADV_DONTFORK = 10

LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Piece(NamedTuple):
    """What of an arena is mapped at some addresses of a process.

    Attributes:
        offset: bytes, where in the file it begins.
        protection: PROT_* of it.
    """

    where: Range
    offset: int
    protection: int = PROT_READ | PROT_WRITE


def map_somewhere(fd: int, length: int) -> int:
    """Map a whole arena at a free place of the window; returns the address.

    Raises:
        OSError: ENOMEM when there is no room of that size.
    """
    address = WINDOW_START
    while address + length <= WINDOW_END:
        try:
            map_at(fd, Range.of_length(address, length))
        except FileExistsError:
            address += _WINDOW_ALIGN
        else:
            return address
    raise OSError(errno.ENOMEM, f"no {length} free bytes of addresses for an arena")


def map_at(fd: int, where: Range, offset: int = 0) -> None:
    """Map part of an arena at exactly these addresses, in this process and none of its forked children.

    Raises:
        FileExistsError: something is mapped there.
        OSError: the kernel refuses.
    """
    map_piece(fd, Piece(where, offset))


def map_piece(fd: int, piece: Piece) -> None:
    """Do the same with a protection. Raises as `map_at`."""
    where, flags = piece.where, _MAP_SHARED_NORESERVE | _MAP_FIXED_NOREPLACE
    found = LIBC.mmap(where.start, where.length, piece.protection, flags, fd, piece.offset)
    if found != where.start:
        checked(-1, f"mmap at {where}")
    # A child that inherited it would read zeros wherever nobody serves it.
    checked(LIBC.madvise(where.start, where.length, _MADV_DONTFORK), "madvise")


def pieces_of(fds: Sequence[int]) -> list[list[Piece]]:
    """Return what this process has mapped of each of some files, by address."""
    found: dict[Identity, list[Piece]] = {identity_of(fd): [] for fd in fds}
    maps = Maps(os.getpid())
    try:
        for mapping in maps.within(Range(0, _USER_END), shared=True):
            pieces = found.get((mapping.device, mapping.inode))
            if pieces is not None:
                protection = PROT_READ * mapping.readable | PROT_WRITE * mapping.writable
                pieces.append(Piece(mapping.where, mapping.offset, protection))
    finally:
        maps.close()
    return list(found.values())


def reserve(where: Range) -> None:
    """Make every access SIGSEGV, whatever is mapped there, and have nothing else come there."""
    found = LIBC.mmap(where.start, where.length, 0, _MAP_FIXED_RESERVE, -1, 0)
    checked(0 if found == where.start else -1, f"mmap at {where}")


def punch(fd: int, offset: int, length: int) -> None:
    """Give pages back: out of the file, out of every mapping, with no message to anybody.

    Raises:
        OSError: EPERM when the file is sealed against it.
    """
    checked(LIBC.fallocate(fd, _FALLOC_PUNCH, offset, length), "fallocate")


def present(fd: int, first: int, n: int) -> NDArray[np.bool_]:
    """Tell which of `n` pages from page number `first` the file has; (n,) bool."""
    found = np.zeros(n, np.bool_)
    at, end = first * PAGE_BYTES, (first + n) * PAGE_BYTES
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # no data from here to the end
                break
            raise
        if data >= end:
            break
        at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        found[data // PAGE_BYTES - first : at // PAGE_BYTES - first] = True
    return found


def resident_bytes(fd: int) -> int:
    """Return how much memory a file takes."""
    return os.fstat(fd).st_blocks * 512
