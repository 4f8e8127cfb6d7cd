"""Protection domains: which queue pairs may use which regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.control.messages import AllocPd, DeallocPd, Handle
from nopin.nic.abi import Discipline
from nopin.nic.attributes import QpCaps
from nopin.verbs.access import AccessLike, parse_access, parse_discipline
from nopin.verbs.buffers import memory_of
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.objects import DeviceObject
from nopin.verbs.qp import QueuePair
from nopin.verbs.region import MemoryRegion

if TYPE_CHECKING:
    from nopin.verbs.device import Device
    from nopin.verbs.session import Session


class ProtectionDomain(DeviceObject):
    """A protection domain; queue pairs use only regions of their own.

    Attributes:
        session: with the server that has it.
    """

    def __init__(self, device: Device) -> None:
        device._require_open()
        session = device.session
        reply, _ = session.request(AllocPd(seq=0), Handle)
        self._begin(device, session, reply.handle)

    @classmethod
    def known(cls, device: Device, session: Session, handle: int) -> ProtectionDomain:
        """Return a protection domain that a server has already."""
        found = cls.__new__(cls)
        found._begin(device, session, handle)
        return found

    def _begin(self, device: Device, session: Session, handle: int) -> None:
        self.device, self.session, self.handle = device, session, handle
        super().__init__(device)

    def register(
        self,
        what: object = None,
        length: int | None = None,
        *,
        access: AccessLike,
        discipline: Discipline | str = "on-demand",
        iova: int | None = None,
    ) -> MemoryRegion:
        """Register memory of this process.

        Args:
            what: a numpy array or another object with the buffer protocol; an address, with `length`; nothing
                for the whole process by its own addresses (implicit).
            length: bytes, for an address.
            access: `Access` flags, or letters r, w, a (remote) and l (local write).
            discipline: "on-demand", "short-term" or "pinned".
            iova: what peers call the first byte; its address unless given.

        Raises:
            UsageError: no such memory, or writing into a read-only buffer.
            ServerRefused: the server refused, or the memory cannot be pinned.
        """
        memory = memory_of(what, length)
        return MemoryRegion(self, memory, parse_access(access), parse_discipline(discipline), iova)

    def create_qp(
        self,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue | None = None,
        *,
        caps: QpCaps | None = None,
        sq_sig_all: bool = False,
    ) -> QueuePair:
        """Make an RC queue pair; `recv_cq` is `send_cq` unless given. Capacities are rounded up.

        Raises:
            ServerRefused: a limit is reached or a capacity is impossible.
        """
        return QueuePair(self, send_cq, recv_cq or send_cq, caps or QpCaps(), sq_sig_all=sq_sig_all)

    def _described(self) -> str:
        return str(self.handle)

    def _end(self) -> None:
        self.session.tell(DeallocPd(seq=0, pd=self.handle))
