"""The server's end of one copier process: start it, work in step with it, end it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nopin.linux import memfd
from nopin.linux.fence import fence
from nopin.linux.libc import FAST_LIBC
from nopin.linux.process_memory import ProcessMemory
from nopin.server import copier_process as layout
from nopin.units import MS_NS

STALL_NS = MS_NS
"""How long to wait for a chunk, which takes some 30 us. Others may have the CPUs, or a page be slow."""

FINISH_NS = 10 * MS_NS
"""How long to wait for the end of a job that is cancelled: a few turns of other processes on the copier's CPU."""

_LOOKS_PER_YIELD = 1024
"""Some 50 us: whoever lets others have the CPU may not have it back when its turn comes."""

_current_cpu: Callable[[], int] = FAST_LIBC.sched_getcpu
_COMMAND = (sys.executable, "-I", "-S", layout.__file__)  # isolated, without site: it needs no package


Memories = tuple[ProcessMemory, ProcessMemory]
"""Of the processes that bytes are copied from and to."""


class Chunk(NamedTuple):
    """A part of a copy.

    Attributes:
        start: where it waits in a buffer that begins a page.
        ends_copy: it is the last of its copy.
    """

    source_address: int
    target_address: int
    length: int
    start: int
    ends_copy: bool


class CopierChild:
    """One copier process, owned. One thread at a time.

    Raises:
        OSError: the host has no memory, descriptors or processes to spare.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as on_failure:
            control_fd = memfd.create("nopin-copier", layout.CONTROL_BYTES)
            on_failure.callback(os.close, control_fd)
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
            on_failure.callback(os.close, self._wake_fd)
            self._page = memfd.map_array(control_fd).data
            self._words = self._page.cast("Q")
            fds = (control_fd, self._wake_fd)
            self._process = subprocess.Popen(
                [*_COMMAND, str(os.getpid()), *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            on_failure.pop_all()
        os.close(control_fd)
        self._job = 0

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def ready(self) -> bool:
        """True once it has come up."""
        return self._words[layout.READY] == 1

    @property
    def asleep(self) -> bool:
        """True when the next job has to wake it up first, which takes some 50 us."""
        return self._words[layout.ASLEEP] == 1

    def begin(self, memories: Memories, chunks: Sequence[Chunk]) -> None:
        """Let it copy these, each when it is told that what comes before is written.

        Requires: it is ready, the job before has finished, and there are at most N_CHUNKS_MAX.
        """
        words = self._words
        words[layout.CPU] = _current_cpu()
        words[layout.SOURCE_PID], words[layout.TARGET_PID] = memories[0].pid, memories[1].pid
        words[layout.N_CHUNKS] = len(chunks)
        at = layout.CHUNKS
        for source_address, target_address, length, start, _ in chunks:
            words[at], words[at + 1], words[at + 2], words[at + 3] = source_address, target_address, length, start
            at += layout.WORDS_PER_CHUNK
        words[layout.WRITTEN] = words[layout.DONE] = 0
        self._job += 1
        words[layout.JOB] = self._job
        fence()
        if self.asleep:
            os.eventfd_write(self._wake_fd, 1)

    def pass_on(self, n_written: int) -> None:
        """Say that so many chunks are written, ours and its own, and the next is its."""
        self._words[layout.WRITTEN] = n_written

    def await_written(self, n_written: int) -> bool:
        """Wait until so many chunks are written, the last by it; False when it does not, or not soon."""
        words = self._words
        patience = _Patience(STALL_NS)
        while True:
            for _ in range(_LOOKS_PER_YIELD):
                if words[layout.DONE] >= n_written:
                    return True
            if words[layout.FINISHED] == self._job:
                return words[layout.DONE] >= n_written
            if patience.lost():
                return False

    def cancel(self) -> None:
        """Let it begin no further chunk of this job."""
        self._words[layout.CANCELLED] = self._job

    def finished(self) -> bool:
        """Wait until it has ended the job: from then on it touches nobody's memory. False: it does not say so."""
        patience = _Patience(FINISH_NS)
        while self._words[layout.FINISHED] != self._job:
            if patience.lost() or self._process.poll() is not None:
                return False
        return True

    def kill(self) -> None:
        """End the process, whatever it does: when this returns it touches nobody's memory. Twice is fine.

        This waits as long as its last system call takes to notice, which is when we would be stuck in it ourselves.
        """
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._process.kill()
        self._process.wait()


class _Patience:
    """Waiting for the copier while our CPU, which may be the one it waits for, is on offer."""

    def __init__(self, limit_ns: int) -> None:
        self._limit_ns = limit_ns
        self._ends = 0

    def lost(self) -> bool:
        """Offer the CPU; True when the limit has passed since the first time."""
        os.sched_yield()
        now = time.monotonic_ns()
        if not self._ends:
            self._ends = now + self._limit_ns
        return now >= self._ends
