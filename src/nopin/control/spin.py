"""How long to look for work before sleeping: as the kernel's halt polling decides it.

A wait that was short would have been saved by looking longer: look for the full time again. A wait that was long shows
that the looking before it was in vain: look less. A wake-up across CPUs costs some 50 us, so a wait counts as short up
to twice the full time; a looking process costs its neighbours on the same CPU.
"""

from __future__ import annotations


class SpinBudget:
    """The present looking time, between zero and a maximum.

    Attributes:
        budget_ns: how long to look for work after the last was done.
    """

    def __init__(self, max_ns: int) -> None:
        self._max_ns = max_ns
        self.budget_ns = max_ns

    def waited(self, duration_ns: int) -> None:
        """Learn from a wait that ended with a sleep."""
        if duration_ns <= 2 * self._max_ns:
            self.budget_ns = self._max_ns
        else:
            self.budget_ns //= 2
