"""WRITEs that are here whole: many into one region, executed with one copy, or a lone one, without arrays.

The first is the steady state of batched messages up to some hundred KiB, the second that of latency. Validity is
decided at once, and whatever is special about a message is left to the ordinary way (`inbound.py`), which finds out
what it is; so are the parts of messages whose other packets are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from nopin.nic.runs import RUN_MIN
from nopin.nic.wire.aeth import MSN_MASK
from nopin.nic.wire.headers import parse_reth, unpack_reth
from nopin.nic.wire.opcodes import BTH_BYTES, ENDS_MESSAGE, HAS_IMM, HAS_RETH, IS_WRITE
from nopin.nic.wire.psn import PSN_MASK, psn_add

_SHORT_TERM = Discipline.SHORT_TERM

_IS_OTHER = ~IS_WRITE | HAS_IMM
"""By opcode: no plain WRITE."""

_WAIT_TOGETHER_BYTES = 64 << 10
"""Where pages are out, so much is looked at at a time, so that what need not wait goes on. Small messages, whose pages
are best asked for all at once, still wait together."""


@dataclass(slots=True, eq=False)
class _Messages:
    """WRITEs that are here whole.

    Attributes:
        packets: all of them, in order.
        stops: (n,) int64, packets up to the end of each message.
        region, remote: where their bytes go: (n, 2) uint64 virtual addresses and lengths.
    """

    packets: Packets
    stops: NDArray[np.int64]
    region: Region
    remote: IoVec

    def first(self, n_bytes: int) -> _Messages:
        """Return the messages that fit so many bytes, at least one."""
        n = max(1, int(np.searchsorted(np.cumsum(self.remote[:, 1]), n_bytes, "right")))
        return _Messages(self.packets.part(0, int(self.stops[n - 1])), self.stops[:n], self.region, self.remote[:n])


def whole_writes(core: Core, qp: QueuePair, packets: Packets, at: int, end: int) -> int:
    """Execute many WRITEs into one region with one copy; returns how many packets were done.

    0 means: handle the first message the ordinary way, which finds what is special about it.

    Raises:
        Parked: pages are on their way; nothing was done.
        Refusal: the memory cannot be written; the sequence advanced over the packets that were copied whole.
    """
    if not (qp.attr.access or 0) & REMOTE_WRITE:
        return 0
    stops = _well_formed(packets.part(at, end), qp.mtu)
    if len(stops) < RUN_MIN:
        return 0
    messages = _addressed(core, qp, packets.part(at, at + int(stops[-1])), stops)
    return 0 if messages is None else _execute(core, qp, messages)


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


def _well_formed(packets: Packets, mtu: int) -> NDArray[np.int64]:
    """Return where messages end that are well formed, whole, and plain WRITEs, from the first packet on: (n,) int64.

    Each packet begins a message exactly if the one before it ended one, all but the last of a message are full, and
    each has a payload: without, there may be no whole RETH either.
    """
    opcode, payload = packets.opcode, packets.payload
    ends = ENDS_MESSAGE[opcode]
    if np.count_nonzero(ends) < RUN_MIN:
        return ends[:0].nonzero()[0]  # long messages: at the price of a look
    wrong = _IS_OTHER[opcode] | (payload <= 0) | (payload > mtu)
    wrong[1:] |= HAS_RETH[opcode[1:]] != ends[:-1]
    wrong |= (payload != mtu) & ~ends
    wrong |= packets.pads != (-payload & 3)
    other = first_true(wrong)
    return (ends if other < 0 else ends[:other]).nonzero()[0] + 1


def _addressed(core: Core, qp: QueuePair, packets: Packets, stops: NDArray[np.int64]) -> _Messages | None:
    """Return those messages, from the first on, that lie in one region and are as long as they say; None if too few."""
    starts = np.empty_like(stops)
    starts[0], starts[1:] = 0, stops[:-1]
    reth = parse_reth(packets.staging.array, packets.offsets[starts] + BTH_BYTES)
    rkey = int(reth.rkey[0])
    region = core.regions.find(rkey, qp.pd)
    if region is None or not region.access & REMOTE_WRITE or region.discipline is _SHORT_TERM:
        return None
    good = (reth.rkey == rkey) & (reth.length == np.add.reduceat(packets.payload, starts))
    bad = first_true(~(good & region.hold_each(reth.address, reth.length)))
    n = len(stops) if bad < 0 else bad
    if n < RUN_MIN:
        return None
    remote = region.places(reth.address[:n], reth.length[:n])
    return _Messages(packets.part(0, int(stops[n - 1])), stops[:n], region, remote)


def _execute(core: Core, qp: QueuePair, messages: _Messages) -> int:
    region = messages.region
    waiter = waiter_for(region, qp.responder_waiter)
    staging, local = messages.packets.staging, messages.packets.payload_iov(0, len(messages.packets))
    done = core.iommu.copy_held_v(region.pasid, messages.remote, staging, local, waiter, write=True)
    if done is None:
        messages = messages.first(_WAIT_TOGETHER_BYTES)
        local = messages.packets.payload_iov(0, len(messages.packets))
        done = core.iommu.write_v(region.pasid, messages.remote, staging, local, region.meter, waiter)
        if done == PARKED:
            raise Parked
    packets, stops = messages.packets, messages.stops
    n_packets, n_messages = len(packets), len(stops)
    if done < int(messages.remote[:, 1].sum()):
        n_packets = int(np.searchsorted(np.cumsum(packets.payload), done, "right"))
        n_messages = int(np.searchsorted(stops, n_packets, "right"))
    side = qp.recv
    side.epsn = psn_add(side.epsn, n_packets)
    side.msn = (side.msn + n_messages) & MSN_MASK
    side.ack_due |= packets.asks_ack(0, n_packets)
    if n_packets < len(packets):
        raise no_access()
    return n_packets
