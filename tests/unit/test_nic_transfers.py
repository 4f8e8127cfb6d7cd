"""Two NICs in memory: every operation, size and path MTU moves exactly the bytes it should."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.nic.abi import QpState, SendFlags, WcFlags, WcOpcode, WcStatus, WrOpcode
from nopin.testing.pair import Pair, connect, make_pair, make_side

OK = WcStatus.SUCCESS


def fill(pair: Pair, seed: int = 7) -> None:
    rng = np.random.default_rng(seed)
    pair.a.space.memory[:] = rng.integers(0, 256, len(pair.a.space.memory), np.uint8)
    pair.b.space.memory[:] = rng.integers(0, 256, len(pair.b.space.memory), np.uint8)


@pytest.mark.parametrize("mtu", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("length", [1, 3, 8, 255, 256, 257, 1024, 4095, 4096, 4097, 70001, 1 << 20])
def test_write_moves_exactly_the_range(mtu: int, length: int) -> None:
    pair = make_pair(mtu=mtu)
    fill(pair)
    before = pair.b.space.memory.copy()
    pair.a.post(WrOpcode.RDMA_WRITE, 5, length, to=pair.b.region, at=4093, wr_id=9)
    pair.run()
    assert pair.a.poll() == [(9, OK)]
    before[4093 : 4093 + length] = pair.a.space.memory[5 : 5 + length]
    assert np.array_equal(pair.b.space.memory, before)


@pytest.mark.parametrize("mtu", [256, 1024, 4096])
@pytest.mark.parametrize("length", [1, 8, 257, 4097, 70001, 3 << 20])
def test_read_moves_exactly_the_range(mtu: int, length: int) -> None:
    pair = make_pair(mtu=mtu)
    fill(pair)
    before = pair.a.space.memory.copy()
    pair.a.post(WrOpcode.RDMA_READ, 77, length, to=pair.b.region, at=4093, wr_id=3)
    pair.run()
    assert pair.a.poll() == [(3, OK)]
    before[77 : 77 + length] = pair.b.space.memory[4093 : 4093 + length]
    assert np.array_equal(pair.a.space.memory, before)


@pytest.mark.parametrize("length", [0, 1, 1000, 1024, 1025, 200_000])
def test_send_arrives_in_the_posted_receive(length: int) -> None:
    pair = make_pair()
    fill(pair)
    pair.b.post_recv(100, length, wr_id=5)
    pair.a.post(WrOpcode.SEND, 0, length, wr_id=6)
    pair.run()
    assert pair.a.poll() == [(6, OK)]
    got = pair.b.completions.poll(4)
    assert [(int(c["wr_id"]), int(c["status"]), int(c["byte_len"])) for c in got] == [(5, 0, length)]
    assert np.array_equal(pair.b.space.memory[100 : 100 + length], pair.a.space.memory[:length])


def test_immediates_and_flags_arrive() -> None:
    pair = make_pair()
    for k in range(3):
        pair.b.post_recv(0, 64, wr_id=k)
    pair.a.post(WrOpcode.SEND_WITH_IMM, 0, 8, imm=0xDEADBEEF)
    pair.a.post(WrOpcode.RDMA_WRITE_WITH_IMM, 0, 3000, to=pair.b.region, at=0, imm=7)
    pair.a.post(WrOpcode.SEND_WITH_INV, 0, 8, imm=pair.b.region.rkey)
    pair.run()
    assert [s for _, s in pair.a.poll()] == [OK, OK, OK]
    first, second, third = pair.b.completions.poll(4)
    assert (int(first["imm"]), int(first["wc_flags"])) == (0xDEADBEEF, WcFlags.WITH_IMM)
    assert (int(second["imm"]), int(second["opcode"]), int(second["byte_len"])) == (
        7,
        WcOpcode.RECV_RDMA_WITH_IMM,
        3000,
    )
    assert int(third["wc_flags"]) == WcFlags.WITH_INV
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.REM_ACCESS_ERR)]


def test_atomics_return_the_original_and_change_memory() -> None:
    pair = make_pair()
    b = pair.b.region
    misalign = -b.iova % 8  # iova differs from the address here
    pair.b.space.memory[misalign : misalign + 8] = np.frombuffer(np.uint64(40).tobytes(), np.uint8)
    pair.a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 0, 8, to=b, at=misalign, compare_add=2)
    pair.a.post(WrOpcode.ATOMIC_CMP_AND_SWP, 8, 8, to=b, at=misalign, compare_add=42, swap=1)
    pair.a.post(WrOpcode.ATOMIC_CMP_AND_SWP, 16, 8, to=b, at=misalign, compare_add=42, swap=9)
    pair.run()
    assert [s for _, s in pair.a.poll()] == [OK, OK, OK]
    assert pair.a.space.memory[:24].view(np.uint64).tolist() == [40, 42, 1]
    assert int(pair.b.space.memory[misalign : misalign + 8].copy().view(np.uint64)[0]) == 1


def test_zero_length_write_and_read_need_no_key() -> None:
    pair = make_pair()
    pair.a.post(WrOpcode.RDMA_WRITE)
    pair.a.post(WrOpcode.RDMA_READ)
    pair.run()
    assert [s for _, s in pair.a.poll()] == [OK, OK]


def test_inline_data_is_taken_from_the_entry() -> None:
    pair = make_pair(mtu=256)
    data = bytes(range(250))
    pair.a.post(WrOpcode.RDMA_WRITE, to=pair.b.region, at=10, inline=data)
    pair.run()
    assert pair.a.poll() == [(0, OK)]
    assert pair.b.space.memory[10:260].tobytes() == data


def test_scatter_lists_are_walked_in_order() -> None:
    from nopin.testing.pair import send_entry

    pair = make_pair(mtu=256)
    fill(pair)
    region = pair.a.region
    sges = [
        (region.iova + 10, 300, region.lkey),
        (region.iova + 5000, 1, region.lkey),
        (region.iova + 99, 700, region.lkey),
    ]
    expected = np.concatenate([pair.a.space.memory[o : o + n] for o, n in ((10, 300), (5000, 1), (99, 700))])
    pair.a.sends.post([send_entry(WrOpcode.RDMA_WRITE, sges, remote=pair.b.region.iova, rkey=pair.b.region.rkey)])
    pair.run()
    assert pair.a.poll() == [(0, OK)]
    assert np.array_equal(pair.b.space.memory[:1001], expected)
    back = [(region.iova + 20_000, 500, region.lkey), (region.iova + 30_000, 501, region.lkey)]
    pair.a.sends.post([send_entry(WrOpcode.RDMA_READ, back, remote=pair.b.region.iova, rkey=pair.b.region.rkey)])
    pair.run()
    assert pair.a.poll() == [(0, OK)]
    assert np.array_equal(pair.a.space.memory[20_000:20_500], expected[:500])
    assert np.array_equal(pair.a.space.memory[30_000:30_501], expected[500:])


def test_many_small_writes_go_with_few_copies() -> None:
    pair = make_pair()
    fill(pair)
    for k in range(128):
        pair.a.post(WrOpcode.RDMA_WRITE, 8 * k, 8, to=pair.b.region, at=16 * k, wr_id=k, flags=SendFlags.NONE)
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region, at=100_000, wr_id=999)
    n_before = pair.b.space.n_copies
    pair.run()
    assert pair.a.poll() == [(999, OK)]
    for k in range(128):
        assert np.array_equal(pair.b.space.memory[16 * k : 16 * k + 8], pair.a.space.memory[8 * k : 8 * k + 8])
    assert pair.b.space.n_copies - n_before <= 4, "small writes were not handled together"


def test_both_directions_at_once() -> None:
    pair = make_pair()
    fill(pair)
    expected_b, expected_a = pair.a.space.memory[:300_000].copy(), pair.b.space.memory[500_000:800_000].copy()
    for _ in range(3):
        pair.a.post(WrOpcode.RDMA_WRITE, 0, 300_000, to=pair.b.region, at=1_000_000)
        pair.b.post(WrOpcode.RDMA_WRITE, 500_000, 300_000, to=pair.a.region, at=1_000_000)
    pair.run()
    assert [s for _, s in pair.a.poll()] == [OK] * 3
    assert [s for _, s in pair.b.poll()] == [OK] * 3
    assert np.array_equal(pair.b.space.memory[1_000_000:1_300_000], expected_b)
    assert np.array_equal(pair.a.space.memory[1_000_000:1_300_000], expected_a)


def test_two_clients_of_one_device_take_the_direct_path() -> None:
    a = make_side("10.0.0.1", seed=1)
    b = make_side("10.0.0.1", seed=2, nic=a.nic, iommu=a.iommu)
    connect(a, b)
    pair = Pair(a, b)
    fill(pair)
    b.post_recv(4_000_000, 5000, wr_id=4)
    a.post(WrOpcode.RDMA_WRITE, 3, 2_500_001, to=b.region, at=1)
    a.post(WrOpcode.SEND_WITH_IMM, 0, 5000, imm=3)
    a.post(WrOpcode.RDMA_READ, 3_000_000, 100_000, to=b.region, at=200_000)
    a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 4_000_000, 8, to=b.region, at=3_900_000, compare_add=1)
    word = b.space.memory[3_900_000:3_900_008].copy()
    pair.run()
    assert [s for _, s in a.poll()] == [OK] * 4
    assert np.array_equal(b.space.memory[1:2_500_002], a.space.memory[3:2_500_004])
    assert np.array_equal(b.space.memory[4_000_000:4_005_000], a.space.memory[:5000])
    assert np.array_equal(a.space.memory[3_000_000:3_100_000], b.space.memory[200_000:300_000])
    assert np.array_equal(a.space.memory[4_000_000:4_000_008], word)
    assert b.poll() == [(4, OK)]
    assert pair.n_packets == 0, "the direct path builds no packets"
    assert a.nic.counters.direct_messages == 4
    assert a.qp.state is QpState.RTS


@pytest.mark.parametrize("length", [5, 6, 7])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.SEND])
@pytest.mark.parametrize("n", [3, 12])
def test_messages_before_one_that_cannot_be_read_arrive_whole(length: int, opcode: WrOpcode, n: int) -> None:
    """Their batch is cut after they were filled, and some of them end in pad bytes."""
    pair = make_pair()
    a, b = pair.a, pair.b
    a.space.memory[:] = 0xAA
    a.space.hole = {1}
    for k in range(n):
        b.post_recv(k * 8, 8)
        a.post(opcode, 4096 if k == n - 1 else k * 8, length, to=b.region, at=k * 8)
    pair.run()
    written = b.space.memory[: n * 8].reshape(n, 8)
    assert (written[:-1, :length] == 0xAA).all()
    assert not written[-1].any()


@pytest.mark.parametrize("length", [5, 6, 7])
def test_answers_before_one_that_cannot_be_read_arrive_whole(length: int) -> None:
    pair = make_pair()
    a, b = pair.a, pair.b
    b.space.memory[:] = 0xAA
    b.space.hole = {1}
    for k in range(3):
        a.post(WrOpcode.RDMA_READ, k * 8, length, to=b.region, at=4096 if k == 2 else k * 8)
    pair.run()
    arrived = a.space.memory[:24].reshape(3, 8)
    assert (arrived[:2, :length] == 0xAA).all()
    assert [status for _, status in a.poll()][:2] == [WcStatus.SUCCESS] * 2
