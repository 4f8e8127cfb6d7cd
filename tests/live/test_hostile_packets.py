"""A real server under floods of damaged packets over UDP: it lives, serves, and changes no byte it should not.

The attacker is the legitimate peer of the queue pair it attacks: it knows number, sequence and key, and half of its
packets have a right ICRC. Other packets come from an address that has no business there.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hostile_peer import MTU, PATIENCE_S, HostilePeer

from nopin import Access, Device, QueuePair, WcStatus
from nopin.lab.servers import LocalServer
from nopin.nic.abi import QpState
from nopin.nic.attributes import QpAttr
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.gid import address_of
from nopin.nic.wire.opcodes import Opcode
from nopin.nic.wire.psn import psn_add
from nopin.testing.packets import Flood, floods, make_packet, reth_bytes, templates
from nopin.units import PAGE_BYTES

N_PACKETS = 100_000
PER_FLOOD = 24
FLOODS_PER_LOOK = 2
OPEN = slice(16 * PAGE_BYTES + 100, 20 * PAGE_BYTES + 13)
READ_ONLY = slice(40 * PAGE_BYTES, 44 * PAGE_BYTES)


class Victim:
    """Memory of this process of which two parts are open to peers, one of them only for reading."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pd = device.alloc_pd()
        self.cq = device.create_cq(1024)
        self.memory = (np.arange(64 * PAGE_BYTES) % 251).astype(np.uint8)
        self.before = self.memory.copy()
        self.open = self.pd.register(self.memory[OPEN], access="rwa")
        self.read_only = self.pd.register(self.memory[READ_ONLY], access="r")
        self.endpoint = Endpoint(device.info.gid, device.info.port)
        self._kept: list[QueuePair] = []

    def queue_pair(self) -> QueuePair:
        """Make one and keep it: a dropped one is closed."""
        self._kept.append(self.pd.create_qp(self.cq))
        return self._kept[-1]

    def changed_outside(self) -> int:
        """Bytes that changed though no peer may write them."""
        changed = self.memory != self.before
        changed[OPEN] = False
        return int(changed.sum())

    def row(self, kind: str) -> dict[str, int]:
        return next(row for row in self.device.stat() if row["kind"] == kind)

    def await_packets(self, n_packets: int) -> None:
        """Wait until the server has taken this many packets since it started."""
        deadline = time.monotonic() + PATIENCE_S
        while self.row("dev")["rcvd_pkts"] < n_packets and time.monotonic() < deadline:
            time.sleep(0.002)


@pytest.fixture
def victim(device: Device) -> Victim:
    return Victim(device)


@pytest.fixture
def peer(victim: Victim) -> Iterator[HostilePeer]:
    made = HostilePeer("127.0.0.77", victim.endpoint)
    yield made
    made.close()


@pytest.fixture
def stranger(victim: Victim) -> Iterator[HostilePeer]:
    made = HostilePeer("127.0.0.78", victim.endpoint)
    yield made
    made.close()


@pytest.fixture
def raw() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.77", 0))
        yield made


class Attack:
    """One queue pair after the other, each attacked until a forged but well-formed request fails it."""

    def __init__(self, victim: Victim, peer: HostilePeer) -> None:
        self._victim, self._peer = victim, peer
        self._choose = random.Random(1)
        self.n_failed = 0
        self.renew()

    def renew(self) -> None:
        self.qp = self._victim.queue_pair()
        self.side = self._peer.connect(self.qp)
        self._psn = self.side.qp.send.next_psn

    def look(self) -> None:
        """Learn the sequence the victim is in, as a peer does from its ACKs; start again once it has failed."""
        attr = self.qp.query()
        if attr.state != QpState.RTS:
            self.n_failed += 1
            self.qp.close()
            self.renew()
        else:
            assert attr.rq_psn is not None
            self._psn = attr.rq_psn

    def sources(self) -> list[bytes]:
        """One of each packet, aimed at the open region, the read-only one, or what lies beside them."""
        victim = self._victim
        region, where = self._choose.choice(((victim.open, OPEN), (victim.open, OPEN), (victim.read_only, READ_ONLY)))
        length = where.stop - where.start
        address = region.iova + self._choose.choice((0, 50, length - 8, length - 1, -8))
        return templates(self.qp.qpn, self._psn, address, region.rkey, MTU)


