"""The completer: what the peer answers to our requests.

An answer moves `una` forward: an ACK over any number of SENDs and WRITEs, a READ or atomic response over its own PSN
and, implicitly, over the SENDs and WRITEs before it. READs and atomics need their own answer: an ACK beyond one
means the answer was lost, and everything from there is asked for again.

Sources: IBTA volume 1, 9.7.5 and 9.7.7; the RNR and retry counters follow ``rxe_comp.c``, except that retry_cnt 7
means seven (IBTA), not for ever.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TypeGuard

from nopin.iommu.access import PARKED
from nopin.nic.abi import AsyncEventType, QpState, WcStatus, WrOpcode
from nopin.nic.core import Core, fail, send_done, sends_done, waiter_for
from nopin.nic.packets import HELD_PACKETS_MAX, Packet, Packets, first_true
from nopin.nic.qp import WINDOW_PACKETS_MAX, WINDOW_PACKETS_MIN, QueuePair
from nopin.nic.requester import restart_timer, rewind
from nopin.nic.runs import Run
from nopin.nic.scatter import copy_piece, push, scatter
from nopin.nic.wire.aeth import KIND_SHIFT, VALUE_MASK, Nak, SyndromeKind
from nopin.nic.wire.headers import parse_atomic_ack
from nopin.nic.wire.kinds import KINDS
from nopin.nic.wire.opcodes import AETH_BYTES, BTH_BYTES, IS_READ_RESPONSE, Opcode
from nopin.nic.wire.psn import PSN_MASK, psn_add, psn_diff
from nopin.nic.work import ATOMIC_BYTES, IS_ATOMIC, NEEDS_ANSWER, SendWork

_ALIVE = (QpState.RTS, QpState.SQD)
_SQD = QpState.SQD
_READ = WrOpcode.RDMA_READ
_ATOMIC_ACK = int(Opcode.ATOMIC_ACKNOWLEDGE)
_ACK = int(SyndromeKind.ACK)

_RETRY_FOR_EVER = 7
"""rnr_retry 7 never runs out."""

NAK_STATUS = {
    Nak.INVALID_REQUEST: WcStatus.REM_INV_REQ_ERR,
    Nak.REMOTE_ACCESS_ERROR: WcStatus.REM_ACCESS_ERR,
    Nak.REMOTE_OPERATIONAL_ERROR: WcStatus.REM_OP_ERR,
}


def receive(core: Core, qp: QueuePair, packets: Packets, now: int) -> None:
    """Take response packets, in order of arrival."""
    side = qp.send
    if side.parked == "scatter":
        _hold(core, qp, packets)
        return
    at, n = 0, len(packets)
    ends = _run_ends(packets)
    while at < n and qp.state in _ALIVE:
        opcode = int(packets.opcode[at])
        if packets.payload[at] < 0:
            core.counters.malformed_drop += 1
            at += 1
        elif IS_READ_RESPONSE[opcode]:
            at = _read_responses(core, qp, packets, at, ends[bisect_right(ends, at)], now)
        else:
            _acknowledge(core, qp, packets.one(at), now)
            at += not side.parked
        if side.parked == "scatter":
            _hold(core, qp, packets.part(at, n))
            return


def receive_one(core: Core, qp: QueuePair, packet: Packet, now: int) -> None:
    """Take a lone response packet: at once if it answers the oldest work, as a batch of one otherwise."""
    side = qp.send
    if side.parked != "scatter" and packet.payload >= 0:
        if not KINDS[packet.opcode].read_response:
            _acknowledge(core, qp, packet, now)
            if side.parked == "scatter":
                _hold(core, qp, packet.alone())
            return
        if side.works and _is_whole_answer(work := side.works[0], qp, packet):
            _take_whole_answer(core, qp, work, packet, now)
            return
    receive(core, qp, packet.alone(), now)


def resume(core: Core, qp: QueuePair, now: int) -> None:
    """Go on after a local page has come."""
    side = qp.send
    parked, side.parked = side.parked, ""
    core.ready[qp] = None
    if parked != "scatter":
        return
    held, side.held, side.n_held = side.held, [], 0
    for packets in held:
        receive(core, qp, packets, now)
    if qp.state in _ALIVE:  # one of them may have ended it, and then nobody answers what is outstanding
        restart_timer(qp, now)


def _hold(core: Core, qp: QueuePair, packets: Packets) -> None:
    """Keep responses until a local page has come; those beyond the bound are as good as lost on the way."""
    side = qp.send
    fits = min(len(packets), HELD_PACKETS_MAX - side.n_held)
    core.counters.parked_drop += len(packets) - fits
    if fits <= 0:
        return
    side.held.append(packets.part(0, fits).detach())
    side.n_held += fits


def on_deadline(core: Core, qp: QueuePair, now: int) -> None:
    """Fire the timers that are due: the end of an RNR wait, or the acknowledge timeout."""
    side = qp.send
    if side.wait_until is not None and now >= side.wait_until:
        side.wait_until = None
        core.ready[qp] = None
    if side.deadline is None or now < side.deadline:
        return
    if side.parked or side.wait_until is not None:
        restart_timer(qp, now)  # a wait of our own is not the peer's silence
        return
    core.counters.ack_timeout += 1
    _retry(core, qp, now)


def deadline(qp: QueuePair) -> int | None:
    """When `on_deadline` wants to be called for this queue pair."""
    side = qp.send
    if side.deadline is None or side.wait_until is None:
        return side.wait_until if side.deadline is None else side.deadline
    return min(side.deadline, side.wait_until)


def settle(core: Core, qp: QueuePair) -> None:
    """Fail work that could not be sent once all before it is done; report a drained send queue."""
    side = qp.send
    if side.halted is not None and side.una == side.sent and side.works and side.works[0] is side.halted:
        finish_with_error(core, qp, side.halted.status)
    elif qp.state is _SQD and not qp.drained and side.una == side.high:
        qp.drained = True
        core.event(AsyncEventType.SQ_DRAINED, qp)


# --- progress -------------------------------------------------------------------------------------------------


def _progress(core: Core, qp: QueuePair, psn: int, now: int) -> None:
    """Acknowledge everything before psn, completing what is whole."""
    side = qp.send
    n_new = psn_diff(psn, side.una)
    if n_new <= 0:
        return
    side.una = psn
    side.acked += n_new
    if side.sent != psn and psn_diff(side.sent, psn) < 0:
        side.sent = psn  # an answer to something sent before a retry rewound us
    while side.asked and psn_diff(side.asked[0][1], psn) < 0:
        side.asked.popleft()
    while side.works:
        work = side.works[0]
        if isinstance(work, Run):
            posts, side.acked = work.take(side.acked)
            sends_done(core, qp, posts, work.opcode)
            if work.n_psn:
                break
            side.works.popleft()
            continue
        if work.status or side.acked < work.n_psn:
            break
        side.acked -= work.n_psn
        side.works.popleft()
        send_done(core, qp, work, WcStatus.SUCCESS)
    side.grown += n_new
    if side.grown >= side.window:
        _open_window(qp)
    side.gap_at = None
    side.retries_left = side.n_retries
    side.rnr_left = qp.attr.rnr_retry or 0
    restart_timer(qp, now)
    if side.works:
        core.ready[qp] = None


def _open_window(qp: QueuePair) -> None:
    """Open the window by a step: once for each window's worth of progress."""
    side = qp.send
    side.grown = 0
    side.window = min(WINDOW_PACKETS_MAX, side.window + WINDOW_PACKETS_MIN)


