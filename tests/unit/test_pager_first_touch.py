"""First touches without a procedure: what they charge, what they note, and what is left to procedures."""

from __future__ import annotations

import pytest

from nopin.mm.effects import PageRun
from nopin.mm.first_touch import FirstTouch
from nopin.mm.readahead import WINDOW_FIRST
from nopin.model.arena.storm import Storm, StormSettings

N_MOST = 32


def row(budget: int) -> tuple[Storm, FirstTouch]:
    storm = Storm(1, StormSettings(budgets=(budget,)))
    touch = storm.pager.first_touch
    touch.open(1, N_MOST)
    return storm, touch


@pytest.mark.parametrize("budget", [4, 5, N_MOST + 8])
def test_as_many_are_answered_as_there_is_room_for(budget: int) -> None:
    storm, touch = row(budget)
    scattered = [0, 10, 3, 20, 6, 13]
    answered = [page for page in scattered if touch.begin(page)]
    touch.close()
    assert answered == scattered[:budget]
    assert storm.budget.n_used == len(answered), "what was not used is given back"
    assert storm.pager.statistics().faults_zero == len(answered)
    assert all(storm.pager.settled(PageRun(page, 1), write=False) for page in answered)


def test_a_page_that_did_not_come_is_as_it_was() -> None:
    storm, touch = row(20)
    assert touch.begin(3) == touch.begin(10) == 1
    touch.failed()
    touch.close()
    assert storm.budget.n_used == 1
    assert storm.pager.settled(PageRun(3, 1), write=False)
    assert not storm.pager.settled(PageRun(10, 1), write=False)
    touch.open(1, N_MOST)
    assert touch.begin(10) == 1


def test_a_page_that_came_is_no_first_touch_any_more() -> None:
    _, touch = row(20)
    assert [touch.begin(3), touch.begin(3)] == [1, 0]


@pytest.mark.parametrize("n_done", [0, 1, WINDOW_FIRST])
def test_pages_of_a_stream_count_as_far_as_they_came(n_done: int) -> None:
    storm, touch = row(20)
    assert [touch.begin(3), touch.begin(4)] == [1, WINDOW_FIRST]
    assert touch.came(4, WINDOW_FIRST, n_done) == (n_done == WINDOW_FIRST)
    touch.close()
    assert storm.budget.n_used == 1 + n_done
    assert [storm.pager.settled(PageRun(page, 1), write=False) for page in range(4, 9)] == [
        page < 4 + n_done for page in range(4, 9)
    ]


@pytest.mark.parametrize(("budget", "n"), [(2, 1), (4, 3), (N_MOST + 2, WINDOW_FIRST)])
def test_a_stream_takes_no_more_than_there_is_room_for(budget: int, n: int) -> None:
    storm, touch = row(budget)
    assert [touch.begin(3), touch.begin(4)] == [1, n]
    if n > 1:
        assert touch.came(4, n, n)
    touch.close()
    assert storm.budget.n_used == 1 + n


def test_devices_that_want_to_hear_of_pages_do_when_the_row_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    storm, touch = row(20)
    heard: list[int] = []
    notifiers = storm.pager.notifiers
    monkeypatch.setattr(notifiers, "n_wanting", 1)
    monkeypatch.setattr(notifiers, "update", lambda where, *, write: heard.append(where.start + bool(write)))
    assert touch.begin(3) == touch.begin(10) == 1
    touch.close()
    assert heard == [3, 10]
