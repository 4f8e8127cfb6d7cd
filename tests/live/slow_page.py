"""Memory whose pages come when the test says so: a medium as slow as one likes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

from own_memory import PAGE, Pages

from nopin.linux.libc import map_shared, syscall, unmap

_SYS_USERFAULTFD = 323
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_API_VERSION, _FEATURE_MINOR_SHMEM, _MODE_MINOR = 0xAA, 1 << 10, 4


class SlowPages(Pages):
    """Shared memory that is in a file and not mapped in: whoever touches it waits until `release`."""

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
    holder = syscall(_SYS_USERFAULTFD, "userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(holder, _API, bytearray(struct.pack("<3Q", _API_VERSION, _FEATURE_MINOR_SHMEM, 0)), True)
    fcntl.ioctl(holder, _REGISTER, bytearray(struct.pack("<4Q", address, len(data), _MODE_MINOR, 0)), True)
    pages = SlowPages(address, len(data) // PAGE, holder)
    try:
        yield pages
    finally:
        pages.release()
        unmap(address, len(data))
