"""The attaching side of the connection exchange: a TCP connection that lives as long as the attachment."""

from __future__ import annotations

import hmac
import select
import socket
import time

from nopin.control.codec import ProtocolError
from nopin.control.exchange import EXCHANGE_VERSION, Attach, Attached, Challenge, Denied, Ended, Frame, proof_of
from nopin.control.framing import FrameReader, encode_frame
from nopin.control.mending import LOST
from nopin.control.url import ShareUrl
from nopin.errors import AttachRefused, PeerError

_PIECE_BYTES = 65536


class PeerConnection:
    """A connection to the exchange of the server that publishes a share.

    Args:
        url: where, and the secret.
        deadline_ns: on the monotonic clock, for `connect` and `attach` together.

    Raises:
        PeerError: nobody answers there.
    """

    def __init__(self, url: ShareUrl, deadline_ns: int) -> None:
        self._url = url
        self._deadline_ns = deadline_ns
        self._where = f"{url.host}:{url.port}"
        self._reader = FrameReader()
        self._cause = ""
        try:
            self._sock = socket.create_connection((url.host, url.port), timeout=self._left_s())
        except OSError as problem:
            reason = problem.strerror or problem
            raise PeerError(
                f"no device server answers at {self._where} ({reason}); is the owner of the share still running?"
            ) from problem

    def fileno(self) -> int:
        """Return the descriptor; readable when the share ended."""
        return self._sock.fileno()

    def attach(self, attach: Attach) -> Attached:
        """Prove that we know the token and exchange queue pair coordinates.

        Raises:
            AttachRefused: unknown share or wrong token, or the server has no room.
            PeerError: it does not answer, closes the connection, or does not know the token itself.
        """
        try:
            challenge = self._receive()
            if not isinstance(challenge, Challenge):
                raise ProtocolError(f"{type(challenge).__name__} instead of Challenge")
            if challenge.version != EXCHANGE_VERSION:
                raise AttachRefused(
                    f"{self._where} speaks exchange version {challenge.version}, we {EXCHANGE_VERSION}",
                    code="version",
                )
            attach.proof = proof_of(attach, self._url.token, challenge.nonce)
            self._sock.sendall(encode_frame(attach))
            answer = self._receive()
        except (OSError, ProtocolError) as problem:
            raise PeerError(f"attaching at {self._where} failed: {problem or 'no answer in time'}") from problem
        if isinstance(answer, Denied):
            raise AttachRefused(f"{self._where} refused: {answer.message}", code=answer.code)
        if not isinstance(answer, Attached):
            raise PeerError(f"{self._where} answered {type(answer).__name__} to an attach")
        expected = proof_of(answer, self._url.token, challenge.nonce)
        if not hmac.compare_digest(answer.proof, expected):
            raise PeerError(f"{self._where} does not know the share's token itself: it is not the owner's server")
        self._sock.setblocking(False)
        return answer

    def ended(self, grace_s: float = 0.0) -> str:
        """Return why the share ended, or nothing while it has not; waits up to `grace_s` for the news."""
        if self._cause or self._sock.fileno() < 0:
            return self._cause
        if grace_s:
            select.select([self._sock], [], [], grace_s)
        try:
            piece = self._sock.recv(_PIECE_BYTES)
            frames = self._reader.feed(piece)
        except BlockingIOError:
            return ""
        except (OSError, ProtocolError):
            piece, frames = b"", []
        self._cause = next((frame.cause for frame in frames if isinstance(frame, Ended)), "")
        if not piece and not self._cause:
            self._cause = LOST
        return self._cause

    def close(self) -> None:
        """Detach. Twice is fine."""
        self._sock.close()

    def _receive(self) -> Frame:
        while True:
            self._sock.settimeout(self._left_s())
            piece = self._sock.recv(_PIECE_BYTES)
            if not piece:
                raise ProtocolError("it closed the connection")
            frames = self._reader.feed(piece)
            if frames:
                return frames[0]

    def _left_s(self) -> float:
        return max(1e-3, (self._deadline_ns - time.monotonic_ns()) / 1e9)
