"""What waits to be sent to one client. A client that does not read is never waited for."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence

from nopin.control.packets import close_all, send_packet

EVENTS_KEPT = 256


class Outbox:
    """Replies and events for one client's non-blocking socket.

    Replies are never dropped: the session reads no further request while one waits, so they are bounded by
    the answer to one request. Of events the oldest go. Descriptors given to `reply` are owned, and closed
    once sent.

    Attributes:
        n_dropped: events dropped so far.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._replies: deque[tuple[bytes, Sequence[int]]] = deque()
        self._events: deque[bytes] = deque()
        self.n_dropped = 0

    def reply(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a reply."""
        self._replies.append((data, fds))

    def event(self, data: bytes) -> None:
        """Queue an event; drops the oldest if too many wait."""
        if len(self._events) == EVENTS_KEPT:
            self._events.popleft()
            self.n_dropped += 1
        self._events.append(data)

    @property
    def waiting(self) -> bool:
        """True while anything waits."""
        return bool(self._replies or self._events)

    @property
    def replies_waiting(self) -> bool:
        """True while a reply waits."""
        return bool(self._replies)

    def flush(self) -> None:
        """Send what the socket takes.

        Raises:
            OSError: the connection broke.
        """
        try:
            while self._replies:
                data, fds = self._replies[0]
                send_packet(self._sock, data, fds)
                self._replies.popleft()
                close_all(fds)
            while self._events:
                send_packet(self._sock, self._events[0])
                self._events.popleft()
        except BlockingIOError:
            return

    def close(self) -> None:
        """Drop everything."""
        for _, fds in self._replies:
            close_all(fds)
        self._replies.clear()
        self._events.clear()
