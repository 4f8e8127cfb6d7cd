"""Exhaustive search: every order of a scenario's steps, up to a bound.

A run cannot be taken back, so each is played from the start: a script leads to a point that was seen before, from there
it is new. At each new choice point the state is digested (`digest.py`); one that was reached before has had all its
futures looked at, or has them on the list, so the run is given up there. That is what keeps the number of runs near
the number of different states rather than that of orders, which grows like a factorial.

**Order.** Schedules with fewer interruptions come first. Most bugs need one or two, so they are found soon, also where
not everything can be looked at, and what is found first is easy to read.

**Bound.** Beyond `depth` choices a run takes the most ordinary one (`guide.py`) to its end. A state that was reached
with less depth left is looked at again when it is reached with more.

**Loses nothing**: `tests/model/test_search.py` compares what is reached, and what is found, with a search that prunes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush

from nopin.model.explore.digest import digest_of
from nopin.model.explore.guide import OUTCOME, Guide
from nopin.model.explore.run import Abandoned, Breach, run_once
from nopin.model.explore.scenario import Scenario

DEPTH = 400
"""Deeper than any scenario of ours goes: all orders."""

MAX_SCHEDULES = 200_000
"""Of one scenario that somebody asked for."""

MAX_SCHEDULES_OF_ALL = 1_000
"""Of each, where all are looked at: most end before, and those with few interruptions come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of a search.

    Attributes:
        depth: choice points at which all options are tried.
        max_schedules: runs, after which it ends unfinished.
        n_faults: times trouble may happen in one run, at any site.
        prune: give up where a state was seen before.
    """

    depth: int = DEPTH
    max_schedules: int = MAX_SCHEDULES
    n_faults: int = 0
    prune: bool = True


@dataclass(slots=True)
class Found:
    """What a search or a campaign of drawn runs came to.

    Attributes:
        n_schedules: runs taken.
        n_states: different states at choice points.
        deepest: most choices in a run.
        finished: everything within the bounds was looked at.
        breach: the first that was found.
        fired: how often each site of trouble had its way.
        seed, jumps: of the drawn run with the breach.
    """

    n_schedules: int = 0
    n_states: int = 0
    deepest: int = 0
    finished: bool = False
    breach: Breach | None = None
    fired: dict[str, int] = field(default_factory=dict)
    seed: int | None = None
    jumps: bool = False


class _Search:
    """The policy of a search: new choice points put their other options on the list."""

    def __init__(self, bounds: Bounds, at_point: Callable[[bytes], None] | None) -> None:
        self.pending: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
        self.seen: dict[bytes, int] = {}
        self._bounds = bounds
        self._n_pushed = 0
        self._at_point = at_point

    def pick(self, guide: Guide, site: str, options: Sequence[str]) -> int:
        """See `Policy`."""
        at = len(guide.choices)
        if at >= self._bounds.depth:
            return 0
        if site == "next":
            self._note_state(guide, at)
        elif not site.startswith(OUTCOME) and sum(guide.fired.values()) >= self._bounds.n_faults:
            return 0
        chosen = tuple(guide.choices)
        n_interruptions = 1 + sum(choice != 0 for choice in chosen)
        for other in range(1, len(options)):
            self._n_pushed += 1
            heappush(self.pending, (n_interruptions, self._n_pushed, (*chosen, other)))
        return 0

    def _note_state(self, guide: Guide, at: int) -> None:
        if not (self._bounds.prune or self._at_point):
            return
        assert guide.world is not None, "choices are made while a world runs"
        digest = digest_of(guide.world) + bytes([sum(guide.fired.values())])
        if self._at_point is not None:
            self._at_point(digest)
        known = self.seen.get(digest)
        if known is not None and known <= at and self._bounds.prune:
            raise Abandoned
        self.seen[digest] = at


def search(scenario: Scenario, bounds: Bounds, *, at_point: Callable[[bytes], None] | None = None) -> Found:
    """Look at all orders within bounds, until one breaks something.

    Args:
        at_point: told the digest of each choice point.
    """
    policy, found = _Search(bounds, at_point), Found()
    while policy.pending:
        if found.n_schedules >= bounds.max_schedules:
            return found
        guide = Guide(heappop(policy.pending)[2], policy)
        found.n_schedules += 1
        with suppress(Abandoned):
            found.breach = run_once(scenario, guide)
        found.deepest = max(found.deepest, len(guide.choices))
        found.n_states = len(policy.seen)
        if found.breach is not None:
            return found
    found.finished = True
    return found
