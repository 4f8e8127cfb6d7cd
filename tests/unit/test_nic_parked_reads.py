"""READ answers that wait for a page: nobody times out, and nobody is left without an answer."""

from __future__ import annotations

from nopin.nic.abi import AsyncEventType, WcStatus, WrOpcode
from nopin.testing.pair import Pair, Side, connect, make_side


def make() -> tuple[Pair, Side, Side]:
    a, b = make_side("10.0.0.1", seed=1), make_side("10.0.0.2", seed=2)
    connect(a, b)
    return Pair(a, b), a, b


def statuses(side: Side) -> list[WcStatus]:
    return [status for _, status in side.poll()]


def test_a_dead_region_is_told_even_if_a_later_request_was_refused_before() -> None:
    pair, a, b = make()
    b.space.slow = {0}
    b.answer_faults = False
    a.post(WrOpcode.RDMA_READ, 0, 8192, to=b.region)
    while pair._step():
        continue  # the READ is accepted and its answer waits for a page
    b.nic.deregister(b.region)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region, at=100_000)
    pair.run()
    assert statuses(a) == [WcStatus.REM_ACCESS_ERR, WcStatus.WR_FLUSH_ERR]
    assert [e.kind for e in b.nic.take_events()].count(AsyncEventType.QP_ACCESS_ERR) == 1
    assert b.nic.counters.sent_nak == 1


def test_a_read_that_parks_for_long_is_asked_again_instead_of_timing_out() -> None:
    pair, a, b = make()
    b.space.memory[:8192] = 7
    b.space.slow = {1}
    b.answer_faults = False
    a.post(WrOpcode.RDMA_READ, 0, 8192, to=b.region)
    a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 8192, 8, to=b.region, at=16384, compare_add=1)
    pair.run(limit_ns=2_000_000_000)
    assert a.poll() == []
    b.answer_faults = True
    pair.run()
    assert statuses(a) == [WcStatus.SUCCESS, WcStatus.SUCCESS]
    assert (a.space.memory[:8192] == 7).all()
    assert b.space.memory[16384] == 1, "the atomic was carried out once"
    assert a.nic.counters.ack_timeout == 0
    assert b.nic.counters.sent_rnr_nak > 10
