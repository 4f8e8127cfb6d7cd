"""The responder's sending half: acknowledgements, atomic answers and the streams of READ responses.

Replies leave in PSN order. A READ is read from the owner's memory piece by piece as it is sent, so a page that is
out stops only this queue pair's stream, and a region that goes away in the middle ends it with an exact NAK.
"""

from __future__ import annotations

import numpy as np

from nopin.iommu.access import PARKED
from nopin.mm.space import IoVec
from nopin.nic.abi import AsyncEventType, QpState
from nopin.nic.core import Core, fail, waiter_for
from nopin.nic.parts import Part, n_whole
from nopin.nic.plan import Family, Plan
from nopin.nic.qp import QueuePair, ReadRun, ReadStream, Reply
from nopin.nic.wire.aeth import MSN_MASK, SYNDROME_ACK, Aeth, Nak, aeth_word, emit_aeth, rnr_syndrome
from nopin.nic.wire.batch import Path, TxBatch
from nopin.nic.wire.headers import emit_atomic_ack
from nopin.nic.wire.opcodes import AETH_BYTES, BTH_BYTES, Opcode
from nopin.nic.wire.psn import psn_add

_RESPONSE = Family(
    Opcode.READ_RESPONSE_ONLY,
    Opcode.READ_RESPONSE_FIRST,
    Opcode.READ_RESPONSE_MIDDLE,
    Opcode.READ_RESPONSE_LAST,
)

_RESPONSE_ONLY = int(_RESPONSE.only)
_ACK, _ATOMIC_ACK = int(Opcode.ACKNOWLEDGE), int(Opcode.ATOMIC_ACKNOWLEDGE)

_Item = tuple[Reply | ReadStream | ReadRun, int, int, Part | None]
"""What is sent, its first packet in the plan, how many packets; of a run, which."""


def build(core: Core, qp: QueuePair, now: int) -> TxBatch | None:
    """Build the next batch of replies of a queue pair; None if there is nothing that can go now."""
    side = qp.recv
    if not side.replies or side.stream_parked_at is not None or qp.path is None:
        return None
    plan = core.plan
    if len(side.replies) == 1:
        only = side.replies[0]
        if isinstance(only, Reply):
            return _build_reply(core, qp, qp.path, only)
        if isinstance(only, ReadStream) and only.n_left == 1 and only.first:
            return _build_response(core, qp, qp.path, only, now)
    plan.start()
    items = _plan(qp, plan)
    plan.layout()
    for item, first, n, part in items:
        if isinstance(item, Reply):
            _emit_reply(plan.staging.view, int(plan.offsets[first]) + BTH_BYTES, item)
            side.replies.popleft()
            continue
        if isinstance(item, ReadRun):
            assert part is not None
            if not _read_run(core, qp, plan, item, first, part):
                side.unroll()
                core.ready[qp] = None
                plan.cut(first)
                break
            if not item.n_left:
                side.replies.popleft()
            continue
        n_ready = _gather(core, qp, plan, item, first, n, now)
        _write_stream_headers(plan, item, first, n_ready)
        _consume(qp, item, n_ready)
        if n_ready < n:
            plan.cut(first + n_ready)
            break
    if plan.n == 0:
        return None
    core.ready[qp] = None
    return plan.finish(qp.path, qp.dest_qpn, singly=qp.foreign)


def _build_reply(core: Core, qp: QueuePair, path: Path, reply: Reply) -> TxBatch:
    """Build a batch of the only reply there is, no data of a READ."""
    plan, aeth = core.plan, aeth_word(reply.syndrome, reply.msn)
    words = (aeth,) if reply.original is None else (aeth, reply.original)
    plan.start_one(_opcode_of(reply), qp.dest_qpn, reply.psn, 0, words)
    qp.recv.replies.popleft()
    return plan.finish_one(path)


