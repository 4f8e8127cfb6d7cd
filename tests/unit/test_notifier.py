"""Notifiers: who is told what, in which order, and what may be answered."""

from __future__ import annotations

import pytest

from nopin.errors import OwnerGone
from nopin.mm.causes import WITH_OWNER, Cause
from nopin.mm.notifier import EVERYTHING, Notifiers, Subscription
from nopin.mm.subscriber import AGAIN, Answer, Fence, Invalidation, Subscriber, Veto
from nopin.ranges import Range
from nopin.testing.recorder import Recorder

HERE, THERE = Range(0x1000, 0x3000), Range(0x8000, 0x9000)


class Calling(Subscriber):
    """Does something at each start."""

    def __init__(self, action: object) -> None:
        self.action = action

    def invalidate_start(self, event: Invalidation) -> Answer:
        assert callable(self.action)
        self.action(event)
        return None


def test_only_overlapping_subscribers_are_told_with_range_and_cause() -> None:
    notifiers, here, there = Notifiers(), Recorder(), Recorder()
    notifiers.subscribe(HERE, here)
    notifiers.subscribe(THERE, there)
    assert notifiers.invalidate(Range(0x2000, 0x8000), Cause.UNMAP) == 1
    assert here.heard == here.ended == [Invalidation((Range(0x2000, 0x8000),), Cause.UNMAP, generation=1)]
    assert there.heard == there.ended == []


def test_a_batch_is_told_once_to_each_whom_any_part_of_it_concerns() -> None:
    notifiers, here, there, between = Notifiers(), Recorder(), Recorder(), Recorder()
    for where, who in ((HERE, here), (THERE, there), (Range(0x5000, 0x6000), between)):
        notifiers.subscribe(where, who)
    bracket = notifiers.invalidate_start([Range(0x8000, 0x8800), HERE, Range(0x1800, 0x3000)], Cause.RECLAIM)
    bracket.end()
    (event,) = here.heard
    assert there.heard == [event]
    assert event.ranges == (HERE, Range(0x8000, 0x8800)), "sorted, and overlapping parts joined"
    assert between.heard == [], "the gap of a batch is not part of it"


def test_equal_generations_mean_nothing_happened_to_the_range() -> None:
    notifiers = Notifiers()
    here = notifiers.subscribe(HERE, Recorder())
    there = notifiers.subscribe(THERE, Recorder())
    notifiers.invalidate(HERE, Cause.REMOVE)
    notifiers.invalidate(HERE, Cause.REMOVE)
    assert (here.generation, there.generation, notifiers.generation) == (2, 0, 2)


def test_brackets_nest_and_overlap_and_each_end_goes_to_those_its_start_was_told_to() -> None:
    notifiers, who = Notifiers(), Recorder()
    notifiers.subscribe(HERE, who)
    first = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    second = notifiers.invalidate_start([Range(0x2000, 0x4000)], Cause.UNMAP)
    late = Recorder()
    notifiers.subscribe(HERE, late)
    first.end()
    second.end()
    assert who.heard == who.ended == [first.event, second.event]
    assert late.heard == late.ended == [], "an end without its start"


def test_an_invalidation_ends_once() -> None:
    bracket = Notifiers().invalidate_start([HERE], Cause.UNMAP)
    bracket.end()
    with pytest.raises(AssertionError):
        bracket.end()


# Subscribing while invalidations run


def test_an_ended_subscription_is_not_told_again_nor_of_the_end_of_what_runs() -> None:
    notifiers, who = Notifiers(), Recorder()
    subscription = notifiers.subscribe(HERE, who)
    bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    notifiers.unsubscribe(subscription)
    notifiers.unsubscribe(subscription)
    bracket.end()
    assert notifiers.invalidate(HERE, Cause.UNMAP) == 0
    assert (len(who.heard), len(who.ended), len(notifiers)) == (1, 0, 0)


def test_a_hook_may_end_another_subscription_of_the_same_invalidation() -> None:
    notifiers, victim = Notifiers(), Recorder()
    victims: list[Subscription] = []
    notifiers.subscribe(HERE, Calling(lambda _: notifiers.unsubscribe(victims[0])))
    victims.append(notifiers.subscribe(HERE, victim))
    assert notifiers.invalidate(HERE, Cause.UNMAP) == 1
    assert (victim.heard, len(notifiers)) == ([], 1)


def test_a_subscription_made_by_a_hook_hears_the_next_invalidation_only() -> None:
    notifiers, late = Notifiers(), Recorder()

    def subscribe_once(event: Invalidation) -> None:
        if event.generation == 1:
            notifiers.subscribe(HERE, late)

    notifiers.subscribe(HERE, Calling(subscribe_once))
    notifiers.invalidate(HERE, Cause.REMAP)
    assert late.heard == []
    notifiers.invalidate(HERE, Cause.UNMAP)
    assert [event.generation for event in late.heard] == [2]


