"""Memory of this process, and what a process may do to it, through plain system calls."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from owner_process import PROT_RW, Actions

from nopin.linux.libc import LIBC, checked, unmap
from nopin.linux.process_vm import ProcessVm
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
MADV_HUGEPAGE = 14
MAP_SHARED, MAP_PRIVATE = 1, 2
_does = Actions()


class Pages:
    """Whole pages at an address; what lies there may be changed or taken away.

    Attributes:
        address: of the first byte.
        n_pages: as mapped.
    """

    def __init__(self, address: int, n_pages: int) -> None:
        self.address = address
        self.n_pages = n_pages

    @property
    def length(self) -> int:
        return self.n_pages * PAGE

    def at(self, page: int) -> int:
        """The address of a page."""
        return self.address + page * PAGE

    def put(self, offset: int, data: bytes) -> None:
        _does.put(self.address + offset, data)

    def get(self, offset: int, length: int) -> bytes:
        return _does.get(self.address + offset, length)

    def fill(self, seed: int) -> bytes:
        """Store random bytes everywhere; returns them."""
        data = np.random.default_rng(seed).bytes(self.length)
        self.put(0, data)
        return data

    def array(self) -> NDArray[np.uint8]:
        """The bytes as they are now and will be: a view."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.length).from_address(self.address))

    def unmap(self, page: int, n_pages: int = 1) -> None:
        _does.unmap(self.at(page), n_pages * PAGE)

    def map_fresh(self, page: int, n_pages: int = 1) -> None:
        """Map new zeroed memory there, over what is mapped."""
        _does.map(n_pages * PAGE, self.at(page))

    def protect(self, page: int, protection: int, n_pages: int = 1) -> None:
        _does.protect(self.at(page), n_pages * PAGE, protection)

    def page_out(self, page: int, n_pages: int) -> None:
        _does.page_out(self.at(page), n_pages * PAGE)

    def advise(self, page: int, advice: int, n_pages: int = 1) -> None:
        _does.advise(self.at(page), n_pages * PAGE, advice)

    def move(self, page: int, to: int, n_pages: int = 1) -> None:
        """Move pages to another address."""
        _does.move(self.at(page), n_pages * PAGE, to)


@contextlib.contextmanager
def anonymous(n_pages: int) -> Iterator[Pages]:
    """Fresh private memory; gone afterwards."""
    pages = Pages(_does.map(n_pages * PAGE), n_pages)
    try:
        yield pages
    finally:
        unmap(pages.address, pages.length)


@contextlib.contextmanager
def mapped_file(file: Path, n_pages: int, *, shared: bool) -> Iterator[Pages]:
    """A mapping of a new file of so many pages."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, n_pages * PAGE)
        flags = MAP_SHARED if shared else MAP_PRIVATE
        address = LIBC.mmap(None, n_pages * PAGE, PROT_RW, flags, fd, 0)
        checked(ctypes.c_ssize_t(address).value, "mmap")
    finally:
        os.close(fd)
    try:
        yield Pages(int(address), n_pages)
    finally:
        unmap(int(address), n_pages * PAGE)


class Child:
    """A forked child that did its part and now keeps still; its memory can be looked at."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def get(self, address: int, length: int) -> bytes:
        seen = np.empty(length, np.uint8)
        assert ProcessVm(self.pid).read(address, length, seen.ctypes.data) == length
        return seen.tobytes()


@contextlib.contextmanager
def forked(first: Callable[[], None] = lambda: None) -> Iterator[Child]:
    """Fork a child that does something and then waits until the block ends."""
    done, says_done = os.pipe()
    waits, ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ends)
            first()
            os.write(says_done, b"!")
            os.read(waits, 1)
        finally:
            os._exit(0)
    for fd in (says_done, waits):
        os.close(fd)
    try:
        assert os.read(done, 1) == b"!", "the child failed"
        yield Child(pid)
    finally:
        os.close(ends)
        os.close(done)
        os.waitpid(pid, 0)
