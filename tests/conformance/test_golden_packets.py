"""Known packets, both ways: taken apart, and built byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from golden import ALL, CNP, G1, G2, G3, K1, K2, K3, Golden

from nopin.link.pcap import encapsulate
from nopin.nic.wire import icrc
from nopin.nic.wire.aeth import SYNDROME_ACK, Aeth
from nopin.nic.wire.bth import Bth, emit_bth, parse_bth
from nopin.nic.wire.headers import Reth
from nopin.nic.wire.opcodes import CNP_OPCODE, Opcode

each = pytest.mark.parametrize("golden", ALL.values(), ids=ALL.keys())


def unwritten(n_bytes: int) -> np.ndarray:
    """A buffer in which a byte nobody wrote shows."""
    return np.full(n_bytes, 0xA5, np.uint8)


def verified(golden: Golden, packet: bytes) -> bool:
    buffer = np.frombuffer(packet, np.uint8)
    at, length = np.array([0]), np.array([len(packet)])
    return bool(icrc.verify(buffer, at, length, golden.received, golden.words)[0])


def sealed(golden: Golden, buffer: np.ndarray) -> bytes:
    icrc.seal(buffer, np.array([0]), np.array([len(buffer)]), golden.sent, golden.words)
    return buffer.tobytes()


@each
def test_icrc_of_a_known_packet_is_right(golden: Golden) -> None:
    assert verified(golden, golden.packet)


@each
def test_icrc_is_computed_byte_for_byte(golden: Golden) -> None:
    buffer = np.frombuffer(golden.packet, np.uint8).copy()
    buffer[-4:] = 0xA5
    assert sealed(golden, buffer) == golden.packet


@each
def test_any_flipped_bit_outside_the_masked_byte_is_noticed(golden: Golden) -> None:
    for bit in range(8 * len(golden.packet)):
        if bit >> 3 == 4:
            continue
        bad = bytearray(golden.packet)
        bad[bit >> 3] ^= 1 << (bit & 7)
        assert not verified(golden, bytes(bad)), f"bit {bit} was flipped and the ICRC still fits"


@each
def test_congestion_marks_set_on_the_way_do_not_break_the_icrc(golden: Golden) -> None:
    marked = bytearray(golden.packet)
    marked[4] ^= 0xC0
    assert verified(golden, bytes(marked))


@pytest.mark.parametrize("golden", [K1, K2, G2, CNP], ids=["K1", "K2", "G2", "CNP"])
def test_the_identification_is_part_of_the_icrc(golden: Golden) -> None:
    buffer = np.frombuffer(golden.packet, np.uint8)
    good = icrc.verify(buffer, np.array([0]), np.array([len(buffer)]), golden.received)
    assert not good[0], "checked with identification 0, but the sender used another"


@pytest.mark.parametrize(
    ("golden", "expected"),
    [
        (G1, Bth(Opcode.SEND_ONLY, 0x12, 0x7D5561, ack_req=True, pad=3)),
        (G2, Bth(Opcode.WRITE_ONLY, 0x12, 0x7D5562, ack_req=True)),
        (G3, Bth(Opcode.ACKNOWLEDGE, 0x11, 0x7D5562)),
        (K1, Bth(Opcode.SEND_ONLY, 0x11, 0x7D5561, ack_req=True, pad=3)),
        (K2, Bth(Opcode.ACKNOWLEDGE, 0x11, 0x7D5561)),
        (K3, Bth(Opcode.ACKNOWLEDGE, 0x12, 0xAC2A6E)),
        (CNP, Bth(CNP_OPCODE, 0x118, 0, becn=True)),
    ],
    ids=ALL.keys(),
)
def test_bth_is_read_and_written(golden: Golden, expected: Bth) -> None:
    assert Bth.parse(golden.packet) == expected
    buffer = bytearray(unwritten(12))
    expected.emit(buffer)
    assert bytes(buffer) == golden.packet[:12]


def test_g1_is_built_whole_by_the_batch_form() -> None:
    buffer = unwritten(len(G1.packet))
    psn = np.array([0x7D5561], np.uint32)
    emit_bth(buffer, np.array([0]), opcode=Opcode.SEND_ONLY, qpn=0x12, psn=psn, ack_req=True, pad=3)
    buffer[12:20] = np.frombuffer(b"hello\0\0\0", np.uint8)
    assert sealed(G1, buffer) == G1.packet


def test_g2_is_built_whole() -> None:
    buffer = unwritten(len(G2.packet))
    view = buffer.data
    Bth(Opcode.WRITE_ONLY, 0x12, 0x7D5562, ack_req=True).emit(view)
    Reth(0x7F1234567008, 0xA37, 12).emit(view, 12)
    buffer[28:40] = np.arange(12)
    assert sealed(G2, buffer) == G2.packet
    assert Reth.parse(G2.packet, 12) == Reth(0x7F1234567008, 0xA37, 12)


@pytest.mark.parametrize(("golden", "msn"), [(G3, 2), (K2, 1), (K3, 1)], ids=["G3", "K2", "K3"])
def test_acknowledgements_are_built_whole(golden: Golden, msn: int) -> None:
    bth = parse_bth(np.frombuffer(golden.packet, np.uint8), np.array([0]))
    buffer = unwritten(len(golden.packet))
    view = buffer.data
    Bth(Opcode.ACKNOWLEDGE, int(bth.qpn[0]), int(bth.psn[0])).emit(view)
    Aeth(SYNDROME_ACK, msn).emit(view, 12)
    assert sealed(golden, buffer) == golden.packet
    assert Aeth.parse(golden.packet, 12) == Aeth(SYNDROME_ACK, msn)


@pytest.mark.parametrize("golden", [G1, G3, K3], ids=["G1", "G3", "K3"])
def test_capture_puts_back_the_ip_and_udp_headers(golden: Golden) -> None:
    assert encapsulate(golden.source, golden.destination, golden.packet) == golden.frame