def _build_response(core: Core, qp: QueuePair, path: Path, stream: ReadStream, now: int) -> TxBatch | None:
    """Build a batch of the only response of the only READ; None if it cannot be read now, or at all."""
    plan, length = core.plan, stream.left
    aeth = aeth_word(SYNDROME_ACK, stream.msn)
    payload_at = plan.start_one(_RESPONSE_ONLY, qp.dest_qpn, stream.psn, length, (aeth,))
    done = _read(core, qp, stream, length, payload_at) if length else 0
    if done == length:
        qp.recv.replies.popleft()
        return plan.finish_one(path)
    if done == PARKED:
        _park(core, qp, stream, now)
    else:
        _refuse(core, qp, stream, stream.psn)
        qp.recv.replies.popleft()  # the stream: nothing of it was sent
    return None


def resume(qp: QueuePair) -> None:
    """Go on with a stream whose page has come."""
    qp.recv.stream_parked_at = None


def park_deadline(qp: QueuePair) -> int | None:
    """When a parked stream must be answered by an RNR NAK: not in ERR, where nobody would answer the retry."""
    at = qp.recv.stream_parked_at
    return None if at is None or not qp.may_receive() else at + qp.timers.park_bound_ns


def give_up_waiting(core: Core, qp: QueuePair) -> None:
    """Turn a park that outlasted its bound into an RNR NAK at the first response that is missing.

    The peer asks again from there on, for this and for all that came after it; the page request goes on.
    """
    side = qp.recv
    stream = side.replies[0]
    assert isinstance(stream, ReadStream), "what parks is one READ"
    side.stream_parked_at = None
    side.stream_patience.end()
    side.replies.clear()
    side.replies.append(Reply(stream.psn, rnr_syndrome(qp.attr.min_rnr_timer or 0), side.msn))
    core.counters.sent_rnr_nak += 1
    core.ready[qp] = None


def _plan(qp: QueuePair, plan: Plan) -> list[_Item]:
    items: list[_Item] = []
    for item in qp.recv.replies:
        if not plan.room:
            break
        first = plan.n
        if isinstance(item, Reply):
            plan.add_one(_opcode_of(item), item.psn, 0, ack_req=False)
            items.append((item, first, 1, None))
            continue
        n = min(item.n_left, plan.room)
        if isinstance(item, ReadRun):
            n = n_whole(item.ends, item.sent, n)
            part = item.next_part(n)
            plan.add_messages(_RESPONSE, item.psn, part)
            items.append((item, first, n, part))
            if n < item.n_left:
                break
            continue
        ends = n == item.n_left
        last = item.left - (n - 1) * qp.mtu if ends else qp.mtu
        plan.add_run(_RESPONSE, item.psn, n, qp.mtu, last, starts=item.first, ends=ends)
        items.append((item, first, n, None))
        if not ends:
            break
    return items


def _opcode_of(reply: Reply) -> int:
    return _ACK if reply.original is None else _ATOMIC_ACK


def _emit_reply(view: memoryview, offset: int, reply: Reply) -> None:
    """Write the extension headers of a reply."""
    Aeth(reply.syndrome, reply.msn).emit(view, offset)
    if reply.original is not None:
        emit_atomic_ack(view, offset + AETH_BYTES, reply.original)


def _write_stream_headers(plan: Plan, stream: ReadStream, first: int, n: int) -> None:
    """Write the AETH of the first and the last response; middles have none."""
    aeth = Aeth(SYNDROME_ACK, stream.msn)
    if n and stream.first:
        aeth.emit(plan.staging.view, int(plan.offsets[first]) + BTH_BYTES)
    if n and n == stream.n_left:
        aeth.emit(plan.staging.view, int(plan.offsets[first + n - 1]) + BTH_BYTES)


