"""READs of single pages of managed memory, timed: by a device that has them mapped, and by one that has not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.units import PAGE_BYTES
from nopin.verbs.attach import attach
from nopin.verbs.device import Device


class AddedTimes(NamedTuple):
    """What READs took beyond the median READ of the same pages when they were mapped, one each, in nanoseconds.

    Attributes:
        minor: the pages were in memory, and the device had not mapped them.
        major: the pages were in swap.
    """

    minor: list[float]
    major: list[float]


class PageReader:
    """A peer that reads an array of pages, on the device that shares it: a copy, with no network between.

    Args:
        memory: (n, 4096) in an arena of the device; not used otherwise.
        swap_out: called to have all of it swapped out.
    """

    def __init__(self, device: Device, memory: NDArray[np.uint8], swap_out: Callable[[], None]) -> None:
        self._memory = memory
        self._swap_out = swap_out
        self._share = device.share(memory)
        self._remote = attach(self._share.url, device=device)
        self._place = np.ones(PAGE_BYTES, np.uint8)

    def round(self, pages: Sequence[int]) -> AddedTimes:
        """Read pages three times: unknown to the device, then known, then from swap."""
        self._swap_out()  # which takes them from the device too
        self._memory += 1
        first, known = self._read_each(pages), self._read_each(pages)
        self._swap_out()
        again = self._read_each(pages)
        usual = median(known)
        return AddedTimes([sample - usual for sample in first], [sample - usual for sample in again])

    def _read_each(self, pages: Sequence[int]) -> list[int]:
        read, place, clock = self._remote.read_async, self._place, time.perf_counter_ns
        samples = []
        for page in pages:
            before = clock()
            read(page, out=place).result()
            samples.append(clock() - before)
        return samples

    def close(self) -> None:
        """End the sharing."""
        self._remote.close()
        self._share.close()
