"""Peers: the TCP listener, and one connection per peer from its first byte to the end of its queue pair.

    greeted -> attached -> lingering -> closed, and from each of them straight to closed

The connection is the peer's life line: when it closes, the queue pair goes. When the share goes first, the
peer is told, and its queue pair answers with access errors until the peer closes or LINGER_NS have passed.
"""

from __future__ import annotations

import contextlib
import secrets
import socket

from nopin.control.codec import ProtocolError
from nopin.control.exchange import NONCE_BYTES, Denied, Ended, Frame, proof_of
from nopin.control.framing import encode_frame
from nopin.control.url import TOKEN_BYTES
from nopin.nic.errors import VerbsError
from nopin.server.core import Core, log
from nopin.server.handshake import Accepted, Handshake
from nopin.server.listener import Listener
from nopin.server.responder import Responder, SilentCq
from nopin.server.shares import Share
from nopin.units import S_NS

HANDSHAKE_NS = 5 * S_NS
LINGER_NS = 5 * S_NS
_RECEIVE_BYTES = 32768
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A peer whose host vanished is noticed after a minute."""


class Exchange:
    """The listener and its connections. Owns the listening socket."""

    def __init__(self, core: Core, sock: socket.socket) -> None:
        self.core = core
        self.cq = SilentCq(core.nic).cq
        self.dummy_token = secrets.token_bytes(TOKEN_BYTES)
        self._connections: dict[Connection, None] = {}  # oldest first
        self._listener = Listener(core, sock, self._accept)
        core.shares.withdrawn = self._withdrawn

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._connections.pop(connection, None)

    def close(self, cause: str) -> None:
        """Stop listening, tell every peer the cause and let go of it."""
        self._listener.close()
        self.core.shares.withdrawn = None
        for connection in list(self._connections):
            connection.end_share(cause)
            connection.close()

    def close_replaced(self, accepted: Accepted) -> None:
        """Close the connection that a peer has lost, if we still have it: no late packet of it may reach memory."""
        for connection in list(self._connections):
            responder = connection.responder
            if (
                responder is not None
                and responder.share is accepted.share
                and responder.is_replaced_by(accepted.attach)
            ):
                connection.close()

    def _accept(self, sock: socket.socket) -> None:
        limits, counters = self.core.limits, self.core.counters
        if len(self._connections) >= limits.exchange_connections:
            counters.peers_over_limit += 1
            sock.close()
            return
        self._make_room(limits.exchange_handshakes)
        counters.peers_accepted += 1
        connection = Connection(self, sock)
        self._connections[connection] = None
        connection.greet()

    def _make_room(self, n_most: int) -> None:
        """Close the oldest of too many that shake hands: those who dawdle must not keep out those who do not."""
        shaking_hands = [connection for connection in self._connections if connection.responder is None]
        for connection in shaking_hands[: max(0, len(shaking_hands) - n_most + 1)]:
            self.core.counters.peers_over_limit += 1
            connection.close()

    def _withdrawn(self, share: Share, cause: str) -> None:
        for connection in list(self._connections):
            if connection.responder is not None and connection.responder.share is share:
                connection.end_share(cause)


class Connection:
    """One peer.

    Attributes:
        responder: its queue pair, once attached.
    """

    def __init__(self, exchange: Exchange, sock: socket.socket) -> None:
        self.responder: Responder | None = None
        self._exchange = exchange
        self._core = exchange.core
        self._sock = sock
        self._ended = False
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._handshake = Handshake(nonce, exchange.dummy_token, self._core.shares.find)
        self._timer = self._core.timers.at(self._core.clock() + HANDSHAKE_NS, self._too_late)
        self._core.poller.watch(sock.fileno(), self._on_ready)

    def greet(self) -> None:
        """Send the challenge."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                self._sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._send(self._handshake.greeting())

    def end_share(self, cause: str) -> None:
        """The share is gone: take the peer's rights, tell it, and linger so that it gets exact errors."""
        if self.responder is None or self._ended:
            return
        self._ended = True
        self.responder.revoke()
        self._timer = self._core.timers.at(self._core.clock() + LINGER_NS, self.close)
        self._send(encode_frame(Ended(cause=cause)))

    def close(self) -> None:
        """Close the connection and destroy its queue pair. Twice is fine."""
        if self._sock.fileno() < 0:
            return
        self._timer.cancel()
        self._core.poller.forget(self._sock.fileno())
        self._sock.close()
        self._exchange.closed(self)
        if self.responder is not None:
            self.responder.destroy()
            self.responder = None

    def _on_ready(self, _mask: int) -> None:
        try:
            piece = self._sock.recv(_RECEIVE_BYTES)
            decision = self._handshake.feed(piece) if piece else None
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        except ProtocolError as problem:
            log.info("a peer sent nonsense: %s", problem)
            self._core.counters.attach_malformed += 1
            self.close()
            return
        if not piece:
            self.close()
        elif isinstance(decision, Denied):
            self._deny(decision)
        elif decision is not None:
            self._attach(decision)

    def _attach(self, accepted: Accepted) -> None:
        self._exchange.close_replaced(accepted)
        try:
            responder = Responder(self._core, self._exchange.cq, accepted.share, accepted.attach)
        except VerbsError as problem:
            self._deny(Denied(code="limit", message=str(problem)))
            return
        self.responder = responder
        self._timer.cancel()
        self._core.counters.attached += 1
        frame = responder.attached()
        frame.proof = proof_of(frame, accepted.share.token, self._handshake.nonce)
        self._send_frame(frame)

    def _deny(self, denied: Denied) -> None:
        counters = self._core.counters
        if denied.code == "malformed":
            counters.attach_malformed += 1
        else:
            counters.attach_refused += 1
        self._send_frame(denied)
        self.close()

    def _too_late(self) -> None:
        self._core.counters.peers_timed_out += 1
        self.close()

    def _send_frame(self, frame: Frame) -> None:
        self._send(encode_frame(frame))

    def _send(self, data: bytes) -> None:
        """Send a small piece; a peer whose window cannot take even that is given up."""
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            sent = 0
        if sent < len(data):
            self.close()
