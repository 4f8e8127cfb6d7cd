"""Memory regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.control.messages import Deregister, ReclaimedShare, Register, Registered
from nopin.errors import UsageError
from nopin.linux.io_uring import PinnedBuffer
from nopin.nic.abi import Access, Discipline
from nopin.verbs.access import WRITING
from nopin.verbs.buffers import Memory
from nopin.verbs.objects import DeviceObject
from nopin.verbs.pinned import pin
from nopin.verbs.prefetch import Prefetch, start_prefetch

if TYPE_CHECKING:
    from nopin.verbs.pd import ProtectionDomain


class MemoryRegion(DeviceObject):
    """Registered memory of this process.

    It stays registered, and the object that exports it stays alive, until closed: dropping the region does
    not end it.

    Attributes:
        lkey: names it in scatter entries; `rkey` names it to peers.
        address: of its first byte; 0 for the implicit region.
        length: bytes; None for the implicit region, the whole process.
        iova: what peers call its first byte.
        access: its rights; `discipline`: how its pages are held.
        watched: munmap, mremap, madvise and fork of this range arrive as events.
    """

    def __init__(
        self, pd: ProtectionDomain, memory: Memory, access: Access, discipline: Discipline, iova: int | None
    ) -> None:
        pd._require_open()
        if memory.read_only and access & WRITING:
            raise UsageError('this buffer is read-only; share it with access="r", or make a writable copy')
        if memory.length is None and discipline is Discipline.PINNED:
            raise UsageError("the whole process cannot be pinned; name a buffer")
        self.pd, self.session = pd, pd.session
        self.address = memory.address
        self.length = memory.length
        self.iova = memory.address if iova is None else iova
        self.access = access
        self.discipline = discipline
        self._memory: Memory | None = memory
        self._pin: PinnedBuffer | None = None
        if discipline is Discipline.PINNED and memory.length is not None:
            self._pin = pin(memory.address, memory.length)
        try:
            reply = self._register()
        except BaseException:
            self._let_go()
            raise
        self.handle, self.lkey, self.rkey, self.watched = reply.mr, reply.lkey, reply.rkey, reply.watched
        super().__init__(pd)
        pd.device._hold(self)

    def _described(self) -> str:
        size = "whole process" if self.length is None else f"{self.length} bytes"
        return f"{self.address:#x} {size} lkey={self.lkey:#x} rkey={self.rkey:#x}"

    def _register(self) -> Registered:
        request = Register(
            seq=0,
            pd=self.pd.handle,
            address=self.address,
            length=self.length,
            iova=self.iova,
            access=int(self.access),
            discipline=int(self.discipline),
            ring_fd=self._pin.fd if self._pin is not None else None,
        )
        return self.session.request(request, Registered)[0]

    def _resume(self, pd: ProtectionDomain, told: ReclaimedShare) -> None:
        """Be the region that a new server has for the same memory."""
        self.pd, self.session = pd, pd.session
        self.handle, self.lkey, self.rkey, self.watched = told.mr, told.lkey, told.rkey, told.watched
        self._move_to(pd)

    def _end(self) -> None:
        self.session.tell(Deregister(seq=0, mr=self.handle))

    def _let_go(self) -> None:
        self._memory = None
        if self._pin is not None:
            self._pin.close()
            self._pin = None

    def prefetch(self, key: object = ..., *, write: bool = False) -> Prefetch:
        """Start making bytes of the region resident, for managed memory; `key` is a slice of bytes.

        Returns and raises as `Device.prefetch`.
        """
        self._require_open()
        length = 0 if self.length is None else self.length
        return start_prefetch(self.pd.device, key, self.address, (length,), (1,), 1, write=write)

    def close(self) -> None:
        """Deregister: no access is under way in it when this returns, and its memory may be freed."""
        super().close()
        self.pd.device._release(self)
