"""Which pages go first: scans run through, what came back stays, what devices use gets another pass, holds are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from nopin.mm.effects import PageRun
from nopin.mm.page_table import PageState
from nopin.mm.residency import QUEUE_SLACK, Budget, Pages, Residency
from nopin.ranges import Range


class Book:
    """Residency with a budget, and pages that come when touched and go when room is needed."""

    def __init__(self, n_pages: int, budget: int) -> None:
        self.states = np.zeros(n_pages, np.uint8)
        self.budget = Budget(budget)
        self.residency = Residency(self.states, self.budget)
        self.young: set[int] = set()

    def age(self, ranges: Sequence[Range]) -> set[int]:
        found = {page for where in ranges for page in range(where.start, where.end) if page in self.young}
        self.young -= found
        return found

    def touch(self, page: int) -> bool:
        """Make a page resident; False if it was."""
        if self.states[page] == PageState.RESIDENT:
            return False
        if not self.budget.room:
            self.evict(max(1, self.budget.n_pages // 8))
        self.states[page] = PageState.RESIDENT
        self.budget.charge(1)
        self.residency.admit(PageRun(page, 1))
        return True

    def evict(self, n: int, *, hot: bool = True) -> Pages:
        pages = self.residency.victims(n, self.age, hot=hot)
        self.states[pages] = PageState.EMPTY
        self.residency.evicted(pages)
        self.budget.charge(-len(pages))
        return pages


def test_the_first_to_come_is_the_first_to_go() -> None:
    book = Book(100, 10)
    for page in (5, 3, 8, 7):
        book.touch(page)
    assert book.evict(2).tolist() == [3, 5]
    assert book.evict(9).tolist() == [7, 8]


def test_a_scan_leaves_a_hot_set_of_half_the_budget_alone() -> None:
    budget, n_pages = 400, 1600
    book, draw = Book(n_pages, budget), random.Random(1)
    hot, scan = budget // 2, 0
    faults = accesses = 0
    for turn in range(60_000):
        if turn % 3:
            faulted = book.touch(draw.randrange(hot))
            if turn > 30_000:
                accesses, faults = accesses + 1, faults + faulted
        else:
            book.touch(hot + scan % (n_pages - hot))
            scan += 1
    assert faults <= 0.05 * accesses, f"{faults} of {accesses} hot accesses fault"


def test_what_devices_used_gets_one_more_pass_and_is_protected_after_the_second() -> None:
    book = Book(100, 20)
    for page in range(10):
        book.touch(page)
    book.young = {0, 1}
    assert book.evict(2).tolist() == [2, 3]
    book.young = {0}
    assert book.evict(6).tolist() == [4, 5, 6, 7, 8, 9]
    assert book.evict(1).tolist() == [1], "used once only"
    assert not len(book.evict(1, hot=False)), "protected"
    assert book.evict(1).tolist() == [0]


def test_pages_that_are_all_in_use_can_be_had_nevertheless() -> None:
    book = Book(100, 20)
    for page in range(0, 40, 2):
        book.touch(page)
    for _ in range(4):
        book.young = set(range(40))
        assert len(book.evict(3)) == 3


def test_held_pages_stay_and_do_not_hide_protected_ones() -> None:
    book = Book(100, 10)
    for page in range(10):
        book.touch(page)
    book.evict(5)
    for page in range(5):
        book.touch(page)  # they come back: protected
    assert book.residency.n_refaults == 5
    book.residency.hold(PageRun(5, 5))
    assert book.evict(5).tolist() == [0, 1, 2, 3, 4]
    assert not len(book.evict(5)), "all that is left is held"
    book.residency.unhold(PageRun(5, 5))
    assert len(book.evict(5)) == 5


def test_protected_pages_leave_room_for_others() -> None:
    book = Book(1000, 100)
    for _ in range(4):
        for page in range(100):
            book.touch(page)
        book.evict(100)
    assert book.residency.n_protected <= 80


def test_touching_and_giving_up_for_ever_takes_no_memory() -> None:
    book = Book(100, 50)
    for page in range(3):
        book.touch(page)
    for _ in range(3 * QUEUE_SLACK):
        book.touch(50)
        book.states[50] = PageState.EMPTY
        book.residency.forget(np.array([50]))
        book.budget.charge(-1)
    assert len(book.residency._probation) <= 2 * QUEUE_SLACK
    assert book.evict(5).tolist() == [0, 1, 2]


def test_single_pages_that_came_one_after_the_other_leave_in_that_order_whatever_came_between() -> None:
    book, came = Book(1000, 900), random.Random(2).sample(range(1000), 600)
    for page in came[:300]:
        book.states[page] = PageState.RESIDENT
        book.budget.charge(1)
        book.residency.admit_one(page)
    for page in came[300:]:
        book.touch(page)
    book.young = {came[0], came[299]}
    left = [book.evict(7).tolist() for _ in range(40)]
    assert left == [sorted(came[at : at + 7]) for at in range(1, 281, 7)]


def test_pages_given_up_and_touched_again_leave_in_their_new_order() -> None:
    book, draw = Book(5000, 5000), random.Random(3)
    for page in draw.sample(range(5000), 4000):
        book.touch(page)
    for first in range(0, 5000, 500):
        pages = np.flatnonzero(book.states[first : first + 500] == PageState.RESIDENT) + first
        book.states[pages] = PageState.EMPTY
        book.residency.forget(pages)
        book.budget.charge(-len(pages))
    for page in range(5000):
        book.touch(page)
    left = np.concatenate([book.evict(100) for _ in range(50)])
    in_order = float(np.mean(np.diff(left) == 1))
    assert in_order > 0.85, f"only {in_order:.0%} leave behind the page before them"
