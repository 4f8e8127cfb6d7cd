"""The pinned address space: page frames held since registration, reached by the addresses they had then.

This is what a NIC with a conventional memory region does, and it is here as the contrast. The frames never
leave, so nothing is ever absent and nothing is ever waited for. But they need not be the process's memory any
longer: after munmap, mremap, MADV_DONTNEED or a hole punch the process has other pages at those addresses, or
none, and this space goes on reading and writing the old ones, without an error.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nopin.mm.space import Absent, FaultResult, IoVec, LooksThenCopies, Reason, Staging
from nopin.ranges import Range


class FramePort(Protocol):
    """Mechanism under a pinned space: moves bytes of the registered range."""

    def load(self, address: int, length: int, local: int) -> int:
        """Copy frames to our address `local`; bytes moved."""
        ...

    def store(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to frames; bytes moved."""
        ...

    def alive(self) -> bool:
        """False once the process has exited."""
        ...

    def close(self) -> None:
        """Let go of the frames."""
        ...


class PinnedSpace(LooksThenCopies):
    """An `AddressSpace` of one registered range: addresses outside it do not exist."""

    def __init__(self, port: FramePort, where: Range) -> None:
        self._port = port
        self._where = where
        self._gone = False
        self._closed = False

    @property
    def gone(self) -> bool:
        """True once the process is known to have exited; never False again."""
        if not self._gone:
            self._gone = not self._port.alive()
        return self._gone

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy frames into staging; see `AddressSpace`."""
        return self._port.load(address, self._accessible(address, length), staging.address + offset)

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy staging into frames; see `AddressSpace`."""
        return self._port.store(address, self._accessible(address, length), staging.address + offset)

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy frame ranges into staging ranges; see `AddressSpace`."""
        packed = Staging(np.empty(int(local[:, 1].sum()), np.uint8))
        moved = 0
        for address, length in remote.tolist():
            count = self.read(address, length, packed, moved)
            moved += count
            if count < length:
                break
        left, at = moved, 0
        for offset, length in local.tolist():
            step = min(length, left - at)
            staging.array[offset : offset + step] = packed.array[at : at + step]
            at += step
        return moved

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy staging ranges into frame ranges; see `AddressSpace`."""
        pieces = [staging.array[offset : offset + length] for offset, length in local.tolist()]
        packed = Staging(np.concatenate(pieces) if pieces else np.empty(0, np.uint8))
        moved = 0
        for address, length in remote.tolist():
            count = self.write(address, length, packed, moved)
            moved += count
            if count < length:
                break
        return moved

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """None: pinned frames are always present."""
        del start, end, write
        return None

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Nothing to do; tells how much of [start, end) is registered."""
        del write
        length = self._accessible(start, end - start)
        if length == end - start:
            return FaultResult(length)
        reason = Reason.OWNER_GONE if self.gone else Reason.NO_ACCESS
        return FaultResult(length, start + length, reason)

    def close(self) -> None:
        """Let go of the frames; from here on the space counts as gone. Twice is fine."""
        self._gone = True
        if not self._closed:
            self._closed = True
            self._port.close()

    def _accessible(self, address: int, length: int) -> int:
        """How many of `length` bytes from `address` are registered and reachable."""
        if self.gone or not self._where.start <= address < self._where.end:
            return 0
        return min(length, self._where.end - address)
