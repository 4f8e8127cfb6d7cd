"""The least a userfaultfd pager can do, to hold the real one against: every fault gets the same bytes by UFFDIO_COPY.

The loop is that of the example in userfaultfd(2): poll, read one message, one ioctl. It keeps no books, asks nobody and
hears of no other event, so that nothing of it could be left out.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from ctypes import addressof, c_char

from nopin.linux.paging_uffd import UFFDIO_COPY, register_missing
from nopin.linux.uffd_handshake import MESSAGE, Feature, open_with
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_MASK

_ADDRESS_AT = 16


def open_bare(address: int, length: int) -> int:
    """Open a userfaultfd that hears of holes touched in a shared mapping of ours, and of nothing else.

    Raises:
        HostLacks: no userfaultfd here.
    """
    fd = open_with((Feature.MISSING_SHMEM,), Feature.MISSING_SHMEM)[0]
    register_missing(fd, Range.of_length(address, length))
    return fd


def answer_with_copies(uffd: int, n_pages: int) -> None:
    """Answer each fault with that many pages of zeros, from the page touched on, until killed."""
    source = mmap.mmap(-1, n_pages * PAGE_BYTES)
    source_address = addressof(c_char.from_buffer(source))
    length, argument, pack = len(source), bytearray(40), struct.Struct("<4Qq").pack_into
    poller = select.poll()
    poller.register(uffd, select.POLLIN)
    while True:
        poller.poll()
        message = os.read(uffd, MESSAGE.size)
        (address,) = struct.unpack_from("<Q", message, _ADDRESS_AT)
        pack(argument, 0, address & ~PAGE_MASK, source_address, length, 0, 0)
        fcntl.ioctl(uffd, UFFDIO_COPY, argument, True)
