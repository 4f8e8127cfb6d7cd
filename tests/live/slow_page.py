"""Memory whose pages come when the test says so: a medium as slow as one likes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

from own_memory import PAGE, Pages
from owner_process import Actions

from nopin.linux.libc import map_shared, syscall, unmap

_SYS_USERFAULTFD = 323
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_API_VERSION, _FEATURE_MINOR_SHMEM = 0xAA, 1 << 10
_MODE_MISSING, _MODE_MINOR = 1, 4


class SlowPages(Pages):
    """Memory whose absent pages a userfaultfd holds back: whoever touches one waits until `release`."""

    def __init__(self, address: int, n_pages: int, holder: int) -> None:
        super().__init__(address, n_pages)
        self._holder = holder

    def release(self) -> None:
        """Let the pages come, and whoever waits go on. Twice is fine."""
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1


@contextlib.contextmanager
def slow_pages(data: bytes) -> Iterator[SlowPages]:
    """Pages that hold `data`, a whole number of pages, held back by a userfaultfd that nobody serves."""
    fd = os.memfd_create("slow", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        address = map_shared(fd, len(data))
    finally:
        os.close(fd)
    with _held_back(address, len(data), _FEATURE_MINOR_SHMEM, _MODE_MINOR) as pages:
        yield pages


@contextlib.contextmanager
def held_back_pages(n_pages: int) -> Iterator[SlowPages]:
    """Private memory that was never touched, which a userfaultfd of this process's own holds back."""
    address = Actions().map(n_pages * PAGE)
    with _held_back(address, n_pages * PAGE, 0, _MODE_MISSING) as pages:
        yield pages


@contextlib.contextmanager
def _held_back(address: int, length: int, features: int, mode: int) -> Iterator[SlowPages]:
    holder = syscall(_SYS_USERFAULTFD, "userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(holder, _API, bytearray(struct.pack("<3Q", _API_VERSION, features, 0)), True)
    fcntl.ioctl(holder, _REGISTER, bytearray(struct.pack("<4Q", address, length, mode, 0)), True)
    pages = SlowPages(address, length // PAGE, holder)
    try:
        yield pages
    finally:
        pages.release()
        unmap(address, length)
