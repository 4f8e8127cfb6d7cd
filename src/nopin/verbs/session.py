"""A connection to one device server: the greeting, requests, the doorbell."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from nopin.control.messages import PROTOCOL_VERSION, Done, Hello, Reply, Request, Welcome
from nopin.control.packets import close_all
from nopin.control.share_book import ShareBook
from nopin.control.socket import ControlSocket
from nopin.errors import HostLacks, ServerError, ServerGone, ServerRefused
from nopin.linux import memfd
from nopin.linux.fence import fence
from nopin.linux.prctl import allow_tracer
from nopin.linux.userfaultfd import open_watch
from nopin.nic.rings import WorkProducer
from nopin.units import PAGE_BYTES
from nopin.verbs.objects import DeviceObject

R = TypeVar("R", bound=Reply)
_ASLEEP = (1,)


class Session:
    """What every object of a device needs of the server.

    Args:
        path: the server's socket.
        before: the session with a server that was killed: its share book is shown to this one.

    Attributes:
        welcome: what the server said about itself.
        retired: objects that were dropped; closed at the next request.

    Raises:
        ServerGone: nobody listens there.
        ServerRefused: the server does not want us.
        ServerError: it speaks another version.
    """

    def __init__(self, path: Path, before: Session | None = None) -> None:
        self.control = ControlSocket(path)
        self.retired: deque[DeviceObject] = deque() if before is None else before.retired
        self._book: int = -1 if before is None else before._book
        try:
            self.welcome, (state_fd, self._doorbell, self._book) = self._greet()
        except BaseException:
            self.control.close()
            raise
        try:
            page = memfd.map_array(state_fd, PAGE_BYTES, writable=False)
        finally:
            os.close(state_fd)
        self._sleeping: Sequence[int] = page.data.cast("Q")
        allow_tracer(self.welcome.server_pid)

    def _greet(self) -> tuple[Welcome, list[int]]:
        """Say hello, our userfaultfd beside it; the server then holds the only copy, so its death frees us."""
        hello, watch = Hello(seq=0, version=PROTOCOL_VERSION, has_book=self._book >= 0), []
        with contextlib.suppress(HostLacks):
            watch_fd, features = open_watch()
            watch.append(watch_fd)
            hello.has_uffd, hello.uffd_features = True, int(features)
        try:
            reply, fds = self.control.request(hello, [*watch, self._book] if hello.has_book else watch)
        except ServerGone as problem:
            if not self.control.told:
                raise
            text = f"the device server at {self.control.path} does not want us: {self.control.told}"
            raise ServerRefused(text, code="closed", errno=errno.ECONNREFUSED) from problem
        finally:
            close_all(watch)
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
            with contextlib.suppress(ServerRefused):  # whoever makes a request now has nothing to do with it
                each.close()

    def ring_doorbell(self, ring: WorkProducer) -> None:
        """Call the server if it sleeps, or does not look at the ring; call it after posting.

        The fence keeps our index store before our look at the flags; the server sets a flag before its last
        look at the rings, so one of us sees the other.
        """
        fence()
        if self._sleeping[0] or ring.unattended:
            if self._doorbell < 0:
                raise ServerGone("the device server of this queue pair went away; make a new one")
            with contextlib.suppress(BlockingIOError):  # the counter is full, so nobody sleeps
                os.eventfd_write(self._doorbell, 1)

    def strike(self, share: str) -> None:
        """Clear a share in our share book: no server that reads it from now on publishes it."""
        before = os.pread(self._book, os.fstat(self._book).st_size, 0)
        ShareBook(memfd.map_array(self._book), before).strike(share)

    def close(self) -> None:
        """End the connection and with it all the server holds for us."""
        self._sleeping = _ASLEEP  # so that a doorbell is asked for, and found missing
        self.control.close()
        self._close_descriptors()

    def abandon(self) -> None:
        """Close this process's copies of the descriptors only: for a child after fork."""
        self.control.abandon()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        close_all(fd for fd in (self._doorbell, self._book) if fd >= 0)
        self._doorbell = self._book = -1
