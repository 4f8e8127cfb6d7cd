"""The responder: what the peer asks of us, in PSN order.

Packets come in batches. Within a batch, those that continue the expected sequence are handled by message, or, for
WRITEs that are here whole, many messages at once; each such step is one copy into the owner's memory whatever the
number of packets. Everything that is not steady state (duplicates, gaps, errors) is handled one packet at a time.

A step either completes, or parks, or fails:

- *parks*: a page must come from a medium. Nothing of the step was executed, the expected PSN stays, and the packets
  are kept until the page request is answered. The acknowledgement is simply late; if it becomes later than
  `Timers.park_bound_ns` the peer is sent an RNR NAK, so that its own timer never has to guess (facts: a parked
  responder holds its acknowledgement).
- *fails*: the packets before the failing one were executed and are acknowledged by the NAK's PSN; of the failing
  packet at most the bytes before the failing byte were written; nothing after it.

Sources: IBTA volume 1, chapter 9.7; the order of checks follows the Linux rxe driver's ``rxe_resp.c``.
"""

from __future__ import annotations

from collections import deque

from nopin.iommu.access import PARKED
from nopin.nic import atomics
from nopin.nic.abi import AsyncEventType, Discipline, QpState
from nopin.nic.core import Core, waiter_for
from nopin.nic.inbound import lone_send, take_message
from nopin.nic.mr import Region
from nopin.nic.packets import HELD_PACKETS_MAX, Packet, Packets
from nopin.nic.qp import QueuePair, ReadStream, Reply, SavedRequest
from nopin.nic.refusal import (
    NotReady,
    Parked,
    Refusal,
    check_target,
    fail_request,
    invalid_request,
    no_access,
    prepare,
)
from nopin.nic.rights import REMOTE_ATOMIC, REMOTE_READ
from nopin.nic.whole_reads import whole_reads
from nopin.nic.whole_writes import lone_write, whole_writes
from nopin.nic.wire.aeth import MSN_MASK, SYNDROME_ACK, Nak, rnr_syndrome
from nopin.nic.wire.headers import AtomicEth, unpack_reth
from nopin.nic.wire.opcodes import BTH_BYTES, IS_SEND, IS_WRITE, Opcode
from nopin.nic.wire.psn import PSN_MASK, psn_add, psn_diff
from nopin.nic.work import ATOMIC_BYTES

_RTR = QpState.RTR
_SHORT_TERM = Discipline.SHORT_TERM

UNSENT_REPLIES_MAX = 1024
"""Answers that may wait to be sent. A peer that keeps to its max_rd_atomic stays far below; one that floods us with
READs or duplicates has the rest dropped, as if they were lost on the way."""


def receive(core: Core, qp: QueuePair, packets: Packets, now: int) -> None:
    """Take request packets, in order of arrival."""
    side = qp.recv
    if side.parked_at is not None:
        _hold(core, qp, packets)
        return
    if qp.state is _RTR and not qp.established:
        qp.established = True
        core.event(AsyncEventType.COMM_EST, qp)
    at = 0
    for edge in packets.breaks():
        while at < edge and qp.may_receive():
            if len(side.replies) >= UNSENT_REPLIES_MAX:
                core.counters.unsent_drop += len(packets) - at
                _acknowledge(core, qp)
                return
            ahead = psn_diff(int(packets.psn[at]), side.epsn)
            if ahead < 0:
                _duplicate(core, qp, packets.one(at))
                at += 1
            elif ahead > 0:
                _out_of_sequence(core, qp, edge - at)
                at = edge
            else:
                at = _advance(core, qp, packets, at, edge, now)
                if side.parked_at is not None:
                    _hold(core, qp, packets.part(at, len(packets)))
                    _acknowledge(core, qp)
                    return
    _acknowledge(core, qp)


def receive_one(core: Core, qp: QueuePair, packet: Packet, now: int) -> None:
    """Take a lone request packet: at once if it is a whole request, as a batch of one otherwise."""
    side = qp.recv
    done = False
    if packet.psn == side.epsn and _is_idle(qp):
        side.nak_sent = False
        try:
            done = _execute_one(core, qp, packet)
        except (Parked, NotReady, Refusal) as reason:
            done = True
            if _stop(core, qp, reason, now):
                _hold(core, qp, packet.alone())
    if not done:
        receive(core, qp, packet.alone(), now)
    elif side.ack_due:
        _acknowledge(core, qp)


