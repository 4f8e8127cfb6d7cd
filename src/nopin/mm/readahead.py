"""Readahead: how many pages a fault brings, by what the faults before it were.

A fault at the page after one of the last few begins a stream, and so does one as far from the last as that was from
the one before. A stream expects its next fault behind the pages it brings, because those will be there; where that
comes true its window doubles, up to a limit. Anything else brings a single page.

CPU and device faults are told apart by who faults, and several streams of one program do not disturb one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

WINDOW_MAX = 512
"""Pages: 2 MiB, the batch at which the cost of a page is lowest."""
WINDOW_FIRST = 4
STRIDE_MAX = 4096
"""Pages. Longer steps are taken for random."""
STRIDE_WINDOW_MAX = 32
"""Pages brought ahead of a stride: each is an operation of its own."""
STREAMS_MAX = 64
"""Of one who faults."""
RECENT = 8
"""Faults of one process that are remembered as possible beginnings of streams."""


class Ahead(NamedTuple):
    """What to bring: `n` pages, `stride` pages apart, the first of them the one that faulted."""

    n: int
    stride: int


JUST_THIS = Ahead(1, 1)
_NEVER = -(1 << 40)
"""No page, and far from all."""


class Streams:
    """Streams of one who faults."""

    __slots__ = ("_expected", "_recent")

    def __init__(self) -> None:
        self._expected: dict[int, Ahead] = {}
        self._recent = deque((_NEVER, _NEVER), maxlen=RECENT)

    def advise(self, page: int) -> Ahead:
        """Tell what to bring for a fault at `page`, and expect the next if it is part of a stream."""
        recent = self._recent
        last = recent[-1]
        stride = page - last
        found = self._expected.pop(page, None) if self._expected else None
        if found is not None:
            most = WINDOW_MAX if found.stride == 1 else STRIDE_WINDOW_MAX
            ahead = Ahead(min(most, found.n * 2), found.stride)
        elif page - 1 in recent:
            ahead = Ahead(WINDOW_FIRST, 1)
        elif last - recent[-2] == stride and 1 < abs(stride) <= STRIDE_MAX:
            ahead = Ahead(WINDOW_FIRST, stride)
        else:
            recent.append(page)
            return JUST_THIS
        recent.append(page)
        self._expect(page + ahead.n * ahead.stride, ahead)
        return ahead

    def brought(self, page: int, asked: Ahead, n: int) -> None:
        """Say that only `n` pages could be brought: the next fault of the stream comes earlier."""
        if n < asked.n and self._expected.pop(page + asked.n * asked.stride, None) is not None:
            self._expect(page + n * asked.stride, asked)

    def _expect(self, page: int, ahead: Ahead) -> None:
        if len(self._expected) >= STREAMS_MAX:
            del self._expected[next(iter(self._expected))]
        self._expected[page] = ahead


class Readahead:
    """Streams of one arena, by who faults."""

    def __init__(self) -> None:
        self._of: dict[Hashable, Streams] = {}

    def of(self, who: Hashable) -> Streams:
        """Return the streams of one process or device."""
        streams = self._of.get(who)
        if streams is None:
            streams = self._of[who] = Streams()
        return streams
