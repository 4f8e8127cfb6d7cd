"""Peers of a real server: attaching, refusal of everything else, and the end of a share."""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import PATIENCE_S, Server, eventually, handle_of, hello, register, running_server

from nopin.control.exchange import AnyFrame, Attach, Attached, Challenge, Denied, Ended, proof_of
from nopin.control.framing import FrameReader, encode_frame
from nopin.control.messages import AllocPd, DeallocPd, Deregister, Publish, Published, Welcome, Withdraw
from nopin.control.socket import ControlSocket

GID = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 9])


Place = tuple[str, int]


def place_of(welcome: Welcome) -> Place:
    return welcome.exchange_host, welcome.exchange_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("exchange")) as running:
        yield running


@dataclass
class Published3x4:
    """A (3, 4) float64 array, published."""

    connection: ControlSocket
    place: Place
    array: NDArray[np.float64]
    pd: int
    mr: int
    share: str
    token: bytes


@pytest.fixture
def published(server: Server) -> Iterator[Published3x4]:
    array = np.zeros((3, 4))
    connection = ControlSocket(server.path)
    place = place_of(hello(connection))
    pd = handle_of(connection, AllocPd(seq=0))
    mr = register(connection, pd, array.ctypes.data, array.nbytes).mr
    reply, _ = connection.request(Publish(seq=0, mr=mr, dtype="<f8", shape=[3, 4], strides=[32, 8]))
    assert isinstance(reply, Published)
    yield Published3x4(connection, place, array, pd, mr, reply.share, reply.token)
    connection.close()


class Peer:
    """The attaching side, frame by frame."""

    def __init__(self, place: Place) -> None:
        self.sock = socket.create_connection(place, PATIENCE_S)
        self._reader = FrameReader()
        self._frames: list[AnyFrame] = []
        challenge = self.receive()
        assert isinstance(challenge, Challenge)
        self.nonce = challenge.nonce

    def attach(self, share: str, token: bytes, **changes: object) -> Attach:
        fields = {
            "share": share,
            "qpn": 77,
            "psn": 88,
            "gid": GID,
            "port": 4791,
            "path_mtu": 1024,
            "max_rd_atomic": 16,
            "replaces": 0,
        } | changes
        attach = Attach(**fields)  # type: ignore[arg-type]  # one field is changed to nonsense
        attach.proof = proof_of(attach, token, self.nonce)
        return attach

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> AnyFrame | None:
        """The next frame; None at the end of the connection."""
        while not self._frames:
            try:
                piece = self.sock.recv(4096)
            except ConnectionError:
                return None
            if not piece:
                return None
            self._frames += self._reader.feed(piece)
        return self._frames.pop(0)

    def answer_to(self, attach: Attach) -> AnyFrame | None:
        self.send(encode_frame(attach))
        return self.receive()

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def peer(published: Published3x4) -> Iterator[Peer]:
    made = Peer(published.place)
    yield made
    made.close()


def n_queue_pairs(server: Server) -> int:
    return len(server.rows("qp"))


def test_a_peer_with_the_token_is_connected(server: Server, published: Published3x4, peer: Peer) -> None:
    frame = peer.answer_to(peer.attach(published.share, published.token))
    assert isinstance(frame, Attached)
    assert frame.proof == proof_of(frame, published.token, peer.nonce)
    assert (frame.dtype, frame.shape, frame.strides) == ("<f8", [3, 4], [32, 8])
    assert frame.address == frame.start == published.array.ctypes.data
    assert frame.span == published.array.nbytes
    assert frame.path_mtu == 1024
    (row,) = server.rows("qp")
    assert (row["lqpn"], row["rqpn"], row["state"], row["rq-psn"]) == (frame.qpn, 77, "RTS", 88)


def test_the_queue_pair_goes_with_the_connection(server: Server, published: Published3x4, peer: Peer) -> None:
    assert isinstance(peer.answer_to(peer.attach(published.share, published.token)), Attached)
    assert n_queue_pairs(server) == 1
    peer.close()
    assert eventually(lambda: n_queue_pairs(server) == 0)


def test_a_wrong_token_and_an_unknown_share_look_the_same(server: Server, published: Published3x4, peer: Peer) -> None:
    before = server.count("attach_refused")
    other = Peer(published.place)
    wrong = peer.answer_to(peer.attach(published.share, secrets.token_bytes(32)))
    unknown = other.answer_to(other.attach("nosuchshare", published.token))
    assert isinstance(wrong, Denied)
    assert wrong == unknown
    assert wrong.code == "token"
    assert peer.receive() is None
    other.close()
    assert server.count("attach_refused") == before + 2
    assert n_queue_pairs(server) == 0


def test_a_replayed_attach_is_refused_and_counted(server: Server, published: Published3x4, peer: Peer) -> None:
    recorded = peer.attach(published.share, published.token)
    assert isinstance(peer.answer_to(recorded), Attached)
    before = server.count("attach_refused")
    again = Peer(published.place)
    assert isinstance(again.answer_to(recorded), Denied)
    again.close()
    assert server.count("attach_refused") == before + 1


