"""How long to look for work before sleeping: as the kernel's halt polling decides it.

A sleep that was short would have been saved by spinning: spin longer. A sleep that was long shows that the
spinning before it was in vain: spin less. A wake-up across CPUs costs some 50 us, a spinning loop costs its
neighbours on the same CPU.
"""

from __future__ import annotations


class SpinBudget:
    """The present spinning time, between zero and a maximum.

    Attributes:
        budget_ns: how long to look for work after the last was done.
    """

    _FIRST_STEP_NS = 10_000

    def __init__(self, max_ns: int) -> None:
        self._max_ns = max_ns
        self.budget_ns = max_ns

    def slept(self, duration_ns: int) -> None:
        """Learn from a sleep."""
        if duration_ns <= self._max_ns:
            self.budget_ns = min(self._max_ns, max(self._FIRST_STEP_NS, 2 * self.budget_ns))
        else:
            self.budget_ns //= 2