def test_a_hundred_thousand_damaged_packets_harm_nothing(
    server: LocalServer, victim: Victim, peer: HostilePeer, stranger: HostilePeer
) -> None:
    bystander = peer.connect(victim.queue_pair())
    attack = Attack(victim, peer)
    from_peer = floods(attack.sources, peer.path, N_PACKETS, PER_FLOOD, seed=11)
    from_stranger = floods(attack.sources, stranger.path, N_PACKETS // 8, PER_FLOOD, seed=12)
    for count, flood in enumerate(from_peer):
        peer.send_flood(flood)
        if count % 8 == 0:
            stranger.send_flood(next(from_stranger))
        if count % FLOODS_PER_LOOK == 0:
            attack.look()
        if count % 100 == 0:
            victim.await_packets(peer.n_sent + stranger.n_sent)
            marker = count.to_bytes(8, "little")
            assert peer.write(bystander, victim.open.iova, victim.open.rkey, marker) == WcStatus.SUCCESS
            assert victim.memory[OPEN.start : OPEN.start + 8].tobytes() == marker
    victim.await_packets(peer.n_sent + stranger.n_sent)
    figures, link = victim.row("dev"), victim.row("link")
    assert figures["rcvd_pkts"] >= N_PACKETS, f"{link['kernel_dropped']} never reached the server"
    assert figures["internal_errors"] == 0
    assert figures["icrc_drop"] > N_PACKETS / 10
    assert figures["sent_nak"] > 100, "the floods never got past the first checks"
    assert figures["wrong_path_drop"] > 100
    assert attack.n_failed > 10
    assert victim.changed_outside() == 0
    attack.renew()
    assert peer.write(attack.side, victim.open.iova, victim.open.rkey, b"after all") == WcStatus.SUCCESS


def as_flood(packets: list[bytes]) -> Flood:
    lengths = np.array([len(packet) for packet in packets], np.int64)
    ends = np.cumsum(lengths)
    return np.frombuffer(b"".join(packets), np.uint8).copy(), ends - lengths, lengths


def sealed(flood: Flood, sender: HostilePeer) -> Flood:
    icrc.seal(*flood, sender.path)
    return flood


def test_what_must_be_dropped_in_silence_does_not_disturb_the_connection(
    victim: Victim, peer: HostilePeer, stranger: HostilePeer
) -> None:
    """Between the packets of a good transfer: wrong ICRC, truncated, foreign, replayed, far ahead, every opcode."""
    qp = victim.queue_pair()
    side = peer.connect(qp)
    rng = np.random.default_rng(5)
    address, rkey = victim.open.iova, victim.open.rkey
    write = make_packet(
        Bth(Opcode.WRITE_ONLY, qp.qpn, side.qp.send.una, ack_req=True), reth_bytes(address, rkey, 8), b"replayed"
    )
    for turn in range(100):
        psn = side.qp.send.next_psn
        every = templates(qp.qpn, psn, address, rkey, MTU)
        peer.send_flood(as_flood(every))  # the ICRC is four zero bytes
        peer.send_flood(as_flood([packet[: rng.integers(1, len(packet))] for packet in every]))
        stranger.send_flood(sealed(as_flood(every), stranger))
        ghosts = [packet for packet in templates(qp.qpn, psn_add(psn, 1 << 20), address, rkey, MTU) if packet[0] >= 0xD]
        peer.send_flood(sealed(as_flood([packet for packet in ghosts if packet[0] <= 0x12]), peer))
        if turn:
            peer.send_flood(sealed(as_flood([write] * 20), peer))
        data = rng.integers(0, 256, 3 * MTU + 5, np.uint8).tobytes()
        assert peer.write(side, address, rkey, data) == WcStatus.SUCCESS
        assert victim.memory[OPEN.start : OPEN.start + len(data)].tobytes() == data
    assert qp.state is QpState.RTS
    assert victim.changed_outside() == 0


def test_no_opcode_reaches_a_queue_pair_that_is_not_connected(victim: Victim, peer: HostilePeer) -> None:
    everything = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)
    idle, ready, failed = victim.queue_pair(), victim.queue_pair(), victim.queue_pair()
    ready.modify(QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=everything))
    peer.connect(failed)
    failed.modify(QpAttr(state=QpState.ERR))
    dropped = victim.row("dev")["wrong_state_drop"]
    for qp in (idle, ready, failed):
        packets = templates(qp.qpn, 0xFFFF00, victim.open.iova, victim.open.rkey, MTU)
        assert {packet[0] for packet in packets} == set(Opcode)
        peer.send_flood(sealed(as_flood(packets), peer))
        dropped += len(packets)
    victim.await_packets(peer.n_sent)
    assert victim.row("dev")["wrong_state_drop"] == dropped
    assert np.array_equal(victim.memory, victim.before)


def test_a_datagram_of_any_size_is_survived(victim: Victim, peer: HostilePeer, raw: socket.socket) -> None:
    """Empty ones, one-byte ones, and the largest there is."""
    side = peer.connect(victim.queue_pair())
    rng = np.random.default_rng(2)
    place = address_of(victim.endpoint.gid), victim.endpoint.port
    for length in (0, 1, 11, 12, 15, 16, 17, 31, 32, 4200, 9000, 65000, 65507):
        packet = rng.integers(0, 256, length, np.uint8)
        raw.sendto(packet.tobytes(), place)
    assert peer.write(side, victim.open.iova, victim.open.rkey, b"still here") == WcStatus.SUCCESS
