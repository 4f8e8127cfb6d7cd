"""Queue pairs: posting work, and the way from RESET to RTS."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from nopin.control.messages import CreateQp, DestroyQp, ModifyQp, QpAttributes, QpCreated, QueryQp
from nopin.errors import ServerGone, UsageError
from nopin.linux import memfd
from nopin.nic.abi import Access, QpState, SendFlags, WrOpcode
from nopin.nic.attributes import RD_ATOMIC_MAX, AddressVector, QpAttr, QpCaps
from nopin.nic.rings import WorkProducer
from nopin.verbs.access import AccessLike, parse_access
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.objects import DeviceObject
from nopin.verbs.wr import RecvWr, SendWr, encode_array, encode_recv, encode_send

if TYPE_CHECKING:
    from nopin.verbs.pd import ProtectionDomain

REMOTE_ALL = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC


@dataclass(frozen=True, slots=True)
class QpEndpoint:
    """What the other side needs to know of a queue pair.

    Attributes:
        gid: 16 bytes; IPv4 a.b.c.d is ::ffff:a.b.c.d.
        port: UDP port.
        psn: the first packet sequence number this side sends.
        foreign: not nopin; packets then go one by one.
    """

    gid: bytes
    port: int
    qpn: int
    psn: int
    foreign: bool = False


def _require_together(pd: ProtectionDomain, *cqs: CompletionQueue) -> None:
    """Check that objects which are to work together are of one device, and of one server.

    Raises:
        UsageError: one of them is of another device.
        ServerGone: one of them is of a server that was replaced.
    """
    if any(cq.device is not pd.device for cq in cqs):
        raise UsageError("the completion queue is of another Device than the protection domain; make it on the same")
    if any(cq.session is not pd.session for cq in cqs):
        raise ServerGone("the server of this protection domain or completion queue went away; make them anew")


class QueuePair(DeviceObject):
    """A reliable-connection queue pair.

    Attributes:
        qpn: its number.
        caps: as granted.
        endpoint: give it to the other side.
    """

    def __init__(
        self,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        caps: QpCaps,
        *,
        sq_sig_all: bool = False,
    ) -> None:
        for parent in (pd, send_cq, recv_cq):
            parent._require_open()
        self.pd, self.send_cq, self.recv_cq = pd, send_cq, recv_cq
        self.session = pd.session
        _require_together(pd, send_cq, recv_cq)
        request = CreateQp(
            seq=0, pd=pd.handle, send_cq=send_cq.handle, recv_cq=recv_cq.handle, caps=caps, sq_sig_all=sq_sig_all
        )
        made, (fd,) = self.session.request(request, QpCreated)
        self.qpn = made.qpn
        try:
            memory = memfd.map_array(fd, made.n_bytes)
        except BaseException:  # this process is out of memory
            self._end()
            raise
        finally:
            os.close(fd)
        self.caps = made.caps
        self.send_ring = WorkProducer(memory[: made.recv_offset], made.caps.max_send_wr, made.send_stride)
        self.recv_ring = WorkProducer(memory[made.recv_offset :], made.caps.max_recv_wr, made.recv_stride)
        self._send_stride = made.send_stride
        welcome = self.session.welcome
        self.endpoint = QpEndpoint(welcome.gid, welcome.port, made.qpn, secrets.randbits(24))
        super().__init__(pd, send_cq, recv_cq)

    def _described(self) -> str:
        return f"{self.qpn:#x}"

    @property
    def state(self) -> QpState:
        """The state the server has it in now."""
        return QpState(self.query().state or 0)

    def connect(
        self,
        remote: QpEndpoint,
        *,
        path_mtu: int | None = None,
        timeout: int = 14,
        retry_cnt: int = 7,
        rnr_retry: int = 7,
        min_rnr_timer: int = 12,
        max_rd_atomic: int = RD_ATOMIC_MAX,
        access: AccessLike = REMOTE_ALL,
    ) -> None:
        """Go from RESET to RTS in one call; the other side does the same with our `endpoint`.

        Args:
            path_mtu: bytes; the server's largest unless given. Both sides must use the same.
            timeout: acknowledgement timer, 4.096 us * 2**timeout; 0 waits for ever.
            retry_cnt: how often unacknowledged packets are sent again, 0 ... 7.
            rnr_retry: how often a not-ready receiver is tried again; 7 is for ever.
            min_rnr_timer: code of the pause we ask for when we are not ready.
            max_rd_atomic: READs and atomics under way at once, in each direction; cards take 16.
            access: what the other side may do through this queue pair: `Access` flags, or letters r, w, a.

        Raises:
            UsageError: an unknown letter.
            ServerRefused: an attribute is impossible, or the queue pair is not in RESET.
        """
        mtu = path_mtu or self.session.welcome.mtu
        av = AddressVector(gid=remote.gid, port=remote.port, foreign=remote.foreign)
        self.modify(QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=int(parse_access(access))))
        self.modify(
            QpAttr(
                state=QpState.RTR,
                av=av,
                path_mtu=mtu,
                dest_qpn=remote.qpn,
                rq_psn=remote.psn,
                max_dest_rd_atomic=max_rd_atomic,
                min_rnr_timer=min_rnr_timer,
            )
        )
        self.modify(
            QpAttr(
                state=QpState.RTS,
                sq_psn=self.endpoint.psn,
                timeout=timeout,
                retry_cnt=retry_cnt,
                rnr_retry=rnr_retry,
                max_rd_atomic=max_rd_atomic,
            )
        )

    def modify(self, attr: QpAttr) -> None:
        """Change attributes or state.

        Raises:
            ServerRefused: EINVAL, the change is not legal; nothing was changed.
        """
        self._require_open()
        self.session.tell(ModifyQp(seq=0, qpn=self.qpn, attr=attr))

    def query(self) -> QpAttr:
        """Return all attributes."""
        self._require_open()
        return self.session.request(QueryQp(seq=0, qpn=self.qpn), QpAttributes)[0].attr

    def post_send(self, wrs: SendWr | Sequence[SendWr]) -> None:
        """Post send work, all or nothing.

        Raises:
            UsageError: a request does not fit this queue pair's capacities.
            QueueFull: not enough free entries (ENOMEM in verbs).
        """
        if self._why_closed:
            raise self._closed_error()
        caps = self.caps
        if isinstance(wrs, SendWr):
            wrs = (wrs,)
        self.send_ring.post([encode_send(wr, max_sge=caps.max_send_sge, max_inline=caps.max_inline) for wr in wrs])
        self.session.ring_doorbell(self.send_ring)

    def post_send_array(
        self,
        n: int,
        *,
        opcode: WrOpcode,
        local_address: ArrayLike,
        length: ArrayLike,
        lkey: int,
        remote_address: ArrayLike,
        rkey: int,
        wr_id: ArrayLike = 0,
        flags: ArrayLike = SendFlags.SIGNALED,
    ) -> None:
        """Post n one-sided or SEND requests of one scatter entry each, encoded by numpy, all or nothing.

        Args:
            n: how many; each array has shape (n,), or is one number for all.
            local_address: where the bytes come from, or go to.
            length: bytes of each.
            flags: SendFlags of each: signal few of many, completions cost as much as small requests.

        Raises:
            UsageError: a number does not fit, the opcode is not possible here, or no scatter entry fits.
            QueueFull: not enough free entries.
        """
        if self._why_closed:
            raise self._closed_error()
        if opcode not in (WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.SEND):
            raise UsageError(f"post_send_array posts READs, WRITEs and SENDs, not {WrOpcode(opcode).name}")
        if not self.caps.max_send_sge:
            raise UsageError("this queue pair takes no scatter entry (QpCaps.max_send_sge is 0)")
        entries = encode_array(
            n,
            self._send_stride,
            opcode=opcode,
            wr_id=wr_id,
            flags=flags,
            remote_address=remote_address,
            rkey=rkey,
            local_address=local_address,
            length=length,
            lkey=lkey,
        )
        self.send_ring.post_array(entries)
        self.session.ring_doorbell(self.send_ring)

    def post_encoded(self, entry: bytes) -> None:
        """Post one send entry that is encoded already (verbs.wr): the shortest way there is.

        Raises:
            QueueFull: no free entry.
        """
        if self._why_closed:
            raise self._closed_error()
        self.send_ring.post((entry,))
        self.session.ring_doorbell(self.send_ring)

    def post_recv(self, wrs: RecvWr | Sequence[RecvWr]) -> None:
        """Post receives, all or nothing. Raises as `post_send`."""
        if self._why_closed:
            raise self._closed_error()
        if isinstance(wrs, RecvWr):
            wrs = (wrs,)
        self.recv_ring.post([encode_recv(wr, max_sge=self.caps.max_recv_sge) for wr in wrs])
        self.session.ring_doorbell(self.recv_ring)

    def _end(self) -> None:
        self.session.tell(DestroyQp(seq=0, qpn=self.qpn))
