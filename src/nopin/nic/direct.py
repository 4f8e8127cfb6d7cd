"""The direct path: both queue pairs live on this device, so messages are copied from memory to memory.

No packet is built and nothing can be lost, but the outcomes are those of the wire, decided by the same functions: who
may access what (`refusal.check_target`), which receive is used, what is told to whom when a page cannot be reached.
A message is copied chunk by chunk (`direct_copy.py`); it parks between chunks. READs and WRITEs about which
nothing is special are not even taken from the ring (`direct_posted.py`).
"""

from __future__ import annotations

from nopin.iommu.relay import TURN_BYTES
from nopin.nic import atomics
from nopin.nic.abi import AsyncEventType, QpState, SendFlags, WcFlags, WcOpcode, WcStatus, WrOpcode
from nopin.nic.completer import NAK_STATUS, finish_with_error, wait_for_receiver
from nopin.nic.core import Core, available, recv_done, send_done, take_recv
from nopin.nic.direct_copy import LocalFault, move
from nopin.nic.direct_posted import copy_posted
from nopin.nic.qp import Inbound, QueuePair
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
from nopin.nic.requester import fetch_one, timeout_ns
from nopin.nic.rights import REMOTE_ATOMIC, REMOTE_READ, REMOTE_WRITE
from nopin.nic.scatter import accesses, prepare_pieces, push
from nopin.nic.wire.aeth import Nak
from nopin.nic.wire.psn import psn_add
from nopin.nic.work import (
    ATOMIC_BYTES,
    IS_ATOMIC,
    IS_SEND,
    NEEDS_ANSWER,
    Piece,
    RecvWork,
    SendWork,
)

_RTR, _RTS = QpState.RTR, QpState.RTS
_SENDING = (QpState.RTS, QpState.SQD)
_SUCCESS = WcStatus.SUCCESS
_SOLICITED = int(SendFlags.SOLICITED)

TURN_WORKS = 128
"""As `TURN_BYTES`: what one queue pair may do before the others get their turn."""


def advance(core: Core, qp: QueuePair, now: int) -> None:
    """Carry out posted work in order, as far as it goes this turn."""
    side = qp.send
    if qp.state not in _SENDING or side.parked or side.wait_until is not None:
        return
    n_bytes, n_works = TURN_BYTES, TURN_WORKS
    while n_bytes > 0 and n_works > 0:
        peer = find_peer(core, qp)
        if not side.works and qp.state is _RTS:
            done, length = _take_posted(core, qp, peer, n_works, n_bytes)
            n_works -= done
            n_bytes -= length
        if not side.works:
            break
        work = side.works[0]
        assert isinstance(work, SendWork), "runs are of the wire"
        if work.status:
            finish_with_error(core, qp, work.status)
            return
        if peer is None:
            _no_answer(qp, now)
            return
        if not peer.established and peer.state is _RTR:
            peer.established = True
            core.event(AsyncEventType.COMM_EST, peer)
        if not _carry_out(core, qp, peer, work, now):
            return
        _complete(core, qp, work)
        n_bytes -= work.length
        n_works -= 1
    if side.works or (qp.state is _RTS and qp.send_ring.has_work):
        core.ready[qp] = None


def _take_posted(core: Core, qp: QueuePair, peer: QueuePair | None, max_works: int, max_bytes: int) -> tuple[int, int]:
    """Carry out what can be in the ring, then take a work that cannot; returns how many were done, and their bytes."""
    n_posted = min(available(core, qp, qp.send_ring), max_works)
    done = 0, 0
    if peer is not None and (peer.established or peer.state is not _RTR):
        done = copy_posted(core, qp, peer, n_posted, max_bytes)
    if done[0] < n_posted and done[1] < max_bytes:
        fetch_one(core, qp)
    return done


def find_peer(core: Core, qp: QueuePair) -> QueuePair | None:
    """Return the queue pair that would answer ours."""
    peer = core.qps.get(qp.attr.dest_qpn or 0)
    if peer is None or not peer.direct or peer.attr.dest_qpn != qp.qpn or not peer.may_receive():
        return None
    return peer


def _no_answer(qp: QueuePair, now: int) -> None:
    """Let the acknowledge timer run, as if packets had gone out and nothing came back."""
    wait = timeout_ns(qp)
    if qp.send.deadline is None and wait is not None:
        qp.send.deadline = now + wait


def _carry_out(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork, now: int) -> bool:
    """Do one work; False when it waits or failed."""
    side = qp.send
    try:
        _execute(core, qp, peer, work)
    except Parked:
        core.counters.parked += 1
        side.parked = "direct"
        return False
    except NotReady:
        core.counters.sent_rnr_nak += 1
        core.counters.rcvd_rnr_nak += 1
        wait_for_receiver(core, qp, peer.attr.min_rnr_timer or 0, now)
        return False
    except LocalFault:
        core.counters.local_protection_error += 1
        finish_with_error(core, qp, WcStatus.LOC_PROT_ERR)
        return False
    except Refusal as refusal:
        core.counters.sent_nak += 1
        fail_request(core, peer, refusal)
        finish_with_error(core, qp, NAK_STATUS[refusal.nak])
        return False
    return True


