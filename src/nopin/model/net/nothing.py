"""The plain memory of a process that is reached through windows alone: none."""

from __future__ import annotations

from nopin.mm.space import Absent, FaultResult, IoVec, LooksThenCopies, Reason, Staging


class NothingMapped(LooksThenCopies):
    """An `AddressSpace` in which no address exists. Windows lie over all that a device may reach."""

    gone = False

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Nothing can be read."""
        return 0

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Nothing can be written."""
        return 0

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Nothing can be read."""
        return 0

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Nothing can be written."""
        return 0

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """Nothing is there that could be absent."""
        return None

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Nothing can be brought."""
        return FaultResult(0, start, Reason.NO_ACCESS)

    def close(self) -> None:
        """Nothing is held."""
