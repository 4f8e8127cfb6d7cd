"""Process handles that a reused process number cannot fool."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

from nopin.errors import HostLacks
from nopin.linux.libc import syscall

_SYS_PIDFD_GETFD = 438


class PidFd:
    """One process, by descriptor. Owns the descriptor."""

    __slots__ = ("_poll", "fd", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._poll = poller.poll

    @classmethod
    def open(cls, pid: int) -> PidFd:
        """Take a handle on a running process.

        Raises:
            ProcessLookupError: there is none of that number.
            HostLacks: the host knows no such handles, or forbids them.
        """
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError as problem:
            if problem.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            remedy = "use Linux 5.3 or later, and allow pidfd_open in the container's seccomp profile"
            raise HostLacks("pidfd", os.strerror(problem.errno), f"{remedy}; nothing works without it") from None

    def exited(self) -> bool:
        """True once the process has ended, reaped or not. While False, its number is its own.

        Any thread may ask. A poll object serves one call at a time, so a second asker brings its own.
        """
        try:
            return bool(self._poll(0))
        except RuntimeError:
            if self.fd < 0:
                return True
            poller = select.poll()
            poller.register(self.fd, select.POLLIN)
            return bool(poller.poll(0))

    def take_fd(self, remote_fd: int) -> int:
        """Duplicate a descriptor of that process into ours, close-on-exec.

        Raises:
            OSError: EPERM when we may not ptrace it, EBADF when it has no such descriptor.
        """
        return syscall(_SYS_PIDFD_GETFD, "pidfd_getfd", self.fd, remote_fd, 0)

    def fileno(self) -> int:
        """The descriptor; readable when the process has ended."""
        return self.fd

    def close(self) -> None:
        """Let go of the handle. Twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._poll = _always_exited


def pid_of(fd: int) -> int | None:
    """Return the process number of a pidfd, -1 if that has ended; None if the descriptor is something else."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        return next((int(line[4:]) for line in lines if line.startswith("Pid:")), None)
    except (OSError, ValueError):
        return None


def _always_exited(_timeout_ms: float | None = None, /) -> list[tuple[int, int]]:
    return [(-1, select.POLLNVAL)]
