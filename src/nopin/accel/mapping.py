"""An arena in a worker: mapped where its owner has it, its faults for the device server to resolve."""

from __future__ import annotations

import os
from pathlib import Path

from nopin.accel.forked import Bequest
from nopin.errors import HostLacks
from nopin.linux.arena_file import map_at
from nopin.linux.libc import unmap
from nopin.linux.paging_uffd import open_paging, register_paging, unregister
from nopin.ranges import Range


class ArenaMapping:
    """One arena of the owner in this process.

    Args:
        fd: of the frames; may be closed afterwards.
        start: the owner's address of it.
        length: bytes.
        server: path of the device server's socket.

    Attributes:
        where: its addresses.
        uffd: its userfaultfd, kept open here, so that faults wait when the device server dies.
        features: those it was opened with.

    Raises:
        OSError: it cannot be mapped here: EEXIST when something of this process is in the way.
        HostLacks: no userfaultfd here.
    """

    def __init__(self, fd: int, start: int, length: int, server: Path) -> None:
        self.where = Range.of_length(start, length)
        map_at(fd, self.where)
        try:
            self.uffd, features = open_paging()
        except HostLacks:
            unmap(start, length)
            raise
        self.features = int(features)
        register_paging(self.uffd, self.where)
        self._bequest = Bequest(fd, server)

    def close(self) -> None:
        """Unmap it. Unregistered first, because nobody may be left to read the event of an unmapping."""
        self._bequest.close()
        unregister(self.uffd, self.where)
        unmap(self.where.start, self.where.length)
        os.close(self.uffd)
