"""Notifiers: who is told what, also when the told ones change the list."""

from __future__ import annotations

import pytest

from nopin.errors import OwnerGone
from nopin.mm.notifier import Cause, Invalidation, Notifiers, Subscription
from nopin.ranges import Range

HERE, THERE = Range(0x1000, 0x3000), Range(0x8000, 0x9000)


def test_only_overlapping_subscribers_are_told_with_range_and_cause() -> None:
    notifiers = Notifiers()
    heard: list[Invalidation] = []
    notifiers.subscribe(HERE, heard.append)
    notifiers.subscribe(THERE, lambda _: pytest.fail("told of a range it did not ask for"))
    assert notifiers.invalidate(Range(0x2000, 0x8000), Cause.UNMAP) == 1
    assert heard == [Invalidation(Range(0x2000, 0x8000), Cause.UNMAP, generation=1)]


def test_equal_generations_mean_nothing_happened_to_the_range() -> None:
    notifiers = Notifiers()
    here = notifiers.subscribe(HERE, lambda _: None)
    there = notifiers.subscribe(THERE, lambda _: None)
    notifiers.invalidate(HERE, Cause.REMOVE)
    notifiers.invalidate(HERE, Cause.REMOVE)
    assert (here.generation, there.generation, notifiers.generation) == (2, 0, 2)


def test_an_ended_subscription_is_not_told_again() -> None:
    notifiers = Notifiers()
    subscription = notifiers.subscribe(HERE, lambda _: pytest.fail("told after it ended"))
    notifiers.unsubscribe(subscription)
    notifiers.unsubscribe(subscription)
    assert notifiers.invalidate(HERE, Cause.UNMAP) == 0
    assert len(notifiers) == 0


def test_a_callback_may_end_another_subscription_of_the_same_invalidation() -> None:
    notifiers = Notifiers()
    victims: list[Subscription] = []
    notifiers.subscribe(HERE, lambda _: notifiers.unsubscribe(victims[0]))
    victims.append(notifiers.subscribe(HERE, lambda _: pytest.fail("told after it ended")))
    assert notifiers.invalidate(HERE, Cause.UNMAP) == 1
    assert len(notifiers) == 1


def test_a_subscription_made_by_a_callback_hears_the_next_invalidation_only() -> None:
    notifiers = Notifiers()
    late: list[Invalidation] = []

    def subscribe_once(event: Invalidation) -> None:
        if event.generation == 1:
            notifiers.subscribe(HERE, late.append)

    notifiers.subscribe(HERE, subscribe_once)
    notifiers.invalidate(HERE, Cause.REMAP)
    assert late == []
    notifiers.invalidate(HERE, Cause.UNMAP)
    assert [event.generation for event in late] == [2]


def test_changes_wait_for_the_outermost_of_nested_invalidations() -> None:
    notifiers = Notifiers()
    late: list[Invalidation] = []

    def nest(event: Invalidation) -> None:
        if event.cause is Cause.REMAP:
            notifiers.subscribe(THERE, late.append)
            notifiers.invalidate(THERE, Cause.UNMAP)

    notifiers.subscribe(HERE, nest)
    notifiers.invalidate(HERE, Cause.REMAP)
    assert late == []
    assert notifiers.invalidate(THERE, Cause.UNMAP) == 1


def test_release_reaches_everybody_exactly_once_and_is_the_last() -> None:
    notifiers = Notifiers()
    heard: list[Cause] = []
    notifiers.subscribe(HERE, lambda event: heard.append(event.cause))
    notifiers.subscribe(THERE, lambda event: heard.append(event.cause))
    notifiers.release()
    notifiers.release()
    notifiers.invalidate(HERE, Cause.UNMAP)
    assert heard == [Cause.RELEASE, Cause.RELEASE]
    with pytest.raises(OwnerGone):
        notifiers.subscribe(HERE, lambda _: None)
