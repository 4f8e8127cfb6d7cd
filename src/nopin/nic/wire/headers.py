"""Extension headers: RETH, AtomicETH, AtomicAckETH, immediate data and IETH. All big-endian.

Each is a record with `parse(buffer, offset)`, which raises struct.error when the buffer ends early, and
`emit(buffer, offset)`, which writes every byte of it. AETH has a file of its own.
Source: IBTA volume 1, section 9.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes
from nopin.nic.wire.opcodes import ATOMIC_ACK_ETH_BYTES, ATOMIC_ETH_BYTES, IMM_BYTES, RETH_BYTES
from nopin.nic.wire.records import Offsets, gather, scatter

Readable = memoryview | bytes | bytearray
Writable = memoryview | bytearray

RETH_FORMAT = "QII"
ATOMIC_ETH_FORMAT = "QIQQ"
ATOMIC_ACK_ETH_FORMAT = "Q"
WORD_FORMAT = "I"
"""Immediate data, or an rkey."""

_RETH = struct.Struct(">" + RETH_FORMAT)
_ATOMIC = struct.Struct(">" + ATOMIC_ETH_FORMAT)
_U64 = struct.Struct(">" + ATOMIC_ACK_ETH_FORMAT)
_U32 = struct.Struct(">" + WORD_FORMAT)
assert _RETH.size == RETH_BYTES
assert _ATOMIC.size == ATOMIC_ETH_BYTES
assert _U64.size == ATOMIC_ACK_ETH_BYTES
assert _U32.size == IMM_BYTES

unpack_reth = _RETH.unpack_from
"""Address, rkey and length of the RETH at an offset: making a `Reth` costs five times as much."""

RETH_DTYPE = np.dtype([("address", ">u8"), ("rkey", ">u4"), ("length", ">u4")])


class Reth(NamedTuple):
    """RDMA extended transport header: what remote memory a whole message means."""

    address: int
    rkey: int
    length: int

    @classmethod
    def parse(cls, buffer: Readable, offset: int) -> Reth:
        """Read 16 bytes at offset."""
        return cls(*_RETH.unpack_from(buffer, offset))

    def emit(self, buffer: Writable, offset: int) -> None:
        """Write 16 bytes at offset."""
        _RETH.pack_into(buffer, offset, *self)


class AtomicEth(NamedTuple):
    """What an atomic request does: FETCH_ADD has its addend in `swap_or_add` and 0 in `compare`."""

    address: int
    rkey: int
    swap_or_add: int
    compare: int

    @classmethod
    def parse(cls, buffer: Readable, offset: int) -> AtomicEth:
        """Read 28 bytes at offset."""
        return cls(*_ATOMIC.unpack_from(buffer, offset))

    def emit(self, buffer: Writable, offset: int) -> None:
        """Write 28 bytes at offset."""
        _ATOMIC.pack_into(buffer, offset, *self)


class RethBatch(NamedTuple):
    """The RETHs of n packets as native arrays: address (n,) uint64, rkey and length (n,) uint32."""

    address: NDArray[np.uint64]
    rkey: NDArray[np.uint32]
    length: NDArray[np.uint32]


def parse_reth(buffer: Bytes, offsets: Offsets) -> RethBatch:
    """Read the RETHs that start at offsets (the RETH's own start, not the packet's)."""
    records = gather(buffer, offsets, RETH_DTYPE)
    return RethBatch(
        records["address"].astype(np.uint64),
        records["rkey"].astype(np.uint32),
        records["length"].astype(np.uint32),
    )


def emit_reth(buffer: Bytes, offsets: Offsets, reth: RethBatch) -> None:
    """Write RETHs that start at offsets."""
    records = np.empty(len(offsets), RETH_DTYPE)
    records["address"], records["rkey"], records["length"] = reth
    scatter(buffer, offsets, records)


def parse_atomic_ack(buffer: Readable, offset: int) -> int:
    """The original value an atomic acknowledge carries."""
    (value,) = _U64.unpack_from(buffer, offset)
    return int(value)


def emit_atomic_ack(buffer: Writable, offset: int, original: int) -> None:
    """Write the original value of an atomic acknowledge, 8 bytes."""
    _U64.pack_into(buffer, offset, original)


def parse_u32(buffer: Readable, offset: int) -> int:
    """Immediate data, or the rkey of an IETH."""
    (value,) = _U32.unpack_from(buffer, offset)
    return int(value)


def emit_u32(buffer: Writable, offset: int, value: int) -> None:
    """Write immediate data, or the rkey of an IETH, 4 bytes."""
    _U32.pack_into(buffer, offset, value)