@pytest.mark.parametrize(
    "change",
    [{"qpn": 78}, {"psn": 1}, {"gid": bytes(16)}, {"port": 9}, {"path_mtu": 256}, {"max_rd_atomic": 1}],
    ids=str,
)
def test_a_coordinate_altered_on_the_way_is_refused(
    published: Published3x4, peer: Peer, change: dict[str, object]
) -> None:
    genuine = peer.attach(published.share, published.token)
    altered = peer.attach(published.share, published.token, **change)
    altered.proof = genuine.proof
    frame = peer.answer_to(altered)
    assert isinstance(frame, Denied)
    assert frame.code == "token"


@pytest.mark.parametrize(
    "change",
    [
        {"qpn": 0},
        {"qpn": 1 << 24},
        {"psn": -1},
        {"gid": b"short"},
        {"port": 0},
        {"path_mtu": 1000},
        {"max_rd_atomic": 256},
    ],
    ids=str,
)
def test_impossible_coordinates_are_named(published: Published3x4, peer: Peer, change: dict[str, object]) -> None:
    frame = peer.answer_to(peer.attach(published.share, published.token, **change))
    assert isinstance(frame, Denied)
    assert frame.code == "malformed"


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 16385),
        struct.pack(">I", 0xFFFFFFFF) + b"x",
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 0),
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame(Ended(cause="withdrawn")),
        encode_frame(Challenge(version=1, nonce=bytes(32))),
    ],
    ids=["oversized", "huge", "garbage", "empty", "http", "wrong frame", "challenge back"],
)
def test_nonsense_ends_the_connection_and_is_counted(
    server: Server, published: Published3x4, peer: Peer, data: bytes
) -> None:
    before = server.count("attach_malformed")
    peer.send(data)
    assert peer.receive() is None
    assert server.count("attach_malformed") == before + 1


def test_bytes_after_attach_end_the_connection(server: Server, published: Published3x4, peer: Peer) -> None:
    attach = peer.attach(published.share, published.token)
    assert isinstance(peer.answer_to(attach), Attached)
    peer.send(b"\x00")
    assert peer.receive() is None
    assert eventually(lambda: n_queue_pairs(server) == 0)


@pytest.mark.parametrize("way", ["withdraw", "deregister", "exit"])
def test_the_end_of_a_share_is_told_with_its_cause(published: Published3x4, peer: Peer, way: str) -> None:
    assert isinstance(peer.answer_to(peer.attach(published.share, published.token)), Attached)
    if way == "withdraw":
        published.connection.request(Withdraw(seq=0, share=published.share))
    elif way == "deregister":
        published.connection.request(Deregister(seq=0, mr=published.mr))
    else:
        published.connection.close()
    ended = peer.receive()
    assert isinstance(ended, Ended)
    assert ended.cause == ("owner exited" if way == "exit" else "withdrawn")


def test_a_withdrawn_share_admits_nobody_and_its_domain_can_go(
    server: Server, published: Published3x4, peer: Peer
) -> None:
    assert isinstance(peer.answer_to(peer.attach(published.share, published.token)), Attached)
    connection = published.connection
    connection.request(Withdraw(seq=0, share=published.share))
    late = Peer(published.place)
    assert isinstance(late.answer_to(late.attach(published.share, published.token)), Denied)
    late.close()
    connection.request(Deregister(seq=0, mr=published.mr))
    connection.request(DeallocPd(seq=0, pd=published.pd))
    assert n_queue_pairs(server) == 1, "it lingers to answer with errors"
    peer.close()
    assert eventually(lambda: n_queue_pairs(server) == 0)
    assert server.count("internal_errors") == 0


def test_peers_that_only_connect_are_bounded_and_the_oldest_makes_room(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("crowd")
    with running_server(folder, exchange_handshakes=3) as server:
        connection = ControlSocket(server.path)
        place = place_of(hello(connection))
        connection.close()
        idle = [Peer(place) for _ in range(3)]
        late = Peer(place)
        assert idle[0].receive() is None
        assert server.count("peers_over_limit") == 1
        late.close()
        for peer in idle:
            peer.close()
        again = Peer(place)
        again.close()


@pytest.mark.timeout(30)
def test_a_peer_that_says_nothing_is_dropped_in_time(server: Server, published: Published3x4, peer: Peer) -> None:
    before = server.count("peers_timed_out")
    assert peer.receive() is None
    assert server.count("peers_timed_out") == before + 1


def test_peers_are_told_when_the_server_stops(tmp_path_factory: pytest.TempPathFactory) -> None:
    array = np.zeros(8, np.uint8)
    with running_server(tmp_path_factory.mktemp("stop")) as server:
        connection = ControlSocket(server.path)
        place = place_of(hello(connection))
        pd = handle_of(connection, AllocPd(seq=0))
        mr = register(connection, pd, array.ctypes.data, 8).mr
        reply, _ = connection.request(Publish(seq=0, mr=mr, dtype="|u1", shape=[8], strides=[1]))
        assert isinstance(reply, Published)
        peer = Peer(place)
        assert isinstance(peer.answer_to(peer.attach(reply.share, reply.token)), Attached)
    ended = peer.receive()
    assert isinstance(ended, Ended)
    assert ended.cause == "server stopping"
    assert peer.receive() is None
    peer.close()
    connection.close()