def _unanswered(qp: QueuePair, psn: int) -> int | None:
    """Return the first PSN up to psn that belongs to a READ or atomic still without an answer."""
    side = qp.send
    position = side.una
    for work in side.works:
        if psn_diff(psn, position) < 0 or work.status:
            return None
        if work.opcode in NEEDS_ANSWER:
            return position
        position = psn_add(work.first_psn, work.n_psn)
    return None


def _retry(core: Core, qp: QueuePair, now: int) -> None:
    """Go back to `una`, if retries are left; a lost packet halves the window."""
    side = qp.send
    if side.retries_left <= 0:
        core.counters.retry_exceeded += 1
        finish_with_error(core, qp, WcStatus.RETRY_EXC_ERR)
        return
    side.retries_left -= 1
    side.window = max(WINDOW_PACKETS_MIN, side.window // 2)
    side.grown = 0
    rewind(core, qp)
    side.deadline = None  # runs again from the moment the packets have gone out


def finish_with_error(core: Core, qp: QueuePair, status: WcStatus) -> None:
    """Complete the oldest work with an error and fail the queue pair."""
    works = qp.send.unroll()
    if works:
        send_done(core, qp, works.popleft(), status)
    fail(core, qp)


# --- acknowledgements -----------------------------------------------------------------------------------------


def _acknowledge(core: Core, qp: QueuePair, packet: Packet, now: int) -> None:
    """Take an ACK, NAK, RNR NAK or atomic response."""
    side, psn = qp.send, packet.psn
    syndrome = packet.staging.view[packet.offset + BTH_BYTES]
    kind = syndrome >> KIND_SHIFT
    if psn_diff(psn, side.una) < 0 or psn_diff(psn, side.high) >= 0:
        core.counters.ghost_response += 1
        return
    if packet.opcode == _ATOMIC_ACK:
        _atomic_response(core, qp, packet, now)
    elif kind == _ACK:
        lost = _unanswered(qp, psn)
        _progress(core, qp, psn_add(psn, 1) if lost is None else lost, now)
        if lost is not None:
            _ask_again(core, qp, now)
    elif kind == SyndromeKind.RNR_NAK:
        core.counters.rcvd_rnr_nak += 1
        if _reached(core, qp, psn, now):
            wait_for_receiver(core, qp, syndrome & VALUE_MASK, now)
    elif kind == SyndromeKind.NAK:
        core.counters.rcvd_nak += 1
        if _reached(core, qp, psn, now):
            _take_nak(core, qp, syndrome, now)
    else:
        core.counters.malformed_drop += 1


def _reached(core: Core, qp: QueuePair, psn: int, now: int) -> bool:
    """Acknowledge what lies before a NAK's PSN; False if an answer before it is missing (ask again instead)."""
    lost = _unanswered(qp, psn_add(psn, -1))
    _progress(core, qp, psn if lost is None else lost, now)
    if lost is not None:
        _ask_again(core, qp, now)
    return lost is None


def wait_for_receiver(core: Core, qp: QueuePair, code: int, now: int) -> None:
    """Wait as the peer's RNR NAK asks, if RNR retries are left."""
    side = qp.send
    if (qp.attr.rnr_retry or 0) != _RETRY_FOR_EVER:
        if side.rnr_left <= 0:
            core.counters.rnr_retry_exceeded += 1
            finish_with_error(core, qp, WcStatus.RNR_RETRY_EXC_ERR)
            return
        side.rnr_left -= 1
    rewind(core, qp)
    side.wait_until = now + qp.timers.rnr_ns[code]
    side.deadline = None


def _take_nak(core: Core, qp: QueuePair, syndrome: int, now: int) -> None:
    if syndrome == Nak.SEQUENCE_ERROR:
        _retry(core, qp, now)
        return
    status = NAK_STATUS.get(Nak(syndrome)) if syndrome in set(Nak) else None
    if status is None:
        core.counters.malformed_drop += 1
        return
    finish_with_error(core, qp, status)


def _ask_again(core: Core, qp: QueuePair, now: int) -> None:
    """Repeat a request whose answer was lost, once per gap; further losses are the timer's."""
    side = qp.send
    core.counters.out_of_seq_response += 1
    if side.gap_at == side.una:
        return
    _retry(core, qp, now)
    side.gap_at = side.una


# --- answers with data ----------------------------------------------------------------------------------------


def _answering(core: Core, qp: QueuePair, psn: int, now: int) -> SendWork | Run | None:
    """Return the work that expects the answer with this PSN next; acknowledges the SENDs and WRITEs before it."""
    side = qp.send
    if psn_diff(psn, side.una) < 0 or psn_diff(psn, side.high) >= 0:
        core.counters.ghost_response += 1
        return None
    lost = _unanswered(qp, psn)
    if lost is None:
        core.counters.ghost_response += 1
        return None
    _progress(core, qp, lost, now)
    if lost != psn:
        _ask_again(core, qp, now)
        return None
    return side.works[0]


def _atomic_response(core: Core, qp: QueuePair, packet: Packet, now: int) -> None:
    work = _answering(core, qp, packet.psn, now)
    if not isinstance(work, SendWork) or work.opcode not in IS_ATOMIC or packet.payload != 0:
        return
    original = parse_atomic_ack(packet.staging.view, packet.offset + BTH_BYTES + AETH_BYTES)
    core.scratch.view[:ATOMIC_BYTES] = original.to_bytes(ATOMIC_BYTES, "little")
    done = push(core, work.pieces, core.scratch, qp.requester_waiter)
    if done == PARKED:
        _park(core, qp)
        return
    if done < ATOMIC_BYTES:
        _local_error(core, qp)
        return
    _progress(core, qp, psn_add(packet.psn, 1), now)


def _is_whole_answer(work: SendWork | Run, qp: QueuePair, packet: Packet) -> TypeGuard[SendWork]:
    """Say whether a packet is the only response to a READ that is the oldest work, and was asked for."""
    side, psn, length = qp.send, packet.psn, packet.payload
    if not isinstance(work, SendWork) or work.opcode is not _READ or work.n_psn != 1 or work.status:
        return False
    if psn != side.una or psn != work.first_psn or psn == side.high:  # `una` is never beyond `high`
        return False
    return length == work.length and packet.pad == -length & 3 and len(work.pieces) == 1


def _take_whole_answer(core: Core, qp: QueuePair, work: SendWork, packet: Packet, now: int) -> None:
    payload_at = packet.offset + packet.header
    done = copy_piece(core, work.pieces[0], packet.staging, payload_at, qp.requester_waiter, write=True)
    if done == PARKED:
        _park(core, qp)
        _hold(core, qp, packet.alone())
    elif done < work.length:
        _local_error(core, qp)
    else:
        _progress(core, qp, (packet.psn + 1) & PSN_MASK, now)


def _read_responses(core: Core, qp: QueuePair, packets: Packets, at: int, end: int, now: int) -> int:
    """Take READ responses that follow one another up to `end`; returns the index after them (the same when it parked).

    Those of one READ, that is, or of a run: the others are the next call's.
    """
    psn = int(packets.psn[at])
    work = _answering(core, qp, psn, now)
    if work is None or work.opcode is not WrOpcode.RDMA_READ:
        return at + 1
    if isinstance(work, Run):
        n_taken = _take_run(core, qp, work, packets, at, end, now)
        if n_taken:
            return at + n_taken
        work = qp.send.unroll()[0]
    index = psn_diff(psn, work.first_psn)
    stop = min(end, at + work.n_psn - index)
    n_good = _well_sized(qp, work, packets, at, stop, index)
    if n_good == 0:
        finish_with_error(core, qp, WcStatus.BAD_RESP_ERR)
        return stop
    total = min(n_good * qp.mtu, work.length - index * qp.mtu)
    if total and not _take_payload(core, qp, work, packets, at, at + n_good, index, total):
        return at if qp.send.parked else stop
    _progress(core, qp, psn_add(psn, n_good), now)
    return at + n_good


def _take_run(core: Core, qp: QueuePair, run: Run, packets: Packets, at: int, end: int, now: int) -> int:
    """Take responses to READs of a run, up to `end`, with one copy; returns how many.

    0: something is special about one of them, or about the memory, and its work will find out by itself. Copying some
    of the bytes again is harmless. Requires: the first is the one at `una`.
    """
    side, region = qp.send, run.region
    n = min(end - at, psn_diff(side.high, side.una), run.n_psn - side.acked)
    part = run.part(side.acked, side.acked + n)
    payloads = part.payloads()
    wrong = packets.payload[at : at + n] != payloads
    wrong |= packets.pads[at : at + n] != (-payloads & 3)
    if first_true(wrong) >= 0 or not region.alive:
        return 0
    local, waiter = packets.payload_iov(at, at + n), waiter_for(region, qp.requester_waiter)
    done = core.iommu.copy_held_v(region.pasid, run.local(part), packets.staging, local, waiter, write=True)
    if done != int(payloads.sum()):
        return 0
    _progress(core, qp, psn_add(side.una, n), now)
    return n


def _take_payload(
    core: Core, qp: QueuePair, work: SendWork, packets: Packets, at: int, stop: int, index: int, total: int
) -> bool:
    """Copy READ data to where the client wants it; False when it parked or failed."""
    pieces = list(work.slice(index * qp.mtu, total))
    done = scatter(core, pieces, packets.staging, packets.payload_iov(at, stop), qp.requester_waiter)
    if done == PARKED:
        _park(core, qp)
        return False
    if done < total:
        _local_error(core, qp)
        return False
    return True


def _park(core: Core, qp: QueuePair) -> None:
    core.counters.parked += 1
    qp.send.parked = "scatter"


def _local_error(core: Core, qp: QueuePair) -> None:
    core.counters.local_protection_error += 1
    finish_with_error(core, qp, WcStatus.LOC_PROT_ERR)


def _run_ends(packets: Packets) -> list[int]:
    """Return the indexes after runs of READ responses that follow one another; other packets are by themselves."""
    is_read = IS_READ_RESPONSE[packets.opcode]
    if first_true(~is_read) < 0:
        return packets.breaks()
    breaks = set(packets.breaks())
    apart = ~is_read[1:] | ~is_read[:-1]
    breaks.update((apart.nonzero()[0] + 1).tolist())
    return sorted(breaks)


def _well_sized(qp: QueuePair, work: SendWork, packets: Packets, at: int, stop: int, index: int) -> int:
    """Count the leading responses that carry exactly what their place in the READ demands."""
    ends = index + stop - at == work.n_psn
    n_full = packets.count_full(at, stop - ends, qp.mtu)
    if not ends or n_full < stop - at - 1:
        return n_full
    last = work.length - (work.n_psn - 1) * qp.mtu
    return n_full + (int(packets.payload[stop - 1]) == last and packets.pad(stop - 1) == (-last & 3))
