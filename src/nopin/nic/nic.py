"""The NIC: objects, the way of packets in and out, and what its runner has to carry out.

No clock, no socket, no thread: the runner brings packets and the time, takes packets, notices and events away, and
calls again at `next_deadline`. `receive` sorts packets to queue pairs (`ingress.py`); what happens then is in
`responder.py` and `completer.py`. `transmit` serves queue pairs in turn from `answers.py`,
`requester.py` or, for a peer on this device, `direct.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterable, Iterator

from nopin.iommu.iommu import Iommu
from nopin.iommu.relay import nobody_waits
from nopin.nic import answers, completer, direct, requester, responder
from nopin.nic.abi import Access, Discipline, QpState
from nopin.nic.attributes import QpAttr, QpCaps
from nopin.nic.core import Core, fail, flush, reset
from nopin.nic.counters import Counters
from nopin.nic.cq import Cq
from nopin.nic.errors import VerbsError
from nopin.nic.events import AsyncEvent
from nopin.nic.ingress import Ingress
from nopin.nic.mr import Pd, Region, RegionTable
from nopin.nic.plan import PACKETS_MAX, Plan
from nopin.nic.qp import QueuePair
from nopin.nic.rings import CompletionProducer, WorkConsumer
from nopin.nic.timers import NOMINAL, Timers
from nopin.nic.transitions import check_transition, merge
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, TxBatch
from nopin.nic.wire.kinds import KINDS
from nopin.nic.wire.opcodes import IS_REQUEST

_FIRST_QPN = 2
_N_QPNS = (1 << 24) - 3
"""QPN 0 and 1 are management queue pairs, 0xffffff is multicast."""

_NEVER = 1 << 63
_RTS, _SQD, _ERR = QpState.RTS, QpState.SQD, QpState.ERR


class Nic:
    """One RoCEv2 device.

    Args:
        draw: `draw(n)` returns a random integer in [0, n); keys, QPNs come from it.
        endpoint: the device's own address and UDP port.
        mtu: the largest path MTU its link carries.
        timers: the laws that queue pairs keep.
        batch_packets: packets one queue pair sends before the next one's turn.
        runner_waits: tells whether the runner has something else to do: asked in the midst of long copies.
    """

    def __init__(
        self,
        *,
        iommu: Iommu,
        endpoint: Endpoint,
        mtu: int,
        draw: Callable[[int], int],
        timers: Timers = NOMINAL,
        batch_packets: int = PACKETS_MAX,
        runner_waits: Callable[[], bool] = nobody_waits,
    ) -> None:
        self.iommu = iommu
        self.endpoint = endpoint
        self.mtu = mtu
        self._draw = draw
        self._timers = timers
        self._core = Core(iommu, RegionTable(draw), endpoint, plan=Plan(batch_packets), runner_waits=runner_waits)
        self._timed: dict[QueuePair, None] = {}
        self._due = _NEVER  # no timer fires before, though the one this was for may be gone by then
        self._ingress = Ingress(self._core)

    @property
    def counters(self) -> Counters:
        """What was counted since the device was made."""
        return self._core.counters

    # --- objects ----------------------------------------------------------------------------------------------

    def alloc_pd(self) -> Pd:
        """Make a protection domain."""
        return Pd()

    def dealloc_pd(self, pd: Pd) -> None:
        """Destroy a protection domain.

        Raises:
            VerbsError: EBUSY while regions or queue pairs use it.
        """
        if pd.n_users:
            raise VerbsError(f"the protection domain still has {pd.n_users} regions or queue pairs", errno.EBUSY)

    def register(
        self,
        pd: Pd,
        *,
        pasid: int,
        address: int,
        length: int | None,
        iova: int,
        access: Access,
        discipline: Discipline,
    ) -> Region:
        """Register a range of an address space; see `RegionTable.register`."""
        return self._core.regions.register(
            pd,
            pasid=pasid,
            address=address,
            length=length,
            iova=iova,
            access=access,
            discipline=discipline,
        )

    def deregister(self, region: Region) -> None:
        """Remove a region: when this returns nothing reaches memory through it. Twice is fine."""
        self._core.regions.deregister(region)

    def create_cq(self, ring: CompletionProducer) -> Cq:
        """Make a completion queue on a ring."""
        return Cq(ring)

    def destroy_cq(self, cq: Cq) -> None:
        """Destroy a completion queue.

        Raises:
            VerbsError: EBUSY while queue pairs use it.
        """
        if cq.n_users:
            raise VerbsError("the completion queue is in use by queue pairs", errno.EBUSY)
        self._core.dirty.pop(cq, None)

    def create_qp(
        self,
        pd: Pd,
        send_cq: Cq,
        recv_cq: Cq,
        send_ring: WorkConsumer,
        recv_ring: WorkConsumer,
        caps: QpCaps,
        sq_sig_all: bool,
    ) -> QueuePair:
        """Make a queue pair in RESET, with a random number."""
        qpn = _FIRST_QPN + self._draw(_N_QPNS)
        while qpn in self._core.qps:
            qpn = _FIRST_QPN + self._draw(_N_QPNS)
        qp = QueuePair(qpn, pd, send_cq, recv_cq, send_ring, recv_ring, caps, sq_sig_all, timers=self._timers)
        self._core.qps[qpn] = qp
        pd.n_users += 1
        send_cq.n_users += 1
        recv_cq.n_users += 1
        return qp

    def modify_qp(self, qp: QueuePair, attr: QpAttr, now: int) -> None:
        """Change attributes or state.

        Raises:
            VerbsError: EINVAL; nothing was changed.
        """
        target = check_transition(qp.state, attr)
        if attr.path_mtu is not None and attr.path_mtu > self.mtu:
            raise VerbsError(f"path_mtu {attr.path_mtu} is above this device's {self.mtu}")
        if target is QpState.RESET:
            reset(self._core, qp)
            qp.attr = QpAttr()
            return
        if target is QpState.ERR:
            qp.recv.replies.clear()
            fail(self._core, qp)
            return
        before = qp.state
        merge(qp.attr, attr)
        if attr.retry_cnt is not None:
            qp.send.n_retries = self._timers.n_retries(attr.retry_cnt)
        qp.state = target
        if before is QpState.INIT and target is QpState.RTR:
            self._enter_rtr(qp)
        elif before is QpState.RTR and target is QpState.RTS:
            _enter_rts(qp)
        elif target is QpState.SQD:
            qp.drained = False
        if target is _RTS:
            self._core.attention.attend(qp)
        self._core.ready[qp] = None

    def query_qp(self, qp: QueuePair) -> QpAttr:
        """Return the current attributes."""
        current = QpAttr()
        merge(current, qp.attr)
        current.state = int(qp.state)
        current.sq_psn = qp.send.next_psn
        current.rq_psn = qp.recv.epsn
        return current

    def destroy_qp(self, qp: QueuePair) -> None:
        """Destroy a queue pair: no access on its behalf is under way when this returns. Twice is fine."""
        if self._core.qps.pop(qp.qpn, None) is None:
            return
        reset(self._core, qp)
        self._timed.pop(qp, None)
        qp.pd.n_users -= 1
        qp.send_cq.n_users -= 1
        qp.recv_cq.n_users -= 1

    def _enter_rtr(self, qp: QueuePair) -> None:
        attr = qp.attr
        assert attr.av is not None
        assert attr.path_mtu is not None
        assert attr.dest_qpn is not None
        remote = Endpoint(attr.av.gid, attr.av.port)
        qp.path = Path(self.endpoint, remote)
        qp.dest_qpn = attr.dest_qpn
        qp.mtu = attr.path_mtu
        qp.direct = remote == self.endpoint
        qp.recv.epsn = attr.rq_psn or 0

    # --- the runner's calls -----------------------------------------------------------------------------------

    def poll_rings(self, now: int) -> bool:
        """Look at the rings that have our attention for new work; True when there was some.

        Where both queue pairs are ours it needs no packet and is carried out at once; the rest is for `transmit`.
        """
        found = False
        core = self._core
        for qp in list(core.attention.queue_pairs):  # one that fails calls for attention
            if qp.state is _RTS:
                if qp.send_ring.has_work and qp not in core.ready and requester.can_fetch(qp):
                    found = True
                    if qp.direct:
                        direct.advance(core, qp, now)
                        self._after(qp)
                    else:
                        core.ready[qp] = None
            elif qp.state is _ERR and (qp.send_ring.has_work or qp.recv_ring.has_work):
                flush(core, qp)
                found = True
        return found

    def attend(self, qp: QueuePair) -> None:
        """Look at the rings of a queue pair again, if something was posted there; its client rang."""
        if qp.send_ring.has_work and qp.state in (_RTS, _ERR):
            self._core.attention.attend(qp)

    def leave_idle(self, fence: Callable[[], None]) -> None:
        """Leave rings in which nothing was posted since the last call: clients ring before they are looked at again.

        Args:
            fence: a full memory barrier.
        """
        self._core.attention.leave_idle(fence)

    @property
    def busy(self) -> bool:
        """True while `transmit` has something to try."""
        return bool(self._core.ready)

    @property
    def has_news(self) -> bool:
        """True if there are notices, events or corrupt objects to take."""
        core = self._core
        return bool(core.dirty or core.events or core.corrupt)

    def receive(self, batch: PacketBatch, now: int) -> None:
        """Take packets that arrived along one path."""
        core = self._core
        n = len(batch.offsets)
        core.counters.rcvd_pkts += n
        if n == 1:
            self._receive_one(batch, now)
            return
        core.counters.rcvd_bytes += int(batch.lengths.sum())
        for qp, packets in self._ingress.sort(batch):
            if IS_REQUEST[packets.opcode[0]]:
                responder.receive(core, qp, packets, now)
            else:
                completer.receive(core, qp, packets, now)
            self._after(qp)

    def _receive_one(self, batch: PacketBatch, now: int) -> None:
        core = self._core
        offset, length = batch.offsets.item(), batch.lengths.item()
        core.counters.rcvd_bytes += length
        found = self._ingress.sort_one(batch, offset, length)
        if found is None:
            return
        qp, packet = found
        if KINDS[packet.opcode].request:
            responder.receive_one(core, qp, packet, now)
        else:
            completer.receive_one(core, qp, packet, now)
        self._after(qp)

    def transmit(self, now: int) -> Iterator[TxBatch]:
        """Serve every queue pair that has something to send once; each batch is valid until the next step."""
        core = self._core
        for qp in list(core.ready):
            core.ready.pop(qp, None)
            if qp.qpn not in core.qps:
                continue
            if qp.direct:
                direct.advance(core, qp, now)
            else:
                if qp.recv.replies and (replies := answers.build(core, qp, now)) is not None:
                    yield self._counted(replies)
                if (requests := requester.build(core, qp, now)) is not None:
                    yield self._counted(requests)
            self._after(qp)

    def next_deadline(self) -> int | None:
        """When `on_deadline` wants to be called next."""
        soonest: int | None = None
        for qp in list(self._timed):
            at = _deadline(qp)
            if at is None:
                del self._timed[qp]
            elif soonest is None or at < soonest:
                soonest = at
        self._due = _NEVER if soonest is None else soonest
        return soonest

    def is_due(self, now: int) -> bool:
        """Say whether `on_deadline` is to be called now: for every turn, where `next_deadline` is too much."""
        if now < self._due:
            return False
        due = self.next_deadline()
        return due is not None and due <= now

    def on_deadline(self, now: int) -> None:
        """Fire every timer that is due."""
        for qp in list(self._timed):
            bound = responder.park_deadline(qp)
            if bound is not None and now >= bound:
                responder.give_up_waiting(self._core, qp)
            bound = answers.park_deadline(qp)
            if bound is not None and now >= bound:
                answers.give_up_waiting(self._core, qp)
            completer.on_deadline(self._core, qp, now)
            self._after(qp)

    def resume(self, waiters: Iterable[Hashable], now: int) -> None:
        """Go on with work whose page requests were answered."""
        for waiter in waiters:
            assert isinstance(waiter, tuple)
            qpn, side = waiter
            qp = self._core.qps.get(qpn)
            if qp is None:
                continue
            if side in ("send", "direct"):
                completer.resume(self._core, qp, now)
            elif side == "recv":
                responder.resume(self._core, qp, now)
            else:
                answers.resume(qp)
            self._core.ready[qp] = None
            self._after(qp)

    def take_notices(self) -> list[Cq]:
        """Return the armed completion queues that got a completion: their channels are to be kicked."""
        if not self._core.dirty:
            return []
        dirty = list(self._core.dirty)
        self._core.dirty.clear()
        return [cq for cq in dirty if cq.ring.fired()]

    def take_events(self) -> list[AsyncEvent]:
        """Return what happened since the last call."""
        events, self._core.events = self._core.events, []
        return events

    def take_corrupt(self) -> list[QueuePair | Cq]:
        """Return objects whose rings hold nonsense: their client is to be disconnected."""
        corrupt, self._core.corrupt = self._core.corrupt, []
        return corrupt

    # --- inside -----------------------------------------------------------------------------------------------

    def _counted(self, batch: TxBatch) -> TxBatch:
        counters, plan = self._core.counters, self._core.plan
        counters.sent_pkts += plan.n
        counters.sent_bytes += plan.n_bytes
        return batch

    def _after(self, qp: QueuePair) -> None:
        """Draw the consequences of a step: halted work, timers, a broken completion queue."""
        side, theirs = qp.send, qp.recv
        if side.halted is not None or qp.state is _SQD:  # otherwise there is nothing to settle
            completer.settle(self._core, qp)
        if qp.send_cq.broken or qp.recv_cq.broken:
            fail(self._core, qp)
        at = side.deadline
        if side.wait_until is not None or theirs.parked_at is not None or theirs.stream_parked_at is not None:
            at = _deadline(qp)
        if at is not None:
            self._timed[qp] = None
            if at < self._due:
                self._due = at


def _enter_rts(qp: QueuePair) -> None:
    side = qp.send
    side.next_psn = side.una = side.sent = side.high = qp.attr.sq_psn or 0
    side.retries_left = side.n_retries
    side.rnr_left = qp.attr.rnr_retry or 0


def _deadline(qp: QueuePair) -> int | None:
    recv = qp.recv
    if recv.parked_at is None and recv.stream_parked_at is None:
        return completer.deadline(qp)
    timers = responder.park_deadline(qp), answers.park_deadline(qp), completer.deadline(qp)
    return min((at for at in timers if at is not None), default=None)
