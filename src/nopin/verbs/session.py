"""A connection to one device server: the greeting, requests, the doorbell."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from nopin.control.messages import PROTOCOL_VERSION, Done, Hello, Reply, Request, Welcome
from nopin.control.packets import close_all
from nopin.control.socket import ControlSocket
from nopin.errors import HostLacks, ServerError
from nopin.linux import memfd
from nopin.linux.fence import fence
from nopin.linux.prctl import allow_tracer
from nopin.linux.userfaultfd import open_watch
from nopin.units import PAGE_BYTES
from nopin.verbs.objects import DeviceObject

R = TypeVar("R", bound=Reply)


class Session:
    """What every object of a device needs of the server.

    Args:
        path: the server's socket.

    Attributes:
        welcome: what the server said about itself.
        retired: objects that were dropped; closed at the next request.

    Raises:
        ServerGone: nobody listens there.
        ServerRefused: the server does not want us.
        ServerError: it speaks another version.
    """

    def __init__(self, path: Path) -> None:
        self.control = ControlSocket(path)
        self.retired: deque[DeviceObject] = deque()
        try:
            self.welcome, (state_fd, self._doorbell, self._book) = self._greet()
        except BaseException:
            self.control.close()
            raise
        try:
            page = memfd.map_array(state_fd, PAGE_BYTES, writable=False)
        finally:
            os.close(state_fd)
        self._sleeping = page.data.cast("Q")
        allow_tracer(self.welcome.server_pid)

    def _greet(self) -> tuple[Welcome, list[int]]:
        """Say hello, our userfaultfd beside it; the server then holds the only copy, so its death frees us."""
        try:
            watch_fd, features = open_watch()
        except HostLacks:
            hello, passed = Hello(seq=0, version=PROTOCOL_VERSION), []
        else:
            passed = [watch_fd]
            hello = Hello(seq=0, version=PROTOCOL_VERSION, has_uffd=True, uffd_features=int(features))
        try:
            reply, fds = self.control.request(hello, passed)
        finally:
            close_all(passed)
        if not isinstance(reply, Welcome) or reply.version != PROTOCOL_VERSION or len(fds) != 3:
            close_all(fds)
            raise ServerError(
                f"the device server at {self.control.path} speaks another version; start one of this version"
            )
        return reply, fds

    def request(self, message: Request, reply_type: type[R], fds: Sequence[int] = ()) -> tuple[R, list[int]]:
        """Send a request, descriptors beside it; returns its reply and the descriptors beside that.

        Raises:
            ServerRefused: the server refused; nothing was changed.
            ServerGone: the server went away.
        """
        if self.retired:
            self._close_retired()
        reply, received = self.control.request(message, fds)
        if not isinstance(reply, reply_type):
            close_all(received)
            raise ServerError(f"{type(message).__name__} was answered with {type(reply).__name__}")
        return reply, received

    def tell(self, message: Request) -> None:
        """Send a request that has no other answer than Done. Raises as `request`."""
        self.request(message, Done)

    def _close_retired(self) -> None:
        dropped = [self.retired.popleft() for _ in range(len(self.retired))]
        for each in dropped:
            each._rejoin()
        for each in dropped:
            each.close()

    def ring_doorbell(self) -> None:
        """Wake the server if it sleeps; call it after posting.

        The fence keeps our index store before our look at the flag; the server sets the flag before its last
        look at the rings, so one of us sees the other.
        """
        fence()
        if self._sleeping[0]:
            with contextlib.suppress(BlockingIOError):  # the counter is full, so nobody sleeps
                os.eventfd_write(self._doorbell, 1)

    def close(self) -> None:
        """End the connection and with it all the server holds for us."""
        self.control.close()
        self._close_descriptors()

    def abandon(self) -> None:
        """Close this process's copies of the descriptors only: for a child after fork."""
        self.control.abandon()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        close_all(fd for fd in (self._doorbell, self._book) if fd >= 0)
        self._doorbell = self._book = -1
