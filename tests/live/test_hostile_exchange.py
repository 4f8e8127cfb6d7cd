"""Strangers at the exchange: whatever they send, or do not send, those who know the token are attached meanwhile."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from serving import PATIENCE_S, Server, eventually, running_server

import nopin
from nopin import Device
from nopin.control.exchange import FRAME_BYTES_MAX, AnyFrame, Attach, proof_of
from nopin.control.framing import FrameReader, encode_frame
from nopin.control.url import ShareUrl

HANDSHAKES = 16
"""Connections that may be shaking hands at once, so that the bound is reached soon."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("strangers"), exchange_handshakes=HANDSHAKES) as running:
        yield running


class Shared:
    """An array of this process, shared, and how to reach it."""

    def __init__(self, server: Server) -> None:
        self.device = Device(server=str(server.path))
        self.array = np.arange(100.0)
        self.share = self.device.share(self.array)
        self.url = ShareUrl.parse(self.share.url)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.url.host, self.url.port), PATIENCE_S)

    def can_be_attached(self) -> bool:
        with nopin.attach(self.share.url, device=self.device) as remote:
            return bool(remote[7] == 7.0)


@pytest.fixture
def shared(server: Server) -> Iterator[Shared]:
    made = Shared(server)
    assert made.can_be_attached()
    yield made
    assert made.can_be_attached()
    made.device.close()
    assert server.count("internal_errors") == 0


def is_closed(sock: socket.socket) -> bool:
    """Read to the end of a connection, whatever comes before it."""
    sock.settimeout(PATIENCE_S)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def good_attach(shared: Shared, sock: socket.socket) -> bytes:
    """The frame that would be accepted on this connection."""
    reader = FrameReader()
    frames: list[AnyFrame] = []
    while not frames:
        frames = reader.feed(sock.recv(4096))
    info = shared.device.info
    attach = Attach(
        share=shared.url.share,
        qpn=5,
        psn=6,
        gid=info.gid,
        port=info.port,
        path_mtu=1024,
        max_rd_atomic=1,
        replaces=0,
    )
    attach.proof = proof_of(attach, shared.url.token, frames[0].nonce)  # type: ignore[union-attr]  # a Challenge
    return encode_frame(attach)


def test_random_bytes_are_refused_and_counted(server: Server, shared: Shared) -> None:
    rng = random.Random(5)
    before = server.count("attach_malformed")
    n_nonsense = 0
    for _ in range(200):
        with shared.connect() as sock:
            data = rng.randbytes(rng.randrange(1, 200))
            if rng.random() < 0.5:  # a length that is right, so that the message itself is looked at
                data = struct.pack(">I", len(data)) + data
            n_nonsense += len(data) >= 4 and int.from_bytes(data[:4], "big") <= len(data) - 4
            n_nonsense += len(data) >= 4 and int.from_bytes(data[:4], "big") > FRAME_BYTES_MAX
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock)
    assert server.count("attach_malformed") == before + n_nonsense
    assert n_nonsense > 150


def test_every_changed_byte_of_an_attach_is_refused(server: Server, shared: Shared) -> None:
    """Also those that still decode: the proof covers every field."""
    rng = random.Random(6)
    counters = ("attach_refused", "attach_malformed", "attached")
    before = {name: server.count(name) for name in counters}
    for _ in range(200):
        with shared.connect() as sock:
            frame = bytearray(good_attach(shared, sock))
            frame[rng.randrange(4, len(frame))] ^= 1 << rng.randrange(8)
            sock.sendall(frame)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock)
    refused, malformed, attached = (server.count(name) - before[name] for name in counters)
    assert attached == 0
    assert refused + malformed == 200
    assert refused > 50


def test_an_attach_split_into_single_bytes_is_accepted(server: Server, shared: Shared) -> None:
    before = server.count("attached")
    with shared.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in good_attach(shared, sock):
            sock.send(bytes([byte]))
        assert eventually(lambda: server.count("attached") == before + 1)


def test_peers_that_dawdle_keep_nobody_out_and_are_let_go_in_time(server: Server, shared: Shared) -> None:
    """Slow loris: each sends a byte now and then. Whoever is quick takes the place of the slowest."""
    before = server.count("peers_timed_out"), server.count("peers_over_limit")
    slow = [shared.connect() for _ in range(2 * HANDSHAKES)]
    for sock in slow:
        with contextlib.suppress(ConnectionError):  # the older half has been let go already
            sock.sendall(b"\0")
    for _ in range(20):
        assert shared.can_be_attached()
    assert server.count("peers_over_limit") == before[1] + HANDSHAKES + 1, "the first of the 20 needed a place too"
    for sock in slow:
        assert is_closed(sock)
        sock.close()
    assert server.count("peers_timed_out") > before[0]


def test_hundreds_of_connections_leave_nothing_behind(server: Server, shared: Shared) -> None:
    n_descriptors = server.n_descriptors()
    for _ in range(10):
        crowd = [shared.connect() for _ in range(60)]
        for sock in crowd[::2]:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for sock in crowd:
            sock.close()
    assert shared.can_be_attached()
    assert eventually(lambda: server.n_descriptors() <= n_descriptors)
    assert server.count("peers_over_limit") > 0


def test_a_peer_that_never_reads_is_given_up_only_by_itself(server: Server, shared: Shared) -> None:
    """It attaches, then its share ends while its window is closed: the others are told all the same."""
    with shared.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.sendall(good_attach(shared, sock))
        other = nopin.attach(shared.share.url, device=shared.device)
        assert other[3] == 3.0
        shared.share.close()
        with pytest.raises(nopin.NopinError):
            other[3]
        other.close()
    shared.share = shared.device.share(shared.array)
    shared.url = ShareUrl.parse(shared.share.url)
