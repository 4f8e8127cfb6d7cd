"""Bursts of first touches: what is answered in a row, where a row ends, and what time counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nopin.linux.paging_uffd import FAULT_WRITE, Message
from nopin.linux.uffd_handshake import EventKind
from nopin.server.first_touches import FirstTouches
from nopin.units import PAGE_BYTES

BASE = 0x10_0000
N_PAGES = 100
FAULT_NS, OWN_NS = 10_000, 1 << 30
"""How long an answer takes, and a toucher that is let run."""


def fault(page: int, flags: int = FAULT_WRITE) -> Message:
    return (int(EventKind.PAGEFAULT), flags, BASE + page * PAGE_BYTES, 0)


class Touched:
    """An arena's mapper whose messages are given, a clock, and what was answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waiting: list[list[Message]]) -> None:
        self.now = 0
        self.waiting = waiting
        self.answered: list[int] = []
        self.noted = False
        self.latency = [[0] * 64 for _ in range(2)]
        monkeypatch.setattr("os.sched_yield", self.let_run)
        uffd = SimpleNamespace(zero=self.zero, read=lambda: self.waiting.pop(0) if self.waiting else [])
        self.mapper: Any = SimpleNamespace(number=1, low=0, high=N_PAGES, bias=BASE, uffd=uffd)
        pager: Any = SimpleNamespace(
            uses_swap=False, first_touch=SimpleNamespace(begin=lambda _mapper, page: page != 66, end=self.end)
        )
        machine: Any = SimpleNamespace()
        self.touches = FirstTouches(pager, machine, lambda: self.now, self.latency, lambda: self.noted)

    def let_run(self) -> None:
        self.now += OWN_NS

    def zero(self, _address: int, length: int) -> tuple[int, int]:
        self.now += FAULT_NS
        return length, 0

    def end(self, page: int, n: int, n_done: int) -> bool:
        assert n == n_done == 1
        self.answered.append(page)
        self.noted |= page == 77
        return True

    def answer(self, n_most: int = 32) -> tuple[int, list[Message]]:
        n, _, left = self.touches.answer(self.mapper, self.waiting.pop(0), self.now, n_most)
        assert n == len(self.answered)
        return n, left


@pytest.mark.parametrize("n_most", [1, 2, 32])
def test_a_row_is_answered_up_to_its_bound(monkeypatch: pytest.MonkeyPatch, n_most: int) -> None:
    touched = Touched(monkeypatch, [[fault(page)] for page in range(40)])
    assert touched.answer(n_most) == (n_most, [])
    assert touched.answered == list(range(n_most))
    assert len(touched.waiting) == 40 - n_most, "what is not answered is not read"


def test_a_row_ends_when_somebody_has_to_be_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(monkeypatch, [[fault(1)], [fault(77)], [fault(2)]])
    assert touched.answer() == (2, [])
    assert touched.waiting == [[fault(2)]]


@pytest.mark.parametrize(
    "other",
    [
        [(int(EventKind.FORK), 0, 3, 0)],
        [fault(66)],  # no first touch
        [fault(N_PAGES)],
        [fault(3, FAULT_WRITE << 1)],  # protected
        [fault(3), fault(4)],
    ],
)
def test_what_is_no_lone_first_touch_comes_back(monkeypatch: pytest.MonkeyPatch, other: list[Message]) -> None:
    touched = Touched(monkeypatch, [[fault(1)], other, [fault(2)]])
    assert touched.answer() == (1, other)


def test_a_toucher_that_is_let_run_does_not_lengthen_its_next_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(monkeypatch, [[fault(1)], [], [fault(2)], [fault(3)], []])
    assert touched.answer() == (3, [])
    counted = {bits: n for bits, n in enumerate(touched.latency[FAULT_WRITE]) if n}
    assert counted == {FAULT_NS.bit_length(): 3}
