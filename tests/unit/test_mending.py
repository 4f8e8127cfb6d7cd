"""What becomes of operations whose connection breaks: repeated in order, or failed, each once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nopin.control.mending import Mending, is_final
from nopin.errors import AttachRefused, NopinError, PeerError, RegionGone
from nopin.nic.abi import WrOpcode

READ, WRITE, ADD = WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.ATOMIC_FETCH_AND_ADD


@dataclass
class Op:
    serial: int
    opcode: WrOpcode = WRITE
    n_posted: int = 1


def test_what_was_under_way_goes_before_what_came_later_oldest_first() -> None:
    mending: Mending[Op] = Mending()
    mending.hold([Op(3, n_posted=0)])
    assert mending.broke([Op(2), Op(1, READ)]).begins
    tasks = mending.take()
    assert [(task.serial, task.n_posted) for task in tasks] == [(1, 0), (2, 0), (3, 0)]
    assert mending.active
    assert not mending.take()
    assert not mending.active


def test_an_atomic_that_may_have_begun_is_not_repeated_and_one_that_has_not_is() -> None:
    mending: Mending[Op] = Mending()
    begun, waiting = Op(1, ADD), Op(2, ADD, n_posted=0)
    broken = mending.broke([begun, waiting])
    assert broken.doubtful == [begun]
    assert not broken.over
    assert mending.take() == [waiting]


def test_a_connection_that_breaks_while_it_is_made_does_not_begin_mending_twice() -> None:
    mending: Mending[Op] = Mending()
    assert mending.broke([Op(1), Op(2)]).begins
    first, second = mending.take()
    assert not mending.broke([first]).begins
    mending.hold([second])
    assert mending.take() == [first, second]


def test_after_the_end_everything_fails_with_what_ended_it() -> None:
    mending: Mending[Op] = Mending()
    mending.broke([Op(1)])
    why = RegionGone("withdrawn")
    assert [task.serial for task in mending.end(why)] == [1]
    assert not mending.end(RegionGone("later"))
    assert mending.dead is why
    late, doubtful = Op(2), Op(3, ADD)
    broken = mending.broke([late, doubtful])
    assert (broken.over, broken.doubtful, broken.begins) == ([late], [doubtful], False)


@pytest.mark.parametrize(
    ("problem", "final"),
    [
        (AttachRefused("no such share", code="token"), True),
        (AttachRefused("no room", code="limit"), False),
        (PeerError("nobody answers"), False),
    ],
)
def test_only_a_server_that_does_not_know_the_share_ends_the_search(problem: NopinError, final: bool) -> None:
    assert is_final(problem) is final
