"""The page that tells clients whether the server sleeps, so that they ring the doorbell only then.

One u64 at offset 0: 1 while the server sleeps or is about to. Clients map the page read-only; a seal makes
sure that they cannot do otherwise.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from nopin.linux import memfd
from nopin.units import PAGE_BYTES

_F_SEAL_FUTURE_WRITE = 0x0010
"""linux/fcntl.h; not in Python's fcntl before 3.13."""


class StatePage:
    """The server's side of the page.

    Attributes:
        fd: for clients to map; owned by this object.
    """

    def __init__(self) -> None:
        self.fd = memfd.create("nopin-state", PAGE_BYTES, seals=0)
        self._words = memoryview(mmap.mmap(self.fd, PAGE_BYTES)).cast("Q")  # before no more can be mapped so
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, memfd.SIZE_SEALS | _F_SEAL_FUTURE_WRITE)

    def set_sleeping(self, sleeping: bool) -> None:
        """Say whether clients have to ring. A fence belongs after True, before looking for work once more."""
        self._words[0] = int(sleeping)

    def close(self) -> None:
        """Close the descriptor; mappings stay as long as they are used."""
        os.close(self.fd)
