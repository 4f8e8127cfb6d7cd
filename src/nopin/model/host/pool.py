"""A pool of frames: which numbers of a range are free, handed out singly or 512 in a row.

The frame given back last is handed out next, and those that never were used in order of their numbers. So which one
comes next depends on the order of events and on no number: two runs that differ only in which frame has what are the
same run to the end (`model/explore/digest.py` relies on it). Only rows of 512 go by numbers.
"""

from __future__ import annotations

from collections import Counter

RUN_FRAMES = 512
"""Frames of a huge page of 2 MiB, which lie at a multiple of this."""


class Frame(int):
    """The number of a frame that was handed out singly: a name, in which nothing lies but that it is not another."""

    __slots__ = ()


class Pool:
    """Frames [first, first + n).

    Costs what was ever taken out: frames above the highest that was are not kept one by one. Most frames go
    singly, so what only a row of 512 needs to know is found out when one is asked for.

    Attributes:
        first, end: its frames are [first, end). n_free: left.
    """

    __slots__ = ("_given_back", "_never_used", "end", "first", "n_free")

    def __init__(self, first: int, n: int) -> None:
        self.first = first
        self.n_free = n
        self.end = first + n
        self._never_used = first  # the lowest frame that never was
        self._given_back: list[int] = []  # in this order

    def __contains__(self, frame: int) -> bool:
        return self.first <= frame < self.end

    def take(self) -> int | None:
        """Take the free frame that came back last; if none ever did, the lowest."""
        if self._given_back:
            self.n_free -= 1
            return self._given_back.pop()
        if self._never_used == self.end:
            return None
        self._never_used += 1
        self.n_free -= 1
        return Frame(self._never_used - 1)

    def take_run(self) -> int | None:
        """Take the lowest free 512 frames at a multiple of 512; returns the first."""
        n_free_in_run = Counter(frame // RUN_FRAMES for frame in self._given_back)
        whole = [run for run, n_free in n_free_in_run.items() if n_free == RUN_FRAMES]
        if whole:
            lowest = min(whole)
            start = lowest * RUN_FRAMES
            left = [frame for frame in self._given_back if frame // RUN_FRAMES != lowest]
        else:
            start = -(-self._never_used // RUN_FRAMES) * RUN_FRAMES
            if start + RUN_FRAMES > self.end:
                return None
            left = [*map(Frame, range(start - 1, self._never_used - 1, -1)), *self._given_back]
            self._never_used = start + RUN_FRAMES
        self._given_back = left
        self.n_free -= RUN_FRAMES
        return start

    def give(self, frame: int) -> None:
        """Give a frame back."""
        self._given_back.append(frame)
        self.n_free += 1

    def free_frames(self) -> tuple[list[int], int]:
        """Return those that came back, in the order in which they are handed out, and how many never were."""
        return self._given_back[::-1], self.end - self._never_used
