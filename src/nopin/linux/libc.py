"""The C library: one handle that keeps errno, one that does not, and checked calls."""

from __future__ import annotations

import ctypes
import os

LIBC = ctypes.CDLL(None, use_errno=True)

FAST_LIBC = ctypes.CDLL(None)
"""Without errno bookkeeping, for calls counted in microseconds: when one fails, ask again through `LIBC`."""

LIBC.syscall.restype = ctypes.c_long
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value


def checked(result: int, what: str) -> int:
    """Return a call's result, or raise the OSError its errno names."""
    if result >= 0:
        return result
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def syscall(number: int, what: str, *arguments: int | ctypes.c_void_p) -> int:
    """Make a system call that the standard library has no name for.

    Integers are passed as 64 bit words. Raises OSError with the call's errno, named `what`.
    """
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *words), what)


def map_shared(fd: int, length: int, offset: int = 0, *, writable: bool = True) -> int:
    """Map `length` bytes of a file shared, for reading and perhaps writing; returns the address."""
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    address = LIBC.mmap(None, length, protection, MAP_SHARED, fd, offset)
    if address is None or address == _MAP_FAILED:
        checked(-1, "mmap")
    return int(address)


def unmap(address: int, length: int) -> None:
    """Remove a mapping made by `map_shared`."""
    checked(LIBC.munmap(address, length), "munmap")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 16 << 20


def keep_freed_memory() -> None:
    """Have freed memory reused: up to 16 MiB of it stay with this process.

    A buffer of a few megabytes that is taken and given back again and again otherwise comes from the kernel each time,
    and each of its pages costs a fault: more than what is done with the bytes. Where the C library is not glibc
    nothing changes.

    Source: mallopt(3).
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        LIBC.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
