"""The address space interface: what a device may ask of a process's memory.

Three kinds stand behind it: plain (the Linux kernel is the MM), pinned (frames held since registration) and,
in the model, simulated processes. `read` and `write` are named from the device's side: `read` takes bytes out
of the process. None of them asks about residency; that is `absent`, so that the caller may park instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IoVec = NDArray[np.uint64]
"""Scatter list: shape (n, 2), columns address (or staging offset) and length in bytes."""

Bytes = NDArray[np.uint8]


class Staging:
    """A byte buffer of the device: its array, its address in this process, a view.

    The address is looked up once because it is needed on every copy. The array must not be resized or freed
    while the staging object lives.

    Attributes:
        origin: (2,) uint64; added to a scatter list it turns offsets into addresses.
    """

    __slots__ = ("address", "array", "origin", "view")

    def __init__(self, array: Bytes) -> None:
        assert array.dtype == np.uint8
        assert array.ndim == 1
        assert array.flags.c_contiguous
        self.array = array
        self.address: int = array.ctypes.data
        self.origin: NDArray[np.uint64] = np.array([self.address, 0], np.uint64)
        self.view = array.data

    @classmethod
    def of_size(cls, length_bytes: int) -> Staging:
        """Allocate a zeroed staging buffer."""
        return cls(np.zeros(length_bytes, np.uint8))


class ByteView(Protocol):
    """Bytes by position: what copies use of a memoryview."""

    def __getitem__(self, where: slice, /) -> bytes | memoryview:
        """Return bytes."""
        ...

    def __setitem__(self, where: slice, data: bytes | memoryview, /) -> None:
        """Change bytes, to as many others."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...


class ByteMemory(Protocol):
    """Memory that is reached by position, wherever its bytes lie: `Staging`, where they lie in one piece."""

    @property
    def view(self) -> ByteView:
        """The bytes."""
        ...


class Reason(Enum):
    """Why memory cannot be accessed."""

    NO_ACCESS = "no mapping, or no permission"
    OWNER_GONE = "the process has exited"
    LOST = "its copy in swap is damaged or cannot be read"
    NO_ROOM = "the residency budget is too small for it"
    SWAP_FULL = "the swap file is full"
    BUSY = "its memory keeps changing; trying again later may help"


@dataclass(frozen=True, slots=True)
class Absent:
    """Pages of a range that are not present now.

    Attributes:
        n_pages: how many pages of 4096 bytes.
        slow: bringing them may wait for a medium (swap, or a file that is not cached), or for a program.
        held: some of them a program may hold back as long as it likes; then they are slow, too.
    """

    n_pages: int
    slow: bool
    held: bool = False


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Outcome of making pages present.

    Attributes:
        bytes_done: bytes from the start of the range that are accessible.
        first_bad: the first address that is not, or None.
        reason: why, when `first_bad` is set.
    """

    bytes_done: int
    first_bad: int | None = None
    reason: Reason | None = None


class AddressSpace(Protocol):
    """A process's memory by its own virtual addresses.

    Every copy returns the number of bytes moved. Short means the byte at that position cannot be accessed
    (no mapping, no permission, or the owner is gone: `gone` tells); everything before it was moved, nothing
    after it was touched.
    """

    @property
    def gone(self) -> bool:
        """True once the process is known to have exited; never False again."""
        ...

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy process memory into staging at offset; may wait for absent pages."""
        ...

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy staging at offset into process memory; may wait for absent pages."""
        ...

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy process ranges into staging ranges, both in order, totals equal."""
        ...

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy staging ranges into process ranges, both in order, totals equal."""
        ...

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """Say which pages of [start, end) are not present; None if all are. Never faults, never waits.

        Args:
            write: count those that a write must fault for first, where it does not do so itself.
        """
        ...

    def read_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy a short range that is present to staging; False: it is not, or not all of it can be read.

        It is `absent` and `read` in one step, for where each costs more than the copy. Requires: `length` > 0.
        """
        ...

    def write_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy staging to a short range that is present; False: it is not, or not all of it can be written."""
        ...

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Make the pages of [start, end) present. Waits: call it only where waiting hurts nobody."""
        ...

    def close(self) -> None:
        """Let go of everything held for this space. Twice is fine."""
        ...


class LooksThenCopies(ABC):
    """The part of an `AddressSpace` that looks and copies in one step, where there is no quicker way."""

    def read_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy a short range that is present to staging; see `AddressSpace`."""
        if self.absent(address, address + length) is not None:
            return False
        return self.read(address, length, staging, offset) == length

    def write_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy staging to a short range that is present; see `AddressSpace`."""
        if self.absent(address, address + length, write=True) is not None:
            return False
        return self.write(address, length, staging, offset) == length

    @abstractmethod
    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """See `AddressSpace`."""

    @abstractmethod
    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """See `AddressSpace`."""

    @abstractmethod
    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """See `AddressSpace`."""
