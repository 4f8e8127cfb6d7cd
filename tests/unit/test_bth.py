"""Base transport header, opcode tables, PSN arithmetic."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from nopin.nic.wire import opcodes
from nopin.nic.wire.bth import DEFAULT_PKEY, Bth, emit_bth, parse_bth
from nopin.nic.wire.opcodes import HEADER_BYTES, IS_KNOWN, Opcode
from nopin.nic.wire.psn import PSN_HALF, PSN_MASK, psn_add, psn_diff


def test_every_field_lies_where_the_standard_says() -> None:
    buffer = bytearray(b"\xa5" * 14)
    Bth(0x07, 0x123456, 0x89ABCD, ack_req=True, solicited=True, pad=2, pkey=0x8001, version=1).emit(buffer, 1)
    assert buffer.hex() == "a5" + "07a18001" + "00123456" + "8089abcd" + "a5"
    Bth(0x81, 1, 0, fecn=True, becn=True).emit(buffer, 1)
    assert buffer[5] == 0xC0


def test_migration_and_reserved_bits_are_ignored() -> None:
    header = bytearray(12)
    Bth(4, 9, 8).emit(header)
    header[1] |= 0x40
    header[4] |= 0x3F
    header[8] |= 0x7F
    assert Bth.parse(header) == Bth(4, 9, 8)
    assert parse_bth(np.frombuffer(header, np.uint8), np.array([0])).qpn[0] == 9


def test_a_header_cut_short_is_refused() -> None:
    with pytest.raises(struct.error):
        Bth.parse(bytes(11))
    with pytest.raises(IndexError):
        parse_bth(np.zeros(11, np.uint8), np.array([0]))
    with pytest.raises(IndexError):
        parse_bth(np.zeros(100, np.uint8), np.array([0, 89]))


def test_batch_writes_each_header_and_nothing_else() -> None:
    buffer = np.full(100, 0xA5, np.uint8)
    offsets = np.array([3, 40, 88])
    ack_req = np.array([False, False, True])
    emit_bth(
        buffer,
        offsets,
        opcode=np.array([6, 7, 8]),
        qpn=0xFFFFFE,
        psn=np.array([0xFFFFFF, 0, 1], np.uint32),
        ack_req=ack_req,
        solicited=ack_req,
        pad=np.array([0, 0, 3]),
    )
    expected = bytearray(b"\xa5" * 100)
    Bth(6, 0xFFFFFE, 0xFFFFFF).emit(expected, 3)
    Bth(7, 0xFFFFFE, 0).emit(expected, 40)
    Bth(8, 0xFFFFFE, 1, ack_req=True, solicited=True, pad=3).emit(expected, 88)
    assert buffer.tobytes() == bytes(expected)


def test_batch_reads_what_single_headers_say() -> None:
    buffer = bytearray(64)
    headers = [Bth(6, 5, 1), Bth(0x0B, 0xABCDEF, PSN_MASK, ack_req=True, solicited=True, pad=3, version=2)]
    for at, header in zip((1, 30), headers, strict=True):
        header.emit(buffer, at)
    batch = parse_bth(np.frombuffer(buffer, np.uint8), np.array([1, 30]))
    assert len(batch) == 2
    assert batch.opcode.tolist() == [6, 0x0B]
    assert batch.qpn.tolist() == [5, 0xABCDEF]
    assert batch.psn.tolist() == [1, PSN_MASK]
    assert batch.ack_req.tolist() == batch.solicited.tolist() == [False, True]
    assert batch.pad.tolist() == [0, 3]
    assert batch.version.tolist() == [0, 2]
    assert batch.pkey.tolist() == [DEFAULT_PKEY] * 2


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"opcode": 8, "psn": 77, "ack_req": True, "solicited": True, "pad": 3, "pkey": 0x7FFF}, True),
        ({"qpn": 10}, False),
        ({"version": 1}, False),
        ({"becn": True}, False),
        ({"pkey": 0xFFFE}, False),
    ],
)
def test_packets_of_one_flow_share_version_partition_and_destination(changes: dict[str, Any], same: bool) -> None:
    buffer = bytearray(2 * 12)
    first = Bth(opcode=7, qpn=9, psn=76)
    first.emit(buffer)
    first._replace(**changes).emit(buffer, 12)
    assert parse_bth(np.frombuffer(buffer, np.uint8), np.array([0, 12])).of_one_flow() is same


def test_batch_of_none_is_none() -> None:
    assert len(parse_bth(np.zeros(64, np.uint8), np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize(
    ("opcode", "n_bytes"),
    [
        (Opcode.SEND_MIDDLE, 12),
        (Opcode.SEND_ONLY_IMM, 16),
        (Opcode.SEND_ONLY_INVALIDATE, 16),
        (Opcode.WRITE_FIRST, 28),
        (Opcode.WRITE_LAST_IMM, 16),
        (Opcode.WRITE_ONLY_IMM, 32),
        (Opcode.READ_REQUEST, 28),
        (Opcode.READ_RESPONSE_FIRST, 16),
        (Opcode.READ_RESPONSE_MIDDLE, 12),
        (Opcode.ACKNOWLEDGE, 16),
        (Opcode.ATOMIC_ACKNOWLEDGE, 24),
        (Opcode.COMPARE_SWAP, 40),
    ],
)
def test_header_lengths(opcode: Opcode, n_bytes: int) -> None:
    assert HEADER_BYTES[opcode] == n_bytes


def test_tables_divide_the_opcodes() -> None:
    assert set(np.flatnonzero(IS_KNOWN)) == set(Opcode)
    assert not (opcodes.IS_REQUEST & opcodes.IS_RESPONSE).any()
    assert ((opcodes.IS_REQUEST | opcodes.IS_RESPONSE) == IS_KNOWN).all()
    assert HEADER_BYTES.max() == opcodes.MAX_HEADER_BYTES
    assert not HEADER_BYTES[~IS_KNOWN].any()


def test_psn_distance_wraps_at_the_half_circle() -> None:
    assert psn_diff(5, 3) == 2
    assert psn_diff(3, 5) == -2
    assert psn_diff(1, PSN_MASK) == 2
    assert psn_diff(PSN_MASK, 1) == -2
    assert psn_diff(PSN_HALF - 1, 0) == PSN_HALF - 1
    assert psn_diff(PSN_HALF, 0) == -PSN_HALF
    assert psn_add(PSN_MASK, 1) == 0
    assert psn_add(0, -1) == PSN_MASK
