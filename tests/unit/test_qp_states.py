"""The queue pair state machine: every legal step, and what an illegal one is told."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.nic.abi import Access, AsyncEventType, QpState, WcStatus, WrOpcode
from nopin.nic.attributes import AddressVector, QpAttr
from nopin.nic.errors import VerbsError
from nopin.nic.wire.gid import gid_of
from nopin.testing.pair import Pair, Side, connect, make_pair, make_side

INIT = QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=0)


def rtr(**changes: object) -> QpAttr:
    values: dict[str, object] = {
        "state": QpState.RTR,
        "av": AddressVector(gid=gid_of("10.0.0.9")),
        "path_mtu": 1024,
        "dest_qpn": 5,
        "rq_psn": 1,
        "max_dest_rd_atomic": 1,
        "min_rnr_timer": 12,
    }
    values.update(changes)
    return QpAttr(**values)  # type: ignore[arg-type]  # a test builds wrong ones on purpose


def rts(**changes: object) -> QpAttr:
    values: dict[str, object] = {
        "state": QpState.RTS,
        "timeout": 14,
        "retry_cnt": 7,
        "rnr_retry": 7,
        "sq_psn": 0x1FFFFFF,
        "max_rd_atomic": 1,
    }
    values.update(changes)
    return QpAttr(**values)  # type: ignore[arg-type]  # a test builds wrong ones on purpose


@pytest.fixture
def side() -> Side:
    return make_side("10.0.0.1", seed=1)


def modify(side: Side, *attrs: QpAttr) -> None:
    for attr in attrs:
        side.nic.modify_qp(side.qp, attr, 0)


def test_the_way_up_and_psns_cut_to_24_bits(side: Side) -> None:
    modify(side, INIT, rtr(), rts())
    assert side.nic.query_qp(side.qp).state == QpState.RTS
    assert side.nic.query_qp(side.qp).sq_psn == 0xFFFFFF


@pytest.mark.parametrize("name", ["av", "path_mtu", "dest_qpn", "rq_psn", "max_dest_rd_atomic", "min_rnr_timer"])
def test_a_missing_attribute_is_named_and_nothing_changes(side: Side, name: str) -> None:
    modify(side, INIT)
    with pytest.raises(VerbsError, match=name):
        modify(side, rtr(**{name: None}))
    assert side.qp.state is QpState.INIT
    assert side.qp.attr.path_mtu is None


@pytest.mark.parametrize(
    ("attr", "says"),
    [
        (rtr(path_mtu=1500), "path_mtu 1500"),
        (rtr(min_rnr_timer=32), "min_rnr_timer 32"),
        (rtr(dest_qpn=0), "dest_qpn"),
        (rtr(timeout=3), "timeout"),
        (rtr(av=AddressVector(gid=b"short")), "GID"),
    ],
)
def test_a_wrong_value_is_explained(side: Side, attr: QpAttr, says: str) -> None:
    modify(side, INIT)
    with pytest.raises(VerbsError, match=says):
        modify(side, attr)


def test_skipping_a_state_is_refused(side: Side) -> None:
    with pytest.raises(VerbsError, match="RESET to RTS"):
        modify(side, rts())
    with pytest.raises(VerbsError, match="99 is no queue pair state"):
        modify(side, QpAttr(state=99))


def test_an_mtu_above_the_links_is_refused() -> None:
    side = make_side("10.0.0.1", seed=1)
    side.nic.mtu = 1024
    modify(side, INIT)
    with pytest.raises(VerbsError, match="above this device's 1024"):
        modify(side, rtr(path_mtu=4096))


def test_error_flushes_both_queues_and_later_posts(side: Side) -> None:
    modify(side, INIT, rtr(), rts())
    side.post_recv(0, 8, wr_id=1)
    side.post(WrOpcode.RDMA_WRITE, 0, 8, wr_id=2)
    modify(side, QpAttr(state=QpState.ERR))
    assert side.poll() == [(2, WcStatus.WR_FLUSH_ERR), (1, WcStatus.WR_FLUSH_ERR)]
    side.post(WrOpcode.RDMA_WRITE, 0, 8, wr_id=3, flags=0)
    side.post_recv(0, 8, wr_id=4)
    assert side.nic.poll_rings(0)
    assert side.poll() == [(3, WcStatus.WR_FLUSH_ERR), (4, WcStatus.WR_FLUSH_ERR)]


def test_reset_forgets_work_without_completions(side: Side) -> None:
    modify(side, INIT, rtr(), rts())
    side.post_recv(0, 8)
    side.post(WrOpcode.RDMA_WRITE, 0, 8)
    modify(side, QpAttr(state=QpState.RESET))
    assert side.poll() == []
    assert side.sends.free == side.sends.depth
    modify(side, INIT, rtr(), rts())


def test_drained_send_queue_is_reported_and_goes_on_in_rts() -> None:
    pair = make_pair()
    a, b = pair.a, pair.b
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.SQD), 0)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
    pair.run()
    assert AsyncEventType.SQ_DRAINED in [event.kind for event in a.nic.take_events()]
    assert a.poll() == []
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.RTS), pair.now)
    pair.run()
    assert a.poll() == [(0, WcStatus.SUCCESS)]


def test_sends_wait_for_rts_and_packets_for_rtr() -> None:
    a, b = make_side("10.0.0.1", seed=1), make_side("10.0.0.2", seed=2)
    a.post(WrOpcode.RDMA_WRITE, 0, 8, to=b.region)
    assert not a.nic.poll_rings(0)
    connect(a, b)
    pair = Pair(a, b)
    pair.run()
    assert a.poll() == [(0, WcStatus.SUCCESS)]


def test_objects_in_use_cannot_be_destroyed(side: Side) -> None:
    with pytest.raises(VerbsError, match="completion queue is in use"):
        side.nic.destroy_cq(side.qp.send_cq)
    with pytest.raises(VerbsError, match="2 regions or queue pairs"):
        side.nic.dealloc_pd(side.qp.pd)
    cq, pd = side.qp.send_cq, side.qp.pd
    side.nic.destroy_qp(side.qp)
    side.nic.deregister(side.region)
    side.nic.destroy_cq(cq)
    side.nic.dealloc_pd(pd)


def test_rights_of_the_peer_do_not_reach_other_domains() -> None:
    """A key of another protection domain opens nothing."""
    pair = make_pair()
    b = pair.b
    other = b.nic.register(
        b.nic.alloc_pd(),
        pasid=b.region.pasid,
        address=b.region.start,
        length=4096,
        iova=b.region.start,
        access=Access.LOCAL_WRITE | Access.REMOTE_WRITE,
        discipline=b.region.discipline,
    )
    pair.a.space.memory[:8] = 1
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=other)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.REM_ACCESS_ERR)]
    assert not np.any(b.space.memory)
