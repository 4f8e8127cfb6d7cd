"""The worker process: maps arenas where its owner has them, and runs one kernel after another.

`python -m nopin.accel.worker OWNER_PID SOCKET_FD`, started by `process.Worker`. It ends with its owner. It keeps a copy
of its own userfaultfd: when the device server dies, faults wait for the next one instead of reading zeros.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nopin.accel import messages
from nopin.accel.arguments import decode, encode
from nopin.accel.kernels import KERNELS, chase
from nopin.accel.mapping import ArenaMapping
from nopin.accel.memory import ArrayRef, Windows
from nopin.accel.messages import Failed, Finished, Mapped, MapWindow, NotMapped, Run, Stop, Stopped, UnmapWindow, Usage
from nopin.control.packets import close_all, receive_packet, send_packet
from nopin.errors import HostLacks, UsageError
from nopin.linux.prctl import set_parent_death_signal

MESSAGE_CHARACTERS_MAX = 4000
TRACEBACK_FRAMES_MAX = 8


class OwnerLeft(Exception):
    """The owner closed its end: there is nothing left to do."""


class StopJob(Exception):
    """The owner wants no more of the present job."""


class Worker:
    """The life of the process.

    Args:
        sock: the worker's end of the socket pair.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._windows = Windows()
        self._mappings: dict[int, ArenaMapping] = {}
        self._unwanted = 0  # the last job we were told to stop
        self._kernels: dict[str, Callable[..., Any]] = KERNELS | {"chase": partial(chase, self._windows)}

    def run(self) -> None:
        """Do what the owner says until it leaves."""
        while True:
            message, fds = self._receive()
            if isinstance(message, MapWindow):
                self._map(message, fds)
            elif isinstance(message, UnmapWindow):
                self._unmap(message)
            elif isinstance(message, Run):
                self._send(self._run(message))
            elif isinstance(message, Stop):  # for a job that has ended meanwhile, or for the next one
                self._unwanted = message.job

    def _receive(self, flags: int = 0) -> tuple[messages.ToWorker, list[int]]:
        packet = receive_packet(self._sock, 1, flags)
        if not packet.data:
            raise OwnerLeft
        return messages.decode_to_worker(packet.data), packet.fds

    def _send(self, message: messages.FromWorker, fds: tuple[int, ...] = ()) -> None:
        send_packet(self._sock, messages.encode(message), fds)

    def _map(self, message: MapWindow, fds: list[int]) -> None:
        try:
            mapping = ArenaMapping(fds[0], message.start, message.length, Path(message.server))
        except (OSError, HostLacks) as problem:
            self._send(NotMapped(str(problem)))
            return
        finally:
            close_all(fds)
        self._windows.add(mapping.where)
        self._mappings[message.start] = mapping
        self._send(Mapped(mapping.features), (mapping.uffd,))

    def _unmap(self, message: UnmapWindow) -> None:
        self._windows.remove(message.start)
        self._mappings.pop(message.start).close()

    def _run(self, message: Run) -> Finished | Failed | Stopped:
        meter = Meter()
        try:
            if message.job == self._unwanted:
                raise StopJob
            result = self._compute(message)
            reply = Finished(message.job, result, meter.read())
            messages.encode(reply)  # UsageError here, where it can still be told, when the result is too long
            return reply
        except StopJob:
            return Stopped(message.job, meter.read())
        except OwnerLeft:
            raise
        except BaseException as error:  # SystemExit of a user's function as well: the worker stays
            return _failure(message.job, error, meter.read())

    def _compute(self, message: Run) -> bytes:
        arrays: list[ArrayRef] = []

        def resolve(ref: ArrayRef) -> NDArray[Any]:
            arrays.append(ref)
            return self._windows.array(ref)

        positional, named = decode(message.arguments, resolve)
        kernel = self._kernels.get(message.kernel) or pkgutil.resolve_name(message.kernel)
        result = kernel(*positional, **named)
        if inspect.isgenerator(result):
            result = self._in_chunks(result, message.job)
        return encode(result, partial(refer_to_argument, arrays))

    def _in_chunks(self, chunks: Any, job: int) -> Any:
        """Run a generator to its end and return its result, stopping between two chunks when told so."""
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                return end.value
            self._heed(job)

    def _heed(self, job: int) -> None:
        try:
            message, fds = self._receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        close_all(fds)
        if isinstance(message, Stop) and message.job == job:
            raise StopJob


class Meter:
    """What a job takes, from here on."""

    def __init__(self) -> None:
        self._began_ns = time.monotonic_ns()
        self._n_before = _n_faults()

    def read(self) -> Usage:
        """Time and faults since it was made."""
        return Usage(time.monotonic_ns() - self._began_ns, _n_faults() - self._n_before)


def _n_faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def refer_to_argument(arguments: list[ArrayRef], array: NDArray[Any]) -> ArrayRef:
    """The reference of a returned array, if it is (part of) an argument.

    Raises:
        UsageError: it is memory of this process only.
    """
    ref = ArrayRef.of(array)
    extent = ref.extent
    for argument in arguments:
        whole = argument.extent
        if extent is None or (whole is not None and whole.contains(extent)):
            return ref
    example = f"dev.empty({array.shape}, {array.dtype.name!r})"
    raise UsageError(
        f"returned an array of {array.dtype.name}, shape {array.shape}, in the worker's own memory; "
        f"give out={example} for the result to lie in an arena"
    )


def _failure(job: int, error: BaseException, usage: Usage) -> Failed:
    """The error as its owner shall see it: without our own frames, and no longer than anybody reads."""
    own = os.path.dirname(__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.dirname(f.filename) != own]
    lines = traceback.format_list(frames[-TRACEBACK_FRAMES_MAX:])
    try:
        text = str(error)
    except Exception as problem:
        text = f"(its message cannot be had: {type(problem).__name__})"
    return Failed(
        job,
        type(error).__name__,
        text[:MESSAGE_CHARACTERS_MAX],
        "".join(lines)[-MESSAGE_CHARACTERS_MAX:],
        usage,
    )


def main(owner_pid: int, fd: int) -> None:
    """Run until the owner ends, closes its end, or kills us."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != owner_pid:
        return  # it ended before we asked to be told
    try:
        Worker(socket.socket(fileno=fd)).run()
    except (OwnerLeft, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
