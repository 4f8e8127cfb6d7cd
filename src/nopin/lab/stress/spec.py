"""What a stress run is to do, and what came of it."""

from __future__ import annotations

import msgspec

from nopin.lab.stress.actor import Tally
from nopin.lab.stress.log import Layout, Violation

LAYOUT = Layout(n_plain=144, n_given_up=42, n_counting=6)
BUDGETS_PAGES = (48, 24, 16, 96)
"""What may be resident, one after the other; it begins with the first."""
N_WRITERS = 2
N_GIVERS = 1 + N_WRITERS
"""The owner and its writers give pages up."""
PEERS = ("wire", "direct")
OWNER = 0
ACCELERATOR = 1 + N_WRITERS
FIRST_PEER = ACCELERATOR + 1
N_ACTORS = FIRST_PEER + len(PEERS)
"""The owner, its forked writers, its accelerator, the peers: each writes the cells whose number leaves its index."""


class StressSpec(msgspec.Struct, frozen=True):
    """What is asked for.

    Attributes:
        seed: decides what everybody does, not in which order they come to do it.
        kills: of the owner's server, at moments spread over the run; each time a successor takes over. They are fewer
            where it takes over more slowly.
    """

    seed: int
    seconds: float = 10.0
    kills: int = 0


class StressFigures(msgspec.Struct, kw_only=True):
    """What came of it.

    Attributes:
        violations: words that could not be there. failures: whoever ended in an error, or did not end.
        tallies: what everybody did.
        pager: figures of the arena at the end, as `nopin stat arena` prints them; after kills those of the last server.
        resident_bytes_max: at any look of the owner.
    """

    seed: int
    seconds: float
    kills: int
    n_pages: int
    violations: list[Violation]
    failures: list[str]
    tallies: list[Tally]
    pager: dict[str, int]
    resident_bytes_max: int

    @property
    def as_promised(self) -> bool:
        """Whether every word was right and everybody came through."""
        return not self.violations and not self.failures
