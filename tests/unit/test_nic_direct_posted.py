"""Short messages on the direct path, straight from the ring, among others that are not."""

import random

import numpy as np
import pytest

from nopin.nic.abi import Access, Discipline, QpState, SendFlags, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.direct_many import LENGTH_MAX, TOGETHER_BYTES
from nopin.testing.pair import ALL_RIGHTS, Pair, connect, make_side
from nopin.units import PAGE_BYTES

OK = WcStatus.SUCCESS
KIB = 1024


def direct_pair(*, access: Access = ALL_RIGHTS, discipline: Discipline = Discipline.ON_DEMAND) -> Pair:
    a = make_side("10.0.0.1", seed=1)
    b = make_side("10.0.0.1", seed=2, nic=a.nic, iommu=a.iommu, access=access, discipline=discipline)
    connect(a, b)
    rng = np.random.default_rng(0)
    for side in (a, b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), dtype=np.uint8)
    return Pair(a, b)


@pytest.mark.parametrize("seed", range(8))
def test_messages_of_all_kinds_take_effect_in_the_order_they_were_posted(seed: int) -> None:
    """Places overlap, so that a message out of its turn shows in the bytes."""
    pair, rng = direct_pair(), random.Random(seed)
    a, b = pair.a, pair.b
    ours, theirs = a.space.memory.copy(), b.space.memory.copy()
    sides = (ours, theirs)
    expected = []
    for wr_id in range(200):
        opcode = rng.choice([WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE, WrOpcode.SEND])
        length = rng.choice([1, 8, 100, 3 * KIB, 70 * KIB])
        here, there = rng.randrange(256 * KIB), rng.randrange(256 * KIB)
        flags = rng.choice([SendFlags.SIGNALED, SendFlags.SIGNALED | SendFlags.FENCE, SendFlags.NONE])
        if opcode is WrOpcode.SEND:
            b.post_recv(there, length)
            a.post(opcode, here, length, wr_id=wr_id, flags=flags)
        else:
            a.post(opcode, here, length, to=b.region, at=there, wr_id=wr_id, flags=flags)
        ranges = slice(here, here + length), slice(there, there + length)
        source = 1 if opcode is WrOpcode.RDMA_READ else 0
        sides[1 - source][ranges[1 - source]] = sides[source][ranges[source]].copy()
        if flags & SendFlags.SIGNALED:
            expected.append((wr_id, OK))
        if rng.random() < 0.2:
            pair.run()
    pair.run()
    assert a.poll() == expected
    assert np.array_equal(a.space.memory, ours)
    assert np.array_equal(b.space.memory, theirs)
    assert pair.n_packets == 0
    assert a.nic.counters.direct_messages == 200


def test_psns_move_on_as_on_the_wire() -> None:
    pair = direct_pair()
    before = pair.a.qp.send.next_psn
    pair.a.post(WrOpcode.RDMA_READ, 0, 2 * KIB + 1, to=pair.b.region)
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    side = pair.a.qp.send
    assert side.next_psn == side.una == side.sent == side.high == (before + 3 + 1) % (1 << 24)


def test_more_than_a_turn_allows_is_all_carried_out() -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    for wr_id in range(256):
        a.post(WrOpcode.RDMA_READ, 8 * wr_id, 8, to=b.region, at=8 * wr_id, wr_id=wr_id)
    a.nic.poll_rings(0)
    list(a.nic.transmit(0))
    assert 0 < len(a.poll()) < 256, "others get their turn in between"
    assert a.nic.busy
    pair.run()
    assert a.sends.free == 256
    assert np.array_equal(a.space.memory[: 8 * 256], b.space.memory[: 8 * 256])


def test_a_queue_that_is_drained_takes_nothing_new_and_rests() -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.SQD), 0)
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region)
    pair.run()
    assert a.poll() == []
    assert not a.nic.busy
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.RTS), 0)
    pair.run()
    assert a.poll() == [(0, OK)]


def test_absent_pages_are_brought_in_order() -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    b.space.slow = {1}
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region, at=0, wr_id=1)
    a.post(WrOpcode.RDMA_READ, 8, 8, to=b.region, at=PAGE_BYTES, wr_id=2)
    a.post(WrOpcode.RDMA_READ, 16, 8, to=b.region, at=0, wr_id=3)
    a.nic.poll_rings(0)
    list(a.nic.transmit(0))
    assert a.poll() == [(1, OK)], "the second waits for its page, and the third behind it"
    pair.run()
    assert a.poll() == [(2, OK), (3, OK)]
    assert np.array_equal(a.space.memory[8:16], b.space.memory[PAGE_BYTES : PAGE_BYTES + 8])


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        ({"rkey": 1}, WcStatus.REM_ACCESS_ERR),
        ({"at": 1 << 30}, WcStatus.REM_ACCESS_ERR),
        ({"here": 1 << 30}, WcStatus.LOC_PROT_ERR),
        ({"hole": 0}, WcStatus.REM_ACCESS_ERR),
        ({"opcode": 77}, WcStatus.LOC_QP_OP_ERR),
    ],
)
def test_what_is_wrong_with_one_is_found_out_and_flushes_the_rest(spoil: dict[str, int], status: WcStatus) -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region, at=PAGE_BYTES, wr_id=1)
    if "hole" in spoil:
        b.space.hole = {spoil["hole"]}
    a.post_send(
        spoil.get("opcode", WrOpcode.RDMA_READ),  # type: ignore[arg-type]  # a client may write any byte there
        [(a.region.iova + spoil.get("here", 8), 8, a.region.lkey)],
        wr_id=2,
        remote=b.region.iova + spoil.get("at", 0),
        rkey=spoil.get("rkey", b.region.rkey),
    )
    a.post(WrOpcode.RDMA_READ, 16, 8, to=b.region, at=PAGE_BYTES, wr_id=3)
    pair.run()
    assert a.poll() == [(1, OK), (2, status), (3, WcStatus.WR_FLUSH_ERR)]
    assert a.qp.state is QpState.ERR


