"""An address space made of numpy pages, whose state a test sets page by page."""

from __future__ import annotations

import numpy as np

from nopin.mm.space import Absent, FaultResult, IoVec, LooksThenCopies, Reason, Staging
from nopin.units import PAGE_BYTES


class MemorySpace(LooksThenCopies):
    """One mapping of `n_pages` at `base`; implements `nopin.mm.space.AddressSpace`.

    Attributes:
        memory: (n_pages * 4096,) uint8, what the process would see.
        hole, read_only, slow: sets of page numbers counted from `base`.
        fleeting: pages that are slow and gone again by the next look, as under a limit that is too tight.
        n_copies: copies carried out.
    """

    def __init__(self, base: int, n_pages: int) -> None:
        assert base % PAGE_BYTES == 0
        self.base = base
        self.memory = np.zeros(n_pages * PAGE_BYTES, np.uint8)
        self.hole: set[int] = set()
        self.read_only: set[int] = set()
        self.slow: set[int] = set()
        self.fleeting: set[int] = set()
        self.n_copies = 0
        self.exited = False

    @property
    def gone(self) -> bool:
        """True once the test set `exited`."""
        return self.exited

    def _reach(self, address: int, length: int, *, write: bool) -> int:
        """Bytes from address that can be accessed."""
        if self.exited:
            return 0
        done = 0
        while done < length:
            at = address + done - self.base
            page = at // PAGE_BYTES
            if not 0 <= at < len(self.memory) or page in self.hole or (write and page in self.read_only):
                break
            self.slow.discard(page)
            done += min(length - done, PAGE_BYTES - at % PAGE_BYTES)
        return done

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy out of the process."""
        return self.read_v(np.array([[address, length]], np.uint64), staging, np.array([[offset, length]], np.uint64))

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy into the process."""
        return self.write_v(np.array([[address, length]], np.uint64), staging, np.array([[offset, length]], np.uint64))

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy out of the process, scattered."""
        return self._copy(remote, staging, local, write=False)

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy into the process, scattered."""
        return self._copy(remote, staging, local, write=True)

    def _copy(self, remote: IoVec, staging: Staging, local: IoVec, *, write: bool) -> int:
        self.n_copies += 1
        assert int(remote[:, 1].sum()) == int(local[:, 1].sum()), "both sides of a copy must have one total"
        places = np.concatenate([np.arange(o, o + n) for o, n in local.astype(np.int64).tolist()])
        done = 0
        for address, length in remote.tolist():
            n = self._reach(address, length, write=write)
            here = self.memory[address - self.base : address - self.base + n]
            if write:
                here[:] = staging.array[places[done : done + n]]
            else:
                staging.array[places[done : done + n]] = here
            done += n
            if n < length:
                break
        return done

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """Report the pages marked slow or fleeting."""
        first, last = (start - self.base) // PAGE_BYTES, (end - 1 - self.base) // PAGE_BYTES
        n_pages = sum(1 for page in range(first, last + 1) if page in self.slow or page in self.fleeting)
        return Absent(n_pages, slow=True) if n_pages else None

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Make slow pages present."""
        done = self._reach(start, end - start, write=write)
        if done == end - start:
            return FaultResult(done)
        return FaultResult(done, start + done, Reason.OWNER_GONE if self.exited else Reason.NO_ACCESS)

    def close(self) -> None:
        """Nothing is held."""
