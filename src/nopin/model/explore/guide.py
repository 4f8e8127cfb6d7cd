"""The guide: the chooser of explored runs. It follows a script of choices, then asks a policy, and notes all answers.

Of steps that are ready, the task that ran last comes first, so that choice 0 everywhere is the plainest of schedules:
each task runs until it waits. The number of other choices is then the number of interruptions, which makes short
scripts easy to read and easy to shrink. A task that has run `IN_A_ROW` steps goes last, so that who polls cannot keep
the others out for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nopin.model.explore.world import World

IN_A_ROW = 100

OUTCOME = "outcome: "
"""Begins the names of sites where one is as ordinary as the other: explored as orders are. All others are trouble."""


class Policy(Protocol):
    """Answers where the script has ended."""

    def pick(self, guide: Guide, site: str, options: Sequence[str]) -> int:
        """Return an index; `options` are in the order of the guide's, most ordinary first."""
        ...


class Plain:
    """Always the most ordinary."""

    def pick(self, guide: Guide, site: str, options: Sequence[str]) -> int:
        """See `Policy`."""
        del guide, site, options
        return 0


class Guide:
    """See above.

    Args:
        script: choices to begin with; one beyond the options there are counts as the last of them.
        policy: what comes then.
        jumps: see `Chooser`.

    Attributes:
        choices: all made so far.
        calm: no longer explored: choose the most ordinary, and note nothing. For what follows a run.
        world: of the run, once it is built.
        turns: events of the trace before which the choice was not the ordinary one.
        fired: how often each site of trouble was answered yes. offered: how often it was asked.
    """

    def __init__(self, script: Sequence[int] = (), policy: Policy | None = None, *, jumps: bool = False) -> None:
        self.jumps = jumps
        self.choices: list[int] = []
        self.calm = False
        self.world: World | None = None
        self.turns: list[int] = []
        self.fired: dict[str, int] = {}
        self.offered: dict[str, int] = {}
        self._script = script
        self._policy: Policy = policy if policy is not None else Plain()
        self._last = ""
        self._n_in_a_row = 0

    def choose(self, site: str, options: Sequence[str]) -> int:
        """See `Chooser`."""
        if site == "next":
            return self._choose_next(options)
        if self.calm:
            return 0
        if site.startswith(OUTCOME):
            return self._answer(site, options)
        self.offered[site] = self.offered.get(site, 0) + 1
        index = self._answer(site, options)
        if index:
            self.fired[site] = self.fired.get(site, 0) + 1
        return index

    def _choose_next(self, options: Sequence[str]) -> int:
        order = self._order(options)
        index = 0 if self.calm else self._answer("next", [options[at] for at in order])
        chosen = order[index]
        name = options[chosen]
        self._n_in_a_row = self._n_in_a_row + 1 if name == self._last else 0
        self._last = name
        return chosen

    def _order(self, options: Sequence[str]) -> list[int]:
        order = list(range(len(options)))
        if self._last in options:
            at = options.index(self._last)
            del order[at]
            order.insert(0 if self._n_in_a_row < IN_A_ROW else len(order), at)
        return order

    def _answer(self, site: str, options: Sequence[str]) -> int:
        at = len(self.choices)
        if at < len(self._script):
            index = min(self._script[at], len(options) - 1)
        else:
            index = self._policy.pick(self, site, options)
        self.choices.append(index)
        if index and self.world is not None and self.world.trace is not None:
            self.turns.append(self.world.trace.n_events)
        return index
