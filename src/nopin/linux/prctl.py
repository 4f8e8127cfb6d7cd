"""Per-process settings a parent, a child or a tracer needs."""

from __future__ import annotations

import contextlib
import ctypes

from nopin.linux.libc import LIBC, checked

_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61  # "Yama"


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    checked(LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), what)


def set_parent_death_signal(signal_number: int) -> None:
    """Have the kernel send us a signal when the thread that started us ends.

    It says nothing about a parent that ended before the call: compare os.getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number, "prctl(PR_SET_PDEATHSIG)")


def allow_tracer(pid: int) -> None:
    """Let one process read and write our memory although Yama's ptrace_scope is 1. Without Yama, nothing."""
    with contextlib.suppress(OSError):  # EINVAL: this kernel has no Yama, so nothing needs allowing
        _prctl(_PR_SET_PTRACER, pid, "prctl(PR_SET_PTRACER)")
