"""One client: its connection, and everything that ends with it.

A session ends when the socket closes, when the process exits (a child that inherited the socket does not keep
it alive), when the client sends something malformed, or when the server stops. All these ways lead to `end`,
once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence

from nopin.control.arena_messages import MapArena, MapperKind
from nopin.control.codec import (
    REQUEST_DESCRIPTORS_MAX,
    AnyRequest,
    ProtocolError,
    decode_request,
    encode,
    request_descriptors,
)
from nopin.control.messages import Event, Hello, Refused, Reply, Request
from nopin.control.packets import close_all, receive_packet, send_packet
from nopin.errors import ServerRefused
from nopin.linux.pidfd import PidFd
from nopin.nic.errors import VerbsError
from nopin.server.client_arenas import ClientArenas
from nopin.server.client_book import ClientBook
from nopin.server.client_memory import ClientMemory
from nopin.server.core import Core, log
from nopin.server.handlers import handle
from nopin.server.objects import ClientObjects
from nopin.server.outbox import Outbox
from nopin.server.poller import EDGE, READ, WRITE
from nopin.server.refusal import refused
from nopin.server.teardown import tear_down

_HANG_UP = 0x010 | 0x008  # EPOLLHUP, EPOLLERR
_REQUESTS_PER_TURN = 16


def say_why(sock: socket.socket, message: str) -> None:
    """Tell a client why its connection is about to be closed, if it listens."""
    with contextlib.suppress(OSError):
        send_packet(sock, encode(Refused(code="closed", errno=errno.ECONNABORTED, message=message)))


class Session:
    """A client. Owns the socket, the process handle and all objects made for the client.

    A session without a socket is that of a client whose server was killed, and that has not come back yet: what it
    shares goes on (`server.orphans`). Once it is back, it gets the new connection.

    Attributes:
        process: the process whose memory the client may register: the one that connected.
        name: its command name, for figures.
        book: what it shares, written down for a successor; None before it said hello.
        doorbell: eventfd that the client writes when the server sleeps, or does not look where it posted. One for each
            client, so that none can take or block another's ring; and never read, because the client may have made it
            blocking: each write is an edge of its own.

    Raises:
        OSError: the server is out of descriptors.
    """

    def __init__(self, core: Core, sock: socket.socket | None, process: PidFd, name: str) -> None:
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.core = core
        self.process = process
        self.name = name
        self.objects = ClientObjects(core.limits)
        self.memory = ClientMemory(core, process, self.misbehaved)
        self.arenas = ClientArenas(core, process, self.objects.usage, self.objects.new_handle, self.emit, self.memory)
        self.book: ClientBook | None = None
        self.greeted = False
        self.alive = True
        self._sock: socket.socket | None = None
        self._outbox: Outbox | None = None
        core.poller.watch(process.fileno(), self._on_exit)
        core.poller.watch(self.doorbell, self._on_doorbell, READ | EDGE)
        if sock is not None:
            self._connect(sock)

    @property
    def pid(self) -> int:
        """Number of the client's process."""
        return self.process.pid

    @property
    def n_events_dropped(self) -> int:
        """Events the client did not read in time."""
        return self._outbox.n_dropped if self._outbox is not None else 0

    @property
    def connected(self) -> bool:
        """False while the client has not come back from the end of its server."""
        return self._sock is not None

    def go_on_with(self, fresh: Session) -> None:
        """The client is back: take over its new connection, and end the session that this had begun."""
        assert not self.connected
        if self.book is not None:
            self.core.orphans.pop(self.book.record, None)
        sock, fresh._sock = fresh._sock, None
        assert sock is not None
        self.core.poller.forget(sock.fileno())
        fresh.end("it was known already")
        self._connect(sock)
        self.greeted = True

    def _connect(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox = Outbox(sock)
        self._events_waited_for = READ
        self.core.poller.watch(sock.fileno(), self._on_socket)

    def emit(self, event: Event) -> None:
        """Send an event; the oldest are dropped when the client does not read, and all while it is not there."""
        if not self.alive or self._outbox is None:
            return
        before = self._outbox.n_dropped
        self._outbox.event(encode(event))
        self.core.counters.events_dropped += self._outbox.n_dropped - before
        self._flush()

    def end(self, reason: str) -> None:
        """Tear everything down, in order. Twice is fine."""
        if not self.alive:
            return
        self.alive = False
        log.info("client %d (%s) ends: %s", self.pid, self.name, reason)
        poller = self.core.poller
        if self._sock is not None:
            poller.forget(self._sock.fileno())
        poller.forget(self.process.fileno())
        poller.forget(self.doorbell)
        if self._outbox is not None:
            self._outbox.close()
        tear_down(self)
        if self._sock is not None:
            self._sock.close()
        self.process.close()
        os.close(self.doorbell)
        if self.book is not None:
            self.core.orphans.pop(self.book.record, None)
        self.core.counters.clients_ended += 1
        self.core.sessions.discard(self)

    def misbehaved(self, what: str) -> None:
        """End the session because the client broke the protocol."""
        if self.alive:
            self.core.counters.clients_misbehaved += 1
            if self._sock is not None:
                say_why(self._sock, f"the server ended the connection: {what}")
            self.end(what)

    def _on_doorbell(self, _mask: int) -> None:
        for entry in self.objects.qps.values():
            self.core.nic.attend(entry.qp)

    def _on_exit(self, _mask: int) -> None:
        self.end("the process exited")

    def _on_socket(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if mask & READ:
            self._read()
        elif mask & _HANG_UP:
            self.end("the connection was closed")

    def _read(self) -> None:
        """Carry out the requests that have arrived, up to a bound, or until a reply cannot be sent."""
        for _ in range(_REQUESTS_PER_TURN):
            if self._sock is None or self._outbox is None or not self.alive or self._outbox.replies_waiting:
                return
            try:
                packet = receive_packet(self._sock, REQUEST_DESCRIPTORS_MAX)
                if not packet.data:
                    close_all(packet.fds)
                    self.end("the connection was closed")
                    return
                self._carry_out(packet.data, packet.fds)
            except BlockingIOError:
                return
            except ProtocolError as problem:
                self.misbehaved(str(problem))
            except OSError as problem:
                self.end(f"the connection broke: {problem}")
            except Exception:  # a mistake of ours: it shall cost this client its session, not all of them
                log.exception("serving client %d (%s) failed", self.pid, self.name)
                self.core.counters.internal_errors += 1
                self.end("the server made a mistake")

    def _carry_out(self, data: bytes, fds: list[int]) -> None:
        """Decode one request, do it, answer it.

        Raises:
            ProtocolError: the client does not keep to the protocol.
        """
        try:
            request = decode_request(data)
            self._check(request, fds)
        except ProtocolError:
            close_all(fds)
            raise
        self.core.counters.requests += 1
        try:
            replies, reply_fds = handle(self, request, fds)
        except (ServerRefused, VerbsError, OSError) as problem:  # OSError: the host is out of something
            self.core.counters.requests_refused += 1
            replies, reply_fds = [refused(problem, request.seq)], ()
        self.answer(request, replies, reply_fds)

    def _check(self, request: AnyRequest, fds: Sequence[int]) -> None:
        is_child = isinstance(request, MapArena) and request.kind is MapperKind.CHILD  # it wants nothing else
        if not is_child and isinstance(request, Hello) == self.greeted:
            raise ProtocolError("Hello comes first, and once")
        expected = request_descriptors(request)
        if len(fds) != expected:
            raise ProtocolError(f"{len(fds)} descriptors beside {type(request).__name__}, {expected} belong there")

    def answer(self, request: Request, replies: Sequence[Reply], fds: Sequence[int] = ()) -> None:
        """Send replies to a request; nothing if the session has ended meanwhile."""
        if not self.alive or self._outbox is None:
            close_all(fds)
            return
        for reply in replies:
            reply.seq = request.seq
            self._outbox.reply(encode(reply), fds)
            fds = ()
        self._flush()

    def _flush(self) -> None:
        """Send what can be sent; wait for room where it cannot, and for requests once all are answered."""
        if self._sock is None or self._outbox is None:
            return
        try:
            self._outbox.flush()
        except OSError as problem:
            self.end(f"the connection broke: {problem}")
            return
        waits_for = (WRITE if self._outbox.waiting else 0) | (0 if self._outbox.replies_waiting else READ)
        if waits_for != self._events_waited_for:
            self._events_waited_for = waits_for
            self.core.poller.change(self._sock.fileno(), waits_for)
