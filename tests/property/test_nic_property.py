"""A NIC that is sent nonsense: no exception, no byte outside the region, and its own books stay in order.

Seeded floods of damaged packets, many with a right ICRC and a plausible PSN, against both roles; and hypothesis, which
composes sequences of well-formed packets in any order and shrinks what goes wrong.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.nic.abi import Access, Discipline, QpState, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.mr import Region
from nopin.nic.packets import HELD_PACKETS_MAX
from nopin.nic.responder import UNSENT_REPLIES_MAX
from nopin.nic.wire.batch import PacketBatch, Path
from nopin.nic.wire.psn import psn_diff
from nopin.testing.packets import floods, sealed_batch, templates
from nopin.testing.pair import ALL_RIGHTS, Side, answer_faults, connect, make_side
from nopin.units import PAGE_BYTES

N_PACKETS = 12_000
PER_FLOOD = 16
MTU = 256
OPEN = slice(16 * PAGE_BYTES + 100, 20 * PAGE_BYTES + 13)
"""The only bytes of the victim's memory that the peer may write."""
LANDING = slice(40 * PAGE_BYTES, 44 * PAGE_BYTES)
"""Where the victim's own READs and atomics put their data."""


class Victim:
    """A queue pair under fire: everything registered for itself, one range for the peer."""

    def __init__(self, seed: int, remote: Access = ALL_RIGHTS) -> None:
        self.side = make_side("10.0.0.1", seed=seed, n_pages=64, access=Access.LOCAL_WRITE, depth=64)
        self.peer = make_side("10.0.0.2", seed=seed + 1, n_pages=4)
        side = self.side
        self.open: Region = side.nic.register(
            side.qp.pd,
            pasid=side.region.pasid,
            address=side.space.base + OPEN.start,
            length=OPEN.stop - OPEN.start,
            iova=0x5000 + OPEN.start,
            access=remote,
            discipline=Discipline.ON_DEMAND,
        )
        side.space.memory[:] = np.arange(len(side.space.memory)) % 251
        self.before = side.space.memory.copy()
        connect(self.side, self.peer, mtu=MTU)
        self.path = Path(side.nic.endpoint, self.peer.nic.endpoint)
        self.back = Path(self.path.remote, self.path.local)

    def requests(self) -> list[bytes]:
        """One of each packet at the PSN that is expected next: what reaches the deepest."""
        side, target = self.side, self.open.iova + 50
        return templates(side.qp.qpn, side.qp.recv.epsn, target, self.open.rkey, MTU)

    def answers(self) -> list[bytes]:
        """The same at the PSN whose answer is awaited."""
        side = self.side
        return templates(side.qp.qpn, side.qp.send.una, 0, 0, MTU)

    def receive(self, batch: PacketBatch, now: int) -> None:
        """One turn of what the server does."""
        nic = self.side.nic
        nic.receive(batch, now)
        nic.poll_rings(now)
        for _ in nic.transmit(now):
            pass
        answer_faults(self.side, now)
        due = nic.next_deadline()
        if due is not None and due <= now:
            nic.on_deadline(now)
        self.side.poll()
        nic.take_notices()
        nic.take_events()
        assert nic.take_corrupt() == []
        check_books(self.side)

    def revive(self) -> None:
        """Connect again once a forged request, well formed but wrong, has failed the queue pair as it should."""
        if self.side.qp.state is not QpState.RTS:
            for side in (self.side, self.peer):
                if side.qp.state is not QpState.RESET:
                    side.nic.modify_qp(side.qp, QpAttr(state=QpState.RESET), 0)
            connect(self.side, self.peer, mtu=MTU)

    def check_memory(self, *writable: slice) -> None:
        """Compare everything but the given ranges with what was there."""
        after = self.side.space.memory.copy()
        for part in writable:
            after[part] = self.before[part]
        assert np.array_equal(after, self.before), "bytes outside what was granted have changed"


