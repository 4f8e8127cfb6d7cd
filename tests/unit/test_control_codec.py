"""Control messages: what goes in comes out, and nothing malformed gets through."""

from __future__ import annotations

import os
import resource
import socket

import msgspec
import numpy as np
import pytest

from nopin.control.arena_messages import (
    ArenaCreated,
    CreateArena,
    MapArena,
    MapperKind,
    Prefetch,
    PrefetchDone,
    PrefetchState,
)
from nopin.control.codec import ProtocolError, decode_reply, decode_request, encode, encode_request
from nopin.control.messages import (
    MESSAGE_BYTES_MAX,
    AllocPd,
    CreateQp,
    Event,
    Hello,
    ModifyQp,
    Publish,
    QpCreated,
    Refused,
    Register,
    Request,
    Stat,
)
from nopin.control.packets import OutOfDescriptors, receive_packet, send_packet
from nopin.errors import UsageError
from nopin.nic.attributes import AddressVector, QpAttr, QpCaps


@pytest.mark.parametrize(
    "request_",
    [
        Hello(seq=1, version=1, has_uffd=True, uffd_features=0x1FFFF),
        Register(seq=2, pd=1, address=0, length=None, iova=0, access=15, discipline=0),
        Register(seq=2, pd=1, address=(1 << 64) - 4096, length=4096, iova=7, access=15, discipline=2, ring_fd=9),
        CreateQp(seq=3, pd=1, send_cq=1, recv_cq=2, caps=QpCaps()),
        ModifyQp(seq=4, qpn=99, attr=QpAttr(state=2, av=AddressVector(gid=bytes(16)), rq_psn=5)),
        Publish(seq=5, mr=1, dtype="<f8", shape=[3, 4], strides=[-32, 8], offset=64),
        CreateArena(seq=6, capacity_bytes=1 << 40, name="default"),
        MapArena(seq=7, arena=1, base=1 << 45, offset=0, length=4096, uffd_features=0x1FFFF, kind=MapperKind.WORKER),
        Prefetch(seq=8, arena=1, ranges=[(0, 4096), (8192, 100)], write=True),
    ],
    ids=lambda r: type(r).__name__,
)
def test_a_request_survives_the_trip(request_: msgspec.Struct) -> None:
    assert decode_request(encode(request_)) == request_  # type: ignore[arg-type]  # parametrised over all requests


@pytest.mark.parametrize(
    "reply",
    [
        Refused(seq=1, code="limit", errno=12, message="too many"),
        QpCreated(seq=2, qpn=5, caps=QpCaps(), send_stride=128, recv_stride=128, recv_offset=8192, n_bytes=16384),
        Event(kind=1000, object_id=3, cause="unmap", start=4096, end=8192, generation=2),
        Stat(seq=3, rows=[{"kind": "mr", "page_faults": 3}], more=True),
        ArenaCreated(seq=4, arena=1, n_pages=1 << 28, budget_bytes=1 << 28),
        PrefetchState(seq=5, prefetch=3, bytes_done=8192, ended=True, reason="no_room"),
        PrefetchDone(kind=1001, object_id=3, cause="cancelled", bytes_done=4096),
    ],
    ids=lambda r: type(r).__name__,
)
def test_a_reply_survives_the_trip(reply: msgspec.Struct) -> None:
    assert decode_reply(encode(reply)) == reply  # type: ignore[arg-type]  # parametrised over all replies


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\xc1",
        bytes(range(96, 160)),
        msgspec.msgpack.encode({"op": "no_such", "seq": 1}),
        msgspec.msgpack.encode({"op": "alloc_pd"}),
        msgspec.msgpack.encode({"op": "dealloc_pd", "seq": 1, "pd": "one"}),
        msgspec.msgpack.encode({"op": "alloc_pd", "seq": 1 << 63})[:-1],
        msgspec.msgpack.encode([1, 2, 3]),
        b"\x91" * 10_000,
        b"\x82\xa2op\xa8alloc_pd\xa3seq\xa1\xff",
    ],
)
def test_malformed_bytes_are_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(data)
    with pytest.raises(ProtocolError):
        decode_reply(data)


