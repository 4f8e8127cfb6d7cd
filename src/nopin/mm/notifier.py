"""Notifiers: how holders of translations hear that memory is about to mean something else.

A device that keeps its own page table (a *mirror*) has copies of facts that belong to somebody else: which frame
holds which page, and whether it may be written. The memory manager changes these facts without asking: it evicts,
migrates, protects, unmaps. If the device used its copy after that, it would read bytes of another page, or write into
one. Pinning solves this by forbidding the changes. Notifiers solve it by announcing them.

**The protocol.** Whoever holds translations of a range subscribes to it. Whoever changes a range brackets the change:

    invalidate_start(ranges, cause)   every subscriber that overlaps lets go of its translations, then
        wait for the fences           what the slow ones returned,
        change the pages              evict, unmap, protect, ...
    end()                             new translations may be learned.

Between the two nobody installs a translation there. Nothing locks a fill out: it learns, asks `read_retry` whether an
invalidation came in between, and if so learns again (`mm/sequence.py`). Brackets of different ranges, and of the same
one, may nest and overlap in any order, each with its own end.

**Two passes.** A device may need time to stop. If each were waited for in turn, k devices would cost k waits. So
a start only tells: a subscriber that needs time returns a `Fence`, and all fences are then waited for together, by
the caller (effect `Quiesce`), because waiting is not this module's to do.

**Causes.** After UNMAP, PROTECT and the other *must-now* causes nothing old may be reachable when the page has
changed, so the fences are waited for before `end` (asserted). RECLAIM and MIGRATE are *deferrable*: only the memory
manager wants them, and until a frame is used anew it still holds the right bytes. Writes stop at once, so that what
is copied out is final; reads may go on, and the fence is waited for where the frame is reused. A swap write can
overlap with the device's flush.

**Refusal.** A subscriber may veto a deferrable invalidation of some pages, which then stay as they are: the caller
leaves `kept` alone. It may do so only so many times in a row, so memory can always be had back. Must-now causes
cannot be refused.

**Not waiting.** With `blockable=False` a subscriber that would have to wait answers `AGAIN`. The others that had
already let go hear an end, so that their books balance; what they reported is kept (a dirty page is dirty whoever
gave up).

**Harvest.** Device page tables have dirty and young bits, as CPU page tables do. What an invalidation collects is
told to the caller: a page a device wrote must not be dropped as clean, one it used is no good victim.

**What is told to whom.** PROTECT, SYNC and RELEASE go to hooks of their own, whose default is to let go of
everything: a subscriber that knows no better is still correct. `update` (pages became present) and `age` (young bits)
are not invalidations and open no bracket.

**Subscribing takes effect at once**, also while invalidations run. Linux defers changes of its tree until no
invalidation runs any more, because starts and ends walk it; a steady stream of overlapping ones can then keep a
newcomer out. Here each bracket remembers whom it told, and ends are told to exactly those. A subscription made during
a bracket does not hear it; its fills are safe all the same, for `read_retry` knows every bracket.

**Release** is the end of the address space: told once, last, and after it nothing is told to anybody.

Source: mm/mmu_notifier.c and include/linux/mmu_notifier.h of Linux for start/end, sequence, owner, blockable and two
passes; the ioproc proposal (Quadrics, 2005) for update, protect and sync. Refusal and deferral are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from nopin.errors import OwnerGone
from nopin.mm.causes import WITH_OWNER, Cause
from nopin.mm.sequence import Era, Eras, Reading, overlap_any
from nopin.mm.subscriber import Again, Answer, Fence, Harvest, Invalidation, Subscriber, Veto
from nopin.ranges import IntervalIndex, Range, coalesce
from nopin.units import U64_MAX

EVERYTHING = Range(0, U64_MAX)

_Hook = Callable[[Invalidation], Answer]


@dataclass(slots=True, eq=False)
class Subscription:
    """Interest of one subscriber in one range.

    Attributes:
        owner: as whom it asks for changes itself; those it is not told of.
        veto_limit: how often in a row it may refuse.
        wants_updates: `update` is called for it.
        generation: of the last invalidation that hit the range; 0 before the first. Equal numbers at two moments
            mean that nothing happened to the range in between.
    """

    where: Range
    subscriber: Subscriber
    owner: object = None
    veto_limit: int = 0
    wants_updates: bool = False
    generation: int = 0
    _n_vetoes: int = field(default=0, repr=False)  # in a row
    _key: int = field(default=-1, repr=False)  # in the index; -1 once ended


class Bracket:
    """An invalidation between start and end; what `Notifiers.invalidate_start` returns.

    Attributes:
        event: what subscribers were told.
        fences: to be waited for, all of them: before `end` for a must-now cause, before a frame is reused for any.
        kept: what subscribers refused to let go of, sorted and disjoint: leave it as it is.
        again: somebody would have had to wait, and `blockable` was False: change nothing. The end is told already.
    """

    __slots__ = ("_era", "_notifiers", "_told", "again", "event", "fences", "kept")

    def __init__(self, notifiers: Notifiers, event: Invalidation, era: Era) -> None:
        self.event = event
        self.fences: list[Fence] = []
        self.kept: list[Range] = []
        self.again = False
        self._notifiers = notifiers
        self._era: Era | None = era
        self._told: list[Subscription] = []

    @property
    def harvest(self) -> Harvest:
        """What devices wrote and used; valid also after `again`."""
        return self.event.harvest

    @property
    def quiet(self) -> bool:
        """True once every fence has passed."""
        return not self.fences or all(fence.passed for fence in self.fences)

    def end(self) -> None:
        """Say that the change is made. Requires: once; for a must-now cause, every fence has passed."""
        assert self._era is not None, "an invalidation ends once"
        assert self.event.cause.deferrable or self.again or self.quiet, "a device may still reach the old pages"
        self._notifiers._end(self, self._era)
        self._era = None


@dataclass(frozen=True, slots=True)
class NotifierStatistics:
    """Counts since the address space was made.

    Attributes:
        invalidations: by the cause's word.
        n_subscriptions: now.
        n_vetoes: refusals heeded.
        n_agains: invalidations given up because somebody would have had to wait.
        n_fences: answers that needed time.
    """

    invalidations: dict[str, int]
    n_subscriptions: int
    n_vetoes: int
    n_agains: int
    n_fences: int


class Notifiers:
    """The subscriptions to one address space.

    Addresses are bytes of a process, or page numbers of an arena: each address space has one kind.

    Attributes:
        n_wanting: how many asked to be told of pages that become present: see `update`.
        ongoing: invalidations that run, of whatever pages: while it is empty `running` need not be asked.
    """

    def __init__(self) -> None:
        self._index: IntervalIndex[Subscription] = IntervalIndex()
        self._eras = Eras()
        self.ongoing = self._eras.ongoing
        self._released = False
        self._release_fences: Sequence[Fence] = ()
        self._by_cause: Counter[Cause] = Counter()
        self._n_vetoes = 0
        self._n_agains = 0
        self._n_fences = 0
        self.n_wanting = 0
        self.generation = 0

    def __len__(self) -> int:
        return len(self._index)

    def statistics(self) -> NotifierStatistics:
        """Return the counts."""
        by_word = {cause.value: n for cause, n in self._by_cause.items()}
        return NotifierStatistics(by_word, len(self), self._n_vetoes, self._n_agains, self._n_fences)

    # Subscribing

    def subscribe(
        self,
        where: Range,
        subscriber: Subscriber,
        *,
        owner: object = None,
        veto_limit: int = 0,
        wants_updates: bool = False,
    ) -> Subscription:
        """Have every later invalidation that overlaps `where` told to `subscriber`.

        Raises:
            OwnerGone: the address space was released.
        """
        if self._released:
            raise OwnerGone(f"cannot watch {where}: the process has exited")
        subscription = Subscription(where, subscriber, owner, veto_limit, wants_updates)
        subscription._key = self._index.insert(where, subscription)
        self.n_wanting += wants_updates
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription: nothing of it is called any more, no outstanding end either. Twice is fine."""
        if subscription._key >= 0:
            self._index.remove(subscription.where, subscription._key)
            subscription._key = -1
            self.n_wanting -= subscription.wants_updates

    # Invalidating

    def invalidate_start(
        self, ranges: Iterable[Range], cause: Cause, *, owner: object = None, blockable: bool = True
    ) -> Bracket:
        """Announce a change of `ranges` (at least one); the caller makes it and calls `end` on what is returned.

        All ranges are told together, once to each subscriber that overlaps any of them: a batch is fenced once.
        """
        assert owner is None or cause in WITH_OWNER, f"nobody owns {cause}"
        self.generation += 1
        self._by_cause[cause] += 1
        event = Invalidation(tuple(coalesce(ranges)), cause, self.generation, owner, blockable)
        assert event.ranges, "an invalidation of nothing"
        bracket = Bracket(self, event, self._eras.start(event.ranges))
        for subscription in self._overlapping(event):
            if not self._tell(subscription, bracket):
                self._give_up(bracket)
                break
        if bracket.kept:
            bracket.kept = coalesce(bracket.kept)
        if self._release_fences:
            bracket.fences += [fence for fence in self._release_fences if not fence.passed]
        return bracket

    def invalidate(self, where: Range, cause: Cause) -> int:
        """Announce a change that is already made, or made by nobody here; returns how many were told.

        Requires: no subscriber needs time.
        """
        if self._released:
            return 0
        bracket = self.invalidate_start((where,), cause)
        assert not bracket.kept, "nothing can be kept of what has happened"
        n_told = len(bracket._told)
        bracket.end()
        return n_told

    def release(self) -> Sequence[Fence]:
        """The address space is gone: tell everybody, once; nothing is told afterwards. Twice is fine.

        Returns:
            Fences to be waited for before its pages are freed. Whoever frees some of them meanwhile for another
            reason waits for the same ones: every later bracket has them, as long as they have not passed.
        """
        if self._released:
            return self._release_fences
        bracket = self.invalidate_start((EVERYTHING,), Cause.RELEASE)
        self._released = True
        for subscription in list(self._index):
            self.unsubscribe(subscription)
        self._release_fences = bracket.fences
        return self._release_fences

    # Telling without a bracket

    def update(self, where: Range, *, write: bool) -> None:
        """Tell who asked for it that pages have become present; `write` if they may be written.

        Requires: called in the same step in which they became so.
        """
        for subscription in self._index.overlapping(where):
            part = subscription.where.intersection(where)
            if subscription.wants_updates and part is not None and not self._eras.running(part):
                subscription.subscriber.update(part, write=write)

    def age(self, ranges: Sequence[Range], *, clear: bool = True) -> set[int]:
        """Return the pages of sorted, disjoint ranges that devices used since the last call that cleared."""
        young: set[int] = set()
        hull = Range(ranges[0].start, ranges[-1].end)
        for subscription in self._index.overlapping(hull):
            subscription.subscriber.age(ranges, young, clear=clear)
        return young

    # Learning translations

    def read_begin(self, where: Range) -> Reading:
        """Begin to learn where pages are; close it with `read_end`. See `mm.sequence`."""
        return self._eras.begin(where)

    def read_retry(self, reading: Reading) -> bool:
        """Tell whether what was learned since may be stale and must be learned again."""
        return self._released or self._eras.retry(reading)

    def read_end(self, reading: Reading) -> None:
        """End a reading, whatever came of it."""
        self._eras.close(reading)

    def running(self, where: Range) -> bool:
        """Tell whether an invalidation of some part of `where` runs now."""
        return self._eras.running(where)

    def _overlapping(self, event: Invalidation) -> list[Subscription]:
        if len(event.ranges) == 1:
            return self._index.overlapping(event.ranges[0])
        found = self._index.overlapping(event.hull)
        return [subscription for subscription in found if overlap_any(event.ranges, subscription.where)]

    def _tell(self, subscription: Subscription, bracket: Bracket) -> bool:
        """Tell one subscriber; False when it would have to wait and must not."""
        event = bracket.event
        if subscription._key < 0:  # an earlier hook of this bracket ended it
            return True
        if event.owner is not None and event.owner is subscription.owner:
            return True
        if subscription._n_vetoes < subscription.veto_limit and event.cause.deferrable:
            event = replace(event, may_veto=True)
        subscription.generation = event.generation
        answer = _hook(subscription.subscriber, event.cause)(event)
        if isinstance(answer, Again):
            assert not event.blockable, "only an invalidation that must not wait can be put off"
            return False
        bracket._told.append(subscription)
        if answer is None:
            subscription._n_vetoes = 0
        else:
            self._note_answer(subscription, bracket, event, answer)
        return True

    def _note_answer(self, subscription: Subscription, bracket: Bracket, event: Invalidation, answer: Answer) -> None:
        if isinstance(answer, Veto):
            assert event.may_veto, "refused more often than allowed, or what cannot be refused"
            subscription._n_vetoes += 1
            self._n_vetoes += 1
            bracket.kept += answer.ranges
            return
        subscription._n_vetoes = 0
        if isinstance(answer, Fence) and not answer.passed:
            self._n_fences += 1
            bracket.fences.append(answer)

    def _give_up(self, bracket: Bracket) -> None:
        self._n_agains += 1
        bracket.again = True
        bracket.end()

    def _end(self, bracket: Bracket, era: Era) -> None:
        self._eras.end(era)
        for subscription in bracket._told:
            if subscription._key >= 0:
                subscription.subscriber.invalidate_end(bracket.event)


def _hook(subscriber: Subscriber, cause: Cause) -> _Hook:
    """Choose what is called for a cause."""
    if cause is Cause.PROTECT:
        return subscriber.protect
    if cause is Cause.SYNC:
        return subscriber.sync
    if cause is Cause.RELEASE:
        return subscriber.release
    return subscriber.invalidate_start