def test_a_stream_of_overlapping_invalidations_does_not_keep_a_newcomer_out() -> None:
    notifiers, late = Notifiers(), Recorder()
    running = [notifiers.invalidate_start([THERE], Cause.RECLAIM)]
    notifiers.subscribe(HERE, late)
    for _ in range(10):
        running.append(notifiers.invalidate_start([THERE], Cause.RECLAIM))
        running.pop(0).end()
    assert notifiers.invalidate(HERE, Cause.UNMAP) == 1
    assert len(late.heard) == 1


# Causes


def test_every_cause_reaches_a_subscriber_that_overrides_nothing_but_the_start() -> None:
    notifiers, who = Notifiers(), Recorder()
    notifiers.subscribe(HERE, who)
    for cause in Cause:
        if cause is not Cause.RELEASE:
            notifiers.invalidate(HERE, cause)
    notifiers.release()
    assert {event.cause for event in who.heard} == set(Cause)
    assert notifiers.statistics().invalidations == {cause.value: 1 for cause in Cause}


def test_a_change_its_owner_asked_for_is_told_to_all_but_the_owner() -> None:
    notifiers, own, other, anonymous = Notifiers(), Recorder(), Recorder(), Recorder()
    device = object()
    notifiers.subscribe(HERE, own, owner=device)
    notifiers.subscribe(HERE, other, owner=object())
    notifiers.subscribe(HERE, anonymous)
    for cause in sorted(WITH_OWNER, key=lambda cause: cause.value):
        notifiers.invalidate_start([HERE], cause, owner=device).end()
    assert (len(own.heard), len(other.heard), len(anonymous.heard)) == (0, 2, 2)
    assert own.ended == []
    notifiers.invalidate(HERE, Cause.UNMAP)
    assert len(own.heard) == 1
    with pytest.raises(AssertionError):
        notifiers.invalidate_start([HERE], Cause.UNMAP, owner=device)


def test_release_reaches_everybody_exactly_once_and_is_the_last() -> None:
    notifiers, who = Notifiers(), Recorder()
    notifiers.subscribe(HERE, who)
    notifiers.subscribe(THERE, who)
    running = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    notifiers.release()
    notifiers.release()
    notifiers.invalidate(HERE, Cause.UNMAP)
    running.end()
    assert [event.cause for event in who.heard] == [Cause.RECLAIM, Cause.RELEASE, Cause.RELEASE]
    assert who.heard[1].ranges == (EVERYTHING,)
    assert who.ended == [], "a subscriber that was released hears no end"
    with pytest.raises(OwnerGone):
        notifiers.subscribe(HERE, Recorder())


def test_release_against_unsubscribe_in_both_orders() -> None:
    notifiers, before, after = Notifiers(), Recorder(), Recorder()
    notifiers.unsubscribe(notifiers.subscribe(HERE, before))
    subscription = notifiers.subscribe(HERE, after)
    notifiers.release()
    notifiers.unsubscribe(subscription)
    assert (len(before.heard), len(after.heard), len(notifiers)) == (0, 1, 0)


def test_release_hands_out_the_fences_to_wait_for_before_pages_are_freed() -> None:
    notifiers, fence = Notifiers(), Fence()
    notifiers.subscribe(HERE, Recorder(fence))
    assert list(notifiers.release()) == [fence]


def test_who_frees_pages_while_a_release_is_waited_for_waits_for_it_too() -> None:
    notifiers, fence = Notifiers(), Fence()
    notifiers.subscribe(HERE, Recorder(fence))
    notifiers.release()
    reclaim = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    assert reclaim.fences == [fence]
    assert list(notifiers.release()) == [fence]
    fence.signal()
    assert notifiers.invalidate_start([HERE], Cause.UNMAP).fences == []


# Two passes


def test_everybody_is_told_before_anybody_is_waited_for() -> None:
    notifiers, fences = Notifiers(), [Fence(), Fence()]
    slow = [Recorder(fence) for fence in fences]
    for who in slow:
        notifiers.subscribe(HERE, who)
    bracket = notifiers.invalidate_start([HERE], Cause.UNMAP)
    assert [len(who.heard) for who in slow] == [1, 1]
    assert (bracket.fences, bracket.quiet) == (fences, False)
    for fence in fences:
        fence.signal()
    assert bracket.quiet
    bracket.end()


def test_a_must_now_change_may_not_end_before_its_fences_have_passed() -> None:
    notifiers, fence = Notifiers(), Fence()
    notifiers.subscribe(HERE, Recorder(fence))
    bracket = notifiers.invalidate_start([HERE], Cause.UNMAP)
    with pytest.raises(AssertionError, match="may still reach"):
        bracket.end()


def test_a_deferrable_change_may_end_and_be_waited_for_where_the_frame_is_reused() -> None:
    notifiers, fence = Notifiers(), Fence()
    who = Recorder(fence)
    notifiers.subscribe(HERE, who)
    bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    bracket.end()
    assert (len(who.ended), bracket.quiet) == (1, False)
    fence.signal()
    assert bracket.quiet


def test_a_fence_passes_once_and_tells_who_waits_then_or_later() -> None:
    fence, told = Fence(), []
    fence.when_passed(lambda: told.append("early"))
    fence.signal()
    fence.signal()
    fence.when_passed(lambda: told.append("late"))
    assert told == ["early", "late"]


