"""Bursts of first touches: what is answered in a row, where a row ends, and what time counts."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from nopin.linux.paging_uffd import FAULT_WRITE, Message
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.effects import Outcome
from nopin.server.first_touches import FirstTouches
from nopin.units import PAGE_BYTES

BASE = 0x10_0000
N_PAGES = 100
NO_FIRST_TOUCH, FAILING, NOTED = 66, 67, 77
"""Pages: one for a procedure, one that cannot be made, one of a stream, with somebody to be attended to for it."""
FAULT_NS, OWN_NS = 10_000, 1 << 30
"""How long an answer takes, and a toucher that is let run."""


def fault(page: int, flags: int = FAULT_WRITE) -> Message:
    return (int(EventKind.PAGEFAULT), flags, BASE + page * PAGE_BYTES, 0)


class Touched:
    """An arena's mapper whose messages are given, a clock, and what was answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waiting: list[Message | None]) -> None:
        self.now = 0
        self.waiting = waiting
        self.answered: list[int] = []
        self.noted = False
        self.latency = [[0] * 64 for _ in range(2)]
        monkeypatch.setattr("os.sched_yield", self.let_run)
        uffd = SimpleNamespace(zero=self.zero, read_one=self.read_one)
        self.mapper: Any = SimpleNamespace(number=1, low=0, high=N_PAGES, bias=BASE, uffd=uffd, owed=set())
        pager: Any = SimpleNamespace(uses_swap=False, first_touch=self)
        machine: Any = SimpleNamespace(zero_at=lambda _mapper, _page, n: Outcome(n, 0))
        self.touches = FirstTouches(pager, machine, lambda: self.now, self.latency, lambda: self.noted)
        self.is_open = False

    def read_one(self) -> Message | None:
        return self.waiting.pop(0) if self.waiting else None

    def let_run(self) -> None:
        self.now += OWN_NS

    def zero(self, address: int, length: int) -> tuple[int, int]:
        assert length == PAGE_BYTES
        if address == BASE + FAILING * PAGE_BYTES:
            return 0, errno.EAGAIN
        self.now += FAULT_NS
        return length, 0

    # What the pager says

    def open(self, mapper: int, n_most: int) -> None:
        assert mapper == 1
        assert not self.is_open
        self.is_open = True

    def begin(self, page: int) -> int:
        assert self.is_open
        if page == NO_FIRST_TOUCH:
            return 0
        self.answered.append(page)
        return 4 if page == NOTED else 1

    def failed(self) -> None:
        self.answered.pop()

    def came(self, page: int, n: int, n_done: int) -> bool:
        assert (page, n) == (NOTED, n_done)
        self.noted = True
        return True

    def close(self) -> None:
        self.is_open = False

    def answer(self, n_most: int = 32, also: list[Message] | None = None) -> tuple[int, list[Message]]:
        first = self.read_one()
        assert first is not None
        n, _, left = self.touches.answer(self.mapper, [first, *(also or [])], self.now, n_most)
        assert n == len(self.answered)
        assert not self.is_open
        return n, left


@pytest.mark.parametrize("n_most", [1, 2, 32])
def test_a_row_is_answered_up_to_its_bound(monkeypatch: pytest.MonkeyPatch, n_most: int) -> None:
    touched = Touched(monkeypatch, [fault(page) for page in range(40)])
    assert touched.answer(n_most) == (n_most, [])
    assert touched.answered == list(range(n_most))
    assert len(touched.waiting) == 40 - n_most, "what is not answered is not read"


def test_a_row_ends_when_somebody_has_to_be_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(monkeypatch, [fault(1), fault(NOTED), fault(2)])
    assert touched.answer() == (2, [])
    assert touched.waiting == [fault(2)]


@pytest.mark.parametrize(
    "other",
    [
        (int(EventKind.FORK), 0, 3, 0),
        fault(NO_FIRST_TOUCH),
        fault(FAILING),
        fault(N_PAGES),
        fault(3, FAULT_WRITE << 1),  # protected
    ],
)
def test_what_is_no_first_touch_or_fails_comes_back(monkeypatch: pytest.MonkeyPatch, other: Message) -> None:
    touched = Touched(monkeypatch, [fault(1), other, fault(2)])
    assert touched.answer() == (1, [other])


def test_messages_that_were_read_together_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(monkeypatch, [fault(3)])
    assert touched.answer(also=[fault(4)]) == (0, [fault(3), fault(4)])


def test_a_toucher_that_is_let_run_does_not_lengthen_its_next_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = Touched(monkeypatch, [fault(1), None, fault(2), fault(3), None])
    assert touched.answer() == (3, [])
    counted = {bits: n for bits, n in enumerate(touched.latency[FAULT_WRITE]) if n}
    assert counted == {FAULT_NS.bit_length(): 3}
