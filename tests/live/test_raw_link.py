"""The raw link over the real loopback: foreign identifications, bad packets, noise."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from nopin.errors import HostLacks, UsageError
from nopin.link.raw import RawLink
from nopin.mm.space import Staging
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, Segment, TxBatch
from nopin.nic.wire.bth import Bth, emit_bth, parse_bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode

ADDRESS = "127.0.0.88"
SENDER = "127.0.0.89"


def can_open_raw() -> bool:
    try:
        RawLink(ADDRESS, 0).close()
    except HostLacks:
        return False
    return True


pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(not can_open_raw(), reason="no permission for raw sockets"),
]


@pytest.fixture
def link() -> Iterator[RawLink]:
    opened = RawLink(ADDRESS, 0)
    yield opened
    opened.close()


def send_with_header(link: RawLink, packet: bytes, identification: int, *, flags: int = 0x4000) -> None:
    """Send as an adapter does: an IP header of our own making."""
    udp = (50000).to_bytes(2, "big") + link.endpoint.port.to_bytes(2, "big")
    udp += (8 + len(packet)).to_bytes(2, "big") + bytes(2)
    addresses = socket.inet_aton(SENDER) + socket.inet_aton(ADDRESS)
    word = (identification << 16 | flags).to_bytes(4, "big")
    head = bytes([0x45, 0]) + (28 + len(packet)).to_bytes(2, "big") + word + bytes([64, 17, 0, 0])
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as adapter:
        adapter.sendto(head + addresses + udp + packet, (ADDRESS, 0))


def sealed(link: RawLink, psn: int, identification: int, n_bytes: int = 100) -> bytes:
    path = Path(Endpoint(gid_of(SENDER), 50000), link.endpoint)
    buffer = np.full(n_bytes, 0x5A, np.uint8)
    Bth(Opcode.SEND_ONLY, 9, psn).emit(buffer.data)
    words = np.array([identification << 16 | 0x4000], np.uint32)
    icrc.seal(buffer, np.array([0]), np.array([n_bytes]), path, words)
    return buffer.tobytes()


def drain(link: RawLink, timeout_s: float = 0.3) -> tuple[list[int], list[PacketBatch]]:
    psns: list[int] = []
    batches: list[PacketBatch] = []
    while select.select(link.filenos(), [], [], timeout_s)[0]:
        for batch in link.receive(0):
            psns += parse_bth(batch.buffer, batch.offsets).psn.tolist()
            batches.append(batch)
    return psns, batches


def test_foreign_identification_is_used_to_check(link: RawLink) -> None:
    for psn, identification in enumerate((0x1234, 0xFFFF, 7)):
        send_with_header(link, sealed(link, psn, identification), identification)
    psns, batches = drain(link)
    assert psns == [0, 1, 2]
    assert all(batch.icrc_checked for batch in batches)
    assert batches[0].path.remote == Endpoint(gid_of(SENDER), 50000)
    assert batches[0].path.local == link.endpoint


def test_wrong_icrc_is_dropped_and_counted(link: RawLink) -> None:
    bad = bytearray(sealed(link, 1, 5))
    bad[50] ^= 1
    send_with_header(link, sealed(link, 0, 5), 5)
    send_with_header(link, bytes(bad), 5)
    send_with_header(link, sealed(link, 2, 6), 5)
    send_with_header(link, sealed(link, 3, 5), 5)
    psns, _ = drain(link)
    assert psns == [0, 3]
    assert link.statistics()["icrc_errors"] == 2


def test_identification_zero_by_agreement_is_accepted(link: RawLink) -> None:
    send_with_header(link, sealed(link, 0, 0), 77)
    assert drain(link)[0] == [0]


def test_too_short_packets_and_other_ports_are_ignored(link: RawLink) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"short", (ADDRESS, link.endpoint.port))
        stranger.sendto(b"not for us, not even looked at", (ADDRESS, link.endpoint.port ^ 1))
    assert drain(link) == ([], [])
    assert link.statistics()["malformed"] == 1


def test_merged_packets_of_a_local_sender_are_counted_as_malformed(link: RawLink) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(17, 103, 4112)  # UDP_SEGMENT
        sender.sendto(bytes(4112 * 15), (ADDRESS, link.endpoint.port))
    assert drain(link) == ([], [])
    assert link.statistics()["malformed"] >= 1


@pytest.mark.parametrize("n_bytes", [16, 60, 4128])
def test_two_raw_links_talk_one_packet_per_datagram(link: RawLink, n_bytes: int) -> None:
    other = RawLink(SENDER, 0)
    try:
        path = Path(other.endpoint, link.endpoint)
        n = 10
        staging = Staging(np.random.default_rng(1).integers(0, 256, n * n_bytes, np.uint8))
        offsets = np.arange(n) * n_bytes
        psn = np.arange(n, dtype=np.uint32)
        emit_bth(staging.array, offsets, opcode=Opcode.SEND_ONLY, qpn=5, psn=psn)
        icrc.seal(staging.array, offsets, np.full(n, n_bytes), path)
        other.send(TxBatch(path, staging, [Segment(0, n * n_bytes, n_bytes)]), 0)
        psns, batches = drain(link)
        assert psns == list(range(n))
        assert all((batch.lengths == n_bytes).all() for batch in batches)
        assert link.statistics()["icrc_errors"] == 0
        assert other.statistics()["packets_sent"] == n
    finally:
        other.close()


def test_the_host_does_not_answer_port_unreachable(link: RawLink) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.connect((ADDRESS, link.endpoint.port))
        for _ in range(50):
            peer.send(bytes(1000))  # would raise ECONNREFUSED from the second on


def test_ipv6_and_wildcard_are_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="IPv6 needs no raw link"):
        RawLink("::1")
    with pytest.raises(UsageError, match="name one"):
        RawLink("0.0.0.0")


def test_a_port_that_is_taken_is_explained(link: RawLink) -> None:
    with pytest.raises(OSError, match=f"{link.endpoint.port} of {ADDRESS} is taken, .*name another address"):
        RawLink(ADDRESS, link.endpoint.port)


def test_missing_permission_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(address: str, port: int) -> socket.socket:
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr("nopin.link.raw.open_raw_udp", denied)
    with pytest.raises(HostLacks, match="CAP_NET_RAW"):
        RawLink(ADDRESS, 0)
