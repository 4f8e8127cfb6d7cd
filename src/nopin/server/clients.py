"""The Unix socket: who may connect, and that one server at most serves a path."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from nopin.control.paths import check_socket_path, ensure_private_directory, lock_path
from nopin.errors import ServerError
from nopin.linux.credentials import Credentials, peer_credentials
from nopin.linux.pidfd import PidFd
from nopin.server.core import Core, log
from nopin.server.listener import Listener
from nopin.server.orphans import name_of
from nopin.server.session import Session, say_why

_BACKLOG = 64
_SO_PEERPIDFD = 77
"""asm-generic/socket.h, since Linux 6.5."""


class SocketFile:
    """A listening socket at a path that is ours alone.

    The lock on the file beside it says whether a server lives, not the socket file, which a killed server
    leaves behind. The lock file itself stays: removing it would let two servers each hold a lock of that name.

    Raises:
        ServerError: another server has the path, or the directory is not safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_socket_path(path)
        ensure_private_directory(path.parent)
        self._lock = os.open(lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._take_lock()
            self.socket = self._listen()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Remove the socket file and give the lock back. The socket itself belongs to its listener."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ServerError(f"a device server (pid {holder}) already serves {self.path}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()  # left behind by a server that was killed: nobody holds the lock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind(os.fspath(self.path))
            os.chmod(self.path, 0o600)
            sock.listen(_BACKLOG)
        except OSError as problem:
            sock.close()
            raise ServerError(f"cannot listen on {self.path}: {problem.strerror}") from problem
        return sock


class Clients:
    """Accepts clients and keeps their sessions."""

    def __init__(self, core: Core, sock: socket.socket) -> None:
        self._core = core
        self._listener = Listener(core, sock, self._accept)

    def close(self) -> None:
        """Stop listening and end every session."""
        self._listener.close()
        for session in list(self._core.sessions):
            session.end("the server stops")

    def _accept(self, sock: socket.socket) -> None:
        core = self._core
        try:
            who = peer_credentials(sock)
            self._admit(who)
            session = _session(core, sock, who.pid)
        except OSError as problem:
            log.info("a client was refused: %s", problem)
            core.counters.clients_refused += 1
            say_why(sock, f"the server takes no such client: {problem.strerror or problem}")
            sock.close()
            return
        core.sessions.add(session)
        core.counters.clients_accepted += 1

    def _admit(self, who: Credentials) -> None:
        """Check that a process may be a client.

        Raises:
            OSError: it may not.
        """
        if who.uid not in (0, os.getuid()):
            raise PermissionError(errno.EPERM, f"uid {who.uid} is not the server's")
        if who.pid <= 0:
            raise ProcessLookupError(errno.ESRCH, "it lives in another PID namespace")
        if len(self._core.sessions) >= self._core.limits.clients:
            raise OSError(errno.EUSERS, f"there are {self._core.limits.clients} clients already")


def _process_of(sock: socket.socket, pid: int) -> PidFd:
    """Return a handle on the process that connected: by the kernel's record of it, which no reused number can fool.

    Raises:
        OSError: it is gone.
    """
    try:
        return PidFd(pid, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    except OSError as problem:
        if problem.errno != errno.ENOPROTOOPT:
            raise
    return PidFd.open(pid)  # before Linux 6.5


def _session(core: Core, sock: socket.socket, pid: int) -> Session:
    """Start a client's session.

    Raises:
        OSError: the process is gone, or the server is out of descriptors; nothing is kept.
    """
    process = _process_of(sock, pid)
    try:
        return Session(core, sock, process, name_of(pid))
    except OSError:
        process.close()
        raise
