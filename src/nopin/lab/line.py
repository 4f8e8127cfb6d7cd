"""A line between two measuring processes: typed messages over a connected stream socket.

Each message is a 4-byte big-endian length and one msgpack value. The same line serves a child process (over a
socket pair) and a partner on another host (over TCP), so a measurement is written once for both.
"""

from __future__ import annotations

import socket
from typing import Any, Generic, TypeVar

import msgspec

from nopin.errors import PeerError

MESSAGE_BYTES_MAX = 1 << 20
_encode = msgspec.msgpack.Encoder().encode
Received = TypeVar("Received")


class PartnerGone(PeerError):
    """The process on the other end of the line has ended, or closed it."""


class Line(Generic[Received]):
    """One end of a line on which values of one type arrive."""

    def __init__(self, sock: socket.socket, received: Any = Any) -> None:
        self._sock = sock
        self._decoder = msgspec.msgpack.Decoder(received)

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
            PartnerGone: the other process is gone.
        """
        body = _encode(message)
        try:
            self._sock.sendall(len(body).to_bytes(4, "big") + body)
        except (BrokenPipeError, ConnectionResetError):
            raise _gone() from None

    def receive(self, timeout_s: float | None = None) -> Received:
        """Wait for the next message.

        Raises:
            PeerError: the other process is gone, said something that is no message, or said nothing in time.
        """
        self._sock.settimeout(timeout_s)
        length = int.from_bytes(self._exactly(4), "big")
        if length > MESSAGE_BYTES_MAX:
            raise PeerError(f"a message of {length} bytes was announced, {MESSAGE_BYTES_MAX} is the most")
        try:
            message: Received = self._decoder.decode(self._exactly(length))
        except msgspec.DecodeError as wrong:
            raise PeerError(f"the partner said something unexpected: {wrong}") from None
        return message

    def of_type(self, received: Any) -> Line[Any]:
        """Return the same line, expecting messages of one type; use only that one from now on."""
        return Line(self._sock, received)

    def fileno(self) -> int:
        """Return the socket's descriptor, readable when a message or the end has arrived."""
        return self._sock.fileno()

    def close(self) -> None:
        """End the line; the other side's `receive` raises PeerError."""
        self._sock.close()

    def _exactly(self, n_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < n_bytes:
            try:
                piece = self._sock.recv(n_bytes - len(received))
            except TimeoutError:
                raise PeerError("the partner said nothing in time") from None
            except ConnectionResetError:
                raise _gone() from None
            if not piece:
                raise _gone()
            received += piece
        return bytes(received)


def _gone() -> PartnerGone:
    return PartnerGone("the process on the other end of a measurement has ended")