def test_memory_that_may_not_be_written_is_not() -> None:
    pair = direct_pair(access=Access.REMOTE_READ)
    before = pair.b.space.memory.copy()
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.REM_ACCESS_ERR)]
    assert np.array_equal(pair.b.space.memory, before)


def test_a_ring_index_that_cannot_be_fails_the_queue_pair() -> None:
    pair = direct_pair()
    a = pair.a
    a.sends._index[0] = 1 << 20
    a.nic.poll_rings(0)
    list(a.nic.transmit(0))
    assert a.qp.state is QpState.ERR
    assert a.qp in a.nic.take_corrupt()


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
def test_many_alike_are_copied_by_one_call_each_way(opcode: WrOpcode) -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    for k in range(100):
        a.post(opcode, 64 * k, k % 60 + 1, to=b.region, at=100_000 - 64 * k, wr_id=k)
    a.nic.poll_rings(0)
    list(a.nic.transmit(0))
    assert a.poll() == [(k, OK) for k in range(100)]
    assert (a.space.n_copies, b.space.n_copies) == (1, 1)
    for k in range(100):
        here = a.space.memory[64 * k : 64 * k + k % 60 + 1]
        assert np.array_equal(here, b.space.memory[100_000 - 64 * k : 100_000 - 64 * k + k % 60 + 1])


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
def test_many_of_several_packets_go_together_up_to_what_the_staging_buffer_takes(opcode: WrOpcode) -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    before = a.qp.send.next_psn
    lengths = [1, KIB, KIB + 1, LENGTH_MAX] * 10 + [LENGTH_MAX] * (TOGETHER_BYTES // LENGTH_MAX)
    for k, length in enumerate(lengths):
        a.post(opcode, LENGTH_MAX * (k % 8), length, to=b.region, at=LENGTH_MAX * (k % 8), wr_id=k)
    a.nic.poll_rings(0)
    list(a.nic.transmit(0))
    assert a.poll() == [(k, OK) for k in range(len(lengths))]
    assert (a.space.n_copies, b.space.n_copies) == (2, 2)
    assert np.array_equal(a.space.memory[: 8 * LENGTH_MAX], b.space.memory[: 8 * LENGTH_MAX])
    n_psn = sum(-(-length // a.qp.mtu) for length in lengths)
    assert a.qp.send.next_psn == a.qp.send.una == (before + n_psn) % (1 << 24)


@pytest.mark.parametrize("length", [8, 2 * KIB + 1])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
@pytest.mark.parametrize("spoil", ["absent here", "absent there", "hole here", "hole there", "outside", "other key"])
@pytest.mark.parametrize("nth", [0, 5, 9])
def test_one_among_many_that_is_special_is_found_and_the_others_take_effect_as_posted(
    opcode: WrOpcode, spoil: str, nth: int, length: int
) -> None:
    pair = direct_pair()
    a, b = pair.a, pair.b
    side = a if spoil.endswith("here") else b
    (side.space.slow if spoil.startswith("absent") else side.space.hole).add(nth)
    if spoil in ("outside", "other key"):
        side.space.hole.clear()
    ours, theirs = a.space.memory.copy(), b.space.memory.copy()
    for k in range(10):
        at = 1 << 30 if spoil == "outside" and k == nth else k * PAGE_BYTES
        a.post_send(
            opcode,
            [(a.region.iova + k * PAGE_BYTES, length, a.region.lkey)],
            wr_id=k,
            remote=b.region.iova + at,
            rkey=b.region.rkey ^ (spoil == "other key" and k == nth),
        )
    pair.run()
    n_good = 10 if spoil.startswith("absent") else nth
    assert [status for _, status in a.poll()][:n_good] == [OK] * n_good
    assert (a.qp.state is QpState.ERR) == (n_good < 10)
    into, source = (ours, theirs) if opcode is WrOpcode.RDMA_READ else (theirs, ours)
    for k in range(n_good):
        where = slice(k * PAGE_BYTES, k * PAGE_BYTES + length)
        into[where] = source[where]
    assert np.array_equal(a.space.memory, ours)
    assert np.array_equal(b.space.memory, theirs)


@pytest.mark.parametrize("rights", [Access.REMOTE_WRITE | Access.LOCAL_WRITE, Access.REMOTE_READ])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
def test_many_need_the_rights_one_needs(rights: Access, opcode: WrOpcode) -> None:
    allowed = bool(rights & Access.REMOTE_READ) == (opcode is WrOpcode.RDMA_READ)
    for place in ("region", "queue pair"):
        pair = direct_pair(access=rights if place == "region" else ALL_RIGHTS)
        if place == "queue pair":
            pair.b.qp.attr.access = int(rights)
        before = pair.a.space.memory.copy(), pair.b.space.memory.copy()
        for k in range(8):
            pair.a.post(opcode, 8 * k, 8, to=pair.b.region, at=8 * k)
        pair.run()
        assert pair.a.poll()[0] == (0, OK if allowed else WcStatus.REM_ACCESS_ERR)
        if not allowed:
            assert np.array_equal(pair.a.space.memory, before[0])
            assert np.array_equal(pair.b.space.memory, before[1])
