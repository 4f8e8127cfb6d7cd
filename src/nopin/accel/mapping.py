"""An arena in a worker: mapped where its owner has it, its faults for the device server to resolve."""

from __future__ import annotations

import fcntl
import os
import struct

from nopin.linux.libc import LIBC, MAP_SHARED, PROT_READ, PROT_WRITE, checked, unmap
from nopin.linux.userfaultfd import Feature, _api, _offered, _open_fd
from nopin.ranges import Range

_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000


class ArenaMapping:
    """One arena of the owner in this process.

    Args:
        fd: of the frames; may be closed afterwards.
        start: the owner's address of it.
        length: bytes.

    Attributes:
        where: its addresses.
        uffd: its userfaultfd, kept open here, so that faults wait when the device server dies.
        features: those it was opened with.

    Raises:
        OSError: it cannot be mapped here: EEXIST when something of this process is in the way.
        HostLacks: no userfaultfd here.
    """

    def __init__(self, fd: int, start: int, length: int) -> None:
        self.where = Range.of_length(start, length)
        flags = MAP_SHARED | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
        address = LIBC.mmap(start, length, PROT_READ | PROT_WRITE, flags, fd, 0)
        if address != start:
            checked(-1, "mmap")
        self.uffd = _open_fd()
        wanted = (1 << 5) | (1 << 10) | 1 | 2 | 4 | 8 | (1 << 6) | (1 << 12)
        self.features = int(Feature(wanted) & _offered())
        _api(self.uffd, Feature(self.features))
        argument = bytearray(struct.pack("<4Q", start, length, 7, 0))
        fcntl.ioctl(self.uffd, 0xC020AA00, argument, True)

    def close(self) -> None:
        """Unmap it, and let go of the userfaultfd: in this order nobody would read the event of the unmapping."""
        argument = struct.pack("<2Q", self.where.start, self.where.length)
        fcntl.ioctl(self.uffd, 0x8010AA01, argument)
        unmap(self.where.start, self.where.length)
        os.close(self.uffd)