def _is_idle(qp: QueuePair) -> bool:
    """Say whether nothing is under way that the next request would have to wait for or belong to."""
    side = qp.recv
    if side.parked_at is not None or side.inbound is not None or len(side.replies) >= UNSENT_REPLIES_MAX:
        return False
    return qp.state is not _RTR or qp.established


def _execute_one(core: Core, qp: QueuePair, packet: Packet) -> bool:
    """Execute a request of one packet; False, and nothing was done, if it is something else or not well formed."""
    if packet.opcode == _WRITE_ONLY:
        return lone_write(core, qp, packet)
    if packet.opcode in _LONE_SENDS:
        return lone_send(core, qp, packet)
    if packet.payload != 0 or packet.opcode not in _WITHOUT_DATA:
        return False
    _execute_without_data(core, qp, packet)
    return True


def resume(core: Core, qp: QueuePair, now: int) -> None:
    """Go on with a request whose page has come."""
    side = qp.recv
    if side.parked_at is None:
        return
    side.parked_at = None
    held, side.held, side.n_held = side.held, [], 0
    for packets in held:
        receive(core, qp, packets, now)


def give_up_waiting(core: Core, qp: QueuePair) -> None:
    """Turn a park that outlasted its bound into an RNR NAK; the page request goes on."""
    side = qp.recv
    side.parked_at = None
    side.patience.end()
    core.counters.parked_drop += side.n_held
    side.held, side.n_held = [], 0
    _not_ready(core, qp)


def park_deadline(qp: QueuePair) -> int | None:
    """When a parked request must be answered by an RNR NAK."""
    at = qp.recv.parked_at
    return None if at is None else at + qp.timers.park_bound_ns


def _hold(core: Core, qp: QueuePair, packets: Packets) -> None:
    side = qp.recv
    fits = min(len(packets), HELD_PACKETS_MAX - side.n_held)
    core.counters.parked_drop += len(packets) - fits
    if fits <= 0:
        return
    side.held.append(packets.part(0, fits).detach())
    side.n_held += fits


def _acknowledge(core: Core, qp: QueuePair) -> None:
    """Queue one ACK for everything completed, if the peer asked for one."""
    side = qp.recv
    if not side.ack_due:
        return
    side.ack_due = False
    psn = psn_add(side.epsn, -1)
    last = side.replies[-1] if side.replies else None
    if isinstance(last, Reply) and last.syndrome == SYNDROME_ACK and last.original is None:
        last.psn, last.msn = psn, side.msn
    else:
        side.replies.append(Reply(psn, SYNDROME_ACK, side.msn))
    core.ready[qp] = None


def _out_of_sequence(core: Core, qp: QueuePair, n_packets: int) -> None:
    """Ask once for the missing packet; drop everything until it comes."""
    side = qp.recv
    core.counters.out_of_seq_request += n_packets
    if side.nak_sent:
        core.counters.dropped_after_nak += n_packets
        return
    side.nak_sent = True
    side.ack_due = False  # the NAK acknowledges all before it
    core.counters.sent_nak += 1
    side.replies.append(Reply(side.epsn, Nak.SEQUENCE_ERROR, side.msn))
    core.ready[qp] = None


def _not_ready(core: Core, qp: QueuePair) -> None:
    """Send RNR NAK for the expected packet and drop what follows it until it comes again."""
    side = qp.recv
    side.nak_sent = True
    core.counters.sent_rnr_nak += 1
    code = qp.attr.min_rnr_timer or 0
    side.replies.append(Reply(side.epsn, rnr_syndrome(code), side.msn))
    core.ready[qp] = None


def _duplicate(core: Core, qp: QueuePair, packet: Packet) -> None:
    """Answer a request that was executed before, without executing it again."""
    side = qp.recv
    core.counters.duplicate_request += 1
    if IS_SEND[packet.opcode] or IS_WRITE[packet.opcode]:
        side.ack_due = True
        return
    saved = _saved_at(qp, packet.psn)
    if saved is None or not _repeat(core, qp, packet, saved):
        core.counters.duplicate_drop += 1


