"""Frames: a host's memory, page by page, with bytes in it.

A frame is free, or in use with a count of references: one for each page table entry, one for the swap cache, one for
the file cache, one for each pin, one for whoever is in the middle of something with it. At zero it is free *at once*:
its bytes are poisoned, and it is handed out next, so that a translation that should be gone meets somebody else's bytes
as soon as possible.

Memory of devices has numbers of the same kind, above the host's own: a translation is a frame number, wherever it is.

Memory of the model grows with the frames that were ever written, not with `n_frames`: a frame without bytes of its own
reads as zeros while it is in use and as poison while it is free.
"""

from __future__ import annotations

from nopin.model.host.pool import RUN_FRAMES, Pool
from nopin.units import PAGE_BYTES

POISON = 0xDB
"""What free frames hold."""

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
        n_frames: of the host's own memory, numbered from 0.
        observer: who is told.
    """

    def __init__(self, n_frames: int, observer: FrameObserver | None = None) -> None:
        self.n_frames = n_frames
        self._observer = observer or FrameObserver()
        self._own = Pool(0, n_frames)
        self._devices: list[Pool] = []  # in order of numbers
        self._n_references: dict[int, int] = {}
        self._bytes: dict[int, bytearray] = {}

    @property
    def n_free(self) -> int:
        """Free frames of the host's own memory."""
        return self._own.n_free

    # Taking and giving back

    def allocate(self) -> int | None:
        """Take the frame that was freed last, zeroed, with one reference; None when there is none."""
        frame = self._own.take()
        return None if frame is None else self._begin_use(frame)

    def allocate_run(self) -> int | None:
        """Take the lowest free 512 frames at a multiple of 512, zeroed; returns the first, or None."""
        start = self._own.take_run()
        if start is not None:
            for frame in range(start, start + RUN_FRAMES):
                self._begin_use(frame)
        return start

    def add_device(self, n_frames: int) -> Pool:
        """Add memory of a device, numbered above all there is."""
        end = self._devices[-1].end if self._devices else self.n_frames
        self._devices.append(Pool(end, n_frames))
        return self._devices[-1]

    def allocate_from(self, pool: Pool) -> int | None:
        """Take a frame of a device's memory, like `allocate`."""
        frame = pool.take()
        return None if frame is None else self._begin_use(frame)

    def get(self, frame: int) -> None:
        """Add a reference. Requires: the frame is in use."""
        assert frame in self._n_references, f"a reference to frame {frame}, which is free"
        self._n_references[frame] += 1

    def put(self, frame: int) -> int:
        """Give a reference back; with the last one the frame is free. Returns how many are left."""
        n_left = self._n_references[frame] - 1
        if n_left:
            self._n_references[frame] = n_left
            return n_left
        del self._n_references[frame]
        self._bytes.pop(frame, None)
        pool = self._own if frame < self.n_frames else next(pool for pool in self._devices if frame in pool)
        pool.give(frame)
        self._observer.freed(frame)
        return 0

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

    def _begin_use(self, frame: int) -> int:
        self._bytes.pop(frame, None)
        self._n_references[frame] = 1
        self._observer.allocated(frame)
        return frame

    def pools(self) -> list[Pool]:
        """Return the host's own frames, and those of each device."""
        return [self._own, *self._devices]

    # Bytes

    def has_bytes(self, frame: int) -> bool:
        """Tell whether a frame was written since it was last taken or given back."""
        return frame in self._bytes

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
