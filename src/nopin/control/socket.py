"""The client's end of the control socket: one request at a time, its reply, and events in between."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from nopin.control.codec import REPLY_DESCRIPTORS, AnyReply, ProtocolError, decode_reply, encode_request
from nopin.control.messages import Event, Refused, Reply, Request, Stat
from nopin.control.packets import OutOfDescriptors, close_all, receive_packet, send_packet
from nopin.errors import ServerError, ServerGone, ServerRefused

EVENTS_KEPT = 1024
"""Events buffered for a client that does not ask for them; then the oldest go."""
TIMEOUT_S = 30.0
"""How long a request waits for its reply at most."""


class ControlSocket:
    """A connection to a device server, safe to use from several threads.

    Args:
        path: the server's socket.

    Attributes:
        told: why the server ended the connection, if it said so.

    Raises:
        ServerGone: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told = ""
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._seq = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.settimeout(TIMEOUT_S)
        try:
            self._sock.connect(os.fspath(path))
        except OSError as problem:
            self._sock.close()
            raise _unreachable(path, problem) from problem

    def fileno(self) -> int:
        """Return the descriptor (readable: an event, or the server's end), or -1 once closed."""
        return self._sock.fileno()

    @property
    def gone(self) -> bool:
        """True once the connection broke or was closed; never False again."""
        return self._sock.fileno() < 0

    @property
    def hung_up(self) -> bool:
        """True once the connection broke or was closed; looks, where `gone` only knows what was noticed."""
        if not self.gone:
            waiter = select.poll()
            waiter.register(self._sock.fileno(), select.POLLRDHUP)
            # Whoever makes a request just now notices by itself; it may even be this thread, and we a finaliser below.
            if waiter.poll(0) and self._lock.acquire(blocking=False):
                try:
                    self._collect()
                finally:
                    self._lock.release()
        return self.gone

    @property
    def busy(self) -> bool:
        """True while a request is under way, perhaps in this very thread, below a finaliser or a signal handler."""
        return self._lock.locked()

    def request(self, message: Request, fds: Sequence[int] = ()) -> tuple[AnyReply, list[int]]:
        """Send a request and wait for its reply; `message.seq` is overwritten.

        Returns:
            The reply and the descriptors beside it, exactly as many as the request is answered with.

        Raises:
            ServerRefused: the server refused; nothing was changed.
            ServerGone: the connection broke, the server did not answer in time, or answered nonsense.
            ServerError: this process has no room for the descriptors that came; what was made stays with the server.
            UsageError: a field of the request is impossible; nothing was sent.
        """
        with self._lock:
            self._seq += 1
            message.seq = self._seq
            data = encode_request(message)
            self._require_open()
            try:
                send_packet(self._sock, data, fds)
                reply, received = self._reply(REPLY_DESCRIPTORS.get(type(message), 0))
            except OutOfDescriptors as problem:
                raise ServerError(f"{type(message).__name__}: {problem}") from problem
            except (OSError, ProtocolError) as problem:
                self._hear_last_words()
                raise self._broken(f"during {type(message).__name__}: {self.told or problem}") from problem
        if isinstance(reply, Refused):
            raise ServerRefused(reply.message, code=reply.code, errno=reply.errno)
        return reply, received

    def take_events(self, timeout_s: float | None = 0.0) -> list[Event]:
        """Return the events that have arrived; wait up to timeout_s for the first, None for ever.

        Raises:
            ServerGone: the connection broke and no event is left to give.
        """
        if not self._events and not self.gone and (timeout_s is None or timeout_s > 0):
            waiter = select.poll()
            waiter.register(self._sock.fileno(), select.POLLIN)
            waiter.poll(None if timeout_s is None else timeout_s * 1000)
        with self._lock:
            if not self.gone:
                self._collect()
            events = list(self._events)
            self._events.clear()
            if not events:
                self._require_open()
            return events

    def left_over(self) -> list[Event]:
        """Return the events that have arrived and were not taken; for a connection that broke."""
        events = list(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        """Close the connection, which ends everything the server holds for it. Twice is fine."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def abandon(self) -> None:
        """Close this process's copy of the descriptor only: for a child after fork."""
        self._sock.close()

    def _reply(self, n_fds: int) -> tuple[AnyReply, list[int]]:
        rows: list[dict[str, object]] = []
        while True:
            packet = receive_packet(self._sock, n_fds)
            if not packet.data:
                raise ProtocolError("the server closed the connection")
            try:
                reply = decode_reply(packet.data)
                if isinstance(reply, Refused) and reply.seq == 0:
                    self.told = reply.message
                    raise ProtocolError(reply.message)
                if isinstance(reply, Event) or reply.seq != self._seq:
                    close_all(packet.fds)
                    self._keep(reply)
                    continue
                if isinstance(reply, Stat):
                    rows += reply.rows
                    if reply.more:
                        continue
                    reply.rows = rows
                expected = 0 if isinstance(reply, Refused) else n_fds
                if len(packet.fds) != expected:
                    raise ProtocolError(f"{len(packet.fds)} descriptors came where {expected} belong")
            except ProtocolError:
                close_all(packet.fds)
                raise
            return reply, packet.fds

    def _hear_last_words(self) -> None:
        """Take note of what the server said before it closed the connection, without waiting."""
        self._sock.settimeout(0.0)
        for _ in range(2):  # the first call may only fetch the pending error
            with contextlib.suppress(OSError, ProtocolError):
                reply = decode_reply(receive_packet(self._sock, 0).data)
                if isinstance(reply, Refused) and reply.seq == 0:
                    self.told = reply.message
                    return

    def _collect(self) -> None:
        """Buffer what has arrived, without waiting (MSG_DONTWAIT would wait: the socket has a timeout)."""
        self._sock.settimeout(0.0)
        try:
            while True:
                packet = receive_packet(self._sock, 0)
                if not packet.data:
                    raise ProtocolError("the server closed the connection")
                self._keep(decode_reply(packet.data))
        except BlockingIOError:
            self._sock.settimeout(TIMEOUT_S)
        except (OSError, ProtocolError):
            self._sock.close()

    def _keep(self, reply: Reply) -> None:
        if isinstance(reply, Event):
            self._events.append(reply)

    def _require_open(self) -> None:
        if self.gone:
            raise ServerGone(
                f"the connection to the device server at {self.path} is closed, and what was made there is gone; "
                "make it anew, with a new Device if this one was closed"
            )

    def _broken(self, what: str) -> ServerGone:
        self._sock.close()
        return ServerGone(f"lost the device server at {self.path} {what}; the Device goes on with the next one there")


def _unreachable(path: Path, problem: OSError) -> ServerGone:
    if isinstance(problem, PermissionError):
        return ServerGone(f"{path} is in a folder of another user's, whose device server serves nobody else")
    reason = problem.strerror or problem
    return ServerGone(f"no device server at {path} ({reason}); one is started by: nopin serve --socket {path}")
