"""A queue pair as a client drives it, without sockets and processes: rings in memory, posts, polls.

Client and device are one thread here, so nothing needs a fence. Whoever runs the NIC looks at the rings, or is rung.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import numpy as np

from nopin.nic.abi import (
    CQE_BYTES,
    WQE_HEADER_BYTES,
    Access,
    QpState,
    SendFlags,
    WcStatus,
    WrOpcode,
    ring_bytes,
    wqe_stride,
)
from nopin.nic.attributes import AddressVector, QpAttr, QpCaps
from nopin.nic.mr import Pd
from nopin.nic.nic import Nic
from nopin.nic.qp import QueuePair
from nopin.nic.rings import CompletionConsumer, CompletionProducer, WorkConsumer, WorkProducer
from nopin.nic.wire.batch import Endpoint

ALL_RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC

Sge = tuple[int, int, int]
"""Address, length, lkey."""


class SendOptions(TypedDict, total=False):
    """What else a send may say, names and defaults as those of `send_entry`."""

    wr_id: int
    flags: int
    remote: int
    rkey: int
    imm: int
    compare_add: int
    swap: int
    inline: bytes | None


def no_fence() -> None:
    """Both ends of a ring are one thread here."""


def no_bell() -> None:
    """Whoever runs the NIC looks by itself."""


def send_entry(
    opcode: WrOpcode,
    sges: Sequence[Sge],
    *,
    wr_id: int = 0,
    flags: int = SendFlags.SIGNALED,
    remote: int = 0,
    rkey: int = 0,
    imm: int = 0,
    compare_add: int = 0,
    swap: int = 0,
    inline: bytes | None = None,
) -> bytes:
    """Encode a send ring entry."""
    n_inline = 0 if inline is None else len(inline)
    if inline is not None:
        flags |= SendFlags.INLINE
    header = struct.pack("<QBBHIQIIQQ", wr_id, opcode, flags, len(sges), imm, remote, rkey, n_inline, compare_add, swap)
    body = b"".join(struct.pack("<QII", *sge) for sge in sges) if inline is None else inline
    return header.ljust(WQE_HEADER_BYTES, b"\0") + body


def recv_entry(sges: Sequence[Sge], *, wr_id: int = 0) -> bytes:
    """Encode a receive ring entry."""
    return send_entry(WrOpcode.SEND, sges, wr_id=wr_id, flags=0)


@dataclass
class Client:
    """A queue pair and the client's ends of its rings; sends and receives complete on one queue.

    Attributes:
        ring: called when a send has been posted, for a device that does not look by itself.
    """

    nic: Nic
    qp: QueuePair
    sends: WorkProducer
    recvs: WorkProducer
    completions: CompletionConsumer
    ring: Callable[[], None] = field(default=no_bell, kw_only=True)

    def post_send(
        self,
        opcode: WrOpcode,
        sges: Sequence[Sge],
        *,
        wr_id: int = 0,
        remote: int = 0,
        rkey: int = 0,
        compare_add: int = 0,
    ) -> None:
        """Post a send; `compare_add` is what a FETCH_ADD adds.

        Raises:
            QueueFull: no entry is free.
        """
        entry = send_entry(opcode, sges, wr_id=wr_id, remote=remote, rkey=rkey, compare_add=compare_add)
        self.sends.post([entry])
        self.ring()

    def post_receive(self, sges: Sequence[Sge], *, wr_id: int = 0) -> None:
        """Post a receive.

        Raises:
            QueueFull: no entry is free.
        """
        self.recvs.post([recv_entry(sges, wr_id=wr_id)])

    def poll(self) -> list[tuple[int, WcStatus]]:
        """Take completions as (wr_id, status)."""
        return [(int(c["wr_id"]), WcStatus(int(c["status"]))) for c in self.completions.poll(1024)]


def make_client(nic: Nic, pd: Pd, *, depth: int = 256, max_inline: int = 256) -> Client:
    """Make a queue pair in RESET, its rings and its completion queue.

    Args:
        depth: of both work rings, a power of two.
    """
    caps = QpCaps(max_send_wr=depth, max_recv_wr=depth, max_inline=max_inline)
    stride = wqe_stride(caps.max_send_sge, caps.max_inline)
    sends, recvs = (np.zeros(ring_bytes(depth, stride), np.uint8) for _ in range(2))
    cq_memory = np.zeros(ring_bytes(4 * depth, CQE_BYTES), np.uint8)
    cq = nic.create_cq(CompletionProducer(cq_memory, 4 * depth, no_fence))
    rings = WorkConsumer(sends, depth, stride), WorkConsumer(recvs, depth, stride)
    return Client(
        nic=nic,
        qp=nic.create_qp(pd, cq, cq, *rings, caps, False),
        sends=WorkProducer(sends, depth, stride),
        recvs=WorkProducer(recvs, depth, stride),
        completions=CompletionConsumer(cq_memory, 4 * depth, no_fence),
    )


class ConnectOptions(TypedDict, total=False):
    """What both ends of a connection agree on, names and defaults as those of `bring_up`."""

    mtu: int
    now: int
    rnr_retry: int
    retry_cnt: int
    timeout: int
    psn: int
    access: Access
    min_rnr_timer: int
    max_rd_atomic: int


def connect(a: Client, b: Client, **options: Unpack[ConnectOptions]) -> None:
    """Bring both ends to RTS; PSNs start just before the wrap."""
    for us, them in ((a, b), (b, a)):
        bring_up(us, them.nic.endpoint, them.qp.qpn, **options)


def bring_up(
    client: Client,
    peer: Endpoint,
    qpn: int,
    *,
    mtu: int = 1024,
    now: int = 0,
    rnr_retry: int = 7,
    retry_cnt: int = 7,
    timeout: int = 14,
    psn: int = 0xFFFFF0,
    access: Access = ALL_RIGHTS,
    min_rnr_timer: int = 12,
    max_rd_atomic: int = 4,
) -> None:
    """Bring one end to RTS, with a queue pair of that number for its peer; both ends begin at one PSN."""
    init = QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=int(access))
    rtr = QpAttr(
        state=QpState.RTR,
        av=AddressVector(gid=peer.gid, port=peer.port),
        path_mtu=mtu,
        dest_qpn=qpn,
        rq_psn=psn,
        max_dest_rd_atomic=max_rd_atomic,
        min_rnr_timer=min_rnr_timer,
    )
    rts = QpAttr(
        state=QpState.RTS,
        timeout=timeout,
        retry_cnt=retry_cnt,
        rnr_retry=rnr_retry,
        sq_psn=psn,
        max_rd_atomic=max_rd_atomic,
    )
    for attr in (init, rtr, rts):
        client.nic.modify_qp(client.qp, attr, now)
