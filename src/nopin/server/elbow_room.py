"""When the loop should go to another CPU: who posts work and who carries it out do not get on on one.

Both look for what the other writes, and yield: so both are always runnable, and each look of one costs the other a
switch with cold caches. An 8-byte READ takes 30 us on two CPUs and 90 to 170 us on one. The kernel mends this only when
it balances its CPUs, 4 to 50 ms later: a thread that never sleeps is not placed anew, and one that wakes is not given
the idle CPU where CPUs were busy lately (SIS_UTIL in select_idle_cpu, kernel/sched/fair.c). On machines with few CPUs
that is how most bursts of small work begin.

Who waits for a page is another matter: it sleeps, and is best served from the CPU it sleeps on.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.units import MS_NS, US_NS

LONG_YIELD_NS = 8 * US_NS
"""A yield without effect takes 1 to 2 us; in a longer one another thread ran on our CPU."""
PAUSE_NS = MS_NS
"""Between two moves: moving costs some 50 us, and might be in vain."""


class ElbowRoom:
    """Decides when to move.

    Args:
        n_cpus: the loop may run on so many.
        n_runnable: tells how many threads of the machine are runnable. While they are no more than there are CPUs and
            two share one, another is idle.
    """

    def __init__(self, n_cpus: int, n_runnable: Callable[[], int]) -> None:
        self._n_cpus = n_cpus
        self._n_runnable = n_runnable
        self._not_before = 0

    def yielded(self, before: int, after: int) -> bool:
        """Learn from a yield after posted work (times of one clock, nanoseconds); True: go to another CPU."""
        if after - before < LONG_YIELD_NS or after < self._not_before:
            return False
        self._not_before = after + PAUSE_NS
        return 1 < self._n_runnable() <= self._n_cpus
