"""Run a command on a host that forbids it some system calls, as a container's seccomp profile does.

    forbidding.py ERRNO NUMBER,NUMBER... COMMAND...

Each of these calls fails with that errno, in the command and in whatever it starts. x86-64 only, any user.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable

PROCESS_VM = (310, 311)
MEMFD_CREATE = (319,)
PIDFD_OPEN = (434,)

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD_NUMBER, _SKIP_UNLESS_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


def forbidding(numbers: Iterable[int], *, code: int = errno.EPERM) -> list[str]:
    """Return what to put before a command."""
    return [sys.executable, __file__, str(code), ",".join(map(str, numbers))]


def _filter(numbers: Iterable[int], code: int) -> bytes:
    """Make a program in classic BPF (linux/seccomp.h, linux/filter.h)."""
    steps = [(_LOAD_NUMBER, 0, 0, 0)]
    for number in numbers:
        steps += [(_SKIP_UNLESS_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | code)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def _install(program: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    steps = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("<H6xQ", len(program) // 8, ctypes.addressof(steps))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    _install(_filter(map(int, sys.argv[2].split(",")), int(sys.argv[1])))
    os.execvp(sys.argv[3], sys.argv[3:])
