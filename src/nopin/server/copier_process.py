"""The copier: a process that copies every second chunk of a long message, in step with the server.

A process and not a thread, because a thread would share the server's interpreter lock, and every handover of it
across CPUs costs more than the help is worth. It copies whole chunks, out of the source and into the target, instead
of half of the work for each: so no data crosses from one CPU's cache to the other's, only the words below.

    server: read 0 | write 0 | read 2  | write 2 | read 4  | ...
    copier: read 1 |  wait   | write 1 | read 3  | write 3 | ...

It runs this file alone, with nothing but the standard library: it starts in 20 ms and stays below 10 MB. What it is
told and what it tells are words of one shared page. At any time at most one job is under way. The server writes a
job's words, then its number; the copier ends it with the number in FINISHED. On x86 stores are seen in their order.

It sleeps by the protocol of the rings: both sides write, fence, and read what the other wrote.

    server: write JOB,        fence, read ASLEEP -> write the eventfd if it sleeps
    copier: write ASLEEP = 1, fence, read JOB    -> work instead of sleeping if there is a new one

The kernel likes to put a process where it was woken from, and two that spin and yield on one CPU can stay there for
long although another is idle. So the server says on which CPU it runs, and the copier keeps off it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

CONTROL_BYTES = 16384
CHUNK_BYTES_MAX = 512 << 10
"""Two buffers of this length fit the second-level cache of any server CPU."""

# Words of the control page, 8 bytes each: those of the server, then those of the copier, some cache lines apart.
JOB, CPU, SOURCE_PID, TARGET_PID, N_CHUNKS = range(5)
WRITTEN, CANCELLED = 16, 17
"""How many chunks are written when it is the copier's turn; the job of which no more is wanted."""
READY, DONE, FINISHED, ASLEEP = range(32, 36)
"""DONE: how many chunks are written when it is the server's turn."""
CHUNKS = 48
WORDS_PER_CHUNK = 4
"""From CHUNKS on, of each chunk: source address, target address, length, place in its buffer."""
N_CHUNKS_MAX = (CONTROL_BYTES // 8 - CHUNKS) // WORDS_PER_CHUNK

_SPIN_NS = 200_000
_LOOKS_PER_YIELD = 16
_LOOKS_AT_WORK_PER_YIELD = 1024
"""Some 50 us, three chunks' time: whoever lets others have the CPU may not have it back when its turn comes."""
_PR_SET_PDEATHSIG = 1
_CPUS = os.sched_getaffinity(0)
_ONE, _NO_FLAGS = ctypes.c_ulong(1), ctypes.c_ulong(0)


class Copier:
    """The life of the process.

    Args:
        control: the shared page.
        wake_fd: the eventfd it sleeps on.
    """

    def __init__(self, control: mmap.mmap, wake_fd: int) -> None:
        self._words = memoryview(control).cast("Q")
        self._wake_fd = wake_fd
        self._barrier = threading.Lock()
        self._buffer = mmap.mmap(-1, CHUNK_BYTES_MAX + mmap.PAGESIZE)
        self._ours = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._segments = (ctypes.c_uint64 * 4)()  # our address, our length, their address, their length
        base = ctypes.addressof(self._segments)
        self._local, self._remote = ctypes.c_void_p(base), ctypes.c_void_p(base + 16)
        libc = ctypes.CDLL(None)
        self._cpu: Callable[[], int] = libc.sched_getcpu
        self._readv, self._writev = libc.process_vm_readv, libc.process_vm_writev
        self._readv.restype = self._writev.restype = ctypes.c_ssize_t

    def run(self) -> None:
        """Do job after job, for ever."""
        words, last = self._words, 0
        words[READY] = 1
        while True:
            last = self._next_job(last)
            if self._cpu() == words[CPU]:
                keep_off(words[CPU])
            self._do(last)
            words[FINISHED] = last

    def _next_job(self, last: int) -> int:
        """Look for a new job for a while, then sleep until there is one."""
        words = self._words
        while not self._look(last):
            words[ASLEEP] = 1
            with self._barrier:  # an uncontended lock is a locked instruction, hence a full fence
                pass
            if words[JOB] == last:
                os.eventfd_read(self._wake_fd)
            words[ASLEEP] = 0
        return words[JOB]

    def _look(self, last: int) -> bool:
        words = self._words
        ends = time.monotonic_ns() + _SPIN_NS
        while True:
            for _ in range(_LOOKS_PER_YIELD):
                if words[JOB] != last:
                    return True
            if time.monotonic_ns() >= ends:
                return False
            os.sched_yield()

    def _do(self, job: int) -> None:
        """Copy chunks 1, 3, 5 and so on, until something cannot be copied or the server wants no more."""
        words = self._words
        source_pid, target_pid = words[SOURCE_PID], words[TARGET_PID]
        for n in range(words[N_CHUNKS]):
            at = CHUNKS + n * WORDS_PER_CHUNK
            source, target, length, start = words[at : at + WORDS_PER_CHUNK]
            if self._copy(self._readv, source_pid, source, length, start) != length:
                return
            if not self._await_turn(job, 2 * n + 1):
                return
            if self._copy(self._writev, target_pid, target, length, start) != length:
                return
            words[DONE] = 2 * n + 2

    def _await_turn(self, job: int, n_before: int) -> bool:
        """Wait until the chunks before ours are written; False when that is not going to be."""
        words = self._words
        while True:
            for _ in range(_LOOKS_AT_WORK_PER_YIELD):
                if words[CANCELLED] == job:
                    return False
                if words[WRITTEN] >= n_before:
                    return True
            os.sched_yield()

    def _copy(self, call: ctypes._NamedFuncPointer, pid: int, address: int, length: int, start: int) -> int:
        segments = self._segments
        segments[0], segments[1], segments[2], segments[3] = self._ours + start, length, address, length
        n_bytes: int = call(ctypes.c_int(pid), self._local, _ONE, self._remote, _ONE, _NO_FLAGS)
        return n_bytes


def keep_off(cpu: int) -> None:
    """Run on any CPU but this one, if we may."""
    others = _CPUS - {cpu}
    if others:
        os.sched_setaffinity(0, others)


def main(server_pid: int, control_fd: int, wake_fd: int) -> None:
    """Run until the server ends or kills us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, and it ends us
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)
    if os.getppid() != server_pid:
        return  # it ended before we asked to be told
    Copier(mmap.mmap(control_fd, CONTROL_BYTES), wake_fd).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
