"""Messages that arrive in packets: WRITE and SEND, placed run by run.

A run is what is here of one message: its packets in order, up to and including its last. It is checked as a whole
(opcode order, sizes, pads), copied with one call, and only then does the expected PSN move.
"""

from __future__ import annotations

import numpy as np

from nopin.iommu.access import PARKED
from nopin.nic.abi import WcFlags, WcOpcode, WcStatus
from nopin.nic.core import Core, recv_done, take_recv, waiter_for
from nopin.nic.packets import Packet, Packets, first_true
from nopin.nic.qp import Inbound, QueuePair
from nopin.nic.refusal import NotReady, Parked, Refusal, check_target, invalid_request, no_access, prepare
from nopin.nic.rights import REMOTE_WRITE
from nopin.nic.scatter import prepare_pieces, push, scatter
from nopin.nic.wire.aeth import MSN_MASK, Nak
from nopin.nic.wire.headers import Reth, parse_u32
from nopin.nic.wire.opcodes import BTH_BYTES, ENDS_MESSAGE, HAS_IETH, HAS_IMM, IMM_BYTES, IS_SEND, IS_WRITE, Opcode
from nopin.nic.wire.psn import PSN_MASK, psn_add
from nopin.nic.work import RecvWork, slice_pieces


def take_message(core: Core, qp: QueuePair, packets: Packets, at: int, end: int) -> int:
    """Execute the packets of one message that are here; returns the index after them."""
    side = qp.recv
    opcode = int(packets.opcode[at])
    inbound = side.inbound
    if inbound is None:
        inbound = _begin(core, qp, packets, at)
    elif bool(IS_SEND[opcode]) != (inbound.recv is not None) or opcode in _STARTS:
        raise invalid_request()
    stop = _message_end(packets, at, end)
    ends = bool(ENDS_MESSAGE[packets.opcode[stop - 1]])
    n_good = _well_sized(qp, inbound, packets, at, stop, ends=ends)
    needs_recv = ends and inbound.recv is None and bool(HAS_IMM[packets.opcode[stop - 1]])
    if n_good == stop - at and needs_recv and side.next_recv is None:
        side.next_recv = take_recv(core, qp)
        if side.next_recv is None:
            n_good -= 1  # everything but the packet that needs the receive
            _place(core, qp, inbound, packets, at, at + n_good)
            raise NotReady
    _place(core, qp, inbound, packets, at, at + n_good)
    if n_good < stop - at:
        side.inbound = inbound
        raise _bad_size(inbound)
    if ends:
        _complete(core, qp, inbound, packets.one(stop - 1))
    return stop


def lone_send(core: Core, qp: QueuePair, packet: Packet) -> bool:
    """Execute a SEND of one packet, without arrays; False: nothing was done, `take_message` will find out why.

    Raises:
        NotReady, Parked: nothing was done.
        Refusal: the receive in use cannot take it.
    """
    side, length = qp.recv, packet.payload
    if not 0 <= length <= qp.mtu or packet.pad != -length & 3:
        return False
    recv = _receive_for(core, qp)
    if length > recv.capacity:
        side.next_recv = recv
        return False
    pieces, payload_at = slice_pieces(recv.pieces, 0, length), packet.offset + packet.header
    done = push(core, pieces, packet.staging, qp.responder_waiter, offset=payload_at)
    if done == PARKED:
        side.next_recv = recv
        raise Parked
    inbound = Inbound(recv=recv, received=length)
    if done < length:
        side.inbound = inbound
        raise _bad_memory(inbound)
    side.epsn = (side.epsn + 1) & PSN_MASK
    side.ack_due |= packet.ack_req
    _complete(core, qp, inbound, packet)
    return True


_SEND_MIDDLE = int(Opcode.SEND_MIDDLE)  # plain numbers: numpy asks an enumeration for its arrays first, slowly
_WRITE_MIDDLE = int(Opcode.WRITE_MIDDLE)
_STARTS = frozenset(
    {
        Opcode.SEND_FIRST,
        Opcode.SEND_ONLY,
        Opcode.SEND_ONLY_IMM,
        Opcode.SEND_ONLY_INVALIDATE,
        Opcode.WRITE_FIRST,
        Opcode.WRITE_ONLY,
        Opcode.WRITE_ONLY_IMM,
    }
)