def _complete(core: Core, qp: QueuePair, work: SendWork) -> None:
    """Retire the oldest work, which was carried out."""
    side = qp.send
    side.works.popleft()
    side.una = side.sent = side.high = psn_add(work.first_psn, work.n_psn)
    side.deadline = None
    side.retries_left = side.n_retries
    side.rnr_left = qp.attr.rnr_retry or 0
    counters = core.counters
    counters.direct_messages += 1
    counters.direct_bytes += work.length
    send_done(core, qp, work, _SUCCESS)


def _execute(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> None:
    if work.opcode in IS_ATOMIC:
        _atomic(core, qp, peer, work)
        return
    _prepare_local(core, qp, work)
    if work.opcode in IS_SEND:
        _send(core, qp, peer, work)
    elif work.opcode is WrOpcode.RDMA_READ:
        _read(core, qp, peer, work)
    else:
        _write(core, qp, peer, work)


def _prepare_local(core: Core, qp: QueuePair, work: SendWork) -> None:
    write = work.opcode in NEEDS_ANSWER
    if work.done_bytes == 0 and not prepare_pieces(core, work.pieces, qp.requester_waiter, write=write):
        raise Parked


def _write(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> None:
    while work.done_bytes < work.length:
        pieces = _remote(core, qp, peer, work, REMOTE_WRITE, write=True)
        move(core, qp, work, pieces, no_access, read=False)
    if work.opcode is WrOpcode.RDMA_WRITE_WITH_IMM:
        recv = take_recv(core, peer)
        if recv is None:
            raise NotReady
        _deliver(core, peer, work, recv, WcOpcode.RECV_RDMA_WITH_IMM)


def _read(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> None:
    if not peer.attr.max_dest_rd_atomic:
        raise invalid_request()
    while work.done_bytes < work.length:
        pieces = _remote(core, qp, peer, work, REMOTE_READ, write=False)
        move(core, qp, work, pieces, no_access, read=True)


def _send(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> None:
    recv = _receive_for(core, qp, peer, work)
    while work.done_bytes < work.length:
        move(core, qp, work, recv.pieces, _bad_receive, read=False)
    if work.opcode is WrOpcode.SEND_WITH_INV and not core.regions.invalidate(work.imm, peer.pd):
        raise Refusal(Nak.REMOTE_ACCESS_ERROR, WcStatus.REM_INV_REQ_ERR)
    peer.recv.inbound = None
    _deliver(core, peer, work, recv, WcOpcode.RECV)


def _receive_for(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> RecvWork:
    """Return the peer's receive for a SEND: the one it already began with, or the next."""
    inbound = peer.recv.inbound
    if inbound is not None and inbound.recv is not None:
        return inbound.recv
    recv = take_recv(core, peer)
    if recv is None:
        raise NotReady
    peer.recv.inbound = Inbound(recv=recv)
    if recv.status:
        raise Refusal(Nak.REMOTE_OPERATIONAL_ERROR, recv.status)
    if work.length > recv.capacity:
        raise Refusal(Nak.INVALID_REQUEST, WcStatus.LOC_LEN_ERR)
    if not prepare_pieces(core, recv.pieces, qp.direct_waiter, write=True):
        raise Parked
    return recv


def _atomic(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> None:
    if not peer.attr.max_dest_rd_atomic or work.remote_address % ATOMIC_BYTES:
        raise invalid_request()
    region = check_target(core, peer, work.rkey, work.remote_address, ATOMIC_BYTES, REMOTE_ATOMIC)
    va = region.va(work.remote_address)
    ours = accesses(work.pieces, qp.requester_waiter, write=True)
    theirs = accesses([Piece(region, va, ATOMIC_BYTES)], qp.direct_waiter, write=True)
    if not core.iommu.admit_all(ours + theirs):
        raise Parked  # before the effect, so that the answer can be stored without waiting
    swap = work.opcode is WrOpcode.ATOMIC_CMP_AND_SWP
    original = atomics.execute(
        core,
        region,
        va,
        compare=work.compare_add if swap else None,
        operand=work.swap if swap else work.compare_add,
        waiter=None,
    )
    if original is None:
        raise no_access()
    core.scratch.view[:ATOMIC_BYTES] = original.to_bytes(ATOMIC_BYTES, "little")
    if push(core, work.pieces, core.scratch, None) < ATOMIC_BYTES:
        raise LocalFault


def _remote(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork, need: int, *, write: bool) -> list[Piece]:
    """Check the whole remote range again before each piece: the region may have gone meanwhile."""
    region = check_target(core, peer, work.rkey, work.remote_address, work.length, need)
    va = region.va(work.remote_address)
    if work.done_bytes == 0:
        prepare(core, region, va, work.length, qp.direct_waiter, write=write)
    return [Piece(region, va, work.length)]


def _bad_receive() -> Refusal:
    return Refusal(Nak.REMOTE_OPERATIONAL_ERROR, WcStatus.LOC_PROT_ERR)


def _deliver(core: Core, peer: QueuePair, work: SendWork, recv: RecvWork, opcode: WcOpcode) -> None:
    flags = WcFlags.NONE
    if work.opcode in (WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_WRITE_WITH_IMM):
        flags = WcFlags.WITH_IMM
    elif work.opcode is WrOpcode.SEND_WITH_INV:
        flags = WcFlags.WITH_INV
    recv_done(
        core,
        peer,
        recv,
        WcStatus.SUCCESS,
        opcode=opcode,
        byte_len=work.length,
        imm=work.imm if flags else 0,
        flags=flags,
        solicited=bool(work.flags & _SOLICITED),
    )
