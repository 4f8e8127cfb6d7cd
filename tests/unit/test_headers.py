"""Extension headers, syndromes, timer codes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from nopin.nic.wire.aeth import SYNDROME_ACK, Aeth, Nak, SyndromeKind, rnr_ns, rnr_syndrome
from nopin.nic.wire.headers import (
    AtomicEth,
    Reth,
    emit_atomic_ack,
    emit_u32,
    parse_atomic_ack,
    parse_reth,
    parse_u32,
)

RETH = Reth(0x1122334455667788, 0x99AABBCC, 0xDDEEFF00)
ATOMIC = AtomicEth(0x1122334455667788, 0x99AABBCC, 0x0102030405060708, 0xF1F2F3F4F5F6F7F8)


@pytest.mark.parametrize(
    ("header", "wire"),
    [
        (RETH, "112233445566778899aabbccddeeff00"),
        (ATOMIC, "112233445566778899aabbcc0102030405060708f1f2f3f4f5f6f7f8"),
        (Aeth(0x62, 0xABCDEF), "62abcdef"),
    ],
    ids=["RETH", "AtomicETH", "AETH"],
)
def test_header_is_written_whole_and_read_back(header: Reth | AtomicEth | Aeth, wire: str) -> None:
    n_bytes = len(wire) // 2
    buffer = bytearray(b"\xa5" * (n_bytes + 2))
    header.emit(buffer, 1)
    assert buffer.hex() == f"a5{wire}a5"
    assert type(header).parse(bytes(buffer), 1) == header
    with pytest.raises(struct.error):
        type(header).parse(bytes(buffer[: n_bytes - 1]), 0)


def test_values_of_four_and_eight_bytes_are_big_endian() -> None:
    buffer = bytearray(b"\xa5" * 14)
    emit_u32(buffer, 1, 0x01020304)
    emit_atomic_ack(buffer, 5, 0x1122334455667788)
    assert buffer.hex() == "a5010203041122334455667788a5"
    assert parse_u32(buffer, 1) == 0x01020304
    assert parse_atomic_ack(buffer, 5) == 0x1122334455667788


def test_reth_batch_equals_single_headers() -> None:
    buffer = np.full(64, 0xA5, np.uint8)
    Reth(7, 9, 0).emit(buffer.data, 1)
    Reth(2**64 - 1, 9, 1 << 31).emit(buffer.data, 40)
    batch = parse_reth(buffer, np.array([1, 40]))
    assert batch.address.tolist() == [7, 2**64 - 1]
    assert batch.rkey.tolist() == [9, 9]
    assert batch.length.tolist() == [0, 1 << 31]


def test_syndrome_kinds() -> None:
    assert Aeth(SYNDROME_ACK, 1).kind == SyndromeKind.ACK
    assert Aeth(rnr_syndrome(12), 1).kind == SyndromeKind.RNR_NAK
    assert Aeth(rnr_syndrome(12), 1).value == 12
    assert Aeth(Nak.SEQUENCE_ERROR, 1).kind == SyndromeKind.NAK
    assert [int(nak) for nak in Nak] == [0x60, 0x61, 0x62, 0x63]


def test_rnr_waits() -> None:
    assert [rnr_ns(code) for code in (0, 1, 12, 14, 31)] == [655_360_000, 10_000, 640_000, 1_280_000, 491_520_000]
    assert rnr_ns(0x20 | 5) == rnr_ns(5), "only five bits count"
