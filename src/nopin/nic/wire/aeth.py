"""The acknowledge header: a syndrome and the message sequence number.

Syndrome bits 7-5 say the kind (0 ACK, 1 RNR NAK, 3 NAK), bits 4-0 its value: credits,
timer code, or NAK code.
Source: IBTA volume 1, section 9.7.5.2 and tables 44 to 47.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.codes import Code
from nopin.mm.space import Bytes
from nopin.nic.wire.opcodes import AETH_BYTES
from nopin.nic.wire.records import Offsets, scatter

AETH_FORMAT = "I"
_AETH = struct.Struct(">" + AETH_FORMAT)
assert _AETH.size == AETH_BYTES

MSN_MASK = 0xFFFFFF

SYNDROME_ACK = 0x1F
"""Plain acknowledgement without a credit limit: what we and Soft-RoCE send."""

KIND_SHIFT = 5
VALUE_MASK = 0x1F


def aeth_word(syndrome: int, msn: int) -> int:
    """The acknowledge header as one number."""
    return syndrome << 24 | msn


class SyndromeKind(Code):
    """Bits 7-5 of a syndrome; 2 and above 3 are reserved."""

    ACK = 0
    RNR_NAK = 1
    NAK = 3


class Nak(Code):
    """Whole syndrome byte of each negative acknowledgement that is not RNR."""

    SEQUENCE_ERROR = 0x60
    INVALID_REQUEST = 0x61
    REMOTE_ACCESS_ERROR = 0x62
    REMOTE_OPERATIONAL_ERROR = 0x63


class Aeth(NamedTuple):
    """One acknowledge header."""

    syndrome: int
    msn: int

    @classmethod
    def parse(cls, buffer: memoryview | bytes | bytearray, offset: int) -> Aeth:
        """Read 4 bytes at offset; struct.error when the buffer ends early."""
        (word,) = _AETH.unpack_from(buffer, offset)
        return cls(word >> 24, word & MSN_MASK)

    def emit(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Write 4 bytes at offset."""
        _AETH.pack_into(buffer, offset, aeth_word(self.syndrome, self.msn))

    @property
    def kind(self) -> int:
        """Bits 7-5: compare with `SyndromeKind`; may be a reserved value."""
        return self.syndrome >> KIND_SHIFT

    @property
    def value(self) -> int:
        """Bits 4-0: credit code, RNR timer code or NAK code."""
        return self.syndrome & VALUE_MASK


def emit_aeth(buffer: Bytes, offsets: Offsets, syndrome: int, msn: NDArray[np.int64]) -> None:
    """Write headers of one syndrome that start at offsets: 4 bytes each."""
    scatter(buffer, offsets, (msn | syndrome << 24).astype(">u4"))


def rnr_syndrome(timer_code: int) -> int:
    """The syndrome of an RNR NAK that asks for the wait of this timer code."""
    return SyndromeKind.RNR_NAK << KIND_SHIFT | timer_code & VALUE_MASK


# Microseconds of codes 0 to 31, table 45. Code 0 is the longest.
_RNR_US = (
    *(655_360, 10, 20, 30, 40, 60, 80, 120),
    *(160, 240, 320, 480, 640, 960, 1280, 1920),
    *(2560, 3840, 5120, 7680, 10_240, 15_360, 20_480, 30_720),
    *(40_960, 61_440, 81_920, 122_880, 163_840, 245_760, 327_680, 491_520),
)
_RNR_NS = tuple(us * 1000 for us in _RNR_US)


RNR_CODES = len(_RNR_NS)


def rnr_ns(timer_code: int) -> int:
    """The wait a timer code means, in nanoseconds; only the low five bits count."""
    return _RNR_NS[timer_code & VALUE_MASK]