def _repeat(core: Core, qp: QueuePair, packet: Packet, saved: SavedRequest) -> bool:
    """Answer a READ or atomic again; False when it is not the one that was saved."""
    is_read = packet.opcode == Opcode.READ_REQUEST
    if is_read != (saved.original is None):
        return False
    if is_read:
        return _repeat_read(core, qp, packet, saved)
    qp.recv.replies.append(Reply(saved.psn, SYNDROME_ACK, qp.recv.msn, saved.original))
    core.ready[qp] = None
    return True


def _saved_at(qp: QueuePair, psn: int) -> SavedRequest | None:
    for saved in reversed(qp.recv.saved):
        if 0 <= psn_diff(psn, saved.psn) < saved.n_psn:
            return saved
    return None


def _repeat_read(core: Core, qp: QueuePair, packet: Packet, saved: SavedRequest) -> bool:
    """Send READ responses again from a PSN on, if the request lies inside the saved one."""
    if packet.payload != 0:
        return False
    address, rkey, length = unpack_reth(packet.staging.view, packet.offset + BTH_BYTES)
    psn = packet.psn
    inside = saved.address <= address and address + length <= saved.address + saved.length
    if rkey != saved.rkey or not inside:
        return False
    # What is still queued at or after this PSN will be asked for again: the peer went back to here.
    side = qp.recv
    head = side.replies[0] if side.replies else None
    side.replies = deque(reply for reply in side.unroll() if psn_diff(reply.end, psn) <= 0)
    if side.stream_parked_at is not None and (not side.replies or side.replies[0] is not head):
        side.stream_parked_at = None
        core.iommu.forget(qp.stream_waiter)
    region = core.regions.check(rkey, qp.pd, address, length, REMOTE_READ)
    side.replies.append(_stream(qp, psn, rkey, address, length, region))
    core.ready[qp] = None
    return True


