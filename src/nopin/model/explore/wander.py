"""Drawn runs: schedules that no exhaustive search reaches, and trouble at every site.

Each run is drawn from its own seed. First it is decided how this run behaves: how readily it interrupts a task, which
sites of trouble are *on* (the first gate), how long the trouble lasts. A site that is on fires at each visit with some
chance (the second gate). So some runs have a lot of one kind and none of another, which is what finds bugs that need a
lot of one kind.

After a while trouble ends for good: from then on everything must come to an end (`no_progress`, `unanswered_fault`).

Source: FoundationDB's buggify has the two gates; its and TigerBeetle's simulators have the two phases.
"""

from __future__ import annotations

from collections.abc import Sequence

from nopin.model.explore.guide import OUTCOME, Guide
from nopin.model.explore.run import run_once
from nopin.model.explore.scenario import Scenario
from nopin.model.explore.search import Found
from nopin.model.streams import Streams

SITE_IS_ON = 0.25
SITE_FIRES = 0.25
CALM_AFTER = (20, 400)
"""Choices after which trouble ends: drawn from between these."""


class Drawing:
    """The policy of one run.

    Args:
        seed: of this run.
    """

    def __init__(self, seed: int) -> None:
        streams = Streams(seed)
        how = streams["how"]
        self.jumps = how.random() < 0.5
        self._stays = how.choice((0.0, 0.3, 0.7, 0.95))
        self._calm_after = how.randrange(*CALM_AFTER)
        self._gates = streams["gates"]
        self._order = streams["order"]
        self._trouble = streams["trouble"]
        self._is_on: dict[str, bool] = {}

    def pick(self, guide: Guide, site: str, options: Sequence[str]) -> int:
        """See `Policy`."""
        if site == "next":
            if self._order.random() < self._stays:
                return 0
            return self._order.randrange(len(options))
        if site.startswith(OUTCOME):
            return self._order.randrange(len(options))
        if site not in self._is_on:
            self._is_on[site] = self._gates.random() < SITE_IS_ON
        if len(guide.choices) >= self._calm_after or not self._is_on[site]:
            return 0
        return self._trouble.randrange(1, len(options)) if self._trouble.random() < SITE_FIRES else 0


def wander(scenario: Scenario, seeds: range) -> Found:
    """Take one drawn run for each seed, until one breaks something."""
    found = Found()
    for seed in seeds:
        drawing = Drawing(seed)
        guide = Guide((), drawing, jumps=drawing.jumps)
        found.n_schedules += 1
        found.breach = run_once(scenario, guide)
        found.deepest = max(found.deepest, len(guide.choices))
        for site in guide.offered:
            found.fired[site] = found.fired.get(site, 0) + guide.fired.get(site, 0)
        if found.breach is not None:
            found.seed, found.jumps = seed, drawing.jumps
            return found
    found.finished = True
    return found
