"""The pager against an oracle: in whatever order faults, evictions, discards and kills come, every byte is right."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nopin.mm.arena_pages import PagerSettings
from nopin.mm.effects import PageRun
from nopin.mm.swap import UNIT_BYTES
from nopin.model.arena.storm import Storm, StormSettings
from nopin.units import MS_NS, PAGE_BYTES

seeds = st.integers(0, 1 << 40)


def assert_nothing_refused(storm: Storm) -> None:
    assert not storm.n_killed, "an access got SIGBUS"
    assert not storm.refused
    assert not storm.lost


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_every_access_finds_what_was_stored_last(seed: int) -> None:
    storm = Storm(seed)
    storm.blow(200)
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)


@given(seed=seeds)
@example(seed=1754276757)  # a device brings a page in between the word of a madvise and the kernel's dropping it
@settings(max_examples=20, deadline=None)
def test_pages_that_the_kernel_drops_at_its_own_time_read_as_zeros_and_no_others_do(seed: int) -> None:
    storm = Storm(seed, StormSettings(removals=True))
    storm.blow(200)
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_pages_given_to_devices_as_they_become_present_are_never_stale(seed: int) -> None:
    storm = Storm(seed, StormSettings(pushes=True))
    storm.blow(200)
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)
    assert storm.mirror.statistics().pushed


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_frames_that_a_slow_device_still_reads_are_not_given_away(seed: int) -> None:
    storm = Storm(seed, StormSettings(slow_reads=True))
    storm.blow(200)
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)


class ServerKilled(BaseException):
    """Stands for SIGKILL."""


@contextlib.contextmanager
def killed_at_line(n: int) -> Iterator[None]:
    """Kill the server at the n-th line of the memory manager, if it comes so far: anywhere, not only at effects."""
    before = sys.gettrace()
    sys.settrace(tracing(n))
    try:
        with contextlib.suppress(ServerKilled):
            yield
    finally:
        sys.settrace(before)


def tracing(n: int) -> Callable[[FrameType, str, Any], Any]:
    left = n

    def line(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            raise ServerKilled
        return line

    return lambda frame, _event, _arg: line if "/nopin/mm/" in frame.f_code.co_filename else None


@given(seed=seeds, lines=st.lists(st.integers(50, 15_000), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_a_server_killed_at_any_line_loses_nothing(seed: int, lines: list[int]) -> None:
    storm = Storm(seed)
    for n in lines:
        with killed_at_line(n):
            storm.blow(200)
        storm.server_is_killed()
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)


@given(seed=seeds, line=st.integers(500, 15_000), lines=st.lists(st.integers(1, 300), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_successors_killed_at_any_line_of_their_recovery_lose_nothing(seed: int, line: int, lines: list[int]) -> None:
    storm = Storm(seed)
    with killed_at_line(line):
        storm.blow(200)
    for n in lines:
        with killed_at_line(n):
            storm.server_is_killed()
    storm.server_is_killed()
    storm.blow(50)
    storm.calm()
    storm.read_everything()
    assert_nothing_refused(storm)


@given(seed=seeds, chance=st.floats(0.05, 0.6))
@settings(max_examples=20, deadline=None)
def test_swap_that_cannot_be_written_now_and_then_costs_no_byte(seed: int, chance: float) -> None:
    storm = Storm(seed)
    draw = Random(seed)
    storm.machine.write_error = lambda _offset, _length: errno.EIO if draw.random() < chance else 0
    storm.blow(200)
    storm.calm()
    storm.machine.write_error = lambda _offset, _length: 0
    storm.read_everything()
    assert_nothing_refused(storm)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_full_swap_refuses_some_and_loses_nothing(seed: int) -> None:
    pager = PagerSettings(swap_limit_bytes=5 * PAGE_BYTES, compress=False, patience_ns=2 * MS_NS)
    storm = Storm(seed, StormSettings(pager=pager, budgets=(8,)))
    storm.blow(100)
    storm.calm()
    storm.read_everything()
    assert not storm.lost


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_machine_short_of_frames_makes_faults_wait_and_loses_nothing(seed: int) -> None:
    storm = Storm(seed)
    storm.machine.n_frames_left = 6
    storm.blow(200)
    storm.calm()
    storm.read_everything()
    assert storm.pager.statistics().short_of_memory
    assert_nothing_refused(storm)


def test_pages_that_fit_into_frames_and_swap_together_are_never_refused() -> None:
    pager = PagerSettings(swap_limit_bytes=7 * PAGE_BYTES, compress=False, patience_ns=0)
    storm = Storm(7, StormSettings(n_pages=14, budgets=(8,), pager=pager))
    for _ in range(150):
        page = storm.random.randrange(14)
        if storm.random.random() < 0.5:
            storm.store(1, page)
        assert storm.read(1, page)
    assert_nothing_refused(storm)


def flip_a_bit(storm: Storm, page: int) -> None:
    at = int(storm.table.units[page]) * UNIT_BYTES
    storm.machine.swap[at + 5] ^= 0x10


def cannot_be_read(storm: Storm, page: int) -> None:
    bad = int(storm.table.units[page]) * UNIT_BYTES
    storm.machine.read_error = lambda offset, length: errno.EIO if offset <= bad < offset + length else 0


@pytest.mark.parametrize("spoil", [flip_a_bit, cannot_be_read])
@pytest.mark.parametrize("mapper", [0, 1])
def test_a_spoilt_page_is_an_error_for_whoever_wants_it_and_for_nobody_else(
    spoil: Callable[[Storm, int], None], mapper: int
) -> None:
    storm = Storm(1)
    for page in range(3, 9):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(12))
    spoil(storm, 5)
    others = [3, 4, 6, 7, 8]
    assert all(storm.read(mapper, page) for page in others[:2])
    assert not storm.read(mapper, 5)
    assert all(storm.read(mapper, page) for page in others)
    assert storm.lost == {5}
    assert not storm.read(2, 5), "it stays lost, and is never zeros"
    storm.server_is_killed()
    assert not storm.read(2, 5), "a successor knows"
    assert not storm.read(0, 5)


def test_a_bad_sector_in_the_middle_of_what_is_read_ahead_costs_its_own_page_only() -> None:
    storm = Storm(1)
    for page in range(8):
        storm.store(1, page)
    storm.machine.run(storm.pager.give_back(12))
    cannot_be_read(storm, 6)
    storm.machine.run(storm.pager.prefetch(PageRun(0, 8), write=False))
    storm.calm()
    assert all(storm.read(0, page) for page in (0, 1, 2, 3, 4, 5, 7))
    assert storm.lost == {6}
