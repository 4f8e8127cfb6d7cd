"""On which CPU the calling thread runs, and how to get to another."""

from __future__ import annotations

import os

from nopin.linux.libc import FAST_LIBC

_LOADAVG_BYTES = 64


class RunQueue:
    """How many threads of the machine run or wait for a CPU. Owns a descriptor."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def n_runnable(self) -> int:
        """Return their number, the caller included (proc_loadavg(5), the fourth field)."""
        return int(os.pread(self._fd, _LOADAVG_BYTES, 0).split()[3].split(b"/")[0])

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def n_cpus() -> int:
    """Return how many CPUs the calling thread may run on."""
    return len(os.sched_getaffinity(0))


def current_cpu() -> int:
    """Return the CPU that the calling thread runs on now."""
    return int(FAST_LIBC.sched_getcpu())


def move_over() -> bool:
    """Go to another of the CPUs that the calling thread may run on, and leave all of them allowed.

    False: there is no other. An affinity that somebody else gives the thread in that very moment is lost.
    """
    allowed = os.sched_getaffinity(0)
    others = allowed - {current_cpu()}
    if not others:
        return False
    try:
        os.sched_setaffinity(0, others)
        os.sched_setaffinity(0, allowed)
    except OSError:  # EINVAL: our cpuset has just been changed, and the kernel has moved us by itself
        return False
    return True
