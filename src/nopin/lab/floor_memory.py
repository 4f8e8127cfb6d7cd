"""The memory floors: a copy within one process, and process_vm_readv from another one."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.linux.process_vm import ProcessVm


def ordinary_memory(length_bytes: int) -> NDArray[np.uint8]:
    """Allocate memory as any program does, every page touched; targets of floors and benchmarks alike."""
    return np.full(length_bytes, 0x5A, np.uint8)


class MemcpyFloor:
    """Rate of numpy's copy between two buffers of the size, in `Floor` form."""

    unit = "bytes_per_s"

    def __init__(self, length_bytes: int) -> None:
        self.name = f"memcpy_{length_bytes}"
        self._source = ordinary_memory(length_bytes)
        self._place = ordinary_memory(length_bytes)

    def measure(self, seconds: float) -> float:
        """Copy for that long; return bytes per second."""
        n_copies = 0
        start = time.perf_counter()
        end = start + seconds
        while (now := time.perf_counter()) < end:
            for _ in range(8):
                np.copyto(self._place, self._source)
            n_copies += 8
        return n_copies * self._source.nbytes / (now - start)

    def close(self) -> None:
        """Nothing to let go of beyond memory."""


class ProcessVmFloor:
    """Rate of process_vm_readv of one size from another process's ordinary memory, in `Floor` form."""

    unit = "bytes_per_s"

    def __init__(self, length_bytes: int) -> None:
        self.name = f"process_vm_readv_{length_bytes}"
        self._place = ordinary_memory(length_bytes)
        self._place_address: int = self._place.ctypes.data
        self._target = Child(_hold_memory, length_bytes)
        self._process = ProcessVm(self._target.pid)
        self._address: int = self._target.line.receive(30)

    def measure(self, seconds: float) -> float:
        """Read the other process's buffer for that long; return bytes per second."""
        read, address, place, length = (
            self._process.read,
            self._address,
            self._place_address,
            self._place.nbytes,
        )
        n_bytes = 0
        start = time.perf_counter()
        end = start + seconds
        while (now := time.perf_counter()) < end:
            for _ in range(8):
                n_bytes += read(address, length, place)
        return n_bytes / (now - start)

    def close(self) -> None:
        """End the other process."""
        self._target.close()


def _hold_memory(line: Line[Any], length_bytes: int) -> None:
    """Hold a buffer, tell its address, wait for the end."""
    memory = ordinary_memory(length_bytes)
    line.send(memory.ctypes.data)
    line.receive()
