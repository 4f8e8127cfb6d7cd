"""Two NICs in memory, on the wire and on the direct path: every failure has its exact outcome on both ends."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.nic.abi import Access, AsyncEventType, QpState, WcStatus, WrOpcode
from nopin.testing.pair import ALL_RIGHTS, Pair, Side, connect, make_side

MTU = 1024
Made = tuple[Pair, Side, Side]


def make(path: str, *, access: Access = ALL_RIGHTS, **options: object) -> Made:
    a = make_side("10.0.0.1", seed=1)
    if path == "direct":
        b = make_side("10.0.0.1", seed=2, access=access, nic=a.nic, iommu=a.iommu)
    else:
        b = make_side("10.0.0.2", seed=2, access=access)
    connect(a, b, mtu=MTU, **options)  # type: ignore[arg-type]  # forwarded as given
    a.space.memory[:] = 0xAA
    return Pair(a, b), a, b


both_paths = pytest.mark.parametrize("path", ["wire", "direct"])


def statuses(side: Side) -> list[WcStatus]:
    return [status for _, status in side.poll()]


@both_paths
def test_hole_in_the_target_stops_the_write_there(path: str) -> None:
    pair, a, b = make(path)
    b.space.hole = {2}
    a.post(WrOpcode.RDMA_WRITE, 0, 16384, to=b.region, at=100)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR, WcStatus.WR_FLUSH_ERR]
    assert (b.space.memory[100:8192] == 0xAA).sum() >= 8192 - 100 - MTU
    assert not b.space.memory[8192:].any(), "bytes beyond the failing packet were written"
    assert (a.qp.state, b.qp.state) == (QpState.ERR, QpState.ERR)
    assert AsyncEventType.QP_ACCESS_ERR in [e.kind for e in b.nic.take_events()]


@both_paths
def test_read_only_page_refuses_write_and_atomic_but_not_read(path: str) -> None:
    pair, a, b = make(path)
    b.space.read_only = set(range(1024))
    b.space.memory[:8] = 5
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region)
    a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 8, 8, to=b.region, compare_add=1)
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS, WcStatus.REM_ACCESS_ERR]
    assert (b.space.memory[:8] == 5).all()


@both_paths
def test_hole_in_the_source_of_a_read(path: str) -> None:
    pair, a, b = make(path)
    b.space.memory[:] = 0xBB
    b.space.hole = {3}
    a.post(WrOpcode.RDMA_READ, 0, 20000, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]
    assert (a.space.memory[3 * 4096 :] == 0xAA).all(), "bytes beyond the failing packet were delivered"


@both_paths
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.SEND])
def test_hole_in_our_own_memory_is_a_local_protection_error(path: str, opcode: WrOpcode) -> None:
    pair, a, b = make(path)
    a.space.hole = {1}
    b.post_recv(0, 65536)
    a.post(opcode, 0, 8192, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.LOC_PROT_ERR]
    assert not b.space.memory[4096:].any()


@both_paths
def test_read_into_our_own_hole_is_a_local_protection_error(path: str) -> None:
    pair, a, b = make(path)
    a.space.hole = {1}
    a.post(WrOpcode.RDMA_READ, 0, 8192, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.LOC_PROT_ERR]


@both_paths
@pytest.mark.parametrize(("at", "length"), [(1024 * 4096 - 7, 8), (-1, 8), (1024 * 4096, 1), (0, 1024 * 4096 + 1)])
def test_out_of_range_is_an_access_error(path: str, at: int, length: int) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.RDMA_READ, 0, min(length, 1024 * 4096), to=b.region, at=at)
    if length > 1024 * 4096:
        a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region, at=length)
    pair.run()
    assert statuses(a)[-1] == WcStatus.REM_ACCESS_ERR


@both_paths
def test_address_plus_length_that_wraps_is_an_access_error(path: str) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.RDMA_WRITE, 0, 64, remote=(1 << 64) - 32, rkey=b.region.rkey)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]


@both_paths
def test_wrong_key_is_an_access_error(path: str) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, remote=b.region.iova, rkey=b.region.rkey ^ 1)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]
    assert b.nic.counters.bad_key == 1


@both_paths
@pytest.mark.parametrize(
    ("have", "opcode"),
    [
        (Access.REMOTE_READ, WrOpcode.RDMA_WRITE),
        (Access.LOCAL_WRITE | Access.REMOTE_WRITE, WrOpcode.RDMA_READ),
        (Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ, WrOpcode.ATOMIC_CMP_AND_SWP),
    ],
)
def test_missing_region_right_is_an_access_error(path: str, have: Access, opcode: WrOpcode) -> None:
    pair, a, b = make(path, access=have)
    a.post(opcode, 0, 8, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]


@both_paths
def test_missing_queue_pair_right_is_an_access_error(path: str) -> None:
    pair, a, b = make(path)
    b.qp.attr.access = int(Access.REMOTE_READ)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]


@both_paths
def test_misaligned_atomic_is_an_invalid_request(path: str) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 0, 8, to=b.region, at=4, compare_add=1)
    pair.run()
    assert statuses(a) == [WcStatus.REM_INV_REQ_ERR]
    assert not b.space.memory.any()


@both_paths
def test_send_longer_than_the_receive(path: str) -> None:
    pair, a, b = make(path)
    b.post_recv(0, 2000, wr_id=7)
    b.post_recv(0, 2000, wr_id=8)
    a.post(WrOpcode.SEND, 0, 5000)
    pair.run()
    assert statuses(a) == [WcStatus.REM_INV_REQ_ERR]
    assert b.poll() == [(7, WcStatus.LOC_LEN_ERR), (8, WcStatus.WR_FLUSH_ERR)]


@both_paths
def test_receive_into_a_hole(path: str) -> None:
    pair, a, b = make(path)
    b.space.hole = {0}
    b.post_recv(0, 64, wr_id=7)
    a.post(WrOpcode.SEND, 0, 64)
    pair.run()
    assert statuses(a) == [WcStatus.REM_OP_ERR]
    assert b.poll() == [(7, WcStatus.LOC_PROT_ERR)]


@both_paths
def test_receive_with_a_bad_key(path: str) -> None:
    pair, a, b = make(path)
    from nopin.testing.pair import send_entry

    b.recvs.post([send_entry(WrOpcode.SEND, [(b.region.iova, 64, b.region.lkey ^ 1)], wr_id=7, flags=0)])
    a.post(WrOpcode.SEND, 0, 64)
    pair.run()
    assert statuses(a) == [WcStatus.REM_OP_ERR]
    assert b.poll() == [(7, WcStatus.LOC_PROT_ERR)]


@both_paths
def test_send_without_receive_waits_for_one(path: str) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.SEND, 0, 64)
    pair.run(limit_ns=5_000_000)
    assert statuses(a) == []
    b.post_recv(0, 64)
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS]
    assert a.nic.counters.rcvd_rnr_nak >= 1


@both_paths
@pytest.mark.parametrize("opcode", [WrOpcode.SEND, WrOpcode.RDMA_WRITE_WITH_IMM])
def test_rnr_retries_run_out(path: str, opcode: WrOpcode) -> None:
    pair, a, b = make(path, rnr_retry=2)
    a.post(opcode, 0, 3000, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.RNR_RETRY_EXC_ERR]
    assert a.nic.counters.rcvd_rnr_nak == 3


@both_paths
def test_silent_peer_is_retried_and_given_up(path: str) -> None:
    pair, a, b = make(path, retry_cnt=3, timeout=10)
    b.nic.destroy_qp(b.qp)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.RETRY_EXC_ERR]
    assert a.nic.counters.ack_timeout == 4
    assert pair.now == pytest.approx(4 * (4096 << 10), rel=0.01)


@both_paths
def test_deregistered_region_is_an_access_error(path: str) -> None:
    pair, a, b = make(path)
    b.nic.deregister(b.region)
    a.post(WrOpcode.RDMA_READ, 0, 8, remote=b.region.iova, rkey=b.region.rkey)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]


@both_paths
def test_owner_that_exits_is_an_access_error(path: str) -> None:
    pair, a, b = make(path)
    b.space.exited = True
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR]


@both_paths
def test_unsignalled_work_that_fails_still_completes(path: str) -> None:
    pair, a, b = make(path)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, remote=1, rkey=1, flags=0, wr_id=1)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region, flags=0, wr_id=2)
    pair.run()
    assert a.poll() == [(1, WcStatus.REM_ACCESS_ERR), (2, WcStatus.WR_FLUSH_ERR)]


@both_paths
def test_slow_pages_park_and_resume_without_retries(path: str) -> None:
    pair, a, b = make(path)
    a.space.memory[:] = np.arange(len(a.space.memory)) % 251
    b.space.slow = {3, 4, 9}
    a.space.slow = {1, 2}
    a.post(WrOpcode.RDMA_WRITE, 0, 100_000, to=b.region)
    a.post(WrOpcode.RDMA_READ, 200_000, 100_000, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS] * 2
    assert np.array_equal(b.space.memory[:100_000], a.space.memory[:100_000])
    assert np.array_equal(a.space.memory[200_000:300_000], a.space.memory[:100_000])
    assert a.nic.counters.ack_timeout == 0
    assert b.region.meter.page_faults == 3


def test_fault_that_outlasts_its_bound_becomes_rnr() -> None:
    pair, a, b = make("wire")
    b.answer_faults = False
    b.space.slow = {0}
    a.post(WrOpcode.RDMA_WRITE, 0, 8192, to=b.region)
    pair.run(limit_ns=100_000_000)
    assert b.nic.counters.sent_rnr_nak >= 1
    b.answer_faults = True
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS]
    assert (b.space.memory[:8192] == 0xAA).all()
    assert a.nic.counters.ack_timeout == 0


@both_paths
def test_full_completion_queue_fails_its_queue_pair(path: str) -> None:
    pair, a, b = make(path)
    for _ in range(5):
        for _ in range(256):
            a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
        pair.run()
    assert a.qp.state is QpState.ERR
    assert AsyncEventType.CQ_ERR in [e.kind for e in a.nic.take_events()]


@both_paths
@pytest.mark.parametrize("length", [0, 8, 100_000])
def test_the_first_message_to_a_queue_pair_in_rtr_is_told_once(path: str, length: int) -> None:
    pair, a, b = make(path)
    b.qp.state = QpState.RTR
    for _ in range(3):
        a.post(WrOpcode.RDMA_WRITE, 0, length, to=b.region)
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS] * 3
    assert [event.kind for event in b.nic.take_events()] == [AsyncEventType.COMM_EST]
