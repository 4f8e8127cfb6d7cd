"""Timer laws: what codes mean, and that a queue pair keeps the laws it was made with."""

from __future__ import annotations

from random import Random

import pytest

from nopin.iommu.iommu import Iommu
from nopin.nic.abi import QpState, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.nic import Nic
from nopin.nic.timers import NOMINAL, Timers
from nopin.nic.wire.batch import Endpoint
from nopin.nic.wire.gid import gid_of
from nopin.testing.pair import Pair, Side, connect, make_side
from nopin.units import MS_NS


def test_nominal_laws_are_the_tables() -> None:
    assert NOMINAL.rnr_ns[12] == 640_000
    assert NOMINAL.ack_ns[0] is None
    assert NOMINAL.ack_ns[14] == NOMINAL.first_ack_ns[14] == 4096 << 14
    assert NOMINAL.n_retries(7) == 7


def test_a_floor_lifts_small_codes_and_leaves_for_ever_alone() -> None:
    timers = Timers(ack_code_min=16, ack_factor=2.0, ack_first_factor=1.5)
    assert timers.ack_ns[0] is None
    assert timers.ack_ns[1] == timers.ack_ns[16] == 2 * (4096 << 16)
    assert timers.ack_ns[20] == 2 * (4096 << 20)
    assert timers.first_ack_ns[14] == 3 * (4096 << 16)


def test_fewer_timeouts_than_there_are_is_one() -> None:
    assert [Timers(more_timeouts=-2).n_retries(count) for count in (0, 1, 2, 7)] == [0, 0, 0, 5]


def side_with(number: int, timers: Timers) -> Side:
    endpoint, iommu = Endpoint(gid_of(f"10.0.0.{number}"), 4791), Iommu()
    nic = Nic(iommu=iommu, endpoint=endpoint, mtu=4096, draw=Random(number).randrange, timers=timers)
    return make_side(f"10.0.0.{number}", seed=number, nic=nic, iommu=iommu)


def pair_with(timers: Timers, *, retry_cnt: int = 7, timeout: int = 14, rnr_retry: int = 7) -> Pair:
    a, b = side_with(1, timers), side_with(2, timers)
    connect(a, b, retry_cnt=retry_cnt, timeout=timeout, rnr_retry=rnr_retry)
    return Pair(a, b)


@pytest.mark.parametrize(
    ("more", "factor", "first", "retry_cnt", "n_intervals"),
    [(0, 1.0, 1.0, 3, 4.0), (-2, 2.0, 1.5, 7, 2.0 * 6.5), (1, 1.0, 0.5, 2, 3.5)],
)
def test_time_to_the_error_follows_the_laws(
    more: int, factor: float, first: float, retry_cnt: int, n_intervals: float
) -> None:
    timers = Timers(ack_factor=factor, ack_first_factor=first, more_timeouts=more)
    pair = pair_with(timers, retry_cnt=retry_cnt, timeout=10)
    pair.wire = lambda _packet, _number: []
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.RETRY_EXC_ERR)]
    assert pair.now == round(n_intervals * (4096 << 10))


def test_progress_makes_the_next_timeout_a_first_one_again() -> None:
    pair = pair_with(Timers(ack_first_factor=0.5), timeout=10)
    lost = {0, 1, 4}
    pair.wire = lambda packet, number: [] if number in lost else [packet]
    for wanted in ((4096 << 10) * 3 // 2, (4096 << 10) // 2):
        before = pair.now
        pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
        pair.run()
        assert pair.a.poll() == [(0, WcStatus.SUCCESS)]
        assert pair.now - before == wanted


def test_rnr_waits_are_stretched() -> None:
    pair = pair_with(Timers(rnr_wait_factor=3.33), rnr_retry=6)
    pair.a.post(WrOpcode.SEND, 0, 8)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.RNR_RETRY_EXC_ERR)]
    assert pair.now == 6 * round(640_000 * 3.33)


@pytest.mark.parametrize("bound_ns", [0, 5 * MS_NS])
def test_a_fault_is_told_to_the_peer_when_the_bound_has_passed(bound_ns: int) -> None:
    pair = pair_with(Timers(park_bound_ns=bound_ns), rnr_retry=0)
    pair.b.answer_faults = False
    pair.b.space.slow.add(0)
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.RNR_RETRY_EXC_ERR)]
    assert pair.now == bound_ns


def test_a_changed_retry_count_counts_from_the_next_progress() -> None:
    pair = pair_with(Timers(), retry_cnt=7, timeout=10)
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.SQD), 0)
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.SQD, retry_cnt=1), 0)
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.RTS), 0)
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.SUCCESS)]
    pair.wire = lambda _packet, _number: []
    before = pair.now
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.RETRY_EXC_ERR)]
    assert pair.now - before == 2 * (4096 << 10)


def test_a_small_batch_gives_others_their_turn_earlier() -> None:
    iommu = Iommu()
    nic = Nic(
        iommu=iommu, endpoint=Endpoint(gid_of("10.0.0.1"), 4791), mtu=4096, draw=lambda n: 77 % n, batch_packets=8
    )
    a, b = make_side("10.0.0.1", seed=1, nic=nic, iommu=iommu), make_side("10.0.0.2", seed=2)
    connect(a, b)
    a.post(WrOpcode.RDMA_WRITE, 0, 64 * 1024, to=b.region)
    a.nic.poll_rings(0)
    (batch,) = a.nic.transmit(0)
    assert sum(-(-segment.length // segment.stride) for segment in batch.segments) == 8
