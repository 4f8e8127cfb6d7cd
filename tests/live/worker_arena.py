"""An arena and a pager in the test process itself, so that workers can be tested without a device server."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import select
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.accel.process import Arena
from nopin.linux import memfd
from nopin.linux.libc import LIBC, MAP_SHARED, PROT_READ, PROT_WRITE, unmap
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, page_floor
from nopin.verbs.accelerator import Accelerator
from nopin.verbs.objects import DeviceObject

_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000
_COPY, _CONTINUE, _ZEROPAGE = 0xC028AA03, 0xC020AA07, 0xC020AA04
_MINOR = 4


_places = itertools.count(0x2200_0000_0000, 1 << 40)


class PlainArena:
    """A memfd mapped in this process, without a userfaultfd: our own touches fault in the kernel."""

    def __init__(self, length: int) -> None:
        start = next(_places)
        self.handle = start >> 40
        self.where = Range.of_length(start, length)
        self.memory_fd = memfd.create("test-arena", length)
        flags = MAP_SHARED | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
        assert LIBC.mmap(start, length, PROT_READ | PROT_WRITE, flags, self.memory_fd, 0) == start
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
    """Resolves faults of workers until closed; counts them, and can be held."""

    def __init__(self) -> None:
        self.faults: list[int] = []
        self.introduced = 0
        self.held = threading.Event()
        self.held.set()
        self._fds: set[int] = set()
        self._poll = select.epoll()
        self._wake = os.eventfd(0)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def introduce(self, arena: Arena, uffd: int, features: int, pidfd: int) -> None:
        assert features
        assert select.select([pidfd], [], [], 0)[0] == []
        self.introduced += 1
        ours = os.dup(uffd)
        self._fds.add(ours)
        self._poll.register(ours, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    return
                self._resolve(fd)

    def _resolve(self, fd: int) -> None:
        try:
            message = os.read(fd, 32)
        except BlockingIOError:
            return
        if message[0] != 0x12:
            return
        flags, address = struct.unpack_from("<2Q", message, 8)
        self.faults.append(address)
        self.held.wait()
        page = page_floor(address)
        request = _CONTINUE if flags & _MINOR else _ZEROPAGE
        try:
            fcntl.ioctl(fd, request, bytearray(struct.pack("<3Qq", page, PAGE_BYTES, 0, 0)))
        except (FileExistsError, ProcessLookupError):
            return

    def close(self) -> None:
        self.held.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for fd in self._fds | {self._wake}:
            os.close(fd)
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
