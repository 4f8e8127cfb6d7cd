"""Readahead: how many pages a fault brings, by what the faults before it were.

Each fault leaves an expectation: where the next one will be if this is a stream. A fault that was expected confirms its
stream, whose window doubles, up to a limit; the next expectation lies behind the window, because what lies inside will
be there. A fault nobody expected begins two streams: to the next page, and with the stride from the fault before it.

CPU and device faults are told apart by who faults: several streams of several programs do not disturb one another, and
a random access pattern brings single pages.
"""

from __future__ import annotations

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


class Ahead(NamedTuple):
    """What to bring: `n` pages, `stride` pages apart, the first of them the one that faulted."""

    n: int
    stride: int


_JUST_THIS = Ahead(1, 1)


class Readahead:
    """Expectations of one arena."""

    def __init__(self) -> None:
        self._expected: dict[tuple[Hashable, int], Ahead] = {}
        self._last: dict[Hashable, int] = {}
        self.n_hits = 0
        self.n_misses = 0

    def advise(self, who: Hashable, page: int) -> Ahead:
        """Tell what to bring for a fault of `who` at `page`, and expect the next."""
        found = self._expected.pop((who, page), None)
        if found is not None:
            self.n_hits += 1
            most = WINDOW_MAX if found.stride == 1 else STRIDE_WINDOW_MAX
            ahead = Ahead(min(most, max(WINDOW_FIRST, found.n * 2)), found.stride)
            self._expect(who, page + ahead.n * ahead.stride, ahead)
            self._last[who] = page
            return ahead
        self.n_misses += 1
        stride = page - self._last.get(who, page)
        if 1 < abs(stride) <= STRIDE_MAX:
            self._expect(who, page + stride, Ahead(1, stride))
        self._expect(who, page + 1, _JUST_THIS)
        self._last[who] = page
        return _JUST_THIS

    def brought(self, who: Hashable, page: int, asked: Ahead, n: int) -> None:
        """Say that only `n` pages could be brought: the next fault of the stream comes earlier."""
        if n < asked.n and self._expected.pop((who, page + asked.n * asked.stride), None) is not None:
            self._expect(who, page + n * asked.stride, asked)

    def forget(self, who: Hashable) -> None:
        """Who faulted is gone."""
        self._last.pop(who, None)

    def _expect(self, who: Hashable, page: int, ahead: Ahead) -> None:
        if len(self._expected) >= STREAMS_MAX:
            del self._expected[next(iter(self._expected))]
        self._expected[who, page] = ahead
