"""The measuring tools measure: helper processes, floors, hazards, a small demo."""

from __future__ import annotations

import os
import resource
from typing import Any

import numpy as np
import pytest

from nopin.errors import PeerError
from nopin.lab import demo, pattern
from nopin.lab.child import Child
from nopin.lab.demo import run_demo
from nopin.lab.floor import measure_floors
from nopin.lab.line import Line, PartnerGone
from nopin.lab.mapping import Mapping

MIB = 1 << 20
PAGES_BYTES = 4 * 4096


def echo(line: Line[Any], prefix: str) -> None:
    while True:
        line.send([prefix, os.getpid(), line.receive()])


def quit_at_once(line: Line[Any]) -> None:
    del line


def test_a_child_is_another_process_that_answers_until_its_line_ends() -> None:
    with Child(echo, "so:") as child:
        assert child.ask({"x": [1, b"2"]}) == ["so:", child.pid, {"x": [1, b"2"]}]
        assert child.pid != os.getpid()
        assert child.close() == 0


def test_a_child_that_is_gone_is_noticed() -> None:
    with Child(quit_at_once) as child, pytest.raises(PartnerGone):
        child.line.receive(20)


def test_a_partner_that_says_nothing_is_not_waited_for_for_ever() -> None:
    with Child(echo, "") as child, pytest.raises(PeerError, match="in time"):
        child.line.receive(0.05)


def test_every_floor_gives_a_figure() -> None:
    figures = {figure.name: figure for figure in measure_floors([4096], n_rounds=2, round_s=0.02)}
    copies, packets = {"memcpy_4096", "process_vm_readv_4096"}, {"udp", "udp_crc"}
    assert set(figures) == copies | packets | {"eventfd_pingpong", "eventfd_pingpong_one_cpu"}
    assert all(0 < figure.min <= figure.median <= figure.max for figure in figures.values())


@pytest.mark.parametrize("action", [Mapping.drop, Mapping.replace])
def test_dropped_and_replaced_pages_read_as_zeros_at_the_same_address(action: Any) -> None:
    mapping = Mapping(PAGES_BYTES)
    mapping.array[:] = 7
    action(mapping)
    assert not mapping.array.any()
    mapping.close()


def test_pages_moved_away_and_back_keep_their_bytes() -> None:
    mapping = Mapping(PAGES_BYTES)
    mapping.array[:] = 7
    mapping.move_away_and_back()
    assert (mapping.array == 7).all()
    mapping.close()


def test_wrong_bytes_are_counted_one_by_one() -> None:
    words = pattern.pattern(100, 1000, seed=3)
    assert pattern.count_wrong_bytes(words, 100, seed=3) == 0
    words.view(np.uint8)[[5, 4000]] ^= 1
    assert pattern.count_wrong_bytes(words, 100, seed=3) == 2
    assert pattern.count_wrong_bytes(words, 101, seed=3) > 7000


def test_a_small_demo_keeps_its_promise() -> None:
    progress: dict[str, int] = {}

    def advance(name: str, n_bytes: int) -> None:
        progress[name] = progress.get(name, 0) + n_bytes

    figures = run_demo(advance, work_bytes=4 * MIB, seed=1)
    assert figures.as_promised
    on_demand = figures.disciplines["on_demand"]
    assert on_demand.vm_pin_bytes == 0
    assert on_demand.bytes_verified == 4 * MIB == progress["on_demand"]
    assert on_demand.page_faults > 0
    assert set(figures.disciplines) | set(figures.left_out) == {"pinned", "on_demand"}


@pytest.mark.needs_io_uring
def test_the_demo_shows_what_a_pin_costs_and_misses() -> None:
    pinned = run_demo(lambda name, n_bytes: None, work_bytes=4 * MIB, seed=1).disciplines["pinned"]
    assert pinned.vm_pin_bytes >= 4 * MIB
    assert pinned.bytes_wrong == 0
    assert pinned.hazards["madvise_dontneed"] == "stale"
    assert pinned.hazards["remap"] == "stale"


@pytest.mark.needs_io_uring
def test_the_demo_pins_less_where_the_limit_forbids_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class LimitedOwner(Child):
        """As if this user could lock 1 MiB."""

        def ask(self, message: Any, timeout_s: float | None = 60.0) -> Any:
            if message[0] == "share":
                asked.append(message[1])
                if message[1] > MIB:
                    return {"refused": "over the limit"}
            return super().ask(message, timeout_s)

    monkeypatch.setattr(demo, "Child", LimitedOwner)
    monkeypatch.setattr(demo, "DISCIPLINES", {"pinned": "pinned"})
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (2 * MIB, 2 * MIB))
    figures = run_demo(lambda name, n_bytes: None, work_bytes=4 * MIB, seed=1)
    assert asked == [4 * MIB, MIB]
    pinned = figures.disciplines["pinned"]
    assert (pinned.bytes_moved, pinned.bytes_wrong, pinned.hazards["remap"]) == (MIB, 0, "stale")
    assert figures.reduced == {"pinned": "over the limit"}
    assert not figures.left_out
