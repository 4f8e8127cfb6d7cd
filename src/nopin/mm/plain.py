"""The plain address space: memory a process already has, reached by its own page table.

There is no table of ours to keep coherent. Every access names process addresses and is translated by the
kernel when it happens, as hardware does with a PASID and shared virtual addressing: a page the owner
unmapped is gone at once, one it remapped is the new one, a copy-on-write page is broken for the owner only.
What is added here is judgement: what counts as slow, and that an exited owner is noticed before its process
number can name somebody else.
"""

from __future__ import annotations

from typing import Protocol

from nopin.mm.space import Absent, FaultResult, IoVec, Reason, Staging
from nopin.units import PAGE_MASK, U64_MAX, page_ceil, page_floor

_LAST_PAGE = page_floor(U64_MAX)


class MemoryPort(Protocol):
    """Mechanism under a plain space: how this host reaches the memory of one process.

    Copies return the bytes moved, 0 when not even the first byte could be. Local addresses are ours.
    """

    def read(self, address: int, length: int, local: int) -> int:
        """Copy from the process to our address `local`."""
        ...

    def write(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to the process."""
        ...

    def read_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy process segments to local segments, in order."""
        ...

    def write_v(self, remote: IoVec, local: IoVec) -> int:
        """Copy local segments to process segments, in order."""
        ...

    def absent(self, start: int, end: int) -> Absent | None:
        """Pages not present in the page-aligned [start, end); None if all are."""
        ...

    def read_present(self, address: int, length: int, local: int) -> bool:
        """Copy a short range to our address `local` if its pages are present; True if it was copied."""
        ...

    def write_present(self, address: int, length: int, local: int) -> bool:
        """Copy from our address `local` to a short range if its pages are present; True if it was copied."""
        ...

    def touch(self, start: int, end: int) -> int | None:
        """Bring the page-aligned [start, end) in, changing no byte; the first page that cannot, or None."""
        ...

    def alive(self) -> bool:
        """False once the process has exited."""
        ...

    def close(self) -> None:
        """Let go of the process."""
        ...


class PlainSpace:
    """An `AddressSpace` over the ordinary memory of one process. `fault` may run on another thread."""

    def __init__(self, port: MemoryPort) -> None:
        self._port = port
        self._gone = False
        self._closed = False

    @property
    def port(self) -> MemoryPort:
        """The mechanism, for who has a quicker way to the same memory."""
        return self._port

    @property
    def gone(self) -> bool:
        """True once the process is known to have exited; never False again."""
        if not self._gone:
            self._gone = not self._port.alive()
        return self._gone

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy process memory into staging; see `AddressSpace`."""
        if self.gone or length <= 0:
            return 0
        return self._port.read(address, length, staging.address + offset)

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy staging into process memory; see `AddressSpace`."""
        if self.gone or length <= 0:
            return 0
        return self._port.write(address, length, staging.address + offset)

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy process ranges into staging ranges; see `AddressSpace`."""
        if self.gone or not len(remote):
            return 0
        return self._port.read_v(remote, local + staging.origin)

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy staging ranges into process ranges; see `AddressSpace`."""
        if self.gone or not len(remote):
            return 0
        return self._port.write_v(remote, local + staging.origin)

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """Pages not present in [start, end), rounded out to pages. Of an owner that is gone, none.

        A write to a present page breaks sharing itself, so `write` makes no difference.
        """
        del write
        if start >= end or self._closed:
            return None
        last = end - 1 | PAGE_MASK  # page_floor and page_ceil, written out: this is asked before every copy
        return self._port.absent(start & ~PAGE_MASK, min(last + 1, _LAST_PAGE))

    def read_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy a short range that is present to staging; see `AddressSpace`."""
        return not self._gone and self._port.read_present(address, length, staging.address + offset)

    def write_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy staging to a short range that is present; see `AddressSpace`."""
        return not self._gone and self._port.write_present(address, length, staging.address + offset)

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Make the pages of [start, end) present.

        Write intent changes nothing here: touching for write would have to store something, and what is left
        to do at the copy (breaking copy-on-write) never waits for a medium. A page that may be read but not
        written therefore counts as done, and the copy finds out.
        """
        del write
        if self.gone:
            return FaultResult(0, start, Reason.OWNER_GONE)
        bad = self._port.touch(page_floor(start), page_ceil(end))
        if bad is None:
            return FaultResult(end - start)
        first_bad = max(bad, start)
        reason = Reason.OWNER_GONE if self.gone else Reason.NO_ACCESS
        return FaultResult(first_bad - start, first_bad, reason)

    def close(self) -> None:
        """Let go of the process; from here on it counts as gone. Twice is fine."""
        self._gone = True
        if not self._closed:
            self._closed = True
            self._port.close()
