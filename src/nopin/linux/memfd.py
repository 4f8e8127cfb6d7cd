"""Anonymous shared memory files: made, sealed, mapped as numpy arrays."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import weakref

import numpy as np

from nopin.errors import HostLacks
from nopin.linux.libc import map_shared, unmap
from nopin.mm.space import Bytes

REMEDY = "allow memfd_create in the container's seccomp profile"
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, length: int, *, seals: int = SIZE_SEALS) -> int:
    """Make a memfd of `length` zero bytes, its size sealed unless other `seals` are wanted; returns the descriptor.

    The seals matter where two processes share it: without them the other side could truncate the file and
    turn our next load into SIGBUS.

    Raises:
        HostLacks: the host forbids it.
        OSError: it is out of descriptors or memory.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as problem:
        if problem.errno in (errno.ENOSYS, errno.EPERM):
            raise HostLacks("memfd", os.strerror(problem.errno), f"{REMEDY}; nothing works without it") from None
        raise
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_array(fd: int, length: int | None = None, *, writable: bool = True) -> Bytes:
    """Map a file as a uint8 array, shared. The mapping lives as long as an array over it does.

    Args:
        fd: may be closed afterwards.
        length: bytes; None for the whole file.
        writable: False maps it read-only, and the array refuses stores.

    Raises:
        OSError: the file cannot be mapped so.
        ValueError: the file is shorter than `length`, or empty.
    """
    size = os.fstat(fd).st_size
    n_bytes = size if length is None else length
    if not 0 < n_bytes <= size:
        raise ValueError(f"cannot map {n_bytes} bytes of a file of {size}")
    address = map_shared(fd, n_bytes, writable=writable)
    # Not the mmap module: it keeps a duplicate of the descriptor for as long as the mapping lives.
    memory = (ctypes.c_uint8 * n_bytes).from_address(address)
    array: Bytes = np.frombuffer(memoryview(memory), np.uint8)
    array.flags.writeable = writable
    weakref.finalize(array, unmap, address, n_bytes).atexit = False  # views of it keep it alive
    return array