def _read_run(core: Core, qp: QueuePair, plan: Plan, run: ReadRun, first: int, part: Part) -> bool:
    """Read the payloads of the next responses of a run by one call, and write their headers.

    False: something is special about its memory, and its READs will find out what by themselves.
    """
    region, n = run.region, part.n_packets
    if not region.alive:
        return False
    remote, local = run.remote(part), plan.payload_iov(first, first + n)
    waiter = waiter_for(region, qp.stream_waiter)
    done = core.iommu.copy_held_v(region.pasid, remote, plan.staging, local, waiter, write=False)
    if done != int(remote[:, 1].sum()):
        return False
    msns = (np.arange(part.nth, part.nth + len(part.starts)) + run.msn) & MSN_MASK
    for packets, msn in (
        (part.first_packets(), msns[int(part.begins_late) :]),
        (part.last_packets(), msns[: part.n_ended]),
    ):
        emit_aeth(plan.staging.array, plan.offsets[first + packets] + BTH_BYTES, SYNDROME_ACK, msn)
    run.sent += n
    run.psn = psn_add(run.psn, n)
    return True


def _gather(core: Core, qp: QueuePair, plan: Plan, stream: ReadStream, first: int, n: int, now: int) -> int:
    """Read the payloads of n responses; returns how many packets are whole."""
    total = min(stream.left, n * qp.mtu)
    if total == 0:
        return n
    if n == 1:
        done = _read(core, qp, stream, total, plan.payload_at(first))
    else:
        done = _read_v(core, qp, stream, total, plan.payload_iov(first, first + n))
    if done == total:
        return n
    if done == PARKED:
        _park(core, qp, stream, now)
        return 0
    whole = int(np.searchsorted(np.cumsum(plan.payload[first : first + n]), done, "right"))
    _refuse(core, qp, stream, psn_add(stream.psn, whole))
    return whole


def _read(core: Core, qp: QueuePair, stream: ReadStream, length: int, at: int) -> int:
    """Read the next bytes of a stream to one place of the plan; returns bytes done or PARKED."""
    region = stream.region
    if region is None or not region.alive:
        return 0
    va, waiter = region.va(stream.address), waiter_for(region, qp.stream_waiter)
    return core.iommu.read(region.pasid, va, length, core.plan.staging, at, region.meter, waiter)


def _read_v(core: Core, qp: QueuePair, stream: ReadStream, length: int, local: IoVec) -> int:
    """Do the same to several places."""
    region = stream.region
    if region is None or not region.alive:
        return 0
    remote = np.array([[region.va(stream.address), length]], np.uint64)
    waiter = waiter_for(region, qp.stream_waiter)
    return core.iommu.read_v(region.pasid, remote, core.plan.staging, local, region.meter, waiter)


def _park(core: Core, qp: QueuePair, stream: ReadStream, now: int) -> None:
    core.counters.parked += 1
    qp.recv.stream_parked_at = qp.recv.stream_patience.park(stream.psn, now)


def _refuse(core: Core, qp: QueuePair, stream: ReadStream, psn: int) -> None:
    """End a stream with a NAK at the response that could not be read.

    A later request may have been refused already, its NAK waiting behind this stream: this one stands for it.
    """
    if qp.state is not QpState.ERR:
        core.counters.sent_nak += 1
        core.counters.access_error += 1
        core.event(AsyncEventType.QP_ACCESS_ERR, qp)
    qp.recv.replies.clear()
    qp.recv.replies.append(stream)  # `_consume` still accounts for what was sent of it
    qp.recv.replies.append(Reply(psn, Nak.REMOTE_ACCESS_ERROR, (stream.msn - 1) & MSN_MASK))
    stream.region = None
    fail(core, qp)
    core.ready[qp] = None  # to send the NAK; `fail` does it only the first time


def _consume(qp: QueuePair, stream: ReadStream, n: int) -> None:
    side = qp.recv
    failed = stream.region is None and stream.left > 0
    sent = min(stream.left, n * qp.mtu)
    stream.psn = psn_add(stream.psn, n)
    stream.n_left -= n
    stream.address += sent
    stream.left -= sent
    stream.first = stream.first and n == 0
    if stream.n_left == 0 or failed:
        side.replies.popleft()
