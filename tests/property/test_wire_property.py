"""Codecs against arbitrary values: what is written is read back, one by one and in batches alike."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.link.base import packets_of, split_slots
from nopin.link.describe import describe
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint, Path, Segment
from nopin.nic.wire.bth import Bth, emit_bth, parse_bth
from nopin.nic.wire.opcodes import HEADER_BYTES, ICRC_BYTES, Opcode
from nopin.nic.wire.psn import PSN_HALF, PSN_MASK, psn_add, psn_diff

psns = st.integers(0, PSN_MASK)
bths = st.builds(
    Bth,
    opcode=st.integers(0, 255),
    qpn=st.integers(0, 0xFFFFFF),
    psn=psns,
    ack_req=st.booleans(),
    solicited=st.booleans(),
    pad=st.integers(0, 3),
    pkey=st.integers(0, 0xFFFF),
    version=st.integers(0, 15),
    fecn=st.booleans(),
    becn=st.booleans(),
)
gids = st.one_of(
    st.binary(min_size=4, max_size=4).map(lambda tail: bytes(10) + b"\xff\xff" + tail),
    st.binary(min_size=16, max_size=16),
)


@given(st.lists(bths, min_size=1, max_size=8), st.integers(0, 7))
def test_headers_survive_the_wire(headers: list[Bth], gap: int) -> None:
    stride = 12 + gap
    buffer = bytearray(b"\xa5" * (stride * len(headers)))
    offsets = np.arange(len(headers)) * stride
    for at, header in zip(offsets.tolist(), headers, strict=True):
        header.emit(buffer, at)
        assert Bth.parse(buffer, at) == header
    batch = parse_bth(np.frombuffer(buffer, np.uint8), offsets)
    for name in ("opcode", "qpn", "psn", "ack_req", "solicited", "pad", "pkey", "version"):
        assert getattr(batch, name).tolist() == [getattr(header, name) for header in headers], name


@given(st.lists(bths, min_size=1, max_size=8))
def test_batch_writes_what_single_headers_write(headers: list[Bth]) -> None:
    offsets = np.arange(len(headers)) * 13
    together = np.full(13 * len(headers), 0xA5, np.uint8)
    emit_bth(
        together,
        offsets,
        opcode=np.array([h.opcode for h in headers]),
        qpn=7,
        psn=np.array([h.psn for h in headers], np.uint32),
        ack_req=np.array([h.ack_req for h in headers]),
        solicited=np.array([h.solicited for h in headers]),
        pad=np.array([h.pad for h in headers]),
    )
    singly = bytearray(b"\xa5" * len(together))
    for at, header in zip(offsets.tolist(), headers, strict=True):
        plain = header._replace(qpn=7, pkey=0xFFFF, version=0, fecn=False, becn=False)
        plain.emit(singly, at)
    assert together.tobytes() == bytes(singly)


@given(psns, st.integers(-PSN_HALF, PSN_HALF - 1))
def test_psn_distance_undoes_addition(psn: int, n: int) -> None:
    assert psn_diff(psn_add(psn, n), psn) == n


@settings(max_examples=60)
@given(
    st.lists(st.integers(16, 300), min_size=1, max_size=6),
    gids,
    st.integers(0, 0xFFFF),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_sealed_packets_are_good_until_a_bit_flips(
    lengths: list[int], gid: bytes, port: int, seed: int, data: st.DataObject
) -> None:
    path = Path(Endpoint(gid, port), Endpoint(gid[:15] + b"\x01", 4791))
    sizes = np.array(lengths, np.int64)
    offsets = np.cumsum(sizes) - sizes
    buffer = np.random.default_rng(seed).integers(0, 256, int(sizes.sum()), np.uint8)
    icrc.seal(buffer, offsets, sizes, path)
    back = Path(path.remote, path.local)
    assert icrc.verify(buffer, offsets, sizes, back).all()
    victim = data.draw(st.integers(0, len(lengths) - 1))
    bit = data.draw(st.integers(0, 8 * lengths[victim] - 1).filter(lambda b: b >> 3 != 4))
    buffer[offsets[victim] + (bit >> 3)] ^= 1 << (bit & 7)
    good = icrc.verify(buffer, offsets, sizes, back)
    assert good.tolist() == [index != victim for index in range(len(lengths))]


@given(st.binary(max_size=80))
def test_any_bytes_can_be_described(packet: bytes) -> None:
    assert describe(memoryview(packet))


@given(st.sampled_from(list(Opcode)), st.binary(min_size=80, max_size=80))
def test_every_known_packet_is_named(opcode: Opcode, rest: bytes) -> None:
    packet = bytes([opcode, 0]) + rest
    words = describe(memoryview(packet))
    assert words.startswith(opcode.name)
    assert f"payload {len(packet) - HEADER_BYTES[opcode] - ICRC_BYTES}" in words


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 300)), min_size=1, max_size=6))
def test_slots_are_cut_like_segments(slots: list[tuple[int, int]]) -> None:
    sizes = [size if size else max(length, 1) for length, size in slots]
    lengths = np.array([length for length, _ in slots], np.uint32)
    offsets, found = split_slots(lengths, np.array(sizes, np.uint32), 1000)
    segments = [Segment(i * 1000, length, sizes[i]) for i, (length, _) in enumerate(slots)]
    assert list(zip(offsets.tolist(), found.tolist(), strict=True)) == list(packets_of(segments))
