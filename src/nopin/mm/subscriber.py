"""What a holder of translations implements, and what it is told and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nopin.mm.causes import Cause
from nopin.ranges import Range


class Fence:
    """A moment after which a subscriber no longer reaches what it was told to let go of.

    Like a dma_fence: it passes once, and stays passed.
    """

    __slots__ = ("_callbacks", "passed")

    def __init__(self) -> None:
        self.passed = False
        self._callbacks: list[Callable[[], None]] = []

    def when_passed(self, callback: Callable[[], None]) -> None:
        """Call back once it has passed: perhaps now."""
        if self.passed:
            callback()
        else:
            self._callbacks.append(callback)

    def signal(self) -> None:
        """Let it pass, and tell who waits. Twice is fine."""
        self.passed = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


@dataclass(frozen=True, slots=True)
class Veto:
    """Answer to a deferrable invalidation: these parts stay with me. All others were let go of."""

    ranges: Sequence[Range]


class Again:
    """Answer to an invalidation that must not wait: I would have to. Nothing was let go of. See `AGAIN`."""


AGAIN = Again()

Answer = Fence | Veto | Again | None
"""What a subscriber says to an invalidation. None: let go of, here and now."""


@dataclass(slots=True)
class Harvest:
    """What devices did with the pages of an invalidation, by page number (for an arena; empty for plain memory).

    Attributes:
        dirty: pages a device wrote since this was last asked. Complete when the start returns: writes stop at once.
        young: pages a device used since this was last asked. Reads that still go on may be missing until the fences
            have passed; it is a hint.
    """

    dirty: set[int] = field(default_factory=set)
    young: set[int] = field(default_factory=set)


@dataclass(slots=True)  # nobody changes one; not frozen, because that takes three times as long to make
class Invalidation:
    """What is about to happen to an address space.

    Attributes:
        ranges: the addresses concerned, sorted, disjoint; for FORK and RELEASE, everything.
        generation: counts the invalidations of this address space, from 1.
        owner: who asked for it, where that matters (`causes.WITH_OWNER`); it is not told.
        blockable: False: do not wait; answer `AGAIN` instead.
        may_veto: a `Veto` will be heeded.
        harvest: where to tell which pages devices wrote and used.
    """

    ranges: tuple[Range, ...]
    cause: Cause
    generation: int
    owner: object = None
    blockable: bool = True
    may_veto: bool = False
    harvest: Harvest = field(default_factory=Harvest, compare=False)

    @property
    def hull(self) -> Range:
        """The smallest single range that contains all of it."""
        return Range(self.ranges[0].start, self.ranges[-1].end)

    def within(self, where: Range) -> list[Range]:
        """Return the parts that lie in `where`."""
        parts = (piece.intersection(where) for piece in self.ranges)
        return [part for part in parts if part is not None]


class Subscriber:
    """Base of who holds translations. All hooks but `invalidate_start` have a safe default.

    Hooks are called by the memory manager in the middle of its work: they must not wait, and must not call back into
    it, except to subscribe and unsubscribe. One that needs time returns a `Fence` and signals it later.
    """

    def invalidate_start(self, event: Invalidation) -> Answer:
        """Let go of all translations in `event.ranges`, and report dirty and young pages to `event.harvest`.

        Writes stop before this returns, whatever the cause. Reads too, unless a fence is returned: then when it
        passes. From here to `invalidate_end` nothing may be installed there (`Notifiers.read_retry` sees to it).
        """
        raise NotImplementedError

    def invalidate_end(self, event: Invalidation) -> None:
        """The change is made; new translations may be learned. Follows each start, in any order of nesting."""

    def protect(self, event: Invalidation) -> Answer:
        """Take the right to write away (PROTECT); reads may go on hitting."""
        return self.invalidate_start(event)

    def sync(self, event: Invalidation) -> Answer:
        """Report dirty pages and call them clean (SYNC): the next write makes them dirty again."""
        return self.invalidate_start(event)

    def release(self, event: Invalidation) -> Answer:
        """Let go of everything, for good (RELEASE). Called once; nothing is called afterwards."""
        return self.invalidate_start(event)

    def update(self, where: Range, *, write: bool) -> None:
        """Pages that just became present, for who asked to be told: `write` if they may be written."""

    def age(self, ranges: Sequence[Range], young: set[int], *, clear: bool) -> None:
        """Add the numbers of pages used since the last clearing to `young`; forget that they were, if `clear`."""
