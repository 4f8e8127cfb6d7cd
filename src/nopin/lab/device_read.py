"""READs of single pages of managed memory, timed: by a device that has them mapped, and by one that has not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.lab.bench_end import succeeded
from nopin.nic.abi import SendFlags, WrOpcode
from nopin.units import PAGE_BYTES
from nopin.verbs.device import Device
from nopin.verbs.wr import SendWr, Sge


class AddedTimes(NamedTuple):
    """What READs took beyond the median READ of the same pages when they were mapped, one each, in nanoseconds.

    Attributes:
        minor: the pages were in memory, and the device had not mapped them.
        major: the pages were in swap.
    """

    minor: list[float]
    major: list[float]


class PageReader:
    """A peer that reads an array of pages, on the device that registered it: a copy, with no network between.

    It sleeps while it waits. All is on one CPU, where one that looks for its answer takes the time from who makes it.

    Args:
        memory: (n, 4096) in an arena of the device; not used otherwise.
        swap_out: called to have all of it swapped out.
    """

    def __init__(self, device: Device, memory: NDArray[np.uint8], swap_out: Callable[[], None]) -> None:
        self._memory = memory
        self._swap_out = swap_out
        self._place = np.ones(PAGE_BYTES, np.uint8)
        self._held = ExitStack()
        enter = self._held.enter_context
        domain = enter(device.alloc_pd())
        self._region = enter(domain.register(memory, access="r"))
        place = enter(domain.register(self._place, access="l"))
        self._to = (Sge(place.address, PAGE_BYTES, place.lkey),)
        self._cq = enter(device.create_cq(spin_us=0))
        self._qp, peer = (enter(domain.create_qp(self._cq, self._cq)) for _ in range(2))
        peer.connect(self._qp.endpoint)
        self._qp.connect(peer.endpoint)

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
        post, wait, clock = self._qp.post_send, self._cq.wait, time.perf_counter_ns
        samples = []
        for page in pages:
            address = self._region.address + page * PAGE_BYTES
            request = SendWr(
                WrOpcode.RDMA_READ,
                self._to,
                flags=SendFlags.SIGNALED,
                remote_address=address,
                rkey=self._region.rkey,
            )
            before = clock()
            post(request)
            succeeded(wait())
            samples.append(clock() - before)
        return samples

    def close(self) -> None:
        """Destroy what was made for it."""
        self._held.close()
