"""Two NICs over a bad wire: loss, duplication, reordering and corruption never change a byte or a status."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from nopin.nic.abi import WcStatus, WrOpcode
from nopin.nic.wire.psn import psn_add
from nopin.testing.pair import ALL_RIGHTS, Pair, Wire, make_pair

OK = WcStatus.SUCCESS


def chaos(seed: int, loss: float, duplicate: float, reorder: float, corrupt: float) -> Wire:
    rng = random.Random(seed)
    held: dict[bytes, list[bytes]] = {}  # by destination, so that a late packet arrives where it was going

    def wire(packet: bytes, _number: int) -> list[bytes]:
        late = held.setdefault(packet[5:8], [])
        out, late[:] = list(late), []
        if rng.random() < loss:
            return out
        if rng.random() < corrupt:
            changed = bytearray(packet)  # the key above was read before the damage
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            packet = bytes(changed)
        if rng.random() < reorder:
            late.append(packet)
            return out
        return [packet, *out] + ([packet] if rng.random() < duplicate else [])

    return wire


def work(pair: Pair, seed: int) -> None:
    """Post a mixed load and check every byte and every completion."""
    rng = np.random.default_rng(seed)
    a, b = pair.a, pair.b
    a.space.memory[:] = rng.integers(0, 256, len(a.space.memory), np.uint8)
    b.space.memory[:] = rng.integers(0, 256, len(b.space.memory), np.uint8)
    want_b = a.space.memory[:300_000].copy()
    want_a = b.space.memory[2_000_000:2_200_000].copy()
    counter = -b.region.iova % 8 + 3_000_000
    b.space.memory[counter : counter + 8] = 0
    for k in range(8):
        b.post_recv(3_100_000 + 5000 * k, 5000, wr_id=k)
    a.post(WrOpcode.RDMA_WRITE, 0, 300_000, to=b.region, at=1_000_000)
    for k in range(4):
        a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 1_000_000 + 8 * k, 8, to=b.region, at=counter, compare_add=1)
        a.post(WrOpcode.SEND, 5000 * k, 5000)
        a.post(WrOpcode.RDMA_READ, 2_000_000 + 50_000 * k, 50_000, to=b.region, at=2_000_000 + 50_000 * k)
        a.post(WrOpcode.SEND_WITH_IMM, 5000 * k, 100, imm=k)
    pair.run()
    assert [status for _, status in a.poll()] == [OK] * 17
    assert [status for _, status in b.poll()] == [OK] * 8
    assert np.array_equal(b.space.memory[1_000_000:1_300_000], want_b)
    assert np.array_equal(a.space.memory[2_000_000:2_200_000], want_a)
    assert a.space.memory[1_000_000:1_000_032].view(np.uint64).tolist() == [0, 1, 2, 3], "an atomic ran twice"
    for k in range(4):
        at = 3_100_000 + 10_000 * k
        assert np.array_equal(b.space.memory[at : at + 5000], a.space.memory[5000 * k : 5000 * k + 5000])


@pytest.mark.parametrize("mtu", [256, 1024, 4096])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("loss", "duplicate", "reorder", "corrupt"),
    [(0.02, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 0.05, 0), (0, 0, 0, 0.02), (0.01, 0.05, 0.02, 0.01)],
)
def test_bad_wire_changes_nothing(
    mtu: int, seed: int, loss: float, duplicate: float, reorder: float, corrupt: float
) -> None:
    work(make_pair(chaos(seed, loss, duplicate, reorder, corrupt), mtu=mtu), seed)


@pytest.mark.parametrize("lost", range(8))
def test_any_single_lost_packet_is_recovered(lost: int) -> None:
    def wire(packet: bytes, number: int) -> list[bytes]:
        return [] if number == lost else [packet]

    pair = make_pair(wire)
    pair.a.space.memory[:4096] = 3
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 4096, to=pair.b.region)
    pair.a.post(WrOpcode.RDMA_READ, 8192, 4096, to=pair.b.region)
    pair.run()
    assert [status for _, status in pair.a.poll()] == [OK, OK]
    assert (pair.a.space.memory[8192:12288] == 3).all()


def test_ghost_acknowledgement_is_ignored() -> None:
    """An ACK for a PSN never sent, and an old one, change nothing."""
    pair = make_pair()
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, OK)]
    ack = next(packet for packet in pair.log if packet[0] == 0x11)
    from nopin.nic.wire import icrc
    from nopin.nic.wire.batch import Path
    from nopin.testing.pair import batch_of

    path = Path(pair.a.nic.endpoint, pair.b.nic.endpoint)
    for psn in (0xFFFFF0, psn_add(0xFFFFF0, 1000)):
        ghost = bytearray(ack)
        ghost[8:12] = struct.pack(">I", psn)
        batch = batch_of([bytes(ghost)], path)
        icrc.seal(batch.buffer, batch.offsets, batch.lengths, Path(path.remote, path.local))
        pair.a.nic.receive(batch, pair.now)
    assert pair.a.nic.counters.ghost_response == 2
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, OK)]


def test_two_gib_message_at_the_smallest_mtu_fits_the_psn_space() -> None:
    """2^23 packets is the most one message may take; only its start is sent here."""
    pair = make_pair(mtu=256)
    a = pair.a
    from nopin.nic import requester

    big = a.nic.register(
        a.qp.pd,
        pasid=a.region.pasid,
        address=0,
        length=1 << 40,
        iova=0,
        access=ALL_RIGHTS,
        discipline=a.region.discipline,
    )
    from nopin.testing.pair import send_entry

    a.sends.post(
        [
            send_entry(WrOpcode.RDMA_WRITE, [(0, 1 << 31, big.lkey)], remote=0, rkey=1),
            send_entry(WrOpcode.RDMA_WRITE, [(0, 8, big.lkey)], remote=0, rkey=1),
            send_entry(WrOpcode.RDMA_WRITE, [(0, (1 << 31) + 1 - 8, big.lkey), (0, 8, big.lkey)], remote=0, rkey=1),
        ]
    )
    for _ in range(3):
        requester.fetch_one(a.nic._core, a.qp)
    first, second, third = a.qp.send.works
    assert (first.n_psn, first.status) == (1 << 23, OK)
    assert second.first_psn == psn_add(first.first_psn, 1 << 23)
    assert third.status == WcStatus.LOC_LEN_ERR