# Refusal


def test_only_deferrable_changes_can_be_refused() -> None:
    notifiers, who = Notifiers(), Recorder()
    notifiers.subscribe(HERE, who, veto_limit=1)
    for cause in Cause:
        if cause is not Cause.RELEASE:
            notifiers.invalidate(HERE, cause)
    assert {event.cause for event in who.heard if event.may_veto} == {Cause.RECLAIM, Cause.MIGRATE}


def test_a_refusal_keeps_pages_is_counted_and_bounded() -> None:
    notifiers, part = Notifiers(), Range(0x1000, 0x2000)
    who = Recorder(Veto([part]), Veto([part]), None, Veto([part]))
    notifiers.subscribe(HERE, who, veto_limit=2)
    kept = []
    for _ in range(4):
        bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM)
        kept.append(bracket.kept)
        bracket.end()
    assert kept == [[part], [part], [], [part]]
    assert [event.may_veto for event in who.heard] == [True, True, False, True], "never more than twice in a row"
    assert notifiers.statistics().n_vetoes == 3


def test_refusing_more_often_than_allowed_is_a_bug_of_the_subscriber() -> None:
    notifiers = Notifiers()
    notifiers.subscribe(HERE, Recorder(Veto([HERE])))
    with pytest.raises(AssertionError, match="refused more often"):
        notifiers.invalidate_start([HERE], Cause.RECLAIM)


def test_what_one_subscriber_keeps_the_others_have_let_go_of() -> None:
    notifiers, keeper, other = Notifiers(), Recorder(Veto([HERE])), Recorder()
    notifiers.subscribe(HERE, keeper, veto_limit=1)
    notifiers.subscribe(HERE, other)
    bracket = notifiers.invalidate_start([HERE], Cause.MIGRATE)
    bracket.end()
    assert (bracket.kept, len(other.heard), len(keeper.ended)) == ([HERE], 1, 1)


# Not waiting


def test_an_invalidation_that_must_not_wait_is_given_up_with_balanced_ends() -> None:
    notifiers, first, second, third = Notifiers(), Recorder(), Recorder(AGAIN), Recorder()
    for who in (first, second, third):
        notifiers.subscribe(HERE, who)
    bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM, blockable=False)
    assert bracket.again
    assert (len(first.heard), len(first.ended)) == (1, 1)
    assert (len(second.heard), len(second.ended)) == (1, 0), "who gave up has begun nothing that could end"
    assert third.heard == []
    assert not notifiers.running(HERE)
    assert notifiers.statistics().n_agains == 1


def test_what_devices_wrote_is_known_even_when_the_invalidation_was_given_up() -> None:
    notifiers = Notifiers()
    notifiers.subscribe(HERE, Calling(lambda event: event.harvest.dirty.add(0x1234)))
    notifiers.subscribe(HERE, Recorder(AGAIN))
    bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM, blockable=False)
    assert bracket.again
    assert bracket.harvest.dirty == {0x1234}


def test_giving_up_is_no_answer_to_an_invalidation_that_may_wait() -> None:
    notifiers = Notifiers()
    notifiers.subscribe(HERE, Recorder(AGAIN))
    with pytest.raises(AssertionError, match="must not wait"):
        notifiers.invalidate_start([HERE], Cause.RECLAIM)


# Hooks without a bracket


class Watching(Recorder):
    """Writes updates down, and has pages that were used."""

    def __init__(self, *used: int) -> None:
        super().__init__()
        self.used = set(used)
        self.updates: list[tuple[Range, bool]] = []

    def update(self, where: Range, *, write: bool) -> None:
        self.updates.append((where, write))

    def age(self, ranges: object, young: set[int], *, clear: bool) -> None:
        young |= self.used
        if clear:
            self.used.clear()


def test_new_pages_are_told_to_those_who_asked_clipped_to_their_range() -> None:
    notifiers, asked, did_not = Notifiers(), Watching(), Watching()
    notifiers.subscribe(HERE, asked, wants_updates=True)
    notifiers.subscribe(HERE, did_not)
    notifiers.update(Range(0x2000, 0x5000), write=True)
    assert (asked.updates, did_not.updates) == ([(Range(0x2000, 0x3000), True)], [])


def test_nothing_is_pushed_into_a_range_that_is_being_invalidated() -> None:
    notifiers, asked = Notifiers(), Watching()
    notifiers.subscribe(HERE, asked, wants_updates=True)
    bracket = notifiers.invalidate_start([HERE], Cause.RECLAIM)
    notifiers.update(HERE, write=False)
    assert asked.updates == []
    bracket.end()
    notifiers.update(HERE, write=False)
    assert asked.updates == [(HERE, False)]


def test_aging_collects_from_all_devices_and_forgets_when_asked_to() -> None:
    notifiers = Notifiers()
    notifiers.subscribe(HERE, Watching(0x1000, 0x1001))
    notifiers.subscribe(HERE, Watching(0x1001, 0x1002))
    assert notifiers.age([HERE], clear=False) == notifiers.age([HERE]) == {0x1000, 0x1001, 0x1002}
    assert notifiers.age([HERE]) == set()
