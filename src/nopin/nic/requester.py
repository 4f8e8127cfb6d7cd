"""The requester: takes work from the send ring and puts its packets on the wire.

Everything is decided in PSN space. Each work owns the PSNs [first_psn, first_psn + n_psn); a READ owns one per
response. `sent` says how far the wire has been told, so a retry is nothing but `sent = una`: packets are derived from
work and PSN each time, never stored. A long READ is asked for in several requests, each no longer than the window, so
that its responses never outrun our receive buffer.

A batch is planned from what may go (window, RNR wait, fence, outstanding READs), laid out, and filled
(`filling.py`). WRITEs or READs that follow one another are one run from the ring to their completion (`runs.py`).

Sources: IBTA volume 1, 9.7.3 (ACK request), 9.7.7 (READ), 9.7.9 (retry); 11.5 for fences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from nopin.nic.abi import Discipline, QpState, SendFlags, WrOpcode
from nopin.nic.core import Core, available, take_send
from nopin.nic.filling import (
    Chunk,
    fetch_payload,
    gather_payloads,
    message_words,
    prepared,
    request_words,
    write_headers,
)
from nopin.nic.parts import n_whole
from nopin.nic.plan import Family, Plan
from nopin.nic.qp import QueuePair
from nopin.nic.runs import RUN_MIN, Run, decode_run
from nopin.nic.wire.batch import TxBatch
from nopin.nic.wire.opcodes import Opcode
from nopin.nic.wire.psn import PSN_MASK, psn_add, psn_diff
from nopin.nic.work import NEEDS_ANSWER, SendWork

_READ = WrOpcode.RDMA_READ
_RTS, _SENDING = QpState.RTS, (QpState.RTS, QpState.SQD)
_SHORT_TERM = Discipline.SHORT_TERM
_SOLICITED = int(SendFlags.SOLICITED)
_FENCE = int(SendFlags.FENCE)

WORKS_MAX = 512
"""Work requests decoded ahead per queue pair; the ring holds the rest."""

ACK_EVERY_PACKETS = 256
"""Inside a long message, ask for an acknowledgement this often; rxe does so every 64, ours cost more."""

_SEND = (Opcode.SEND_ONLY, Opcode.SEND_FIRST, Opcode.SEND_MIDDLE, Opcode.SEND_LAST)
_WRITE = (Opcode.WRITE_ONLY, Opcode.WRITE_FIRST, Opcode.WRITE_MIDDLE, Opcode.WRITE_LAST)
_FAMILY = {
    WrOpcode.SEND: Family(*_SEND),
    WrOpcode.SEND_WITH_IMM: Family(Opcode.SEND_ONLY_IMM, Opcode.SEND_FIRST, Opcode.SEND_MIDDLE, Opcode.SEND_LAST_IMM),
    WrOpcode.SEND_WITH_INV: Family(
        Opcode.SEND_ONLY_INVALIDATE, Opcode.SEND_FIRST, Opcode.SEND_MIDDLE, Opcode.SEND_LAST_INVALIDATE
    ),
    WrOpcode.RDMA_WRITE: Family(*_WRITE),
    WrOpcode.RDMA_WRITE_WITH_IMM: Family(
        Opcode.WRITE_ONLY_IMM, Opcode.WRITE_FIRST, Opcode.WRITE_MIDDLE, Opcode.WRITE_LAST_IMM
    ),
}
_ONE_PACKET = {
    WrOpcode.RDMA_READ: Opcode.READ_REQUEST,
    WrOpcode.ATOMIC_CMP_AND_SWP: Opcode.COMPARE_SWAP,
    WrOpcode.ATOMIC_FETCH_AND_ADD: Opcode.FETCH_ADD,
}


def can_fetch(qp: QueuePair) -> bool:
    """Say whether posted work could be taken if there were any."""
    side = qp.send
    return side.halted is None and not side.parked and len(side.works) < WORKS_MAX


def fetch_one(core: Core, qp: QueuePair) -> None:
    """Take the oldest posted work from the ring and give it PSNs."""
    _fetch_singly(core, qp, min(available(core, qp, qp.send_ring), 1))


def _fetch_in_runs(core: Core, qp: QueuePair) -> None:
    """Take all there is, holding WRITEs or READs that follow one another as one."""
    side = qp.send
    n_new = min(available(core, qp, qp.send_ring), WORKS_MAX - len(side.works))
    while n_new >= RUN_MIN and side.halted is None and qp.caps.max_send_sge:
        run = decode_run(qp.send_ring.peek(n_new), core.regions, qp.pd, qp.mtu, side.window)
        if run is None:
            break
        run.first_psn = side.next_psn
        side.next_psn = psn_add(side.next_psn, run.n_psn)
        side.works.append(run)
        qp.send_ring.skip(len(run.posts))
        n_new -= len(run.posts)
    _fetch_singly(core, qp, n_new)


def _fetch_singly(core: Core, qp: QueuePair, n_new: int) -> None:
    side = qp.send
    for _ in range(n_new):
        if side.halted is not None:
            return
        work = take_send(core, qp)
        side.works.append(work)
        if work.status:
            side.halted = work
            work.first_psn, work.n_psn = side.next_psn, 0
            return
        work.first_psn = side.next_psn
        work.n_psn = 1 if work.length <= qp.mtu else -(-work.length // qp.mtu)
        side.next_psn = (side.next_psn + work.n_psn) & PSN_MASK


def build(core: Core, qp: QueuePair, now: int) -> TxBatch | None:
    """Build the next batch of requests; None if nothing may go now."""
    side = qp.send
    if qp.state not in _SENDING or side.parked or side.wait_until is not None:
        return None
    if qp.state is _RTS:
        if qp.send_ring.has_work:
            _fetch_in_runs(core, qp)
    else:
        side.unroll()  # of a run that is under way, some may have to wait for better times
    if not side.works:
        return None
    work = side.works[0]
    if _is_alone(work, qp):
        return _build_one(core, qp, work, now)
    plan = core.plan
    plan.start()
    chunks = _plan(qp, plan)
    if not chunks:
        return None
    plan.layout()
    chunks = _cut(plan, chunks, gather_payloads(core, qp, plan, chunks))
    if not chunks:
        return None
    write_headers(qp, plan, chunks)
    _account(qp, chunks, now)
    core.ready[qp] = None
    assert qp.path is not None
    return plan.finish(qp.path, qp.dest_qpn, singly=qp.foreign)


def _is_alone(work: SendWork | Run, qp: QueuePair) -> TypeGuard[SendWork]:
    """Say whether a work is all there is: one packet, nothing before or after it, never sent so far."""
    side = qp.send
    if len(side.works) > 1 or isinstance(work, Run) or work.n_psn != 1 or len(work.pieces) > 1 or work.status:
        return False
    return side.sent == side.una == side.high == work.first_psn and qp.state is _RTS


def _build_one(core: Core, qp: QueuePair, work: SendWork, now: int) -> TxBatch | None:
    """Build a batch of one packet, a whole work, without arrays; None if its bytes cannot be had, now or at all."""
    assert qp.path is not None
    plan, side, psn = core.plan, qp.send, work.first_psn
    is_short_term = work.pieces and work.pieces[0].region.discipline is _SHORT_TERM
    if is_short_term and not prepared(core, qp, work):
        return None
    if work.opcode in NEEDS_ANSWER:
        if is_short_term:
            core.iommu.settle(qp.requester_waiter)
        plan.start_one(_ONE_PACKET[work.opcode], qp.dest_qpn, psn, 0, request_words(work, 0, work.length), ack_req=True)
        side.asked.append((psn, psn))
    else:
        opcode, solicited = _FAMILY[work.opcode].only, work.flags & _SOLICITED != 0
        words = message_words(work)
        payload_at = plan.start_one(opcode, qp.dest_qpn, psn, work.length, words, ack_req=True, solicited=solicited)
        if not fetch_payload(core, qp, work, payload_at):
            return None
    side.sent = side.high = (psn + 1) & PSN_MASK
    restart_timer(qp, now)
    return plan.finish_one(qp.path)


def rewind(core: Core, qp: QueuePair) -> None:
    """Send again from the oldest PSN that was not acknowledged."""
    side = qp.send
    core.counters.resent_pkts += psn_diff(side.sent, side.una)
    side.sent = side.una
    if any(isinstance(work, Run) and work.opcode is _READ for work in side.works):
        side.unroll()  # they keep the bounds of requests, and may no longer fit the window
    core.ready[qp] = None


def timeout_ns(qp: QueuePair) -> int | None:
    """Return the acknowledge timeout; None for code 0, which means wait for ever."""
    timers, side = qp.timers, qp.send
    waits = timers.first_ack_ns if side.retries_left == side.n_retries else timers.ack_ns
    return waits[qp.attr.timeout or 0]


def restart_timer(qp: QueuePair, now: int) -> None:
    """Run the acknowledge timer exactly while something is outstanding."""
    side = qp.send
    wait = timeout_ns(qp) if side.una != side.sent else None
    side.deadline = None if wait is None else now + wait


# --- planning -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Room:
    """What may still go in this batch.

    Attributes:
        window: PSNs, besides those in flight.
        before: PSNs, from the next on, that were on the wire before; negative beyond them.
        n_asked: READs and atomics under way. n_asked_max: how many there may be.
        roomy: False if only what was asked for already goes again: with little room, work waits, for answers are on
            their way, and small batches would cost more.
    """

    window: int
    before: int
    n_asked: int
    n_asked_max: int
    roomy: bool

    @classmethod
    def of(cls, qp: QueuePair, plan: Plan, in_flight: int) -> _Room:
        """Return what may go from `sent` on."""
        side = qp.send
        window = side.window - in_flight
        roomy = not in_flight or window >= min(plan.packets_max, side.window // 2)
        return cls(window, psn_diff(side.high, side.sent), len(side.asked), max(1, qp.attr.max_rd_atomic or 0), roomy)


def _plan(qp: QueuePair, plan: Plan) -> list[Chunk]:
    """Choose the packets that may go now, starting at `sent`."""
    side = qp.send
    chunks: list[Chunk] = []
    # Counted from the oldest work, not by PSN comparison: one work may own 2^23 PSNs, half the circle.
    in_flight = psn_diff(side.sent, side.una)
    room = _Room.of(qp, plan, in_flight)
    index = side.acked + in_flight
    for work in side.works:
        if work.status:
            break
        while index < work.n_psn:
            chunk = _next_chunk(qp, plan, room, work, index)
            if chunk is None:
                return chunks
            chunks.append(chunk)
            index += chunk.n_psn
            room.window -= chunk.n_psn
            room.before -= chunk.n_psn
        index -= work.n_psn
    return chunks


def _next_chunk(qp: QueuePair, plan: Plan, room: _Room, work: SendWork | Run, index: int) -> Chunk | None:
    """Put what may go of a work into the plan, from its packet `index` on; None: nothing may."""
    if room.window <= 0 or not plan.room:
        return None
    if index == 0 and room.before <= 0 and not _may_start(qp, work, room.n_asked):
        return None
    if work.opcode not in NEEDS_ANSWER:
        return _data(qp, plan, room, work, index) if room.roomy else None
    if isinstance(work, Run):
        return _requests(plan, room, work, index) if room.roomy else None
    return _request(qp, plan, room, work, index)


def _request(qp: QueuePair, plan: Plan, room: _Room, work: SendWork, index: int) -> Chunk | None:
    """Ask for the answers of a READ or an atomic: again for what was asked for, or for as much as may be now."""
    psn = psn_add(work.first_psn, index)
    n_psn = _asked_from(qp, psn) if room.before > 0 else 0
    if n_psn == 0:
        if not room.roomy or room.n_asked >= room.n_asked_max:
            return None
        room.n_asked += 1
        n_psn = min(work.n_psn - index, room.window, max(1, qp.send.window // 2))
    chunk = Chunk(work, index, n_psn, plan.n, 1)
    plan.add_one(_ONE_PACKET[work.opcode], psn, 0, ack_req=True)
    return chunk


def _requests(plan: Plan, room: _Room, run: Run, index: int) -> Chunk | None:
    """Ask for as many whole READs of a run as may be under way."""
    n, n_psn = run.n_requests(index, room.window, min(plan.room, room.n_asked_max - room.n_asked))
    if not n:
        return None
    room.n_asked += n
    chunk = Chunk(run, index, n_psn, plan.n, n)
    plan.add_requests(Opcode.READ_REQUEST, psn_add(run.first_psn, index), run.part(index, index + n_psn))
    return chunk


def _data(qp: QueuePair, plan: Plan, room: _Room, work: SendWork | Run, index: int) -> Chunk:
    """Send as much of a WRITE or SEND as may go; of a run, what ends with a message, and nothing behind it."""
    n = n_max = min(work.n_psn - index, room.window, plan.room)
    if isinstance(work, Run):
        n = n_whole(work.ends, index, n_max)
    chunk = Chunk(work, index, n, plan.n, n)
    _add_data(qp, plan, chunk, closes_window=n == room.window)
    if n < n_max:
        room.window = n
    return chunk


def _asked_from(qp: QueuePair, psn: int) -> int:
    """Count the answers from psn on that one earlier request covers; 0 if psn was never asked for."""
    for first, last in qp.send.asked:
        if psn_diff(psn, first) >= 0 and psn_diff(last, psn) >= 0:
            return psn_diff(last, psn) + 1
    return 0


def _may_start(qp: QueuePair, work: SendWork | Run, n_asked: int) -> bool:
    """Say whether a work that was never on the wire may begin."""
    if qp.state is QpState.SQD:
        return False
    return not (work.flags & _FENCE and n_asked)


def _add_data(qp: QueuePair, plan: Plan, chunk: Chunk, *, closes_window: bool) -> None:
    work, n = chunk.work, chunk.n_packets
    if isinstance(work, Run):
        part = work.part(chunk.nth, chunk.nth + n)
        plan.add_messages(_FAMILY[work.opcode], psn_add(work.first_psn, chunk.nth), part)
        # Where a completion was asked for, an acknowledgement is: nobody waits for the others.
        plan.request_ack(chunk.at + part.last_packets()[work.signaled(part)])
        plan.request_ack(plan.n - 1)
        return
    if work.n_psn == 1:
        solicited = bool(work.flags & _SOLICITED)
        plan.add_one(_FAMILY[work.opcode].only, work.first_psn, work.length, ack_req=True, solicited=solicited)
        return
    ends = chunk.nth + n == work.n_psn
    last = work.length - (work.n_psn - 1) * qp.mtu if ends else qp.mtu
    psn = psn_add(work.first_psn, chunk.nth)
    plan.add_run(_FAMILY[work.opcode], psn, n, qp.mtu, last, starts=chunk.nth == 0, ends=ends)
    first_due = ACK_EVERY_PACKETS - 1 - chunk.nth % ACK_EVERY_PACKETS
    if first_due < n:
        plan.request_ack(slice(chunk.at + first_due, plan.n, ACK_EVERY_PACKETS))
    if ends or closes_window or not plan.room:
        plan.request_ack(plan.n - 1)
    if ends and work.flags & _SOLICITED:
        plan.solicit(plan.n - 1)


def _cut(plan: Plan, chunks: list[Chunk], n_packets: int) -> list[Chunk]:
    """Keep what lies in the first n packets; a data chunk may lose its tail, a READ request is whole."""
    if n_packets == plan.n:
        return chunks
    kept: list[Chunk] = []
    for chunk in chunks:
        n = min(chunk.n_packets, n_packets - chunk.at)
        if n <= 0:
            break
        kept.append(chunk if n == chunk.n_packets else chunk._replace(n_psn=n, n_packets=n))
    plan.cut(n_packets)
    if n_packets:
        plan.request_ack(n_packets - 1)  # the packet that would have asked may never follow
    return kept


def _asked_by(chunk: Chunk, psn: int) -> list[tuple[int, int]]:
    """Return the first and last PSN of each request of a chunk that begins at a PSN."""
    work = chunk.work
    if isinstance(work, SendWork):
        return [(psn, psn_add(psn, chunk.n_psn - 1))]
    part = work.part(chunk.nth, chunk.nth + chunk.n_psn)
    firsts, lasts = (part.starts + psn) & PSN_MASK, (part.ends + (psn - 1)) & PSN_MASK
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _account(qp: QueuePair, chunks: list[Chunk], now: int) -> None:
    """Move `sent` over what goes out; remember what was asked; start the timer."""
    side = qp.send
    for chunk in chunks:
        if chunk.work.opcode in NEEDS_ANSWER and psn_diff(side.sent, side.high) >= 0:
            side.asked.extend(_asked_by(chunk, side.sent))
        side.sent = psn_add(side.sent, chunk.n_psn)
    if psn_diff(side.sent, side.high) > 0:
        side.high = side.sent
    if side.deadline is None:
        restart_timer(qp, now)
