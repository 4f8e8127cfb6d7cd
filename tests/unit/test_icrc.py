"""The ICRC over batches: mixed lengths, marks, hostile shapes. Values are checked against a plain second way."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from nopin.link.pcap import encapsulate
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint, Path
from nopin.nic.wire.gid import gid_of

HERE, THERE = Endpoint(gid_of("192.0.2.1"), 4791), Endpoint(gid_of("192.0.2.2"), 50000)
HERE_6, THERE_6 = Endpoint(gid_of("2001:db8::1"), 4791), Endpoint(gid_of("2001:db8::2"), 50000)


def slow_icrc(source: Endpoint, destination: Endpoint, packet: bytes) -> bytes:
    """As the standard words it: build the headers, set the masked fields to ones, CRC."""
    frame = bytearray(encapsulate(source, destination, packet))
    is_ipv6 = frame[0] >> 4 == 6
    if is_ipv6:
        frame[0] |= 0x0F
    for at in (1, 2, 3, 7, 46, 47, 52) if is_ipv6 else (1, 8, 10, 11, 26, 27, 32):
        frame[at] = 0xFF
    return zlib.crc32(bytes([0xFF] * 8) + bytes(frame[:-4])).to_bytes(4, "little")


def packed(lengths: list[int], gap: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random packets with gaps between them."""
    sizes = np.array(lengths, np.int64)
    offsets = np.cumsum(sizes + gap) - sizes
    buffer = np.random.default_rng(1).integers(0, 256, int(offsets[-1] + sizes[-1]) + gap, np.uint8)
    return buffer, offsets, sizes


@pytest.mark.parametrize("ends", [(HERE, THERE), (HERE_6, THERE_6)], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(
    "lengths", [[16], [20] * 7, [4128, *[4112] * 14, 100], [4112] * 30], ids=["one", "acks", "write", "middles"]
)
def test_seal_equals_the_plain_way_and_touches_nothing_else(
    ends: tuple[Endpoint, Endpoint], lengths: list[int]
) -> None:
    buffer, offsets, sizes = packed(lengths)
    before = buffer.copy()
    icrc.seal(buffer, offsets, sizes, Path(*ends))
    for at, size in zip(offsets.tolist(), lengths, strict=True):
        end = at + size
        assert buffer[end - 4 : end].tobytes() == slow_icrc(*ends, buffer[at:end].tobytes())
        before[end - 4 : end] = buffer[end - 4 : end]
    assert (buffer == before).all()
    assert icrc.verify(buffer, offsets, sizes, Path(ends[1], ends[0])).all()


def test_path_direction_ports_and_addresses_matter() -> None:
    buffer, offsets, sizes = packed([200])
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE))
    wrong = [
        Path(HERE, THERE),
        Path(THERE._replace(port=1), HERE),
        Path(THERE, HERE._replace(port=1)),
        Path(THERE, HERE._replace(gid=gid_of("192.0.2.3"))),
        Path(HERE_6, THERE_6),
    ]
    for path in wrong:
        assert not icrc.verify(buffer, offsets, sizes, path)[0]


def test_one_bad_packet_is_told_from_its_neighbours() -> None:
    buffer, offsets, sizes = packed([300] * 9)
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE))
    buffer[offsets[4] + 100] ^= 1
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).tolist() == [True] * 4 + [False] + [True] * 4


def test_marks_on_some_packets_only() -> None:
    buffer, offsets, sizes = packed([300] * 9)
    buffer[offsets + 4] = 0
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE))
    buffer[offsets[2] + 4] = 0x80
    buffer[offsets[5] + 4] = 0xFF
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).all()


@pytest.mark.parametrize("short", [0, 1, 4, 15])
def test_too_short_packets_are_wrong_and_harmless(short: int) -> None:
    buffer, offsets, sizes = packed([16, 20, 16])
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE))
    sizes[1] = short
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).tolist() == [True, False, True]
    offsets[1] = len(buffer)
    sizes[1] = 0
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).tolist() == [True, False, True]


def test_identification_and_flags_of_each_packet() -> None:
    buffer, offsets, sizes = packed([100, 200, 100])
    words = np.array([0x12344000, 0x4000, 0xFFFF0000], np.uint32)
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE), words)
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE), words).all()
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).tolist() == [False, True, False]


def test_nothing_in_nothing_out() -> None:
    none = np.zeros(0, np.int64)
    buffer = np.zeros(10, np.uint8)
    icrc.seal(buffer, none, none, Path(HERE, THERE))
    assert len(icrc.verify(buffer, none, none, Path(HERE, THERE))) == 0


def test_largest_datagram_is_checked() -> None:
    buffer, offsets, sizes = packed([65507])
    icrc.seal(buffer, offsets, sizes, Path(HERE, THERE))
    assert icrc.verify(buffer, offsets, sizes, Path(THERE, HERE)).all()