def _begin(core: Core, qp: QueuePair, packets: Packets, at: int) -> Inbound:
    """Open a message: resolve where it goes. Leaves no trace when it parks or is refused."""
    opcode = int(packets.opcode[at])
    if opcode not in _STARTS:
        raise invalid_request()
    if packets.payload[at] < 0:
        raise invalid_request()
    if IS_SEND[opcode]:
        return Inbound(recv=_receive_for(core, qp))
    reth = Reth.parse(packets.staging.view, int(packets.offsets[at]) + BTH_BYTES)
    if reth.length == 0:
        return Inbound()
    region = check_target(core, qp, reth.rkey, reth.address, reth.length, REMOTE_WRITE)
    va = region.va(reth.address)
    prepare(core, region, va, reth.length, qp.responder_waiter, write=True)
    return Inbound(region=region, va=va, length=reth.length)


def _receive_for(core: Core, qp: QueuePair) -> RecvWork:
    """Take the receive that a SEND goes into. Leaves no trace when it parks; a bad one is the message's own."""
    recv = take_recv(core, qp)
    if recv is None:
        raise NotReady
    if recv.status:
        qp.recv.inbound = Inbound(recv=recv)
        raise Refusal(Nak.REMOTE_OPERATIONAL_ERROR, recv.status)
    if not prepare_pieces(core, recv.pieces, qp.responder_waiter, write=True):
        qp.recv.next_recv = recv
        raise Parked
    return recv


def _message_end(packets: Packets, at: int, end: int) -> int:
    """Return the index after the last packet here that can belong to the message at `at`."""
    first = int(packets.opcode[at])
    if ENDS_MESSAGE[first]:
        return at + 1
    middle, family = (_SEND_MIDDLE, IS_SEND) if IS_SEND[first] else (_WRITE_MIDDLE, IS_WRITE)
    other = first_true(packets.opcode[at + 1 : end] != middle)
    if other < 0:
        return end
    stop = at + 1 + other
    last = int(packets.opcode[stop])
    return stop + 1 if ENDS_MESSAGE[last] and family[last] and last not in _STARTS else stop


