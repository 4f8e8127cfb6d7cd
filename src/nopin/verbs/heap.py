"""The memory of one arena as malloc and free see it: addresses, zeroing, threads, and finalisers.

`free` may be called anywhere: from a finaliser that runs inside the allocator, or inside a request to the server. So
it only notes what was freed, and does the rest if nothing else is under way; else whoever comes next does. What is
freed is kept for reuse up to a bound; beyond, the server is told that the bytes are not wanted, a whole batch at once.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable

from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT, page_ceil, page_floor
from nopin.verbs.allocator import Allocator

ZERO_BY_HAND_BYTES = 1 << 18
"""From this length on, discarding used pages is cheaper than storing zeros in them, which brings them back first."""


class Heap:
    """Blocks of memory in an arena. Any thread may use it.

    Args:
        where: addresses of the arena, whole pages.
        discard: makes [offset, offset + length) of the arena read as zeros; False if that is impossible now.
        keep_bytes: freed memory that is kept as it is for reuse.

    Attributes:
        on_empty: called when the last block has been freed.
        sealed: nothing is given out or taken back any more: the process was forked from the arena's owner.
    """

    def __init__(self, where: Range, discard: Callable[[int, int], bool], *, keep_bytes: int) -> None:
        self.where = where
        self.on_empty: Callable[[], None] = _nothing
        self.sealed = False
        self._allocator = Allocator(where.length >> PAGE_SHIFT)
        self._discard = discard
        self._keep_pages = keep_bytes >> PAGE_SHIFT
        self._lock = threading.Lock()
        self._holder = 0
        self._freed: deque[int] = deque()

    @property
    def n_blocks(self) -> int:
        """Blocks that are given out."""
        self._settle()
        return self._allocator.n_blocks

    @property
    def usable(self) -> bool:
        """False in a child after fork, and for a finaliser that interrupted the allocator itself."""
        return not self.sealed and self._holder != threading.get_ident()

    def owns(self, address: int) -> bool:
        """Tell whether an address is in the arena."""
        return self.where.start <= address < self.where.end

    def allocate(self, length: int, *, zero: bool) -> int | None:
        """Return the address of `length` bytes, all zero if that is asked for; None if there is no room.

        Requires: it is usable.
        """
        assert self.usable
        with self._lock:
            self._holder = threading.get_ident()
            try:
                return self._allocate_locked(length, zero=zero)
            finally:
                self._holder = 0

    def reallocate(self, address: int, length: int) -> int | None:
        """Make a block longer or shorter; it may move. Returns its address; None, and nothing changed, without room."""
        offset = address - self.where.start
        with_room = self._allocator.length_of(offset)
        if with_room // 2 <= length <= with_room:
            return address
        moved = self.allocate(length, zero=False) if self.usable else None
        if moved is not None:
            ctypes.memmove(moved, address, min(length, with_room))
            self.free(address)
        return moved

    def free(self, address: int) -> None:
        """Take a block back; never waits for another thread, and may be called anywhere."""
        if self.sealed:
            return
        self._freed.append(address - self.where.start)
        self._settle()

    def _settle(self) -> None:
        """Do what `free` left, unless somebody is at it; whoever is does it then."""
        emptied = False
        while self._freed and not self.sealed and self._lock.acquire(blocking=False):
            self._holder = threading.get_ident()
            try:
                self._take_back_locked()
                emptied = self._allocator.n_blocks == 0
                if self._allocator.n_used_free > self._keep_pages:
                    self._discard_used_locked()
            finally:
                self._holder = 0
                self._lock.release()
        if emptied:
            self.on_empty()

    def discard_freed(self) -> None:
        """Have the server forget what has been freed."""
        with self._lock:
            self._holder = threading.get_ident()
            try:
                self._take_back_locked()
                self._discard_used_locked()
            finally:
                self._holder = 0

    def _allocate_locked(self, length: int, *, zero: bool) -> int | None:
        self._take_back_locked()
        block = self._allocator.allocate(length, zero=zero)
        if block is None and self._allocator.n_used_free:
            self._discard_used_locked()  # runs of both kinds become one
            block = self._allocator.allocate(length, zero=zero)
        if block is None:
            return None
        if zero and not block.zero:
            self._make_zero(block.offset, length)
        return self.where.start + block.offset

    def _make_zero(self, offset: int, length: int) -> None:
        begin, end = page_ceil(offset), page_floor(offset + length)
        if end - begin >= ZERO_BY_HAND_BYTES and self._discard(begin, end - begin):
            ctypes.memset(self.where.start + offset, 0, begin - offset)
            ctypes.memset(self.where.start + end, 0, offset + length - end)
        else:
            ctypes.memset(self.where.start + offset, 0, length)

    def _take_back_locked(self) -> None:
        for _ in range(len(self._freed)):
            self._allocator.free(self._freed.popleft())

    def _discard_used_locked(self) -> None:
        for run in self._allocator.take_used():
            if self._discard(run.first * PAGE_BYTES, run.n * PAGE_BYTES):
                self._allocator.discarded(run)
            else:
                self._allocator.kept(run)


def _nothing() -> None:
    pass
