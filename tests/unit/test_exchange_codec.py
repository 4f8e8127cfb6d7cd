"""Frames of the exchange, and the proof that binds them to a token."""

from __future__ import annotations

import struct

import msgspec
import pytest

from nopin.control.codec import ProtocolError
from nopin.control.exchange import (
    FRAME_BYTES_MAX,
    Attach,
    Attached,
    Challenge,
    Denied,
    Ended,
    Frame,
    proof_of,
)
from nopin.control.framing import FrameReader, encode_frame

ATTACH = Attach(share="s", qpn=5, psn=6, gid=bytes(16), port=4791, path_mtu=1024, max_rd_atomic=16, replaces=0)
ATTACHED = Attached(
    dtype="<f8",
    shape=[10],
    strides=[8],
    address=4096,
    start=4096,
    span=80,
    rkey=1,
    access=6,
    qpn=7,
    psn=8,
    gid=bytes(16),
    port=4791,
    path_mtu=1024,
    max_rd_atomic=16,
)
FRAMES: list[Frame] = [
    Challenge(version=1, nonce=bytes(32)),
    ATTACH,
    ATTACHED,
    Denied(code="token", message="no"),
    Ended(cause="withdrawn"),
]


@pytest.mark.parametrize("step", [1, 3, 7, 10_000])
def test_frames_come_out_however_the_stream_is_cut(step: int) -> None:
    stream = b"".join(encode_frame(frame) for frame in FRAMES)
    reader = FrameReader()
    got = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
    assert got == FRAMES


def test_an_impossible_length_is_refused_before_its_body_comes() -> None:
    with pytest.raises(ProtocolError, match="over 16384"):
        FrameReader().feed(struct.pack(">I", FRAME_BYTES_MAX + 1))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"t": "attach", "share": 5})])
def test_a_malformed_frame_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        FrameReader().feed(struct.pack(">I", len(body)) + body)


def test_too_long_a_frame_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="over 16384"):
        encode_frame(Denied(code="x", message="m" * FRAME_BYTES_MAX))


@pytest.mark.parametrize("bare", [ATTACH, ATTACHED], ids=["attach", "attached"])
def test_a_proof_covers_every_field_the_nonce_and_the_token(bare: Attach | Attached) -> None:
    proof = proof_of(bare, b"t" * 32, b"n" * 32)
    assert proof_of(bare, b"u" * 32, b"n" * 32) != proof
    assert proof_of(bare, b"t" * 32, b"m" * 32) != proof
    for name, value in msgspec.structs.asdict(bare).items():
        if name == "proof":
            continue
        other = value + 1 if isinstance(value, int) else value + value
        assert proof_of(msgspec.structs.replace(bare, **{name: other}), b"t" * 32, b"n" * 32) != proof, name


def test_a_proof_does_not_depend_on_the_proof_field() -> None:
    proof = proof_of(ATTACH, b"t" * 32, b"n" * 32)
    carried = msgspec.structs.replace(ATTACH, proof=proof)
    assert proof_of(carried, b"t" * 32, b"n" * 32) == proof