def _well_sized(qp: QueuePair, inbound: Inbound, packets: Packets, at: int, stop: int, *, ends: bool) -> int:
    """Count the leading packets whose payload and pad are right for their position.

    All but the last of a message are exactly one MTU without pad; the last has the rest.
    """
    n_full = stop - at - ends
    n_right = packets.count_full(at, stop - ends, qp.mtu)
    if n_right < n_full:
        return n_right
    total = inbound.received + n_full * qp.mtu
    limit = inbound.recv.capacity if inbound.recv is not None else inbound.length
    if total > limit or (not ends and inbound.recv is None and total == limit):
        # A WRITE's last byte belongs to its last packet, so the full ones must end before the limit.
        return max(0, min(n_full, (limit - inbound.received - (inbound.recv is None)) // qp.mtu))
    if not ends:
        return n_full
    last = int(packets.payload[stop - 1])
    only = int(packets.opcode[stop - 1]) in _STARTS
    fits = (0 if only else 1) <= last <= qp.mtu and packets.pad(stop - 1) == (-last & 3)
    exact = total + last <= limit if inbound.recv is not None else total + last == limit
    return n_full + 1 if fits and exact else n_full


def _bad_size(inbound: Inbound) -> Refusal:
    """A message longer than its receive buffer is LOC_LEN_ERR at the receiver (the verbs' meaning)."""
    return invalid_request() if inbound.recv is None else Refusal(Nak.INVALID_REQUEST, WcStatus.LOC_LEN_ERR)


def _place(core: Core, qp: QueuePair, inbound: Inbound, packets: Packets, at: int, stop: int) -> None:
    """Copy the payloads of well-formed packets to where they belong and advance the sequence.

    Raises:
        Parked: nothing was copied and nothing advanced.
        Refusal: the sequence advanced over the packets that were copied whole.
    """
    side = qp.recv
    if stop > at:
        # `_well_sized` has seen that all but perhaps the last are full.
        total = (stop - at - 1) * qp.mtu + int(packets.places[stop - 1, 1])
        if total:
            _copy(core, qp, inbound, packets, at, stop, total)
        _advance_over(qp, inbound, packets, at, stop, total)
        side.inbound = inbound


def _advance_over(qp: QueuePair, inbound: Inbound, packets: Packets, at: int, stop: int, n_bytes: int) -> None:
    side = qp.recv
    side.epsn = psn_add(side.epsn, stop - at)
    inbound.received += n_bytes
    side.ack_due |= packets.asks_ack(at, stop)


def _copy(core: Core, qp: QueuePair, inbound: Inbound, packets: Packets, at: int, stop: int, total: int) -> None:
    done = _copy_out(core, qp, inbound, packets, at, stop, total)
    if done == total:
        return
    if done == PARKED:
        if inbound.recv is not None and qp.recv.inbound is None:
            qp.recv.next_recv = inbound.recv
        raise Parked
    sizes = packets.payload[at:stop]
    whole = int(np.searchsorted(np.cumsum(sizes), done, "right"))
    _advance_over(qp, inbound, packets, at, at + whole, int(sizes[:whole].sum()))
    qp.recv.inbound = inbound
    raise _bad_memory(inbound)


def _bad_memory(inbound: Inbound) -> Refusal:
    """Memory that cannot be written is the peer's mistake in a WRITE, and ours in a SEND."""
    return no_access() if inbound.recv is None else Refusal(Nak.REMOTE_OPERATIONAL_ERROR, WcStatus.LOC_PROT_ERR)


def _copy_out(core: Core, qp: QueuePair, inbound: Inbound, packets: Packets, at: int, stop: int, total: int) -> int:
    """Copy payloads; returns bytes done or PARKED."""
    staging, waiter = packets.staging, qp.responder_waiter
    if inbound.recv is None:
        region = inbound.region
        assert region is not None
        if not region.alive:
            return 0
        va = inbound.va + inbound.received
        if stop - at == 1:
            offset = int(packets.places[at, 0])
            return core.iommu.write(region.pasid, va, total, staging, offset, region.meter, waiter_for(region, waiter))
        remote = np.array([[va, total]], np.uint64)
        local = packets.payload_iov(at, stop)
        return core.iommu.write_v(region.pasid, remote, staging, local, region.meter, waiter_for(region, waiter))
    pieces = list(slice_pieces(inbound.recv.pieces, inbound.received, total))
    return scatter(core, pieces, staging, packets.payload_iov(at, stop), waiter)


def _complete(core: Core, qp: QueuePair, inbound: Inbound, last: Packet) -> None:
    """Finish a message at its last packet: count it, complete the receive it used."""
    side = qp.recv
    side.inbound = None
    recv = inbound.recv
    imm, flags = 0, WcFlags.NONE
    if HAS_IMM[last.opcode] or HAS_IETH[last.opcode]:
        imm = parse_u32(last.staging.view, last.offset + last.header - IMM_BYTES)
        flags = WcFlags.WITH_IMM if HAS_IMM[last.opcode] else WcFlags.WITH_INV
    if flags is WcFlags.WITH_INV and not core.regions.invalidate(imm, qp.pd):
        # The sequence has passed the packet; the NAK must name it.
        side.epsn = psn_add(side.epsn, -1)
        side.inbound = inbound
        raise Refusal(Nak.REMOTE_ACCESS_ERROR, WcStatus.REM_INV_REQ_ERR)
    side.msn = (side.msn + 1) & MSN_MASK
    wc_opcode = WcOpcode.RECV
    if recv is None:
        if flags is not WcFlags.WITH_IMM:
            return
        recv, side.next_recv = side.next_recv, None
        assert recv is not None, "a WRITE with immediate took its receive before it was placed"
        wc_opcode = WcOpcode.RECV_RDMA_WITH_IMM
    recv_done(
        core,
        qp,
        recv,
        WcStatus.SUCCESS,
        opcode=wc_opcode,
        byte_len=inbound.received,
        imm=imm,
        flags=flags,
        solicited=last.solicited,
    )