def _stream(qp: QueuePair, psn: int, rkey: int, address: int, length: int, region: Region | None) -> ReadStream:
    n_psn = 1 if length <= qp.mtu else -(-length // qp.mtu)
    return ReadStream(psn, n_psn, rkey, address, length, True, qp.recv.msn, region)


def _advance(core: Core, qp: QueuePair, packets: Packets, at: int, end: int, now: int) -> int:
    """Execute what the packet at the expected PSN begins or continues; returns the next index.

    The same index comes back when the queue pair parked.
    """
    side = qp.recv
    side.nak_sent = False
    opcode = int(packets.opcode[at])
    try:
        if opcode in _PLAIN_WRITES and side.inbound is None:
            n_done = whole_writes(core, qp, packets, at, end)
            if n_done:
                return at + n_done
        if opcode == _READ_REQUEST and side.inbound is None:
            n_done = _read_requests(core, qp, packets.part(at, len(packets)))
            if n_done:
                return at + n_done
        if IS_SEND[opcode] or IS_WRITE[opcode]:
            return take_message(core, qp, packets, at, end)
        if side.inbound is not None or packets.payload[at] != 0 or opcode not in _WITHOUT_DATA:
            raise invalid_request()
        _execute_without_data(core, qp, packets.one(at))
    except (Parked, NotReady, Refusal) as reason:
        return at if _stop(core, qp, reason, now) else end
    return at + 1


def _stop(core: Core, qp: QueuePair, reason: Exception, now: int) -> bool:
    """Take note of a step that was not carried out; True when it parked, so that its packets are to be kept."""
    side = qp.recv
    if isinstance(reason, Parked):
        core.counters.parked += 1
        side.parked_at = side.patience.park(side.epsn, now)
        return True
    if isinstance(reason, Refusal):
        refuse(core, qp, reason)
        return False
    assert isinstance(reason, NotReady)
    _acknowledge(core, qp)
    _not_ready(core, qp)
    return False


def refuse(core: Core, qp: QueuePair, refusal: Refusal) -> None:
    """Answer the request at the expected PSN with a NAK and fail the queue pair."""
    side = qp.recv
    side.ack_due = False
    core.counters.sent_nak += 1
    side.replies.append(Reply(side.epsn, refusal.nak, side.msn))
    fail_request(core, qp, refusal)


_READ_REQUEST, _WRITE_ONLY = int(Opcode.READ_REQUEST), int(Opcode.WRITE_ONLY)
_PLAIN_WRITES = frozenset({Opcode.WRITE_ONLY, Opcode.WRITE_FIRST})
_LONE_SENDS = frozenset({Opcode.SEND_ONLY, Opcode.SEND_ONLY_IMM, Opcode.SEND_ONLY_INVALIDATE})
_WITHOUT_DATA = frozenset({Opcode.READ_REQUEST, Opcode.COMPARE_SWAP, Opcode.FETCH_ADD})


def _execute_without_data(core: Core, qp: QueuePair, packet: Packet) -> None:
    if packet.opcode == _READ_REQUEST:
        _read_request(core, qp, packet)
    else:
        _atomic_request(core, qp, packet)


def _read_request(core: Core, qp: QueuePair, packet: Packet) -> None:
    """Accept a READ: its responses are streamed by `answers.py`."""
    side = qp.recv
    address, rkey, length = unpack_reth(packet.staging.view, packet.offset + BTH_BYTES)
    if not qp.attr.max_dest_rd_atomic:
        raise invalid_request()
    region = None
    if length:
        region = check_target(core, qp, rkey, address, length, REMOTE_READ)
        if region.discipline is _SHORT_TERM:
            prepare(core, region, region.va(address), length, qp.responder_waiter, write=False)
            core.iommu.settle(qp.responder_waiter)
    if side.ack_due:
        _acknowledge(core, qp)  # what came before, and no more: this is answered by its data
    side.msn = (side.msn + 1) & MSN_MASK
    stream = _stream(qp, side.epsn, rkey, address, length, region)
    _save(qp, SavedRequest(side.epsn, stream.n_left, rkey, address, length))
    side.epsn = (side.epsn + stream.n_left) & PSN_MASK
    side.replies.append(stream)
    core.ready[qp] = None


def _read_requests(core: Core, qp: QueuePair, packets: Packets) -> int:
    """Accept several READs at once; returns how many. 0: the first is to be looked at by itself."""
    side = qp.recv
    run, saved = whole_reads(core, qp, packets)
    if run is None:
        return 0
    if side.ack_due:
        _acknowledge(core, qp)  # what came before, and no more: these are answered by their data
    n = len(run.ends)
    side.msn = (side.msn + n) & MSN_MASK
    side.epsn = run.end
    for request in saved:
        _save(qp, request)
    side.replies.append(run)
    core.ready[qp] = None
    return n


def _atomic_request(core: Core, qp: QueuePair, packet: Packet) -> None:
    """Execute an atomic and keep its result for duplicates."""
    side = qp.recv
    eth = AtomicEth.parse(packet.staging.view, packet.offset + BTH_BYTES)
    if not qp.attr.max_dest_rd_atomic or eth.address % ATOMIC_BYTES:
        raise invalid_request()
    region = check_target(core, qp, eth.rkey, eth.address, ATOMIC_BYTES, REMOTE_ATOMIC)
    swap = packet.opcode == Opcode.COMPARE_SWAP
    original = atomics.execute(
        core,
        region,
        region.va(eth.address),
        compare=eth.compare if swap else None,
        operand=eth.swap_or_add,
        waiter=waiter_for(region, qp.responder_waiter),
    )
    if original == PARKED:
        raise Parked
    if original is None:
        raise no_access()
    _acknowledge(core, qp)
    side.msn = (side.msn + 1) & MSN_MASK
    _save(qp, SavedRequest(side.epsn, 1, eth.rkey, eth.address, ATOMIC_BYTES, original))
    side.replies.append(Reply(side.epsn, SYNDROME_ACK, side.msn, original))
    side.epsn = psn_add(side.epsn, 1)
    core.ready[qp] = None


def _save(qp: QueuePair, request: SavedRequest) -> None:
    saved = qp.recv.saved
    saved.append(request)
    while len(saved) > (qp.attr.max_dest_rd_atomic or 0):
        saved.popleft()
