"""What a device knows of where pages are: the frame numbers that its last fills found, right or stale.

A mirror says which pages may be accessed; its entries hold no frame, because frames of an arena lie in page order. In
a modelled process they do not, so the device keeps the other half of the table here, and reaches frames by it and by
nothing else. Nothing is ever taken out: an entry is as good as the mirror's word for it, and a device that accesses a
page without that word uses what is left there, as broken hardware would.
"""

from __future__ import annotations

from nopin.model.host.frames import Frames
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

Piece = tuple[int, int, int, int, int]
"""The part of an access that lies in one page: (va, frame, first byte in it, offset in the access, length in bytes).

A plain tuple, which is made in half the time: there is one in every access of a device.
"""


class Translations:
    """Frame by page number; see above."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self._frame_of: dict[int, int] = {}
        self.frame = self._frame_of.__getitem__

    def __len__(self) -> int:
        return len(self._frame_of)

    def capture(self, page: int, frame: int) -> None:
        """A fill found a page there."""
        self._frame_of[page] = frame

    def pieces(self, va: int, length: int, offset: int = 0) -> list[Piece]:
        """Cut bytes [va + offset, va + length) by page, and translate each. Requires: every page was captured once."""
        found: list[Piece] = []
        while offset < length:
            start = va + offset
            at = start & PAGE_MASK
            n = length - offset
            if n > PAGE_BYTES - at:
                n = PAGE_BYTES - at
            found.append((start, self._frame_of[start >> PAGE_SHIFT], at, offset, n))
            offset += n
        return found
