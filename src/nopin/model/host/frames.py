"""Frames: a host's memory, page by page, with bytes in it.

A frame is free, or in use with a count of references: one for each page table entry, one for the swap cache, one for
the file cache, one for each pin, one for whoever is in the middle of something with it. At zero it is free *at once*:
its bytes are poisoned, and the lowest free frame is handed out first, so that a translation that should be gone meets
somebody else's bytes as soon as possible.

Memory of the model grows with the frames that were ever written, not with `n_frames`: a frame without bytes of its own
reads as zeros while it is in use and as poison while it is free.
"""

from __future__ import annotations

import heapq

from nopin.units import PAGE_BYTES

POISON = 0xDB
"""What free frames hold."""

RUN_FRAMES = 512
"""Frames of a huge page of 2 MiB, which lie at a multiple of this."""

_POISONED = bytes([POISON]) * PAGE_BYTES


class FrameObserver:
    """Told of every frame taken and given back; what it does not want it does not override."""

    def allocated(self, frame: int) -> None:
        """The frame is in use from here on."""

    def freed(self, frame: int) -> None:
        """The frame is free from here on, and may be reused by the next step."""


class Frames:
    """See above.

    Args:
        n_frames: of the host's own memory.
        observer: who is told.

    Attributes:
        n_free: left.
    """

    def __init__(self, n_frames: int, observer: FrameObserver | None = None) -> None:
        self.n_frames = n_frames
        self.n_free = n_frames
        self._observer = observer or FrameObserver()
        self._never_used = 0  # the lowest frame that never was
        self._freed: list[int] = []  # heap; may hold frames that a run has taken since
        self._free_again: set[int] = set()  # what of the heap is still free; only asked, never iterated
        self._n_free_in_run: dict[int, int] = {}  # of frames that were used before
        self._n_references: dict[int, int] = {}
        self._bytes: dict[int, bytearray] = {}

    # Taking and giving back

    def allocate(self) -> int | None:
        """Take the lowest free frame, zeroed, with one reference; None when there is none."""
        while self._freed:
            frame = heapq.heappop(self._freed)
            if frame in self._free_again:
                self._free_again.discard(frame)
                self._n_free_in_run[frame // RUN_FRAMES] -= 1
                return self._take(frame)
        if self._never_used == self.n_frames:
            return None
        self._never_used += 1
        return self._take(self._never_used - 1)

    def allocate_run(self) -> int | None:
        """Take the lowest free 512 frames at a multiple of 512, zeroed; returns the first, or None."""
        runs = [run for run, n_free in self._n_free_in_run.items() if n_free == RUN_FRAMES]
        if runs:
            start = min(runs) * RUN_FRAMES
            self._free_again.difference_update(range(start, start + RUN_FRAMES))
            self._n_free_in_run[start // RUN_FRAMES] = 0
        else:
            start = -(-self._never_used // RUN_FRAMES) * RUN_FRAMES
            if start + RUN_FRAMES > self.n_frames:
                return None
            for frame in range(self._never_used, start):
                self._make_free(frame)
            self._never_used = start + RUN_FRAMES
        for frame in range(start, start + RUN_FRAMES):
            self._take(frame)
        return start

    def get(self, frame: int) -> None:
        """Add a reference. Requires: the frame is in use."""
        assert frame in self._n_references, f"a reference to frame {frame}, which is free"
        self._n_references[frame] += 1

    def put(self, frame: int) -> None:
        """Give a reference back; with the last one the frame is free."""
        n_left = self._n_references[frame] - 1
        if n_left:
            self._n_references[frame] = n_left
            return
        del self._n_references[frame]
        self._bytes.pop(frame, None)
        self._make_free(frame)
        self.n_free += 1
        self._observer.freed(frame)

    def hand_over(self, source: int, target: int) -> None:
        """Give all references of a frame but one to another that has one. Requires: both are in use."""
        n_moved = self._n_references[source] - 1
        self._n_references[source] = 1
        self._n_references[target] += n_moved

    def n_references(self, frame: int) -> int:
        """Return how many there are; 0: the frame is free."""
        return self._n_references.get(frame, 0)

    def in_use(self) -> list[int]:
        """Return the frames in use, in order."""
        return sorted(self._n_references)

    def _take(self, frame: int) -> int:
        self._bytes.pop(frame, None)
        self._n_references[frame] = 1
        self.n_free -= 1
        self._observer.allocated(frame)
        return frame

    def _make_free(self, frame: int) -> None:
        heapq.heappush(self._freed, frame)
        self._free_again.add(frame)
        run = frame // RUN_FRAMES
        self._n_free_in_run[run] = self._n_free_in_run.get(run, 0) + 1

    # Bytes

    def read(self, frame: int, at: int, length: int) -> bytes:
        """Return bytes of a frame, free or not, within the page."""
        assert 0 <= at <= at + length <= PAGE_BYTES
        held = self._bytes.get(frame)
        if held is not None:
            return bytes(held[at : at + length])
        return bytes(length) if frame in self._n_references else _POISONED[:length]

    def write(self, frame: int, at: int, data: bytes) -> None:
        """Change bytes of a frame, free or not, within the page."""
        assert 0 <= at <= at + len(data) <= PAGE_BYTES
        held = self._bytes.get(frame)
        if held is None:
            held = self._bytes[frame] = bytearray(PAGE_BYTES if frame in self._n_references else _POISONED)
        held[at : at + len(data)] = data

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page. Requires: both are in use."""
        assert source in self._n_references
        assert target in self._n_references
        held = self._bytes.get(source)
        if held is not None:
            self._bytes[target] = bytearray(held)
        else:
            self._bytes.pop(target, None)
