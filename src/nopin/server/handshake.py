"""The server's side of the connection exchange, up to the decision. No I/O, clock or randomness here.

Whether a share is unknown or the token is wrong must not show: both take the same steps over the same bytes
and get the same answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from nopin.control.codec import ProtocolError
from nopin.control.exchange import EXCHANGE_VERSION, Attach, Challenge, Denied, proof_of
from nopin.control.framing import FrameReader, encode_frame
from nopin.server.shares import Share

MTUS = (256, 512, 1024, 2048, 4096)
"""InfiniBand path MTUs, bytes."""
PSN_END = 1 << 24
QPN_END = 1 << 24


@dataclass(frozen=True, slots=True)
class Accepted:
    """The peer knows the token and asked for something possible."""

    share: Share
    attach: Attach


class Handshake:
    """One connection from its first byte to the decision.

    Args:
        nonce: fresh random bytes; what makes a recorded proof worthless.
        dummy_token: stands in for the token of an unknown share.
        find: looks up a published share by name.
    """

    def __init__(self, nonce: bytes, dummy_token: bytes, find: Callable[[str], Share | None]) -> None:
        self._nonce = nonce
        self._dummy_token = dummy_token
        self._find = find
        self._reader = FrameReader()
        self._decided = False

    @property
    def nonce(self) -> bytes:
        """What the answer's proof has to cover as well."""
        return self._nonce

    def greeting(self) -> bytes:
        """Return the bytes the server sends first."""
        return encode_frame(Challenge(version=EXCHANGE_VERSION, nonce=self._nonce))

    def feed(self, piece: bytes) -> Accepted | Denied | None:
        """Take received bytes; return the decision once there is one.

        Raises:
            ProtocolError: malformed, oversized, another message than Attach, or anything after it.
        """
        frames = self._reader.feed(piece)
        if self._decided and piece:
            raise ProtocolError("bytes after Attach")
        if not frames:
            return None
        if len(frames) > 1 or not isinstance(frames[0], Attach):
            raise ProtocolError("not one Attach")
        self._decided = True
        return self._decide(frames[0])

    def _decide(self, attach: Attach) -> Accepted | Denied:
        share = self._find(attach.share)
        token = self._dummy_token if share is None else share.token
        proven = hmac.compare_digest(proof_of(attach, token, self._nonce), attach.proof)
        if share is None or not proven:
            return Denied(code="token", message="no such share, or wrong token")
        if problem := _impossible(attach):
            return Denied(code="malformed", message=problem)
        return Accepted(share, attach)


def _impossible(attach: Attach) -> str:
    """Say what is wrong with the coordinates of a peer that knows the token; empty if nothing is."""
    checks = (
        (0 < attach.qpn < QPN_END, "the queue pair number does not fit in 24 bits"),
        (0 <= attach.psn < PSN_END, "the packet sequence number does not fit in 24 bits"),
        (len(attach.gid) == 16, "a GID has 16 bytes"),
        (0 < attach.port < 65536, "the UDP port is not in 1 ... 65535"),
        (attach.path_mtu in MTUS, f"the path MTU is none of {MTUS}"),
        (0 <= attach.max_rd_atomic < 256, "max_rd_atomic is not in 0 ... 255"),
        (0 <= attach.replaces < QPN_END, "the queue pair number to be replaced does not fit in 24 bits"),
    )
    return next((message for good, message in checks if not good), "")
