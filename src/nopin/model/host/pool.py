"""A pool of frames: which numbers of a range are free, the lowest handed out first, singly or 512 in a row."""

from __future__ import annotations

import heapq

RUN_FRAMES = 512
"""Frames of a huge page of 2 MiB, which lie at a multiple of this."""


class Pool:
    """Frames [first, first + n).

    Costs what was ever taken out: frames above the highest that was are not kept one by one.

    Attributes:
        first, end: its frames are [first, end). n_free: left.
    """

    __slots__ = ("_free", "_heap", "_n_free_in_run", "_never_used", "end", "first", "n_free")

    def __init__(self, first: int, n: int) -> None:
        self.first = first
        self.n_free = n
        self.end = first + n
        self._never_used = first  # the lowest frame that never was
        self._heap: list[int] = []  # frames that came back; may hold some that a run has taken since
        self._free: set[int] = set()  # what of the heap is still free; only asked, never iterated
        self._n_free_in_run: dict[int, int] = {}  # of frames that were used before

    def __contains__(self, frame: int) -> bool:
        return self.first <= frame < self.end

    def take(self) -> int | None:
        """Take the lowest free frame."""
        while self._heap:
            frame = heapq.heappop(self._heap)
            if frame in self._free:
                self._free.discard(frame)
                self._n_free_in_run[frame // RUN_FRAMES] -= 1
                self.n_free -= 1
                return frame
        if self._never_used == self.end:
            return None
        self._never_used += 1
        self.n_free -= 1
        return self._never_used - 1

    def take_run(self) -> int | None:
        """Take the lowest free 512 frames at a multiple of 512; returns the first."""
        runs = [run for run, n_free in self._n_free_in_run.items() if n_free == RUN_FRAMES]
        if runs:
            start = min(runs) * RUN_FRAMES
            self._free.difference_update(range(start, start + RUN_FRAMES))
            self._n_free_in_run[start // RUN_FRAMES] = 0
        else:
            start = -(-self._never_used // RUN_FRAMES) * RUN_FRAMES
            if start + RUN_FRAMES > self.end:
                return None
            for frame in range(self._never_used, start):
                self._add(frame)
            self._never_used = start + RUN_FRAMES
        self.n_free -= RUN_FRAMES
        return start

    def give(self, frame: int) -> None:
        """Give a frame back."""
        self._add(frame)
        self.n_free += 1

    def _add(self, frame: int) -> None:
        heapq.heappush(self._heap, frame)
        self._free.add(frame)
        run = frame // RUN_FRAMES
        self._n_free_in_run[run] = self._n_free_in_run.get(run, 0) + 1
