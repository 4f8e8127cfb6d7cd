"""A full memory barrier from pure Python.

x86 keeps stores in order and loads in order, but a load may pass an earlier store to another address. The
doorbell protocol (store the ring index, then load the server's sleep flag) breaks under exactly that. Taking
an uncontended lock executes a locked compare-and-exchange, which drains the store buffer. The lock is private
to each thread, so that it is never contended.
"""

from __future__ import annotations

import threading


class _Barrier(threading.local):
    def __init__(self) -> None:
        self.lock = threading.Lock()


_barrier = _Barrier()


def fence() -> None:
    """Make every earlier store of this thread visible before any later load."""
    with _barrier.lock:
        pass
