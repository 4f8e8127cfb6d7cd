"""The latency floor: two processes waking each other through eventfds, each asleep until woken.

One round trip is two wake-ups: the least that any request to a sleeping process and its answer can cost. Where
the scheduler puts the two makes a difference of ten (5 us on one CPU, 45 us on two of a virtual machine), and it
changes its mind; so the figure is for two CPUs, where a client and its device run, unless one is asked for.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

from nopin.lab.child import Child
from nopin.lab.line import Line


class WakeFloor:
    """Time of an eventfd ping-pong between two processes, in `Floor` form."""

    unit = "ns"

    def __init__(self, n_wakes: int = 2, *, one_cpu: bool = False) -> None:
        """Start the partner; figures are for n_wakes wake-ups, of which a round trip has two."""
        name = "eventfd_pingpong" if n_wakes == 2 else "eventfd_wake"
        self.name = f"{name}_one_cpu" if one_cpu else name
        self._trips = n_wakes / 2
        cpus = sorted(os.sched_getaffinity(0))
        self._our_cpu, self._partner_cpu = cpus[0], cpus[0 if one_cpu else -1]
        self._ping = os.eventfd(0)
        self._pong = os.eventfd(0)
        self._partner = Child(_answer, self._ping, self._pong, pass_fds=(self._ping, self._pong))
        self._partner.line.receive(30)
        os.sched_setaffinity(self._partner.pid, {self._partner_cpu})

    def measure(self, seconds: float) -> float:
        """Ping for that long; return the median in nanoseconds."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._our_cpu})
        try:
            return median(self._round_trips_ns(seconds)) * self._trips
        finally:
            os.sched_setaffinity(0, before)

    def _round_trips_ns(self, seconds: float) -> list[int]:
        ping, pong, clock = self._ping, self._pong, time.perf_counter_ns
        samples: list[int] = []
        end = clock() + int(seconds * 1e9)
        before = clock()
        while before < end:
            os.eventfd_write(ping, 1)
            os.eventfd_read(pong)
            after = clock()
            samples.append(after - before)
            before = after
        return samples

    def close(self) -> None:
        """End the partner."""
        os.eventfd_write(self._ping, _END)
        self._partner.close()
        os.close(self._ping)
        os.close(self._pong)


_END = 1 << 32


def _answer(line: Line[Any], ping: int, pong: int) -> None:
    """Answer every ping until the one that says to end, or until the parent is gone."""
    line.send("ready")
    while os.eventfd_read(ping) < _END:
        os.eventfd_write(pong, 1)
