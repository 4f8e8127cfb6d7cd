"""Accelerators: workers that compute on this process's arenas, at the same addresses."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.accel import arguments, messages
from nopin.accel.job import Job
from nopin.accel.kernels import KERNELS
from nopin.accel.lane import Lane
from nopin.accel.memory import ArrayRef
from nopin.accel.process import Arena, Introduce
from nopin.accel.queue import JobQueue
from nopin.accel.tally import AcceleratorStatistics, Tally
from nopin.control.arena_messages import MapArena, MapperKind
from nopin.control.dtypes import parse_dtype
from nopin.control.messages import Handle
from nopin.errors import Closed, UsageError
from nopin.verbs.lifeline import Lifeline
from nopin.verbs.objects import DeviceObject
from nopin.verbs.session import Session

DEPTH = 256
WORKERS_MAX = 64


class Accelerator(DeviceObject):
    """Workers that run kernels on arrays in arenas. They share a queue: first come, first served.

    Dropped, it stays until its last job has ended. Jobs wait behind one another and run without help of their owner.

    Args:
        device: what it belongs to.
        arenas: gives the device's arenas; the workers map all of them.
        introduce: tells the device server of a worker's mapping.
        workers: processes, hence jobs that run at once, from 1 to 64.
        depth: jobs that may wait.

    Raises:
        UsageError: one of the numbers makes no sense.
    """

    def __init__(
        self,
        device: DeviceObject,
        arenas: Callable[[], Iterable[Arena]],
        introduce: Introduce,
        *,
        workers: int = 1,
        depth: int = DEPTH,
    ) -> None:
        if not 1 <= workers <= WORKERS_MAX:
            raise UsageError(f"{workers} workers; an accelerator has from 1 to {WORKERS_MAX}")
        if depth < 1:
            raise UsageError(f"a queue of {depth} jobs; give 1 or more")
        super().__init__(device)
        self._arenas = arenas
        self._queue: JobQueue[Job] = JobQueue(depth)
        self._numbers = itertools.count(1)
        self._tally = Tally()
        self._lanes = [Lane(self._queue, arenas, introduce, self._tally) for _ in range(workers)]

    def _described(self) -> str:
        return f"of {len(self._lanes)} workers"

    def launch(self, kernel: str, /, *args: object, **named: object) -> Job:
        """Have a worker run a kernel; returns at once.

        Arrays go by reference: no byte is copied, and what the kernel stores is stored in them. They must lie in an
        arena of this device. Of an array the kernel returns, only one that is, or is part of, an argument can come
        back; so give `out=` to functions that would make a new one.

        Args:
            kernel: `fill copy sum add scale gather chase` (see `nopin.accel.kernels`), or the import path of any
                function: "numpy.sqrt", "mypackage.module.f". If that is a generator function, its job can be
                cancelled wherever it yields.
            args, named: arrays, numbers, texts, bytes, None, slices, dtypes, and lists, tuples and mappings of them.

        Raises:
            UsageError: an array outside every arena (use `dev.asarray`), something that cannot be sent, no such
                kernel. Nothing was launched.
            QueueFull: too many jobs wait.
            Closed: the accelerator was closed, or belongs to the process this one was forked from.
        """
        self._require_open()
        _check_name(kernel)
        held: list[tuple[ArrayRef, NDArray[Any]]] = []

        def refer(array: NDArray[Any]) -> ArrayRef:
            ref = self._reference(kernel, array)
            held.append((ref, array))
            return ref

        data = arguments.encode([args, named], refer)
        number = next(self._numbers)
        messages.encode(messages.Run(number, kernel, data))  # UsageError: too long to be sent
        job = Job(number, kernel, data, partial(_find, held), self._withdraw)
        self._queue.put(job)
        return job

    def statistics(self) -> AcceleratorStatistics:
        """What it has done since it was made."""
        return self._tally.read(len(self._queue))

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers that run now."""
        return [pid for lane in self._lanes if (pid := lane.pid) is not None]

    def _withdraw(self, job: Job) -> bool:
        if not self._queue.withdraw(job):
            return False
        self._tally.count("cancelled")
        return True

    def _reference(self, kernel: str, array: NDArray[Any]) -> ArrayRef:
        ref = ArrayRef.of(array)
        extent = ref.extent
        if extent is None or any(arena.where.contains(extent) for arena in self._arenas()):
            return ref
        raise UsageError(
            f"{kernel}: the array of {array.dtype}, shape {array.shape}, at {extent.start:#x} is in ordinary memory, "
            "which a worker cannot reach; make it with dev.zeros or dev.empty, or copy it once with dev.asarray(x)"
        )

    def _end(self) -> None:
        for job in self._queue.close():
            job.fail(Closed(f"the accelerator was closed before {job.kernel} began"))
        for lane in self._lanes:
            lane.close()

    def _abandon(self) -> None:
        super()._abandon()
        for lane in self._lanes:
            lane.abandon()


def introduce_worker(lifeline: Lifeline, arena: Arena, uffd: int, features: int, pidfd: int) -> None:
    """Have the device server resolve the faults of a worker that has mapped an arena where its owner has it.

    Raises:
        ServerRefused: it does not want to.
        ServerGone: it went away, and no other came in time.
    """

    def introduce(session: Session) -> None:
        request = MapArena(
            seq=0,
            arena=arena.handle,
            base=arena.where.start,
            offset=0,
            length=arena.where.length,
            uffd_features=features,
            kind=MapperKind.WORKER,
        )
        session.request(request, Handle, (uffd, pidfd))

    lifeline.through(introduce)


def _check_name(kernel: object) -> None:
    own = " ".join(KERNELS)
    if not isinstance(kernel, str):
        raise UsageError(f"a kernel is named by text: {own}, or an import path such as 'numpy.sqrt'")
    module, _, name = kernel.rpartition(".")
    if module == "__main__":
        raise UsageError(f"a worker cannot import {kernel}: its __main__ is its own; move {name} into a module")
    if kernel not in KERNELS and not module:
        raise UsageError(f"no kernel {kernel!r}; there are {own}; name others by import path, such as 'numpy.sqrt'")


def _find(held: list[tuple[ArrayRef, NDArray[Any]]], ref: ArrayRef) -> NDArray[Any]:
    """The argument a returned reference means, or a view of it that keeps it alive.

    Raises:
        ValueError: it is no part of any argument.
    """
    for known, array in held:
        if known == ref:
            return array
    extent = ref.extent
    if extent is None:
        return np.empty(ref.shape, parse_dtype(ref.dtype))
    for known, array in held:
        whole = known.extent
        if whole is not None and whole.contains(extent):
            memory = (ctypes.c_uint8 * whole.length).from_address(whole.start)
            memory.keep = array  # type: ignore[attr-defined]  # ctypes objects take attributes; this one lives as the base
            offset = ref.address - whole.start
            view: NDArray[Any] = np.ndarray(ref.shape, parse_dtype(ref.dtype), memoryview(memory), offset, ref.strides)
            view.flags.writeable = ref.writable and array.flags.writeable
            return view
    raise ValueError(f"{ref} at {ref.address:#x} is no part of any argument")
