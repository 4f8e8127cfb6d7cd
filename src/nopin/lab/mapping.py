"""A few pages of anonymous memory at an address of our own, and what a process may do to them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from nopin.linux.libc import LIBC, PROT_READ, PROT_WRITE, checked, unmap

MAP_PRIVATE = 2
MAP_ANONYMOUS = 0x20
MAP_FIXED_NOREPLACE = 0x100000
MADV_DONTNEED = 4
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2


def _signed(result: int | None) -> int:
    """Read a pointer result as the signed number `checked` expects: MAP_FAILED is -1."""
    return ctypes.c_ssize_t(result or 0).value


def map_private(length: int, address: int | None = None) -> int:
    """Map fresh anonymous memory, at a given free address or anywhere; returns the address."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | (MAP_FIXED_NOREPLACE if address is not None else 0)
    return checked(_signed(LIBC.mmap(address, length, PROT_READ | PROT_WRITE, flags, -1, 0)), "mmap")


class Mapping:
    """Anonymous memory of a whole number of pages.

    Attributes:
        address: stays the same whatever is done to the memory behind it.
        array: the bytes at that address, as the process itself sees them.
    """

    def __init__(self, length_bytes: int) -> None:
        self.length = length_bytes
        self.address = map_private(length_bytes)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * length_bytes).from_address(self.address)
        )

    def drop(self) -> None:
        """Give the pages back with MADV_DONTNEED; the next touch finds zeros."""
        arguments = ctypes.c_void_p(self.address), ctypes.c_size_t(self.length), ctypes.c_int(MADV_DONTNEED)
        checked(LIBC.madvise(*arguments), "madvise")

    def replace(self) -> None:
        """Unmap the memory and map fresh memory at the same address, as malloc may do."""
        unmap(self.address, self.length)
        map_private(self.length, self.address)

    def move_away_and_back(self) -> None:
        """Move the pages to another address and back again with mremap."""
        elsewhere = map_private(self.length)
        self._move(self.address, elsewhere)
        self._move(elsewhere, self.address)

    def _move(self, source: int, target: int) -> None:
        LIBC.mremap.restype = ctypes.c_void_p
        size = ctypes.c_size_t(self.length)
        flags = ctypes.c_int(MREMAP_MAYMOVE | MREMAP_FIXED)
        moved = LIBC.mremap(ctypes.c_void_p(source), size, size, flags, ctypes.c_void_p(target))
        checked(_signed(moved), "mremap")

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Have a forked child that shares the pages copy-on-write for as long as the block runs."""
        waits, ends = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ends)
            os.read(waits, 1)
            os._exit(0)
        os.close(waits)
        try:
            yield
        finally:
            os.close(ends)
            os.waitpid(child, 0)

    def close(self) -> None:
        """Unmap it; `array` must not be touched any more."""
        unmap(self.address, self.length)
