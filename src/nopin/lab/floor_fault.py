"""The floors of page faults: the barest userfaultfd loop in another process, and reading a file into place."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.touch import scattered_pages, store_rate, touch_each
from nopin.linux import memfd
from nopin.linux.arena_file import punch
from nopin.linux.bare_pager import answer_with_copies, open_bare
from nopin.units import PAGE_BYTES

_FAULTS_AT_ONCE = 100
READ_BYTES = 2 << 20
"""In one call: what the pager reads at once, and where a copy costs least a byte."""


class BareLoop:
    """Shared memory whose faults the barest loop answers, `batch_pages` at a time."""

    def __init__(self, n_pages: int, batch_pages: int) -> None:
        assert n_pages % batch_pages == 0
        self._n_pages = n_pages
        self._fd = memfd.create("nopin-bare", n_pages * PAGE_BYTES)
        self.memory = memfd.map_array(self._fd)
        self._uffd = open_bare(self.memory.ctypes.data, self.memory.nbytes)
        self._loop = Child(_answer, self._uffd, batch_pages, pass_fds=(self._uffd,))
        self._loop.line.receive(30)

    def empty(self) -> None:
        """Take all pages out again."""
        punch(self._fd, 0, self.memory.nbytes)

    def close(self) -> None:
        """End the loop; nobody may touch a hole any more."""
        self._loop.kill()
        os.close(self._uffd)
        os.close(self._fd)


def _answer(line: Line[Any], uffd: int, batch_pages: int) -> None:
    line.send("ready")
    answer_with_copies(uffd, batch_pages)


class OneFaultFloor:
    """How long a store to one missing page takes with the barest loop, in `Floor` form."""

    name, unit = "bare_uffdio_copy", "ns"

    def __init__(self, n_pages: int) -> None:
        self._loop = BareLoop(n_pages, 1)
        self._n_pages = n_pages
        self._seeds: Iterator[int] = count()

    def measure(self, seconds: float) -> float:
        """Touch scattered pages for that long; return the median in nanoseconds."""
        self._loop.empty()
        pages = scattered_pages(self._n_pages, self._n_pages, next(self._seeds))
        samples: list[int] = []
        end = time.perf_counter() + seconds
        while pages and time.perf_counter() < end:
            samples += touch_each(self._loop.memory, pages[:_FAULTS_AT_ONCE])
            del pages[:_FAULTS_AT_ONCE]
        return median(samples)

    def close(self) -> None:
        """End the loop."""
        self._loop.close()


class FirstTouchFloor:
    """How fast memory is touched in order with the barest loop at one batch size, in `Floor` form."""

    unit = "bytes_per_s"

    def __init__(self, n_pages: int, batch_pages: int) -> None:
        self.name = f"bare_uffdio_copy_{batch_pages}_pages"
        self._loop = BareLoop(n_pages, batch_pages)

    def measure(self, seconds: float) -> float:
        """Touch all of it, again and again for about that long; return bytes a second."""
        rates: list[float] = []
        end = time.perf_counter() + seconds
        while not rates or time.perf_counter() < end:
            self._loop.empty()
            rates.append(store_rate(self._loop.memory))
        return median(rates)

    def close(self) -> None:
        """End the loop."""
        self._loop.close()


class ReadIntoPlaceFloor:
    """How fast pread brings a cached file into memory that has no frames yet, as a pager must, in `Floor` form."""

    name, unit = "pread_into_place", "bytes_per_s"

    def __init__(self, length: int, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by `close`
        self._file.write(np.random.default_rng(1).bytes(length))
        self._file.flush()
        self._fd = memfd.create("nopin-place", length)
        self._place = memfd.map_array(self._fd)

    def measure(self, seconds: float) -> float:
        """Read all of it, again and again for about that long; return bytes a second."""
        rates: list[float] = []
        end = time.perf_counter() + seconds
        while not rates or time.perf_counter() < end:
            punch(self._fd, 0, self._place.nbytes)
            rates.append(self._read_rate())
        return median(rates)

    def read_each(self, pages: Sequence[int]) -> list[int]:
        """Read single pages into place, which has frames once it was measured; return nanoseconds for each."""
        place, file, clock = self._place.data, self._file.fileno(), time.perf_counter_ns
        samples = []
        for offset in [page * PAGE_BYTES for page in pages]:
            before = clock()
            os.preadv(file, [place[offset : offset + PAGE_BYTES]], offset)
            samples.append(clock() - before)
        return samples

    def _read_rate(self) -> float:
        place, file = self._place.data, self._file.fileno()
        before = time.perf_counter()
        for offset in range(0, len(place), READ_BYTES):
            os.preadv(file, [place[offset : offset + READ_BYTES]], offset)
        return len(place) / (time.perf_counter() - before)

    def close(self) -> None:
        """Let go of the file and the memory."""
        self._file.close()
        os.close(self._fd)
