"""Copies between our memory and another process's: process_vm_readv and process_vm_writev.

The kernel walks the target's current page tables at each call, brings absent pages in, obeys the permissions
of its mappings, and keeps no pin afterwards. A range that runs into a hole moves what lies before it. One
call moves 2 GiB at most, quietly, and takes 1024 segments a side, so longer work is split here.

A call costs little more than the kernel's part: the one-segment form fills a reused block of four words and
passes ready-made ctypes objects, without errno; only a call that failed is made again with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.errors import HostLacks
from nopin.linux.libc import FAST_LIBC, LIBC
from nopin.mm.space import IoVec

MAX_SEGMENTS = 1024
"""UIO_MAXIOV of the kernel."""

MAX_CALL_BYTES = 1 << 30
"""Below the kernel's silent limit of 2 GiB less a page (MAX_RW_COUNT)."""

_pack_segments = struct.Struct("<4Q").pack_into
_ONE = ctypes.c_ulong(1)
_NO_FLAGS = ctypes.c_ulong(0)


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = library[name]  # indexing, unlike an attribute, makes a private object
    function.restype = ctypes.c_ssize_t
    return function


def require_process_vm() -> None:
    """Check that the two calls are to be had at all; of other processes each has to be asked by itself.

    Raises:
        HostLacks: they are not in this kernel, or a container forbids them.
    """
    word, copy = ctypes.c_uint64(1), ctypes.c_uint64(0)
    own = ProcessVm(os.getpid())
    for copied in (own.read, own.write):
        count = copied(ctypes.addressof(word), 8, ctypes.addressof(copy))
        if count < 0:
            remedy = "allow process_vm_readv and process_vm_writev in the container's seccomp profile"
            raise HostLacks("process_vm", os.strerror(-count), f"{remedy}; nothing works without them")


class ProcessVm:
    """Copies to and from one process, by number. Not for two threads at once: they would share the segments.

    Each copy returns the bytes moved, or a negative errno when not even the first byte was: ``-EFAULT`` for a
    hole or missing permission, ``-ESRCH`` for no such process, ``-EPERM`` when we may not look.
    """

    def __init__(self, pid: int) -> None:
        self._pid = ctypes.c_int(pid)
        self._segments = (ctypes.c_uint64 * 4)()  # local address, local length, remote address, remote length
        base = ctypes.addressof(self._segments)
        self._local = ctypes.c_void_p(base)
        self._remote = ctypes.c_void_p(base + 16)
        self._fast_read = _function(FAST_LIBC, "process_vm_readv")
        self._fast_write = _function(FAST_LIBC, "process_vm_writev")
        self._slow_read = _function(LIBC, "process_vm_readv")
        self._slow_write = _function(LIBC, "process_vm_writev")

    def read(self, address: int, length: int, local: int) -> int:
        """Copy `length` bytes at `address` of the process to our address `local`."""
        if length <= MAX_CALL_BYTES:
            _pack_segments(self._segments, 0, local, length, address, length)
            if self._fast_read(self._pid, self._local, _ONE, self._remote, _ONE, _NO_FLAGS) == length:
                return length
        return self._copy(self._slow_read, address, length, local)

    def write(self, address: int, length: int, local: int) -> int:
        """Copy `length` bytes at our address `local` to `address` of the process."""
        if length <= MAX_CALL_BYTES:
            _pack_segments(self._segments, 0, local, length, address, length)
            if self._fast_write(self._pid, self._local, _ONE, self._remote, _ONE, _NO_FLAGS) == length:
                return length
        return self._copy(self._slow_write, address, length, local)

    def read_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy remote segments to local ones, both in order; their totals are equal."""
        return self._copy_v(self._fast_read, self._slow_read, remote, local)

    def write_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy local segments to remote ones, both in order; their totals are equal."""
        return self._copy_v(self._fast_write, self._slow_write, remote, local)

    def _copy(self, call: Any, address: int, length: int, local: int) -> int:
        """The careful form: in bounded calls, and on from a short count to learn why it was short."""
        moved = 0
        while moved < length:
            step = min(length - moved, MAX_CALL_BYTES)
            _pack_segments(self._segments, 0, local + moved, step, address + moved, step)
            count = call(self._pid, self._local, _ONE, self._remote, _ONE, _NO_FLAGS)
            if count <= 0:
                return moved or -(ctypes.get_errno() if count else errno.EFAULT)
            moved += count
        return moved

    def _copy_v(self, fast: Any, slow: Any, remote: IoVec, local: IoVec) -> int:
        if len(remote) <= MAX_SEGMENTS and len(local) <= MAX_SEGMENTS:
            there, here = np.ascontiguousarray(remote), np.ascontiguousarray(local)
            total = int(there[0, 1]) if len(there) == 1 else int(np.add.reduce(here[:, 1]))
            if self._call_v(fast, there, here) == total:
                return total
        return self._copy_v_in_pieces(slow, remote, local)

    def _copy_v_in_pieces(self, call: Any, remote: IoVec, local: IoVec) -> int:
        """The careful form: lists cut where one call ends, and on from a short count."""
        remote_ends, local_ends = _ends(remote), _ends(local)
        total = int(remote_ends[-1]) if len(remote_ends) else 0
        assert total == (int(local_ends[-1]) if len(local_ends) else 0), "scatter lists of different length"
        moved = 0
        while moved < total:
            until = min(_reach(remote_ends, moved), _reach(local_ends, moved), moved + MAX_CALL_BYTES)
            there = _clip(remote, remote_ends, moved, until)
            here = _clip(local, local_ends, moved, until)
            count = self._call_v(call, there, here)
            if count <= 0:
                return moved or -(ctypes.get_errno() if count else errno.EFAULT)
            moved += count
        return moved

    def _call_v(self, call: Any, there: IoVec, here: IoVec) -> int:
        count: int = call(
            self._pid,
            ctypes.c_void_p(here.__array_interface__["data"][0]),  # half the price of .ctypes.data
            ctypes.c_ulong(len(here)),
            ctypes.c_void_p(there.__array_interface__["data"][0]),
            ctypes.c_ulong(len(there)),
            _NO_FLAGS,
        )
        return count


def _ends(segments: IoVec) -> NDArray[np.uint64]:
    """Position after each segment, counted over the whole list."""
    return np.cumsum(segments[:, 1], dtype=np.uint64)


def _reach(ends: NDArray[np.uint64], start: int) -> int:
    """How far one call of at most MAX_SEGMENTS segments gets from position `start`."""
    first = int(np.searchsorted(ends, start, side="right"))
    return int(ends[min(first + MAX_SEGMENTS, len(ends)) - 1])


def _clip(segments: IoVec, ends: NDArray[np.uint64], start: int, end: int) -> IoVec:
    """The segments between two positions of the list, the first and last cut to fit; C-contiguous."""
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    piece = np.array(segments[first : last + 1], np.uint64, order="C")
    skip = start - (int(ends[first - 1]) if first else 0)
    piece[0, 0] += skip
    piece[0, 1] -= skip
    piece[-1, 1] -= int(ends[last]) - end
    return piece
