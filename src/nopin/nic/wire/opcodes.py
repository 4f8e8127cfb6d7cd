"""RC opcodes and what each implies, as enumeration and as lookup tables.

A table has 256 entries, so that it can be indexed with an array of opcode bytes straight from the wire;
opcodes that reliable connections do not have are False (or 0) in all of them and absent from `IS_KNOWN`.
Source: IBTA volume 1, section 9.2 (opcode table); values as seen on Linux Soft-RoCE.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from nopin.codes import Code

BTH_BYTES = 12
RETH_BYTES = 16
ATOMIC_ETH_BYTES = 28
ATOMIC_ACK_ETH_BYTES = 8
AETH_BYTES = 4
IMM_BYTES = 4
IETH_BYTES = 4
ICRC_BYTES = 4

MIN_PACKET_BYTES = BTH_BYTES + ICRC_BYTES
"""Shorter than this is not a packet."""

MAX_HEADER_BYTES = BTH_BYTES + ATOMIC_ETH_BYTES
"""The longest RC header, that of an atomic request."""

CNP_OPCODE = 0x81
"""Congestion notification packet: not RC, so not an `Opcode`, but every RoCEv2 end may receive one."""


class Opcode(Code):
    """Opcode byte of a reliable connection packet."""

    SEND_FIRST = 0x00
    SEND_MIDDLE = 0x01
    SEND_LAST = 0x02
    SEND_LAST_IMM = 0x03
    SEND_ONLY = 0x04
    SEND_ONLY_IMM = 0x05
    WRITE_FIRST = 0x06
    WRITE_MIDDLE = 0x07
    WRITE_LAST = 0x08
    WRITE_LAST_IMM = 0x09
    WRITE_ONLY = 0x0A
    WRITE_ONLY_IMM = 0x0B
    READ_REQUEST = 0x0C
    READ_RESPONSE_FIRST = 0x0D
    READ_RESPONSE_MIDDLE = 0x0E
    READ_RESPONSE_LAST = 0x0F
    READ_RESPONSE_ONLY = 0x10
    ACKNOWLEDGE = 0x11
    ATOMIC_ACKNOWLEDGE = 0x12
    COMPARE_SWAP = 0x13
    FETCH_ADD = 0x14
    SEND_LAST_INVALIDATE = 0x16
    SEND_ONLY_INVALIDATE = 0x17


Table = NDArray[np.bool_]


def _table(members: Iterable[int]) -> Table:
    table = np.zeros(256, np.bool_)
    table[list(members)] = True
    table.flags.writeable = False
    return table


def _named(*parts: str) -> set[Opcode]:
    """Every opcode whose name contains one of the parts."""
    return {op for op in Opcode if any(part in op.name for part in parts)}


_RESPONSES = _named("RESPONSE", "ACKNOWLEDGE")
_SEND = {op for op in Opcode if op.name.startswith("SEND")}
_WRITE = {op for op in Opcode if op.name.startswith("WRITE")}
_READ_RESPONSE = _named("READ_RESPONSE")
_ATOMIC = {Opcode.COMPARE_SWAP, Opcode.FETCH_ADD}

IS_KNOWN = _table(Opcode)
IS_RESPONSE = _table(_RESPONSES)
IS_REQUEST = _table(set(Opcode) - _RESPONSES)
IS_SEND = _table(_SEND)
IS_WRITE = _table(_WRITE)
IS_READ_RESPONSE = _table(_READ_RESPONSE)
IS_ATOMIC = _table(_ATOMIC)
ENDS_MESSAGE = _table(_named("_LAST", "_ONLY") | {Opcode.READ_REQUEST} | _ATOMIC)
"""Last or only, or a request of one packet."""

HAS_RETH = _table({Opcode.WRITE_FIRST, Opcode.WRITE_ONLY, Opcode.WRITE_ONLY_IMM, Opcode.READ_REQUEST})
HAS_ATOMIC_ETH = _table(_ATOMIC)
HAS_ATOMIC_ACK_ETH = _table({Opcode.ATOMIC_ACKNOWLEDGE})
HAS_AETH = _table(_RESPONSES - {Opcode.READ_RESPONSE_MIDDLE})
HAS_IMM = _table(_named("_IMM"))
HAS_IETH = _table(_named("_INVALIDATE"))

HEADER_BYTES: NDArray[np.int64] = (
    BTH_BYTES * IS_KNOWN
    + RETH_BYTES * HAS_RETH
    + ATOMIC_ETH_BYTES * HAS_ATOMIC_ETH
    + AETH_BYTES * HAS_AETH
    + ATOMIC_ACK_ETH_BYTES * HAS_ATOMIC_ACK_ETH
    + IMM_BYTES * HAS_IMM
    + IETH_BYTES * HAS_IETH
).astype(np.int64)
"""Bytes from the start of the BTH to the payload; 0 for an unknown opcode."""
HEADER_BYTES.flags.writeable = False
