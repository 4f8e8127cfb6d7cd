"""An arena and a pager in the test process itself, so that workers can be tested without a device server."""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.accel.process import Arena
from nopin.linux import memfd
from nopin.linux.arena_file import map_at
from nopin.linux.libc import unmap
from nopin.linux.paging_uffd import FAULT_MINOR, PagingUffd
from nopin.linux.uffd_handshake import EventKind
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, page_floor
from nopin.verbs.accelerator import Accelerator
from nopin.verbs.objects import DeviceObject

_places = itertools.count(0x2200_0000_0000, 1 << 40)


class PlainArena:
    """A memfd mapped in this process, without a userfaultfd: our own touches fault in the kernel."""

    def __init__(self, length: int) -> None:
        start = next(_places)
        self.handle = start >> 40
        self.where = Range.of_length(start, length)
        self.server = Path("nobody forks here")
        self.memory_fd = memfd.create("test-arena", length)
        map_at(self.memory_fd, self.where)
        self.bytes: NDArray[np.uint8] = np.frombuffer(
            memoryview((ctypes.c_uint8 * length).from_address(start)), np.uint8
        )

    def array(self, offset: int, shape: Any, dtype: Any) -> NDArray[Any]:
        found: NDArray[Any] = np.ndarray(shape, dtype, self.bytes.data, offset)
        return found

    def close(self) -> None:
        os.close(self.memory_fd)
        unmap(self.where.start, self.where.length)


class Pager:
    """Resolves faults of workers until closed; counts them, can be held, and can say that all pages are lost."""

    def __init__(self) -> None:
        self.faults: list[int] = []
        self.introduced = 0
        self.held = threading.Event()
        self.held.set()
        self.all_lost = False
        self._uffds: dict[int, PagingUffd] = {}
        self._poll = select.epoll()
        self._wake = os.eventfd(0)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def introduce(self, arena: Arena, uffd: int, features: int, pidfd: int) -> None:
        assert features
        assert select.select([pidfd], [], [], 0)[0] == []
        self.introduced += 1
        ours = PagingUffd(os.dup(uffd))
        self._uffds[ours.fileno()] = ours
        self._poll.register(ours, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    return
                for kind, flags, address, _ in self._uffds[fd].read():
                    if kind == EventKind.PAGEFAULT:
                        self._resolve(self._uffds[fd], page_floor(address), minor=bool(flags & FAULT_MINOR))

    def _resolve(self, uffd: PagingUffd, page: int, *, minor: bool) -> None:
        self.faults.append(page)
        self.held.wait()
        if self.all_lost:
            uffd.poison(page, PAGE_BYTES)
        elif minor:
            uffd.map_in(page, PAGE_BYTES, protect=False)
        else:
            uffd.zero(page, PAGE_BYTES)

    def close(self) -> None:
        self.held.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for uffd in self._uffds.values():
            uffd.close()
        os.close(self._wake)
        self._poll.close()


class Bench:
    """An accelerator over one plain arena, or more."""

    def __init__(self, workers: int, depth: int) -> None:
        self.arenas = [PlainArena(64 << 20)]
        self.pager = Pager()
        self.accelerator = Accelerator(
            DeviceObject(), lambda: self.arenas, self.pager.introduce, workers=workers, depth=depth
        )

    def array(self, offset: int, shape: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return self.arenas[0].array(offset, shape, dtype)

    def launch(self, *args: Any, **named: Any) -> Any:
        return self.accelerator.launch(*args, **named)

    @contextmanager
    def dropped_accelerator(self) -> Iterator[Callable[[], bool]]:
        """Let go of the accelerator inside, as a user who keeps only its jobs; tells whether it has gone."""
        gone = weakref.ref(self.accelerator)
        lanes, queue = self.accelerator._lanes, self.accelerator._queue
        del self.accelerator
        try:
            yield lambda: gone() is None
        finally:
            queue.close()
            for lane in lanes:
                lane.close()
            self.accelerator = Accelerator(DeviceObject(), list, self.pager.introduce)


@contextmanager
def bench(workers: int = 1, depth: int = 256) -> Iterator[Bench]:
    """Workers with all they need, ended afterwards."""
    made = Bench(workers, depth)
    try:
        yield made
    finally:
        made.accelerator.close()
        made.pager.close()
        for arena in made.arenas:
            arena.close()
