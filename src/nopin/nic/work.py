"""Work requests as the device holds them: decoded from a ring entry, validated, with their place in PSN space."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from nopin.nic.abi import SGE_DTYPE, WQE_HEADER_BYTES, SendFlags, WcOpcode, WcStatus, WrOpcode
from nopin.nic.mr import LENGTH_BYTES_MAX, Pd, Region, RegionTable
from nopin.nic.rights import LOCAL_WRITE, NOTHING

_HEADER = struct.Struct("<QBBHIQIIQQ")
_SGE = struct.Struct("<QII")
_SGE_BYTES = SGE_DTYPE.itemsize
assert _SGE.size == _SGE_BYTES

ATOMIC_BYTES = 8

_INLINE = int(SendFlags.INLINE)

WC_OPCODE: dict[int, WcOpcode] = {
    WrOpcode.SEND: WcOpcode.SEND,
    WrOpcode.SEND_WITH_IMM: WcOpcode.SEND,
    WrOpcode.SEND_WITH_INV: WcOpcode.SEND,
    WrOpcode.RDMA_WRITE: WcOpcode.RDMA_WRITE,
    WrOpcode.RDMA_WRITE_WITH_IMM: WcOpcode.RDMA_WRITE,
    WrOpcode.RDMA_READ: WcOpcode.RDMA_READ,
    WrOpcode.ATOMIC_CMP_AND_SWP: WcOpcode.COMP_SWAP,
    WrOpcode.ATOMIC_FETCH_AND_ADD: WcOpcode.FETCH_ADD,
}
"""What a completion says its work was."""
_BY_VALUE = {int(opcode): opcode for opcode in WrOpcode}

IS_SEND = frozenset({WrOpcode.SEND, WrOpcode.SEND_WITH_IMM, WrOpcode.SEND_WITH_INV})
IS_WRITE = frozenset({WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM})
IS_ATOMIC = frozenset({WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD})
NEEDS_ANSWER = IS_ATOMIC | {WrOpcode.RDMA_READ}
"""Work that completes by a response of its own, not by an acknowledgement."""


@dataclass(slots=True, eq=False)
class Piece:
    """A range of one region's address space, by virtual address."""

    region: Region
    va: int
    length: int


@dataclass(slots=True, eq=False)
class SendWork:
    """One send work request.

    Attributes:
        pieces: the local scatter list, resolved; empty for inline data.
        status: SUCCESS, or why it cannot be carried out (found locally).
        first_psn: the PSN of its first packet; it takes `n_psn` of them.
        done_bytes: on the direct path, how much has been copied.
    """

    wr_id: int
    opcode: WrOpcode
    flags: int
    imm: int
    remote_address: int
    rkey: int
    compare_add: int
    swap: int
    length: int = 0
    pieces: list[Piece] = field(default_factory=list)
    inline: bytes | None = None
    status: WcStatus = WcStatus.SUCCESS
    first_psn: int = 0
    n_psn: int = 1
    done_bytes: int = 0

    def slice(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield the local ranges of [offset, offset + length) of the message."""
        return slice_pieces(self.pieces, offset, length)


@dataclass(slots=True, eq=False)
class RecvWork:
    """One receive work request in use: its buffers and how much has arrived."""

    wr_id: int
    pieces: list[Piece]
    capacity: int
    status: WcStatus = WcStatus.SUCCESS
    received: int = 0


def slice_pieces(pieces: list[Piece], offset: int, length: int) -> Iterator[Piece]:
    """Yield the parts of a scatter list that hold bytes [offset, offset + length) of it."""
    for piece in pieces:
        if length <= 0:
            return
        if offset >= piece.length:
            offset -= piece.length
            continue
        n_bytes = min(length, piece.length - offset)
        if offset == 0 and n_bytes == piece.length:
            yield piece
        else:
            yield Piece(piece.region, piece.va + offset, n_bytes)
        offset = 0
        length -= n_bytes


def resolve(entry: bytes, n_sge: int, regions: RegionTable, pd: Pd, need: int) -> tuple[list[Piece], int] | None:
    """Resolve the scatter entries of a ring entry; None if a key, right or range is wrong.

    Returns the pieces (empty ones left out) and their total length.
    """
    pieces: list[Piece] = []
    total = 0
    for at in range(WQE_HEADER_BYTES, WQE_HEADER_BYTES + n_sge * _SGE_BYTES, _SGE_BYTES):
        address, length, lkey = _SGE.unpack_from(entry, at)
        if length == 0:
            continue
        region = regions.check(lkey, pd, address, length, need)
        if region is None:
            return None
        pieces.append(Piece(region, region.va(address), length))
        total += length
    return pieces, total


def decode_send(entry: bytes, regions: RegionTable, pd: Pd, max_sge: int, max_inline: int) -> SendWork:
    """Decode a send ring entry. Never fails: what is wrong with it is in `status`."""
    wr_id, opcode_value, flags, n_sge, imm, remote, rkey, n_inline, compare_add, swap = _HEADER.unpack_from(entry)
    opcode = _BY_VALUE.get(opcode_value)
    work = SendWork(wr_id, WrOpcode.SEND if opcode is None else opcode, flags, imm, remote, rkey, compare_add, swap)
    if opcode is None or n_sge > max_sge:
        work.status = WcStatus.LOC_QP_OP_ERR
        return work
    if flags & _INLINE:
        _decode_inline(work, entry, n_inline, max_inline)
        return work
    need = LOCAL_WRITE if opcode in NEEDS_ANSWER else NOTHING
    resolved = resolve(entry, n_sge, regions, pd, need)
    if resolved is None:
        work.status = WcStatus.LOC_PROT_ERR
        return work
    work.pieces, work.length = resolved
    if work.length > LENGTH_BYTES_MAX or (opcode in IS_ATOMIC and work.length != ATOMIC_BYTES):
        work.status = WcStatus.LOC_LEN_ERR
    return work


def _decode_inline(work: SendWork, entry: bytes, n_inline: int, max_inline: int) -> None:
    if n_inline > max_inline or work.opcode in NEEDS_ANSWER:
        work.status = WcStatus.LOC_QP_OP_ERR
        return
    work.inline = entry[WQE_HEADER_BYTES : WQE_HEADER_BYTES + n_inline]
    work.length = n_inline


def decode_recv(entry: bytes, regions: RegionTable, pd: Pd, max_sge: int) -> RecvWork:
    """Decode a receive ring entry. Never fails: what is wrong with it is in `status`."""
    wr_id = _HEADER.unpack_from(entry)[0]
    n_sge = _HEADER.unpack_from(entry)[3]
    if n_sge > max_sge:
        return RecvWork(wr_id, [], 0, WcStatus.LOC_QP_OP_ERR)
    resolved = resolve(entry, n_sge, regions, pd, LOCAL_WRITE)
    if resolved is None:
        return RecvWork(wr_id, [], 0, WcStatus.LOC_PROT_ERR)
    # No message is longer, however much room a client offers.
    return RecvWork(wr_id, resolved[0], min(resolved[1], LENGTH_BYTES_MAX))