def test_deep_nesting_is_refused_without_harm() -> None:
    with pytest.raises(ProtocolError):
        decode_reply(b"\x83\xa2re\xa4stat\xa3seq\x01\xa4rows\x91\x81\xa1k" + b"\x91" * 50_000 + b"\x01")


def test_every_truncation_of_a_request_is_refused() -> None:
    data = encode(Register(seq=2, pd=1, address=4096, length=8192, iova=0, access=15, discipline=0))
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            decode_request(data[:length])


def test_too_long_a_message_is_neither_sent_nor_read() -> None:
    long = Refused(code="x", errno=1, message="m" * MESSAGE_BYTES_MAX)
    with pytest.raises(ProtocolError, match="over 65536"):
        encode(long)
    with pytest.raises(ProtocolError, match="over 65536"):
        decode_reply(msgspec.msgpack.encode(long))


def test_an_integer_beyond_64_bits_is_refused_before_sending() -> None:
    with pytest.raises(ProtocolError):
        encode(Register(seq=1, pd=1, address=1 << 64, length=1, iova=0, access=1, discipline=0))


def test_descriptors_travel_beside_a_packet_and_close_on_exec() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(os.devnull, "rb") as file:
        send_packet(ours, encode(AllocPd(seq=1)), [file.fileno()])
        data, fds = receive_packet(theirs, 1)
        assert decode_request(data) == AllocPd(seq=1)
        assert len(fds) == 1
        assert not os.get_inheritable(fds[0])
        os.close(fds[0])


@pytest.mark.parametrize("n_allowed", [0, 1])
def test_more_descriptors_than_allowed_are_refused_and_not_kept(n_allowed: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(os.devnull, "rb") as file:
        send_packet(ours, b"x", [file.fileno()] * 3)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ProtocolError, match="descriptors"):
            receive_packet(theirs, n_allowed)
        assert set(os.listdir("/proc/self/fd")) == before


def test_descriptors_for_which_no_room_is_left_are_no_fault_of_the_other_side() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs, open(os.devnull, "rb") as file:
        send_packet(ours, b"lost", [file.fileno()])
        send_packet(ours, b"next")
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            with pytest.raises(OutOfDescriptors, match="ulimit -n"):
                receive_packet(theirs, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert receive_packet(theirs, 1).data == b"next"


def test_an_oversized_packet_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send_packet(ours, bytes(MESSAGE_BYTES_MAX + 1))
        with pytest.raises(ProtocolError, match="oversized"):
            receive_packet(theirs, 0)


@pytest.mark.parametrize(
    "request_",
    [
        CreateQp(seq=1, pd=1, send_cq=2, recv_cq=2, caps=QpCaps(max_send_wr="8"), sq_sig_all=False),  # type: ignore[arg-type]
        ModifyQp(seq=1, qpn=5, attr=3),  # type: ignore[arg-type]  # the wrong move
        ModifyQp(seq=1, qpn=1 << 65, attr=QpAttr()),
        Publish(seq=1, mr=1, dtype="x" * MESSAGE_BYTES_MAX, shape=[1], strides=[1]),
        Register(seq=1, pd=1, address=object(), length=1, iova=0, access=0, discipline=0),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_the_server_would_not_understand_is_not_sent(request_: Request) -> None:
    """It ends the connection of who sends one, which takes everything that its user has with it."""
    with pytest.raises(UsageError, match=type(request_).__name__):
        encode_request(request_)


def test_integers_of_numpy_are_integers() -> None:
    sent = QpCaps(max_send_wr=np.int64(8), max_recv_wr=np.uint16(4))  # type: ignore[arg-type]  # as good
    request = CreateQp(seq=1, pd=1, send_cq=2, recv_cq=2, caps=sent, sq_sig_all=False)
    got = decode_request(encode_request(request))
    assert isinstance(got, CreateQp)
    assert (got.caps.max_send_wr, got.caps.max_recv_wr) == (8, 4)
