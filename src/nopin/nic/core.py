"""What all parts of the NIC share, and the ways a queue pair's work ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.iommu import Iommu
from nopin.iommu.relay import nobody_waits
from nopin.mm.space import Staging
from nopin.nic.abi import AsyncEventType, Discipline, QpState, SendFlags, WcFlags, WcOpcode, WcStatus
from nopin.nic.attention import Attention
from nopin.nic.counters import Counters
from nopin.nic.cq import Cq
from nopin.nic.errors import RingCorrupt
from nopin.nic.events import AsyncEvent
from nopin.nic.mr import Region, RegionTable
from nopin.nic.plan import Plan
from nopin.nic.qp import QueuePair, ReceiveSide, SendSide
from nopin.nic.rings import WorkConsumer
from nopin.nic.wire.batch import Endpoint
from nopin.nic.work import WC_OPCODE, RecvWork, SendWork, decode_recv, decode_send

Waiter = tuple[int, str]

_SIGNALED = int(SendFlags.SIGNALED)
_PINNED = Discipline.PINNED
_SUCCESS = WcStatus.SUCCESS
_RTS = QpState.RTS
_NO_FLAGS = WcFlags.NONE


@dataclass(slots=True)
class Core:
    """The device's tables and outboxes.

    Attributes:
        attention: whose rings are looked at.
        ready: queue pairs that may have something to send, in the order they will be served.
        dirty: completion queues that got something since notices were last taken.
        plan: the one place where outgoing packets are built; a batch is sent before the next is begun.
        runner_waits: tells whether the device's runner has something else to do.
    """

    iommu: Iommu
    regions: RegionTable
    endpoint: Endpoint
    counters: Counters = field(default_factory=Counters)
    qps: dict[int, QueuePair] = field(default_factory=dict)
    attention: Attention = field(default_factory=Attention)
    ready: dict[QueuePair, None] = field(default_factory=dict)
    dirty: dict[Cq, None] = field(default_factory=dict)
    events: list[AsyncEvent] = field(default_factory=list)
    corrupt: list[QueuePair | Cq] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    scratch: Staging = field(default_factory=lambda: Staging.of_size(64))
    runner_waits: Callable[[], bool] = nobody_waits

    def event(self, kind: AsyncEventType, target: QueuePair | Cq) -> None:
        """Tell the owner of an object that something happened to it."""
        self.events.append(AsyncEvent(kind, target))


def waiter_for(region: Region, waiter: Waiter | None) -> Waiter | None:
    """Return who waits when a page of the region is out: nobody if it is pinned, where none ever is."""
    return None if region.discipline is _PINNED else waiter


def others_wait(core: Core, qp: QueuePair) -> bool:
    """Tell whether anybody but this queue pair wants the device."""
    if core.ready or core.runner_waits():
        return True
    attended = core.attention.queue_pairs
    return any(other.send_ring.has_work for other in attended if other is not qp and other.state is _RTS)


def available(core: Core, qp: QueuePair, ring: WorkConsumer) -> int:
    """Entries waiting in a ring; a corrupt one fails the queue pair and counts as empty."""
    try:
        return ring.available
    except RingCorrupt:
        core.corrupt.append(qp)
        fail(core, qp)
        return 0


def take_send(core: Core, qp: QueuePair) -> SendWork:
    """Take the oldest posted send. Requires: `available` was positive."""
    caps = qp.caps
    return decode_send(qp.send_ring.take(), core.regions, qp.pd, caps.max_send_sge, caps.max_inline)


def take_recv(core: Core, qp: QueuePair) -> RecvWork | None:
    """Take the oldest posted receive; None if there is none."""
    side = qp.recv
    if side.next_recv is not None:
        recv, side.next_recv = side.next_recv, None
        return recv
    if available(core, qp, qp.recv_ring) <= 0:
        return None
    return decode_recv(qp.recv_ring.take(), core.regions, qp.pd, qp.caps.max_recv_sge)


def _push(
    core: Core,
    qp: QueuePair,
    cq: Cq,
    wr_id: int,
    status: WcStatus,
    opcode: WcOpcode,
    byte_len: int,
    *,
    imm: int = 0,
    src_qp: int = 0,
    flags: WcFlags = _NO_FLAGS,
    solicited: bool = False,
) -> None:
    if cq.broken:
        return
    try:
        pushed = cq.ring.push(wr_id, status, opcode, byte_len, imm, qp.qpn, src_qp, flags, solicited=solicited)
    except RingCorrupt:
        cq.broken = True
        core.corrupt.append(cq)
        return
    core.dirty[cq] = None
    if not pushed:
        cq.broken = True
        core.counters.cq_overrun += 1
        core.event(AsyncEventType.CQ_ERR, cq)


def send_done(core: Core, qp: QueuePair, work: SendWork, status: WcStatus) -> None:
    """Retire the oldest send work: give its slot back, complete it if it asked or failed."""
    qp.send_ring.release()
    if status or qp.sq_sig_all or work.flags & _SIGNALED:
        _push(core, qp, qp.send_cq, work.wr_id, status, WC_OPCODE[work.opcode], 0 if status else work.length)


def posted_done(core: Core, qp: QueuePair, wr_id: int, opcode: int, flags: int, length: int) -> None:
    """Retire the next work of the send ring, which succeeded before it was even taken; nothing is older."""
    qp.send_ring.finish()
    if flags & _SIGNALED or qp.sq_sig_all:
        _push(core, qp, qp.send_cq, wr_id, _SUCCESS, WC_OPCODE[opcode], length)


def sends_done(core: Core, qp: QueuePair, posts: NDArray[np.void], opcode: int) -> None:
    """Retire the oldest works, all of one kind, which succeeded: (n,) ring entries of `abi.one_sge_dtype`."""
    qp.send_ring.release(len(posts))
    asked = posts if qp.sq_sig_all else posts[(posts["flags"] & _SIGNALED) != 0]
    for wr_id, byte_len in zip(asked["wr_id"].tolist(), asked["local_length"].tolist(), strict=True):
        _push(core, qp, qp.send_cq, wr_id, _SUCCESS, WC_OPCODE[opcode], byte_len)


def recv_done(
    core: Core,
    qp: QueuePair,
    recv: RecvWork,
    status: WcStatus,
    *,
    opcode: WcOpcode = WcOpcode.RECV,
    byte_len: int = 0,
    imm: int = 0,
    flags: WcFlags = WcFlags.NONE,
    solicited: bool = False,
) -> None:
    """Retire the oldest receive work and complete it."""
    qp.recv_ring.release()
    _push(
        core,
        qp,
        qp.recv_cq,
        recv.wr_id,
        status,
        opcode,
        byte_len,
        imm=imm,
        src_qp=qp.attr.dest_qpn or 0,
        flags=flags,
        solicited=solicited,
    )


def fail(core: Core, qp: QueuePair) -> None:
    """Move a queue pair to ERR and flush everything it had; replies already queued still go out."""
    if qp.state is QpState.ERR:
        return
    qp.state = QpState.ERR
    _forget_waits(core, qp)
    qp.send.deadline = qp.send.wait_until = None
    qp.send.held.clear()
    qp.send.n_held = 0
    qp.recv.held.clear()
    qp.recv.n_held = 0
    qp.recv.parked_at = None
    flush(core, qp)
    core.attention.attend(qp)  # what is posted later is flushed, too
    core.ready[qp] = None  # for the replies


def flush(core: Core, qp: QueuePair) -> None:
    """Complete all queued work of a queue pair in ERR with WR_FLUSH_ERR, also what is posted later."""
    side = qp.send
    works = side.unroll()
    while works:
        send_done(core, qp, works.popleft(), WcStatus.WR_FLUSH_ERR)
    side.halted = None
    inbound, qp.recv.inbound = qp.recv.inbound, None
    if inbound is not None and inbound.recv is not None:
        recv_done(core, qp, inbound.recv, WcStatus.WR_FLUSH_ERR)
    _flush_rings(core, qp)


def _flush_rings(core: Core, qp: QueuePair) -> None:
    for _ in range(available(core, qp, qp.send_ring)):
        send_done(core, qp, take_send(core, qp), WcStatus.WR_FLUSH_ERR)
    while (recv := take_recv(core, qp)) is not None:
        recv_done(core, qp, recv, WcStatus.WR_FLUSH_ERR)


def reset(core: Core, qp: QueuePair) -> None:
    """Return a queue pair to RESET: work is forgotten without completions (ib_modify_qp to RESET)."""
    _forget_waits(core, qp)
    core.attention.forget(qp)
    core.ready.pop(qp, None)
    qp.send = SendSide()
    qp.recv = ReceiveSide()
    qp.path = None
    qp.direct = False
    qp.established = False
    qp.state = QpState.RESET
    for ring in (qp.send_ring, qp.recv_ring):
        try:
            ring.discard()
        except RingCorrupt:
            core.corrupt.append(qp)


def _forget_waits(core: Core, qp: QueuePair) -> None:
    for waiter in (qp.requester_waiter, qp.responder_waiter, qp.direct_waiter, qp.stream_waiter):
        core.iommu.forget(waiter)
    qp.send.parked = ""
    qp.recv.stream_parked_at = None
