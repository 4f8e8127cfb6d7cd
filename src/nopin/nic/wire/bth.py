"""The base transport header: 12 bytes that start every packet.

`Bth` is one header; `parse_bth` and `emit_bth` work on all packets of a batch.
Source: IBTA volume 1, section 9.2.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nopin.mm.space import Bytes
from nopin.nic.wire.opcodes import BTH_BYTES
from nopin.nic.wire.psn import PSN_MASK
from nopin.nic.wire.records import Offsets, gather, scatter

BTH_FORMAT = "BBHII"
"""Opcode, flags, P_Key, QPN below the congestion bits, PSN below the acknowledge request bit."""
_BTH = struct.Struct(">" + BTH_FORMAT)
assert _BTH.size == BTH_BYTES

DEFAULT_PKEY = 0xFFFF
PKEY_MASK = 0x7FFF
"""P_Keys match on these bits; bit 15 says full member."""

QPN_MASK = 0xFFFFFF
SOLICITED_BIT = 0x80
PAD_SHIFT = 4
VERSION_MASK = 0x0F
ACK_REQ_BIT = 1 << 31
FECN_BIT = 1 << 31
BECN_BIT = 1 << 30

BTH_DTYPE = np.dtype([("opcode", "u1"), ("flags", "u1"), ("pkey", ">u2"), ("qpn", ">u4"), ("psn", ">u4")])
"""As on the wire: `qpn` has the congestion bits above it, `psn` the acknowledge request bit."""
assert BTH_DTYPE.itemsize == BTH_BYTES


_FLOW_BITS = np.frombuffer(bytes.fromhex("000f7fffffffffff"), np.uint64)[0]
"""Of a header's first eight bytes, what packets of one flow have in common: version, P_Key but its bit 15, the byte
with the congestion bits, QPN."""

unpack_bth = _BTH.unpack_from
"""The words of the header at an offset, as `BTH_FORMAT` has them: making a `Bth` costs ten times as much."""


class Bth(NamedTuple):
    """One base transport header."""

    opcode: int
    qpn: int
    psn: int
    ack_req: bool = False
    solicited: bool = False
    pad: int = 0
    pkey: int = DEFAULT_PKEY
    version: int = 0
    fecn: bool = False
    becn: bool = False

    @classmethod
    def parse(cls, buffer: memoryview | bytes | bytearray, offset: int = 0) -> Bth:
        """Read the header at offset.

        Raises:
            struct.error: fewer than 12 bytes there.
        """
        opcode, flags, pkey, qpn, psn = _BTH.unpack_from(buffer, offset)
        return cls(  # in order, which costs half as much as by name
            opcode,
            qpn & QPN_MASK,
            psn & PSN_MASK,
            psn >= ACK_REQ_BIT,
            flags >= SOLICITED_BIT,
            flags >> PAD_SHIFT & 3,
            pkey,
            flags & VERSION_MASK,
            qpn >= FECN_BIT,
            qpn & BECN_BIT != 0,
        )

    def emit(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """Write all 12 bytes of the header at offset."""
        _BTH.pack_into(
            buffer,
            offset,
            self.opcode,
            self.solicited << 7 | self.pad << PAD_SHIFT | self.version,
            self.pkey,
            self.fecn << 31 | self.becn << 30 | self.qpn,
            self.ack_req << 31 | self.psn,
        )


class BthBatch:
    """The headers of n packets, each field an (n,) array in native byte order (`pkey`: big-endian view).

    Attributes:
        opcode: uint8. qpn: uint32. psn: uint32. ack_req: bool.
        flags: uint8, the byte that holds `solicited`, `pad` and `version`.
        pkey: uint16.
    """

    __slots__ = ("_records", "ack_req", "flags", "opcode", "pkey", "psn")

    def __init__(self, records: NDArray[np.void]) -> None:
        self._records = records
        self.opcode: NDArray[np.uint8] = records["opcode"]
        self.flags: NDArray[np.uint8] = records["flags"]
        self.pkey: NDArray[np.uint16] = records["pkey"]
        psn = records["psn"]
        self.psn: NDArray[np.uint32] = psn & np.uint32(PSN_MASK)
        self.ack_req: NDArray[np.bool_] = psn >= ACK_REQ_BIT

    def __len__(self) -> int:
        return len(self.opcode)

    @property
    def qpn(self) -> NDArray[np.uint32]:
        """(n,) uint32: the destination."""
        qpn: NDArray[np.uint32] = self._records["qpn"] & np.uint32(QPN_MASK)
        return qpn

    def of_one_flow(self) -> bool:
        """Tell whether all have the version, partition, congestion bits and destination of the first, in one look."""
        heads = np.ndarray((len(self.opcode),), np.uint64, self._records, strides=self._records.strides)
        return not ((heads ^ heads[0]) & _FLOW_BITS).any()

    @property
    def first_mark(self) -> int:
        """What the first has in the byte with the congestion bits, which no ICRC covers."""
        return int(self._records["qpn"][0]) >> 24

    @property
    def solicited(self) -> NDArray[np.bool_]:
        """(n,) bool: the receiver asks for a solicited event."""
        return self.flags >= SOLICITED_BIT

    @property
    def pad(self) -> NDArray[np.uint8]:
        """(n,) uint8: zero bytes between payload and ICRC, 0 to 3."""
        return self.flags >> np.uint8(PAD_SHIFT) & np.uint8(3)

    @property
    def version(self) -> NDArray[np.uint8]:
        """(n,) uint8: must be 0."""
        return self.flags & np.uint8(VERSION_MASK)


def parse_bth(buffer: Bytes, offsets: Offsets) -> BthBatch:
    """Read the headers at offsets (copies; the buffer may be reused).

    Requires: 12 bytes at each offset, else IndexError.
    """
    return BthBatch(gather(buffer, offsets, BTH_DTYPE))


def emit_bth(
    buffer: Bytes,
    offsets: Offsets,
    *,
    opcode: ArrayLike,
    qpn: int,
    psn: NDArray[np.uint32],
    ack_req: ArrayLike = False,
    solicited: ArrayLike = False,
    pad: ArrayLike = 0,
) -> None:
    """Write the header of each packet at its offset, all 12 bytes.

    Args:
        buffer: receives the headers.
        offsets: (n,) where each goes.
        opcode, ack_req, solicited, pad: (n,) arrays, or one value for all.
        qpn: the destination of all of them.
        psn: (n,) uint32, each below 2^24.
    """
    records = np.empty(len(offsets), BTH_DTYPE)
    records["opcode"] = opcode
    records["flags"] = _flags(solicited, pad)
    records["pkey"] = DEFAULT_PKEY
    records["qpn"] = qpn
    records["psn"] = psn if ack_req is False else psn | np.asarray(ack_req, np.uint32) << np.uint32(31)
    scatter(buffer, offsets, records)


def _flags(solicited: ArrayLike, pad: ArrayLike) -> ArrayLike:
    if solicited is False and isinstance(pad, int):
        return pad << PAD_SHIFT  # the steady state: middles of a long message
    return np.asarray(solicited, np.uint8) << 7 | np.asarray(pad, np.uint8) << PAD_SHIFT
