"""Touching memory and looking at the clock: how page faults are measured from where they happen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from nopin.units import PAGE_BYTES


@contextmanager
def one_cpu() -> Iterator[None]:
    """Run on one CPU inside, this thread and whatever it starts: where a fault costs least, and always the same."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def scattered_pages(n_pages: int, n: int, seed: int, *, apart: int = 2) -> list[int]:
    """Choose up to `n` pages in random order, no two of them closer than `apart`, so that none comes with another."""
    chosen = np.random.default_rng(seed).permutation(n_pages // apart)[:n] * apart
    return [int(page) for page in chosen]


def touch_each(memory: NDArray[np.uint8], pages: Sequence[int]) -> list[int]:
    """Store one byte in each page; return how long each store took, in nanoseconds."""
    place, clock = memory.data, time.perf_counter_ns
    samples = []
    for offset in [page * PAGE_BYTES for page in pages]:
        before = clock()
        place[offset] = 1
        samples.append(clock() - before)
    return samples


def store_rate(memory: NDArray[np.uint8]) -> float:
    """Store one byte in every page, in order; return bytes of pages a second."""
    before = time.perf_counter()
    memory[::PAGE_BYTES] = 1
    return memory.nbytes / (time.perf_counter() - before)


def load_rate(memory: NDArray[np.uint8]) -> float:
    """Load one byte of every page, in order; return bytes of pages a second."""
    before = time.perf_counter()
    np.bitwise_or.reduce(memory[::PAGE_BYTES])
    return memory.nbytes / (time.perf_counter() - before)
