"""The memory of a modelled process by PASID: translated by the process's own page table, at each access.

What hardware does that shares page tables (SVA, CAPI). The device keeps nothing between two accesses, so there is
nothing to invalidate; copies take one step. A page that is absent, or that a write finds shared, is a page request,
which `resolve` answers. The table's own bits note what devices used and wrote.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.space import Absent, FaultResult, IoVec, LooksThenCopies, Reason, Staging
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Procedure
from nopin.model.host.fault import fault_pages, lookup
from nopin.model.host.process import Process
from nopin.model.host.table import Present
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

Move = Callable[[int, int, int], None]
"""Moves bytes of one page: (frame, first byte in it, length)."""


class WalkedSpace(LooksThenCopies):
    """See above; an `AddressSpace`.

    Args:
        device: by name, for the observer.
    """

    def __init__(self, process: Process, device: str, observer: DeviceObserver) -> None:
        self._process = process
        self._device = device
        self._observer = observer
        self._hopeless: set[tuple[int, bool]] = set()  # pages (and write) whose faults failed, until the next access

    @property
    def gone(self) -> bool:
        """True once the process has exited."""
        return not self._process.alive

    # Accesses

    def read(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy process memory into staging; see `AddressSpace`."""
        done = 0
        for va, entry, at, n in self._walk(address, length, write=False):
            data = self._process.host.frames.read(entry.frame, at, n)
            staging.view[offset + done : offset + done + n] = data
            self._observer.device_read(self._device, self._process, va, entry.frame, data)
            done += n
        return done

    def write(self, address: int, length: int, staging: Staging, offset: int) -> int:
        """Copy staging into process memory; see `AddressSpace`."""
        done = 0
        for va, entry, at, n in self._walk(address, length, write=True):
            data = bytes(staging.view[offset + done : offset + done + n])
            self._process.host.frames.write(entry.frame, at, data)
            self._observer.device_wrote(self._device, self._process, va, entry.frame, data)
            done += n
        return done

    def read_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Copy a short range that is present; that a fault of its failed is for the access to find that waited."""
        return self._all_usable(address, length, write=False) and super().read_present(address, length, staging, offset)

    def write_present(self, address: int, length: int, staging: Staging, offset: int) -> bool:
        """Do the same the other way."""
        return self._all_usable(address, length, write=True) and super().write_present(address, length, staging, offset)

    def read_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy process ranges into staging ranges; see `AddressSpace`."""
        return _in_pieces(self.read, remote, staging, local)

    def write_v(self, remote: IoVec, staging: Staging, local: IoVec) -> int:
        """Copy staging ranges into process ranges; see `AddressSpace`."""
        return _in_pieces(self.write, remote, staging, local)

    def absent(self, start: int, end: int, *, write: bool = False) -> Absent | None:
        """Count pages that the table does not let the device access so; faults take time, so all are slow."""
        if start >= end or self.gone:
            return None
        pages = range(start >> PAGE_SHIFT, (end - 1 >> PAGE_SHIFT) + 1)
        n_absent = sum(self._may_come(page, write=write) for page in pages)
        return Absent(n_absent, slow=True, held=True) if n_absent else None

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        """Not here: a fault is a procedure, `resolve`."""
        raise AssertionError("faults of a modelled process take time")

    def close(self) -> None:
        """Nothing is held."""

    # Faults

    def resolve(self, pages: PageRun, write: bool) -> Procedure[FaultPages]:
        """Bring pages; what cannot be had the next access will find."""
        came = yield from fault_pages(self._process, pages.first, pages.n, write=write)
        if came.reason not in (None, Reason.BUSY):
            self._hopeless.add((pages.first + came.n_done, write))
        return came

    def _may_come(self, page: int, *, write: bool) -> bool:
        """Tell whether an access has to wait for a page, and for good reason."""
        if self._usable(page, write=write) is not None or (page, write) in self._hopeless:
            return False
        vma = self._process.vmas.find(page)
        return vma is not None and vma.allows(write=write)

    def _all_usable(self, address: int, length: int, *, write: bool) -> bool:
        pages = range(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1)
        return all(self._usable(page, write=write) is not None for page in pages)

    def _usable(self, page: int, *, write: bool) -> Present | None:
        entry = lookup(self._process, page)
        return entry if entry is not None and (entry.writable or not write) else None

    def _walk(self, address: int, length: int, *, write: bool) -> list[tuple[int, Present, int, int]]:
        """Translate page by page, as far as that goes: (address, entry, first byte in the page, length)."""
        found: list[tuple[int, Present, int, int]] = []
        end = address + length
        while address < end:
            page, at = address >> PAGE_SHIFT, address & PAGE_MASK
            entry = self._usable(page, write=write)
            if entry is None:
                self._hopeless.discard((page, write))
                break
            entry.young = True
            entry.dirty = entry.dirty or write
            n = min(PAGE_BYTES - at, end - address)
            found.append((address, entry, at, n))
            address += n
        return found


def _in_pieces(copy: Callable[[int, int, Staging, int], int], remote: IoVec, staging: Staging, local: IoVec) -> int:
    """Copy what two lists have in common, piece after piece; returns bytes done."""
    targets = iter(local.tolist())
    at = room = done = 0
    for address, length in remote.tolist():
        copied = 0
        while copied < length:
            while not room:
                at, room = next(targets)
            step = min(length - copied, room)
            n = copy(address + copied, step, staging, at)
            done += n
            if n < step:
                return done
            copied, at, room = copied + step, at + step, room - step
    return done
