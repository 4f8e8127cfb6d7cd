"""Who decides what comes next, where more than one thing may.

The scheduler asks its chooser at every point where several steps are ready, and modelled code asks it where an outcome
is open (does this allocation fail?). A chooser that answers from a script replays a run exactly; one that draws
explores at random; one that counts through all answers explores everything (`nopin.explore`).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol


class Chooser(Protocol):
    """Decides.

    Attributes:
        jumps: offer the next timer as a choice beside what is ready now, as if everything ready were slow. Without,
            time passes only when nothing is ready.
    """

    jumps: bool

    def choose(self, site: str, options: Sequence[str]) -> int:
        """Return the index of one of at least two options.

        Args:
            site: what is decided, for instance ``"next"`` for the step that goes next.
            options: names, stable from run to run.
        """
        ...


class Drawn:
    """Draws every answer.

    Args:
        random: where from.
    """

    def __init__(self, random: Random, *, jumps: bool = False) -> None:
        self._random = random
        self.jumps = jumps

    def choose(self, site: str, options: Sequence[str]) -> int:
        """See `Chooser`."""
        del site
        return self._random.randrange(len(options))
