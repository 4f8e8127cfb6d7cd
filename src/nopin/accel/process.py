"""The owner's handle on one worker process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Protocol

from nopin.accel import messages
from nopin.accel.messages import Failed, Finished, Mapped, MapWindow, NotMapped, Run, Stop, Stopped, UnmapWindow
from nopin.control.codec import ProtocolError
from nopin.control.packets import Packet, close_all, receive_packet, send_packet
from nopin.errors import AcceleratorError, PageLost, WorkerGone
from nopin.linux.interpreter import interrupts_held_back, python_command, python_environment
from nopin.linux.pidfd import PidFd
from nopin.ranges import Range

_DEATH_TIMEOUT_S = 5.0


class Arena(Protocol):
    """What a worker has to know of an arena."""

    @property
    def handle(self) -> int:
        """Its number at the device server."""
        ...

    @property
    def where(self) -> Range:
        """Its addresses, the same in every process."""
        ...

    @property
    def memory_fd(self) -> int:
        """The file of its frames."""
        ...

    @property
    def server(self) -> Path:
        """Path of the device server's socket."""
        ...


Introduce = Callable[[Arena, int, int, int], None]
"""Tells the device server of a worker's mapping: the arena, the worker's userfaultfd, its features, and a pidfd."""


class Worker:
    """A running worker process. One thread at a time, but for `stop` and `kill`.

    It is to be made by the thread that works with it: the kernel ends it when that thread ends.

    Args:
        introduce: called for each arena once the worker has it mapped, before any job can touch it.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, introduce: Introduce) -> None:
        self._introduce = introduce
        self._mapped: set[Range] = set()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with interrupts_held_back():  # for good: Ctrl-C is for the owner, which ends its workers
                    self._process = subprocess.Popen(
                        python_command("-m", "nopin.accel.worker", str(os.getpid()), str(theirs.fileno())),
                        pass_fds=(theirs.fileno(),),
                        stdin=subprocess.DEVNULL,
                        env=python_environment(),
                    )
            except BaseException:
                ours.close()
                raise
        self._sock = ours
        self._pidfd = PidFd.open(self._process.pid)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return not self._pidfd.exited()

    def map_all(self, arenas: Iterable[Arena]) -> None:
        """Have exactly these arenas mapped in the worker.

        Raises:
            AcceleratorError: one of them cannot be mapped there.
            WorkerGone: the worker died.
            NopinError: the device server refused it, or is gone.
        """
        wanted = {arena.where: arena for arena in arenas}
        for where in self._mapped - wanted.keys():
            self._mapped.remove(where)
            self._send(UnmapWindow(where.start))
        for where in wanted.keys() - self._mapped:
            self._map(wanted[where])

    def _map(self, arena: Arena) -> None:
        self._send(MapWindow(arena.where.start, arena.where.length, os.fspath(arena.server)), (arena.memory_fd,))
        reply, fds = self._receive(1)
        if isinstance(reply, NotMapped):
            raise AcceleratorError(f"the worker cannot map the arena at {arena.where}: {reply.reason}")
        if not isinstance(reply, Mapped) or len(fds) != 1:
            close_all(fds)
            self._unexpected(reply)
        try:
            self._introduce(arena, fds[0], reply.features, self._pidfd.fd)
        except BaseException:
            self.close()  # it has a mapping whose faults nobody would resolve
            raise
        finally:
            close_all(fds)
        self._mapped.add(arena.where)

    def run(self, job: int, kernel: str, arguments: bytes) -> Finished | Failed | Stopped:
        """Run a kernel and wait for its end.

        Raises:
            WorkerGone: the worker died in it; `PageLost` when that was SIGBUS.
        """
        self._send(Run(job, kernel, arguments))
        reply, _ = self._receive(0)
        if not isinstance(reply, Finished | Failed | Stopped) or reply.job != job:
            self._unexpected(reply)
        return reply

    def stop(self, job: int) -> None:
        """Ask it to stop a job at its next chunk. Any thread may."""
        with contextlib.suppress(OSError):  # it is dead, or its socket closed: then the job ends anyway
            self._sock.sendmsg([messages.encode(Stop(job))], (), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it at once, whatever it does: a process that waits in a page fault can be killed. Any thread may."""
        with contextlib.suppress(OSError):  # it has been reaped
            signal.pidfd_send_signal(self._pidfd.fd, signal.SIGKILL)

    def close(self) -> None:
        """End it and let go of everything. Twice is fine."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DEATH_TIMEOUT_S)
        self.abandon()

    def abandon(self) -> None:
        """Close descriptors only: for a child after fork."""
        self._sock.close()
        self._pidfd.close()

    def _send(self, message: messages.ToWorker, fds: tuple[int, ...] = ()) -> None:
        try:
            send_packet(self._sock, messages.encode(message), fds)
        except OSError:
            self._died()

    def _receive(self, n_fds: int) -> tuple[messages.FromWorker, list[int]]:
        self._await_word()
        try:
            packet = receive_packet(self._sock, n_fds, socket.MSG_DONTWAIT)
        except OSError:
            packet = Packet(b"", [])
        except ProtocolError as problem:
            self._unexpected(problem)
        if not packet.data:
            self._died()
        try:
            return messages.decode_from_worker(packet.data), packet.fds
        except ProtocolError as problem:
            close_all(packet.fds)
            self._unexpected(problem)

    def _await_word(self) -> None:
        """Sleep until it says something or dies; its end of the socket may live on in a process forked meanwhile."""
        waiter = select.poll()
        waiter.register(self._sock.fileno(), select.POLLIN)
        waiter.register(self._pidfd.fd, select.POLLIN)
        waiter.poll()

    def _unexpected(self, what: object) -> NoReturn:
        self.close()
        raise WorkerGone(f"worker {self.pid} answered with {what}; it was ended", exit_status=-signal.SIGKILL)

    def _died(self) -> NoReturn:
        try:
            status = self._process.wait(_DEATH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._unexpected("the end of its connection")
        if status == -signal.SIGBUS:
            raise PageLost(
                f"worker {self.pid} got SIGBUS: a page it touched is lost (its copy in swap cannot be read, or no room "
                "was left for it); the device's events and statistics say which and why",
                exit_status=status,
            )
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        raise WorkerGone(f"worker {self.pid} {how}; the next job gets a new one", exit_status=status)
