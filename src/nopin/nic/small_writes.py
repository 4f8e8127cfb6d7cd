"""Single-packet WRITEs: many into one region, executed with one copy, or a lone one, without arrays.

The first is the steady state of batched small messages, the second that of latency. Validity is decided at once, and
whatever is special about a packet is left to the ordinary way (`inbound.py`), which finds out what it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.access import PARKED
from nopin.mm.space import IoVec
from nopin.nic.abi import Discipline
from nopin.nic.core import Core, waiter_for
from nopin.nic.mr import Region
from nopin.nic.packets import Packet, Packets, first_true
from nopin.nic.qp import QueuePair
from nopin.nic.refusal import Parked, no_access
from nopin.nic.rights import REMOTE_WRITE
from nopin.nic.wire.aeth import MSN_MASK
from nopin.nic.wire.headers import parse_reth, unpack_reth
from nopin.nic.wire.opcodes import BTH_BYTES, Opcode
from nopin.nic.wire.psn import PSN_MASK, psn_add

_SHORT_TERM = Discipline.SHORT_TERM
_WRITE_ONLY = int(Opcode.WRITE_ONLY)

_MANY = 4
"""From this many in a row it pays to handle them together."""


def small_writes(core: Core, qp: QueuePair, packets: Packets, at: int, end: int) -> int:
    """Execute many single-packet WRITEs into one region with one copy; returns how many were done.

    0 means: handle the first one the ordinary way, which finds what is special about it.
    """
    # Without a payload there may be no whole RETH either.
    other = first_true((packets.opcode[at:end] != _WRITE_ONLY) | (packets.payload[at:end] <= 0))
    n = end - at if other < 0 else other
    if n < _MANY or not (qp.attr.access or 0) & REMOTE_WRITE:
        return 0
    run = packets.part(at, at + n)
    reth = parse_reth(run.staging.array, run.offsets + BTH_BYTES)
    rkey = int(reth.rkey[0])
    region = core.regions.find(rkey, qp.pd)
    if region is None or not region.access & REMOTE_WRITE or region.discipline is _SHORT_TERM:
        return 0
    good = _plain_writes(qp, run, reth.rkey == rkey, reth.length, reth.address, region)
    bad = first_true(~good)
    n = n if bad < 0 else bad
    if n < _MANY:
        return 0
    return _execute_small(core, qp, run.part(0, n), region, region.places(reth.address[:n], reth.length[:n]))


def lone_write(core: Core, qp: QueuePair, packet: Packet) -> bool:
    """Execute one single-packet WRITE; False: nothing was done, the ordinary way will find out why.

    Raises:
        Parked: the page is on its way; nothing was done.
        Refusal: the memory cannot be written.
    """
    side, length = qp.recv, packet.payload
    if not 0 < length <= qp.mtu or packet.pad != -length & 3 or not (qp.attr.access or 0) & REMOTE_WRITE:
        return False
    address, rkey, announced = unpack_reth(packet.staging.view, packet.offset + BTH_BYTES)
    region = core.regions.check(rkey, qp.pd, address, length, REMOTE_WRITE)
    if region is None or announced != length or region.discipline is _SHORT_TERM:
        return False
    va, waiter = region.va(address), waiter_for(region, qp.responder_waiter)
    payload_at = packet.offset + packet.header
    done = core.iommu.write(region.pasid, va, length, packet.staging, payload_at, region.meter, waiter)
    if done == PARKED:
        raise Parked
    if done < length:
        raise no_access()
    side.epsn = (side.epsn + 1) & PSN_MASK
    side.msn = (side.msn + 1) & MSN_MASK
    side.ack_due |= packet.ack_req
    return True


def _plain_writes(
    qp: QueuePair,
    run: Packets,
    same_key: NDArray[np.bool_],
    length: NDArray[np.uint32],
    address: NDArray[np.uint64],
    region: Region,
) -> NDArray[np.bool_]:
    """Say which WRITEs of a run are well formed and inside the region: (n,) bool."""
    return np.asarray(
        same_key
        & (length > 0)
        & (length == run.payload)
        & (length <= qp.mtu)
        & (run.pads == (-run.payload & 3))
        & region.hold_each(address, length)
    )


def _execute_small(core: Core, qp: QueuePair, run: Packets, region: Region, remote: IoVec) -> int:
    side = qp.recv
    total = int(run.payload.sum())
    waiter = waiter_for(region, qp.responder_waiter)
    done = core.iommu.write_v(region.pasid, remote, run.staging, run.payload_iov(0, len(run)), region.meter, waiter)
    if done == PARKED:
        raise Parked
    n_done = len(run) if done == total else int(np.searchsorted(np.cumsum(run.payload), done, "right"))
    side.epsn = psn_add(side.epsn, n_done)
    side.msn = (side.msn + n_done) & MSN_MASK
    side.ack_due |= run.asks_ack(0, n_done)
    if n_done < len(run):
        raise no_access()
    return n_done
