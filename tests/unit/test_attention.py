"""Rings that nobody posts in are left, and no post is missed by that."""

from __future__ import annotations

from collections.abc import Callable

from nopin.nic.abi import QpState, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.nic import Nic
from nopin.testing.pair import Pair, make_pair, no_fence


def leave(nic: Nic, fence: Callable[[], None] = no_fence) -> None:
    """Let a whole period go by: nothing was posted between the two."""
    nic.leave_idle(no_fence)
    nic.leave_idle(fence)


def post(pair: Pair) -> None:
    pair.a.post(WrOpcode.RDMA_WRITE, 0, 8, to=pair.b.region)


def test_a_ring_in_which_nothing_is_posted_is_left_and_says_so() -> None:
    pair = make_pair()
    assert not pair.a.sends.unattended
    leave(pair.a.nic)
    assert pair.a.sends.unattended
    post(pair)
    assert not pair.a.nic.poll_rings(0), "who posts has to ring first"


def test_a_post_in_a_ring_that_was_left_is_carried_out_once_its_client_rang() -> None:
    pair = make_pair()
    leave(pair.a.nic)
    post(pair)
    pair.a.nic.attend(pair.a.qp)
    assert not pair.a.sends.unattended
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.SUCCESS)]


def test_ringing_for_nothing_brings_no_looks() -> None:
    pair = make_pair()
    leave(pair.a.nic)
    pair.a.nic.attend(pair.a.qp)
    assert pair.a.sends.unattended


def test_a_ring_in_use_is_not_left() -> None:
    pair = make_pair()
    for _ in range(3):
        post(pair)
        pair.run()
        pair.a.nic.leave_idle(no_fence)
        assert not pair.a.sends.unattended


def test_a_post_just_when_the_ring_is_left_is_seen() -> None:
    pair = make_pair()
    rang: list[bool] = []

    def client_posts_meanwhile() -> None:
        post(pair)
        rang.append(pair.a.sends.unattended)

    leave(pair.a.nic, client_posts_meanwhile)
    assert rang == [True]
    assert not pair.a.sends.unattended
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.SUCCESS)]


def test_work_that_waits_in_its_ring_keeps_the_looks() -> None:
    pair = make_pair()
    post(pair)
    leave(pair.a.nic)
    assert not pair.a.sends.unattended


def test_a_queue_pair_in_error_is_not_left_for_its_receives_are_not_rung_for() -> None:
    pair = make_pair()
    a = pair.a
    leave(a.nic)
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.ERR), 0)
    leave(a.nic)
    a.post_recv(0, 8, wr_id=5)
    assert a.nic.poll_rings(0)
    assert a.poll() == [(5, WcStatus.WR_FLUSH_ERR)]


def test_posts_while_the_send_queue_was_drained_are_seen_when_it_goes_on() -> None:
    pair = make_pair()
    a = pair.a
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.SQD), 0)
    pair.run()
    leave(a.nic)
    assert a.sends.unattended
    post(pair)
    a.nic.attend(a.qp)
    a.nic.modify_qp(a.qp, QpAttr(state=QpState.RTS), pair.now)
    assert not a.sends.unattended
    pair.run()
    assert a.poll() == [(0, WcStatus.SUCCESS)]


def test_a_destroyed_queue_pair_is_forgotten() -> None:
    pair = make_pair()
    attended = pair.a.nic._core.attention.queue_pairs
    assert pair.a.qp in attended
    pair.a.nic.destroy_qp(pair.a.qp)
    assert pair.a.qp not in attended
