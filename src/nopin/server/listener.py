"""Accepting connections without being stopped by a lack of descriptors."""

from __future__ import annotations

import socket
from collections.abc import Callable

from nopin.server.core import Core
from nopin.server.poller import READ
from nopin.units import MS_NS

_PAUSE_NS = 100 * MS_NS
_PER_TURN = 16


class Listener:
    """Accepts on a listening socket and hands non-blocking connections on. Owns the socket."""

    def __init__(self, core: Core, sock: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
        self._core = core
        self._sock = sock
        self._accepted = accepted
        sock.setblocking(False)
        core.poller.watch(sock.fileno(), self._on_ready)

    def _on_ready(self, _mask: int) -> None:
        for _ in range(_PER_TURN):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError:  # out of descriptors or memory: the connection stays in the backlog meanwhile
                self._pause()
                return
            connection.setblocking(False)
            self._accepted(connection)

    def _pause(self) -> None:
        fd = self._sock.fileno()
        self._core.poller.change(fd, 0)
        self._core.timers.at(self._core.clock() + _PAUSE_NS, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._core.poller.change(self._sock.fileno(), READ)

    def close(self) -> None:
        """Stop listening. Twice is fine."""
        if self._sock.fileno() >= 0:
            self._core.poller.forget(self._sock.fileno())
            self._sock.close()
