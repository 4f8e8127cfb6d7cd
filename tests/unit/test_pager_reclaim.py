"""Making room in the background, where the budget is so small that nothing is spare."""

from __future__ import annotations

from nopin.model.arena.storm import Storm, StormSettings


def test_the_only_page_is_left_to_whoever_waited_for_it() -> None:
    storm = Storm(1, StormSettings(budgets=(1,)))
    assert storm.read(1, 3)
    assert not storm.pager.wants_reclaim
    assert storm.machine.run(storm.pager.reclaim()) == 0
    assert storm.machine.present[3]


def test_what_came_last_is_left_although_a_batch_is_larger() -> None:
    storm = Storm(1, StormSettings(budgets=(20,)))
    for page in (9, 1, 5):
        assert storm.read(1, page)
    storm.budget.n_pages = 3
    storm.machine.run(storm.pager.reclaim())
    assert storm.machine.present[5]
    assert storm.machine.present.sum() == 2
