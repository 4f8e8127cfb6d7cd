"""With whom the loop shares its CPU, as far as it can know: where it makes room, and where it stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nopin.server import loop as module
from nopin.server.core import Core
from nopin.server.elbow_room import LONG_YIELD_NS, ElbowRoom
from nopin.server.loop import Loop


class Clock:
    """Each look is a long yield after the one before."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += LONG_YIELD_NS
        return self.now


def loop_that_sends(batches: list[Any]) -> Loop:
    """A loop whose clients have posted work, which takes so many packets to carry out."""
    nic = SimpleNamespace(busy=False, poll_rings=lambda _now: True, transmit=lambda _now: iter(batches))
    link = SimpleNamespace(filenos=list, send=lambda _batch, _now: None)
    poller = SimpleNamespace(watch=lambda *_: None)
    core = SimpleNamespace(nic=nic, link=link, poller=poller, workers=SimpleNamespace(fd=-1), clock=Clock())
    return Loop(cast(Core, core), 0, ElbowRoom(2, lambda: 2))


@pytest.mark.parametrize(("batches", "n_moves"), [([], 1), ([object()], 0)])
def test_room_is_made_for_clients_whose_work_takes_no_packets(
    batches: list[Any], n_moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[bool] = []
    monkeypatch.setattr(module, "move_over", lambda: moves.append(True))
    loop = loop_that_sends(batches)
    loop._yield()
    assert not moves, "nobody has posted"
    assert loop._serve_posts(0)
    loop._yield()
    assert len(moves) == n_moves