def check_books(side: Side) -> None:
    """What must hold of both halves of a queue pair after every step."""
    send, recv = side.qp.send, side.qp.recv
    if side.qp.state in (QpState.RTS, QpState.SQD):
        assert psn_diff(send.sent, send.una) >= 0
        assert psn_diff(send.high, send.sent) >= 0
        assert psn_diff(send.next_psn, send.high) >= 0
        assert 0 <= send.acked < max(1, send.works[0].n_psn if send.works else 1)
        assert sum(work.n_psn for work in send.works) == psn_diff(send.next_psn, send.una) + send.acked
    assert all(psn_diff(last, send.una) >= 0 for _, last in send.asked)
    assert sum(map(len, send.held)) == send.n_held <= HELD_PACKETS_MAX
    assert sum(map(len, recv.held)) == recv.n_held <= HELD_PACKETS_MAX
    assert len(recv.saved) <= (side.qp.attr.max_dest_rd_atomic or 0)
    assert len(recv.replies) <= UNSENT_REPLIES_MAX + 2
    if recv.inbound is not None and recv.inbound.region is not None:
        assert recv.inbound.received < recv.inbound.length


@pytest.mark.parametrize(("seed", "per_flood"), [(0, PER_FLOOD), (1, PER_FLOOD), (2, 1)])
def test_a_responder_survives_any_flood(seed: int, per_flood: int) -> None:
    victim = Victim(seed)
    side = victim.side
    n_deaths = 0
    for count, (buffer, offsets, lengths) in enumerate(
        floods(victim.requests, victim.back, N_PACKETS * (per_flood + 4) // 20, per_flood, seed),
    ):
        if count % 3 == 0:
            side.post_recv(LANDING.start, 1000)
        victim.receive(PacketBatch(victim.path, buffer, offsets, lengths), count * 1000)
        n_deaths += side.qp.state is not QpState.RTS
        victim.revive()
        made = victim.requests()
        victim.receive(sealed_batch([made[count % len(made)]] * 3, victim.path), count * 1000 + 500)
        victim.revive()
    assert n_deaths > 0, "the floods never got past the first checks"
    victim.check_memory(OPEN, LANDING)
    assert not np.array_equal(side.space.memory[OPEN], victim.before[OPEN]), "no forged WRITE ever succeeded"


@pytest.mark.parametrize("remote", [Access.REMOTE_READ, Access.LOCAL_WRITE, Access.NONE])
def test_a_region_without_write_rights_never_changes(remote: Access) -> None:
    victim = Victim(5, remote)
    for count in range(300):
        made = victim.requests()
        victim.receive(sealed_batch([made[count % len(made)]] * 5, victim.path), count * 1000)
        victim.revive()
    victim.check_memory()


def post_work(side: Side) -> None:
    """Keep READs, atomics, WRITEs and SENDs outstanding, so that every kind of answer has its question."""
    while side.sends.free >= 8:
        for opcode in (WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND):
            side.post(opcode, LANDING.start, 1000, remote=0x1000, rkey=7)
        side.post(WrOpcode.ATOMIC_FETCH_AND_ADD, LANDING.start + 2000, 8, remote=0x1000, rkey=7)


@pytest.mark.parametrize(("seed", "per_flood"), [(0, PER_FLOOD), (1, PER_FLOOD), (2, 1)])
def test_a_requester_survives_any_flood(seed: int, per_flood: int) -> None:
    victim = Victim(seed)
    side = victim.side
    n_deaths = 0
    for count, (buffer, offsets, lengths) in enumerate(
        floods(victim.answers, victim.back, N_PACKETS * (per_flood + 4) // 20, per_flood, seed),
    ):
        post_work(side)
        victim.receive(PacketBatch(victim.path, buffer, offsets, lengths), count * 1_000_000)
        made = victim.answers()
        victim.receive(sealed_batch([made[count % len(made)]] * 2, victim.path), count * 1_000_000 + 1)
        n_deaths += side.qp.state is not QpState.RTS
        victim.revive()
    assert n_deaths > 0, "the floods never got past the first checks"
    victim.check_memory(LANDING)


packet_lists = st.lists(
    st.tuples(st.integers(0, 59), st.integers(-3, 5), st.integers(1, 5), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(packet_lists, st.sets(st.integers(16, 20)), st.sets(st.integers(16, 20)), st.sets(st.integers(39, 44)))
def test_any_order_of_well_formed_packets_keeps_the_books(
    choices: list[tuple[int, int, int, bool]], slow: set[int], hole: set[int], slow_landing: set[int]
) -> None:
    """Requests and responses at PSNs around the expected ones, with pages that are out or not there."""
    victim = Victim(9)
    side = victim.side
    side.space.slow, side.space.hole = slow | slow_landing, hole
    for k in range(4):
        side.post_recv(LANDING.start + 1000 * k, 1000)
    for step, (which, ahead, n, as_answer) in enumerate(choices):
        if side.qp.state is QpState.RTS:
            post_work(side)
        psn = (side.qp.send.una if as_answer else side.qp.recv.epsn) + ahead & 0xFFFFFF
        made = templates(side.qp.qpn, psn, victim.open.iova + 50, victim.open.rkey, MTU)
        victim.receive(sealed_batch([made[which % len(made)]] * n, victim.path), step * 1_000_000)
    victim.check_memory(OPEN, LANDING)


def test_short_writes_at_the_end_of_the_buffer_are_refused_not_read_past() -> None:
    """A packet that ends inside its own RETH, the last thing in the link's buffer, behind good ones."""
    victim = Victim(3)
    qp = victim.side.qp
    made = templates(qp.qpn, qp.recv.epsn, victim.open.iova, victim.open.rkey, MTU)
    write = next(packet for packet in made if packet[0] == 0x0A and len(packet) > 40)
    cut = write[:12] + bytes(4)
    packets = [write[:9] + ((qp.recv.epsn + k) & 0xFFFFFF).to_bytes(3, "big") + write[12:] for k in range(5)]
    packets.append(cut[:9] + ((qp.recv.epsn + 5) & 0xFFFFFF).to_bytes(3, "big") + cut[12:])
    victim.receive(sealed_batch(packets, victim.path), 0)
    assert victim.side.qp.state is QpState.ERR
    assert victim.side.nic.counters.sent_nak == 1
    assert (victim.side.space.memory[OPEN.start : OPEN.start + 8] == 0xEE).all()
    victim.check_memory(OPEN)


def test_many_small_writes_reach_a_region_of_any_size() -> None:
    """One copy for all, also where the region is longer than 32 bits can say (the implicit one is)."""
    victim = Victim(4)
    side = victim.side
    everything = side.nic.register(
        side.qp.pd,
        pasid=side.region.pasid,
        address=0,
        length=None,
        iova=0,
        access=ALL_RIGHTS,
        discipline=Discipline.ON_DEMAND,
    )
    made = templates(side.qp.qpn, side.qp.recv.epsn, side.space.base + OPEN.start, everything.rkey, MTU)
    write = next(packet for packet in made if packet[0] == 0x0A and len(packet) == 12 + 16 + 8 + 4)
    psns = [(side.qp.recv.epsn + k) & 0xFFFFFF for k in range(8)]
    packets = [write[:9] + psn.to_bytes(3, "big") + write[12:] for psn in psns]
    victim.receive(sealed_batch(packets, victim.path), 0)
    assert side.qp.state is QpState.RTS
    assert (side.space.memory[OPEN.start : OPEN.start + 8] == 0xEE).all()


def test_a_flood_of_duplicates_keeps_a_bounded_number_of_answers() -> None:
    victim = Victim(6)
    side = victim.side
    first = side.qp.recv.epsn
    made = templates(side.qp.qpn, first, victim.open.iova + 4, victim.open.rkey, MTU)
    atomic = next(packet for packet in made if packet[0] == 0x14)
    for _ in range(5):
        side.nic.receive(sealed_batch([atomic] * 1000, victim.path), 0)
    assert len(side.qp.recv.replies) <= UNSENT_REPLIES_MAX + 1
    assert side.nic.counters.unsent_drop >= 5000 - UNSENT_REPLIES_MAX - 1
    for _ in range(20):
        for _batch in side.nic.transmit(0):
            pass
    again = sealed_batch([made[0]], victim.path)
    side.nic.receive(again, 0)
    assert side.qp.state is QpState.RTS
