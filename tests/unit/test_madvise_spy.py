"""What is concluded from what /proc shows of threads that wait in madvise, and of others."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

import pytest

from nopin.linux.madvise_spy import Advice, advice_of, gives_up
from nopin.ranges import Range

MAPPED = [Range(0x10000, 0x18000)]
WAITS = "userfaultfd_event_wait_completion"
REMOVE, DONTNEED = 9, 4


def madvise(start: int, length: int, advice: int) -> str:
    return f"28 {start:#x} {length:#x} {advice:#x} 0x0 0x0 0x0 0x7ffd 0x7f5c"


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, tuple[str, str]]], None]:
    """Have /proc/77 show threads: of each its system call, and where it sleeps."""

    def show(threads: dict[int, tuple[str, str]]) -> None:
        def opened(path: str, *args: Any) -> io.StringIO:
            prefix, number, name = path.rsplit("/", 2)
            assert prefix == "/proc/77/task"
            return io.StringIO(threads[int(number)][("syscall", "wchan").index(name)])

        monkeypatch.setattr(os, "listdir", lambda _folder: [str(number) for number in threads])
        monkeypatch.setattr(builtins, "open", opened)

    return show


@pytest.mark.parametrize(("advice", "is_given_up"), [(REMOVE, True), (DONTNEED, False)])
def test_a_thread_that_waits_tells_what_it_asked_for(proc: Any, advice: int, is_given_up: bool) -> None:
    proc({7: (madvise(0x12000, 0x1800, advice), WAITS), 8: ("running", "0"), 9: ("202 0x0 0x0 0x0", "futex_do_wait")})
    assert advice_of(77, MAPPED) == [Advice(Range(0x12000, 0x14000), is_given_up, 7)]


def test_a_thread_whose_message_was_read_and_that_sleeps_elsewhere_tells_nothing(proc: Any) -> None:
    """It would be taken for the sender of a message of another thread, which runs for a moment and is not seen."""
    proc({7: (madvise(0x10000, 0x8000, DONTNEED), "rwsem_down_read_slowpath"), 8: ("running", "0")})
    assert advice_of(77, MAPPED) is None


def test_where_the_kernel_does_not_say_where_threads_sleep_all_of_them_count(proc: Any) -> None:
    proc({7: (madvise(0x10000, 0x1000, REMOVE), "0")})
    assert advice_of(77, MAPPED) == [Advice(Range(0x10000, 0x11000), True, 7)]


def test_threads_that_wait_about_other_addresses_are_none_of_ours(proc: Any) -> None:
    proc({7: (madvise(0x20000, 0x1000, REMOVE), WAITS)})
    assert advice_of(77, MAPPED) is None


def test_a_thread_that_unmaps_is_seen_and_gives_no_advice(proc: Any) -> None:
    proc({7: ("11 0x10000 0x1000 0x0 0x0 0x0 0x0 0x7ffd 0x7f5c", WAITS)})
    assert advice_of(77, MAPPED) == []


@pytest.mark.parametrize(
    ("problem", "found"), [(PermissionError(), []), (FileNotFoundError(), []), (OSError(24, "too many files"), None)]
)
def test_where_nobody_can_be_seen(monkeypatch: pytest.MonkeyPatch, problem: OSError, found: Any) -> None:
    """Out of descriptors is no reason to read a message unseen: it passes."""

    def refuse(_folder: str) -> list[str]:
        raise problem

    monkeypatch.setattr(os, "listdir", refuse)
    assert advice_of(77, MAPPED) == found


def test_giving_up_is_believed_of_whoever_asks_for_it() -> None:
    where = Range(0x12000, 0x13000)
    keeps, drops = Advice(Range(0x10000, 0x18000), False, 1), Advice(Range(0x12000, 0x14000), True, 2)
    assert gives_up([keeps, drops], where)
    assert gives_up([keeps], where) is False
    assert gives_up([drops], Range(0x10000, 0x14000)) is None
