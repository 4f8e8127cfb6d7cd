"""Pinning memory for real, for the discipline that compares with it."""

from __future__ import annotations

import errno
import resource

from nopin.errors import ServerRefused
from nopin.linux.io_uring import PinnedBuffer
from nopin.units import format_bytes

_REMEDY = "raise it (ulimit -l, or memlock in limits.conf), or register on demand, which needs no limit"


def pin(address: int, length: int) -> PinnedBuffer:
    """Pin the frames behind a range of our memory until the buffer is closed.

    Raises:
        ServerRefused: code "memlock" when over RLIMIT_MEMLOCK (ENOMEM, as a verbs provider says), code "efault"
            when part of the range is not mapped or not writable, "pin" for what else the kernel refuses.
        HostLacks: no io_uring here.
        UsageError: an impossible length.
    """
    where = f"{format_bytes(length)} at {address:#x}"
    try:
        return PinnedBuffer(address, length)
    except MemoryError:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit == resource.RLIM_INFINITY:
            text = f"cannot pin {where}: the host is out of memory; register on demand"
        else:
            text = f"cannot pin {where}: over RLIMIT_MEMLOCK ({format_bytes(limit)}); {_REMEDY}"
        raise ServerRefused(text, code="memlock", errno=errno.ENOMEM) from None
    except OSError as problem:
        unmapped = problem.errno == errno.EFAULT
        why = "part of it is not mapped, or not writable" if unmapped else problem.strerror
        raise ServerRefused(
            f"cannot pin {where}: {why}",
            code="efault" if unmapped else "pin",
            errno=problem.errno or errno.EINVAL,
        ) from None
