"""From the link to queue pairs: the checks that drop a packet silently, and the grouping of a batch.

The checks are those of IBTA 9.6 in the order of the Linux rxe driver's ``rxe_recv.c``, all counted: length, opcode,
version, P_Key, ICRC, queue pair, its state, the two addresses. What survives is grouped so that each queue pair gets
consecutive packets of one direction at once. A lone packet, which is what latency is made of, goes without arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes, Staging
from nopin.nic.abi import QpState
from nopin.nic.core import Core
from nopin.nic.packets import Packet, Packets, describe
from nopin.nic.qp import RECEIVING_STATES, QueuePair
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import PacketBatch, Path
from nopin.nic.wire.bth import (
    ACK_REQ_BIT,
    PAD_SHIFT,
    PKEY_MASK,
    QPN_MASK,
    SOLICITED_BIT,
    VERSION_MASK,
    BthBatch,
    parse_bth,
    unpack_bth,
)
from nopin.nic.wire.kinds import KINDS
from nopin.nic.wire.opcodes import ICRC_BYTES, IS_KNOWN, IS_REQUEST, IS_RESPONSE, MIN_PACKET_BYTES
from nopin.nic.wire.psn import PSN_MASK

_REQUESTS = frozenset(IS_REQUEST.nonzero()[0].tolist())
_RESPONSES = frozenset(IS_RESPONSE.nonzero()[0].tolist())

_ANSWERED_STATES = (QpState.RTS, QpState.SQD)

Group = tuple[QueuePair, Packets]


class Ingress:
    """Sorts received packets."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._staging: Staging | None = None

    def sort(self, batch: PacketBatch) -> Iterator[Group]:
        """Yield the packets of a batch that are to be taken, by queue pair and direction, in order of arrival."""
        offsets, lengths = batch.offsets, batch.lengths
        if lengths.min(initial=MIN_PACKET_BYTES) < MIN_PACKET_BYTES:
            long_enough = lengths >= MIN_PACKET_BYTES
            self._core.counters.malformed_drop += int((~long_enough).sum())
            offsets, lengths = offsets[long_enough], lengths[long_enough]
            batch.runs = batch.slices = None
        if len(offsets):
            yield from self._sort_many(batch, offsets, lengths)

    def _sort_many(self, batch: PacketBatch, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[Group]:
        bth = parse_bth(batch.buffer, offsets)
        packets = describe(self._staging_of(batch.buffer), offsets, lengths, bth)
        if _of_one_stream(bth) and (batch.icrc_checked or _all_intact(batch, offsets, lengths)):
            qp = self._admit(int(bth.qpn[0]), batch.path, len(bth), request=bool(IS_REQUEST[bth.opcode[0]]))
            if qp is not None:
                yield qp, packets
            return
        good = _well_formed(bth)
        counters = self._core.counters
        counters.malformed_drop += int((~good).sum())
        if not batch.icrc_checked:
            intact = icrc.verify(batch.buffer, offsets, lengths, batch.path)
            counters.icrc_drop += int((good & ~intact).sum())
            good &= intact
        yield from self._groups(packets, bth.qpn, good, batch.path)

    def _groups(
        self, packets: Packets, qpn: NDArray[np.uint32], good: NDArray[np.bool_], path: Path
    ) -> Iterator[Group]:
        # One number per packet whose change starts a new group: direction, queue pair, fit to be used.
        kind = qpn.astype(np.int64)
        kind += kind
        kind += IS_REQUEST[packets.opcode]
        kind[~good] = -1
        edges = [0, *((kind[1:] != kind[:-1]).nonzero()[0] + 1).tolist(), len(packets)]
        for start, end in itertools.pairwise(edges):
            if kind[start] < 0:
                continue
            qp = self._admit(int(qpn[start]), path, end - start, request=bool(kind[start] & 1))
            if qp is not None:
                yield qp, packets if end - start == len(packets) else packets.part(start, end)

    def sort_one(self, batch: PacketBatch, offset: int, length: int) -> tuple[QueuePair, Packet] | None:
        """Return the packet of a batch of one, which is so long and lies there, if it is to be taken."""
        staging, counters = self._staging_of(batch.buffer), self._core.counters
        if length < MIN_PACKET_BYTES:
            counters.malformed_drop += 1
            return None
        opcode, flags, pkey, qpn, psn = unpack_bth(staging.view, offset)
        kind = KINDS[opcode]
        if not kind.known or flags & VERSION_MASK or pkey & PKEY_MASK != PKEY_MASK:
            counters.malformed_drop += 1
            return None
        if not batch.icrc_checked and not icrc.verify_one(staging.view, offset, length, batch.path):
            counters.icrc_drop += 1
            return None
        qp = self._admit(qpn & QPN_MASK, batch.path, 1, request=kind.request)
        if qp is None:
            return None
        pad, header = flags >> PAD_SHIFT & 3, kind.header_bytes
        return qp, Packet(
            staging,
            offset,
            opcode,
            psn & PSN_MASK,
            psn >= ACK_REQ_BIT,
            flags >= SOLICITED_BIT,
            pad,
            length,
            header,
            length - header - pad - ICRC_BYTES,
        )

    def _admit(self, qpn: int, path: Path, n_packets: int, *, request: bool) -> QueuePair | None:
        counters = self._core.counters
        qp = self._core.qps.get(qpn)
        if qp is None:
            counters.unknown_qpn_drop += n_packets
            return None
        if qp.state not in (RECEIVING_STATES if request else _ANSWERED_STATES) or qp.path is None:
            counters.wrong_state_drop += n_packets
            return None
        if path.remote.gid != qp.path.remote.gid or path.local.gid != qp.path.local.gid or qp.direct:
            counters.wrong_path_drop += n_packets
            return None
        return qp

    def _staging_of(self, buffer: Bytes) -> Staging:
        """Wrap the link's buffer, which is the same one call after call."""
        if self._staging is None or self._staging.array is not buffer:
            self._staging = Staging(buffer)
        return self._staging


def _all_intact(batch: PacketBatch, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> bool:
    slices = batch.slices or icrc.slices_of(batch.buffer.data, offsets, lengths)
    return icrc.all_intact(slices, lengths, batch.path, batch.runs)


def _of_one_stream(bth: BthBatch) -> bool:
    """Tell whether all packets are well formed, unmarked, of one queue pair and direction: a long message, mostly."""
    opcodes = set(bth.opcode.tobytes())
    if not (opcodes <= _REQUESTS or opcodes <= _RESPONSES) or not bth.of_one_flow() or bth.first_mark:
        return False
    return not int(bth.flags[0]) & VERSION_MASK and int(bth.pkey[0]) & PKEY_MASK == PKEY_MASK


def _well_formed(bth: BthBatch) -> NDArray[np.bool_]:
    good: NDArray[np.bool_] = IS_KNOWN[bth.opcode]
    good &= (bth.flags & np.uint8(VERSION_MASK)) == 0
    good &= (bth.pkey & np.uint16(PKEY_MASK)) == PKEY_MASK
    return good
