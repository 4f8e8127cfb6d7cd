"""The requester: takes work from the send ring and puts its packets on the wire.

Everything is decided in PSN space. Each work owns the PSNs [first_psn, first_psn + n_psn); a READ owns one per
response. `sent` says how far the wire has been told, so a retry is nothing but `sent = una`: packets are derived from
work and PSN each time, never stored. A long READ is asked for in several requests, each no longer than the window, so
that its responses never outrun our receive buffer.

A batch is planned from what may go (window, RNR wait, fence, outstanding READs), laid out, and its payloads are
gathered from the client's memory straight into the packets, one copy call per region. A gather that meets a page on
a medium parks the queue pair; one that meets a hole halts it at that work, which fails once all before it is done.

Sources: IBTA volume 1, 9.7.3 (ACK request), 9.7.7 (READ), 9.7.9 (retry); 11.5 for fences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from nopin.iommu.access import PARKED
from nopin.nic.abi import Discipline, QpState, SendFlags, WcStatus, WrOpcode
from nopin.nic.core import Core, available, take_send, waiter_for
from nopin.nic.mr import Region
from nopin.nic.plan import Family, Plan
from nopin.nic.qp import QueuePair
from nopin.nic.scatter import gather, prepare_pieces, pull
from nopin.nic.wire.batch import TxBatch
from nopin.nic.wire.headers import AtomicEth, Reth, emit_u32
from nopin.nic.wire.opcodes import BTH_BYTES, IMM_BYTES, Opcode
from nopin.nic.wire.psn import psn_add, psn_diff
from nopin.nic.work import IS_ATOMIC, IS_WRITE, NEEDS_ANSWER, Piece, SendWork
from nopin.units import U64_MAX

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
_WITH_WORD = frozenset({WrOpcode.SEND_WITH_IMM, WrOpcode.SEND_WITH_INV, WrOpcode.RDMA_WRITE_WITH_IMM})
_ONE_PACKET = {
    WrOpcode.RDMA_READ: Opcode.READ_REQUEST,
    WrOpcode.ATOMIC_CMP_AND_SWP: Opcode.COMPARE_SWAP,
    WrOpcode.ATOMIC_FETCH_AND_ADD: Opcode.FETCH_ADD,
}


class Chunk(NamedTuple):
    """Consecutive packets of one work in a plan.

    Attributes:
        nth: the work's packet (or, for a READ, response) it begins with.
        n_psn: PSNs it takes; a READ request takes as many as it asks responses for.
        at: its first packet in the plan; `n_packets` of them there.
    """

    work: SendWork
    nth: int
    n_psn: int
    at: int
    n_packets: int


def can_fetch(qp: QueuePair) -> bool:
    """Say whether `fetch` could take something if it were posted."""
    side = qp.send
    return side.halted is None and not side.parked and len(side.works) < WORKS_MAX


def fetch(core: Core, qp: QueuePair) -> None:
    """Take posted work from the ring and give it PSNs."""
    if not qp.send_ring.has_work:
        return
    side = qp.send
    n_new = min(available(core, qp, qp.send_ring), WORKS_MAX - len(side.works))
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
        work.n_psn = 1 if work.opcode in IS_ATOMIC else max(1, -(-work.length // qp.mtu))
        side.next_psn = psn_add(side.next_psn, work.n_psn)


def build(core: Core, qp: QueuePair, now: int) -> TxBatch | None:
    """Build the next batch of requests; None if nothing may go now."""
    side = qp.send
    if qp.state not in (QpState.RTS, QpState.SQD) or side.parked or side.wait_until is not None:
        return None
    if qp.may_send():
        fetch(core, qp)
    if not side.works:
        return None
    if _is_alone(qp, side.works[0]):
        return _build_one(core, qp, side.works[0], now)
    plan = core.plan
    plan.start()
    chunks = _plan(qp, plan)
    if not chunks:
        return None
    plan.layout()
    chunks = _cut(plan, chunks, _gather(core, qp, plan, chunks))
    if not chunks:
        return None
    _write_headers(qp, plan, chunks)
    _account(qp, chunks, now)
    core.ready[qp] = None
    assert qp.path is not None
    return plan.finish(qp.path, qp.dest_qpn, singly=qp.foreign)


def _is_alone(qp: QueuePair, work: SendWork) -> bool:
    """Say whether a work is all there is: one packet, nothing before or after it, never sent so far."""
    side = qp.send
    if len(side.works) > 1 or work.n_psn != 1 or len(work.pieces) > 1 or work.status:
        return False
    return side.sent == side.una == side.high == work.first_psn and qp.may_send()


def _build_one(core: Core, qp: QueuePair, work: SendWork, now: int) -> TxBatch | None:
    """Build a batch of one packet, a whole work, without arrays; None if its bytes cannot be had, now or at all."""
    assert qp.path is not None
    plan, side, psn = core.plan, qp.send, work.first_psn
    if not _prepared(core, qp, work):
        return None
    if work.opcode in NEEDS_ANSWER:
        plan.start_one(_ONE_PACKET[work.opcode], qp.dest_qpn, psn, 0, ack_req=True)
        _emit_request(plan.staging.view, work, 0, work.length)
        side.asked.append((psn, psn))
        core.iommu.settle(qp.requester_waiter)
    else:
        opcode, solicited = _FAMILY[work.opcode].only, bool(work.flags & _SOLICITED)
        payload_at = plan.start_one(opcode, qp.dest_qpn, psn, work.length, ack_req=True, solicited=solicited)
        if not _fetch_payload(core, qp, work, payload_at):
            return None
        if work.opcode in IS_WRITE:
            Reth(work.remote_address, work.rkey, work.length).emit(plan.staging.view, BTH_BYTES)
        if work.opcode in _WITH_WORD:
            emit_u32(plan.staging.view, payload_at - IMM_BYTES, work.imm)
    side.sent = side.high = psn_add(psn, 1)
    restart_timer(qp, now)
    return plan.finish_one(qp.path)


def _fetch_payload(core: Core, qp: QueuePair, work: SendWork, at: int) -> bool:
    """Bring the bytes of a work of one piece to their place; False when they are not there, now or at all."""
    if work.inline is not None:
        core.plan.staging.view[at : at + work.length] = work.inline
        return True
    done = pull(core, work.pieces, qp.requester_waiter, offset=at)
    if done == work.length:
        return True
    if done == PARKED:
        _park(core, qp)
    else:
        _halt(core, qp, work)
    return False


def rewind(core: Core, qp: QueuePair) -> None:
    """Send again from the oldest PSN that was not acknowledged."""
    side = qp.send
    core.counters.resent_pkts += psn_diff(side.sent, side.una)
    side.sent = side.una
    core.ready[qp] = None


def timeout_ns(qp: QueuePair) -> int | None:
    """Return the acknowledge timeout; None for code 0, which means wait for ever."""
    timers, side = qp.timers, qp.send
    waits = timers.first_ack_ns if side.retries_left == side.n_retries else timers.ack_ns
    return waits[qp.attr.timeout or 0]


def restart_timer(qp: QueuePair, now: int) -> None:
    """Run the acknowledge timer exactly while something is outstanding."""
    side = qp.send
    wait = timeout_ns(qp)
    outstanding = side.una != side.sent
    side.deadline = now + wait if outstanding and wait is not None else None


# --- planning -------------------------------------------------------------------------------------------------


def _plan(qp: QueuePair, plan: Plan) -> list[Chunk]:
    """Choose the packets that may go now, starting at `sent`."""
    side = qp.send
    chunks: list[Chunk] = []
    # Counted from the oldest work, not by PSN comparison: one work may own 2^23 PSNs, half the circle.
    in_flight = psn_diff(side.sent, side.una)
    index = side.acked + in_flight
    fresh = psn_diff(side.high, side.sent)
    window = side.window - in_flight
    # With little room, work waits: answers are on their way, and small batches would cost more.
    roomy = not in_flight or window >= min(plan.packets_max, side.window // 2)
    n_asked = len(side.asked)
    for work in side.works:
        if work.status:
            return chunks
        while index < work.n_psn:
            if window <= 0 or not plan.room:
                return chunks
            if index == 0 and fresh <= 0 and not _may_start(qp, work, n_asked):
                return chunks
            if work.opcode in NEEDS_ANSWER:
                psn = psn_add(work.first_psn, index)
                n_psn = _asked_from(qp, psn)
                if n_psn == 0:
                    if not roomy or n_asked >= max(1, qp.attr.max_rd_atomic or 0):
                        return chunks
                    n_asked += 1
                    n_psn = min(work.n_psn - index, window, max(1, side.window // 2))
                chunks.append(Chunk(work, index, n_psn, plan.n, 1))
                plan.add_one(_ONE_PACKET[work.opcode], psn, 0, ack_req=True)
            elif not roomy:
                return chunks
            else:
                n_psn = min(work.n_psn - index, window, plan.room)
                chunks.append(Chunk(work, index, n_psn, plan.n, n_psn))
                _add_data(qp, plan, chunks[-1], closes_window=n_psn == window)
            index += n_psn
            window -= n_psn
            fresh -= n_psn
        index -= work.n_psn
    return chunks


def _asked_from(qp: QueuePair, psn: int) -> int:
    """Count the answers from psn on that one earlier request covers; 0 if psn was never asked for."""
    for first, last in qp.send.asked:
        if psn_diff(psn, first) >= 0 and psn_diff(last, psn) >= 0:
            return psn_diff(last, psn) + 1
    return 0


def _may_start(qp: QueuePair, work: SendWork, n_asked: int) -> bool:
    """Say whether a work that was never on the wire may begin."""
    if qp.state is QpState.SQD:
        return False
    return not (work.flags & _FENCE and n_asked)


def _add_data(qp: QueuePair, plan: Plan, chunk: Chunk, *, closes_window: bool) -> None:
    work, n = chunk.work, chunk.n_packets
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


def _account(qp: QueuePair, chunks: list[Chunk], now: int) -> None:
    """Move `sent` over what goes out; remember what was asked; start the timer."""
    side = qp.send
    for chunk in chunks:
        if chunk.work.opcode in NEEDS_ANSWER and not _asked_from(qp, side.sent):
            side.asked.append((side.sent, psn_add(side.sent, chunk.n_psn - 1)))
        side.sent = psn_add(side.sent, chunk.n_psn)
    if psn_diff(side.sent, side.high) > 0:
        side.high = side.sent
    if side.deadline is None:
        restart_timer(qp, now)


# --- filling --------------------------------------------------------------------------------------------------


def _write_headers(qp: QueuePair, plan: Plan, chunks: list[Chunk]) -> None:
    """Write the extension headers: RETH where a WRITE begins or a READ asks, immediates where messages end."""
    view = plan.staging.view
    for chunk in chunks:
        work = chunk.work
        if work.opcode in NEEDS_ANSWER:
            start = chunk.nth * qp.mtu
            at = int(plan.offsets[chunk.at])
            _emit_request(view[at:], work, start, min(work.length - start, chunk.n_psn * qp.mtu))
            continue
        if chunk.nth == 0 and work.opcode in IS_WRITE:
            at = int(plan.offsets[chunk.at]) + BTH_BYTES
            Reth(work.remote_address, work.rkey, work.length).emit(view, at)
        if work.opcode in _WITH_WORD and chunk.nth + chunk.n_psn == work.n_psn:
            last = chunk.at + chunk.n_packets - 1
            emit_u32(view, int(plan.offsets[last] + plan.header[last]) - IMM_BYTES, work.imm)


def _emit_request(packet: memoryview, work: SendWork, start: int, length: int) -> None:
    """Write the extension header of a READ of a part of a message, or of an atomic."""
    if work.opcode is WrOpcode.RDMA_READ:
        Reth(work.remote_address + start & U64_MAX, work.rkey, length).emit(packet, BTH_BYTES)
    elif work.opcode is WrOpcode.ATOMIC_CMP_AND_SWP:
        AtomicEth(work.remote_address, work.rkey, work.swap, work.compare_add).emit(packet, BTH_BYTES)
    else:
        AtomicEth(work.remote_address, work.rkey, work.compare_add, 0).emit(packet, BTH_BYTES)


def _gather(core: Core, qp: QueuePair, plan: Plan, chunks: list[Chunk]) -> int:
    """Bring all payloads into the packets; returns how many leading packets are complete."""
    for group in _groups(chunks):
        at = group[0].at
        n = group[-1].at + group[-1].n_packets - at
        n_ready = _gather_group(core, qp, plan, group, at, n)
        if n_ready < n:
            return at + n_ready
    return plan.n


def _groups(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """Join neighbours whose payload comes from one range each of one region: they are copied with one call."""
    group: list[Chunk] = []
    joinable: Region | None = None
    for chunk in chunks:
        region = _region(chunk)
        if group and (region is None or region is not joinable):
            yield group
            group = []
        group.append(chunk)
        joinable = region
    if group:
        yield group


def _region(chunk: Chunk) -> Region | None:
    """The region of a chunk that comes from one range and may be joined with others."""
    pieces = chunk.work.pieces
    if len(pieces) != 1 or chunk.work.opcode in NEEDS_ANSWER:
        return None
    region = pieces[0].region
    return None if region.discipline is Discipline.SHORT_TERM else region


def _gather_group(core: Core, qp: QueuePair, plan: Plan, group: list[Chunk], at: int, n: int) -> int:
    work = group[0].work
    if group[0].nth == 0 and not _prepared(core, qp, work):
        return 0
    if work.opcode in NEEDS_ANSWER or work.length == 0:
        core.iommu.settle(qp.requester_waiter)
        return n
    if work.inline is not None:
        _copy_inline(plan, group[0], qp.mtu)
        return n
    sizes = plan.payload[at : at + n]
    total = int(sizes.sum())
    if n == 1 and len(work.pieces) == 1:
        done = _gather_one(core, qp, plan, group[0])
    else:
        pieces = [piece for chunk in group for piece in _pieces(chunk, plan, qp.mtu)]
        done = gather(core, pieces, plan.staging, plan.payload_iov(at, at + n), qp.requester_waiter)
    if done == total:
        return n
    if done == PARKED:
        _park(core, qp)
        return 0
    whole = int(np.searchsorted(np.cumsum(sizes), done, "right"))
    bad = next(chunk.work for chunk in group if at + whole < chunk.at + chunk.n_packets)
    _halt(core, qp, bad)
    return whole


def _halt(core: Core, qp: QueuePair, work: SendWork) -> None:
    """Stop at a work whose bytes cannot be read; it fails once all before it is done."""
    work.status = WcStatus.LOC_PROT_ERR
    qp.send.halted = work
    core.counters.local_protection_error += 1


def _gather_one(core: Core, qp: QueuePair, plan: Plan, chunk: Chunk) -> int:
    piece = chunk.work.pieces[0]
    region = piece.region
    if not region.alive:
        return 0
    offset = int(plan.offsets[chunk.at] + plan.header[chunk.at])
    length = int(plan.payload[chunk.at])
    va = piece.va + chunk.nth * qp.mtu
    waiter = waiter_for(region, qp.requester_waiter)
    return core.iommu.read(region.pasid, va, length, plan.staging, offset, region.meter, waiter)


def _pieces(chunk: Chunk, plan: Plan, mtu: int) -> Iterable[Piece]:
    if chunk.n_packets == chunk.work.n_psn:
        return chunk.work.pieces
    length = int(plan.payload[chunk.at : chunk.at + chunk.n_packets].sum())
    return chunk.work.slice(chunk.nth * mtu, length)


def _prepared(core: Core, qp: QueuePair, work: SendWork) -> bool:
    """Make a short-term work's pages present before its first byte is copied."""
    write = work.opcode in NEEDS_ANSWER
    if prepare_pieces(core, work.pieces, qp.requester_waiter, write=write):
        return True
    _park(core, qp)
    return False


def _park(core: Core, qp: QueuePair) -> None:
    core.counters.parked += 1
    qp.send.parked = "gather"


def _copy_inline(plan: Plan, chunk: Chunk, mtu: int) -> None:
    inline = chunk.work.inline
    assert inline is not None
    at = chunk.nth * mtu
    for k in range(chunk.at, chunk.at + chunk.n_packets):
        n_bytes = int(plan.payload[k])
        start = int(plan.offsets[k] + plan.header[k])
        plan.staging.view[start : start + n_bytes] = inline[at : at + n_bytes]
        at += n_bytes
