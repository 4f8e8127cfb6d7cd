"""Messages between an attaching peer and the server that publishes a region, over TCP.

Each frame is a 4-byte big-endian length (at most FRAME_BYTES_MAX) and one msgpack message. The order:

    server -> peer   Challenge(version, nonce)
    peer   -> server Attach(share, proof, queue pair coordinates)
    server -> peer   Attached(array description, queue pair coordinates, proof)   or   Denied(code)
    ...              the connection stays open as long as the peer is attached
    server -> peer   Ended(cause)                        when the region is withdrawn or its owner ends

The token itself never travels. `proof` is HMAC-SHA256 keyed with the token over the nonce and every other
field, so a recorded Attach is worthless at the next connection, and nobody on the path can alter a
coordinate. Closing the connection destroys the peer's queue pair at the server.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

EXCHANGE_VERSION = 2
FRAME_BYTES_MAX = 16384
NONCE_BYTES = 32


class Frame(msgspec.Struct, tag_field="t", kw_only=True):
    """Base of every message."""


class Challenge(Frame, tag="challenge"):
    """First frame of the server."""

    version: int
    nonce: bytes


class Attach(Frame, tag="attach"):
    """The peer asks to be connected to a published region.

    Attributes:
        qpn, psn, gid, port: of its queue pair.
        replaces: the number of another queue pair at the same gid and port, whose connection broke: should the server
            not know that yet, it closes its end before it connects this one. 0 for none.
    """

    share: str
    qpn: int
    psn: int
    gid: bytes
    port: int
    path_mtu: int
    max_rd_atomic: int
    replaces: int  # no default: what a damaged message lacks must not be filled in before the proof is looked at
    proof: bytes = b""

    def is_replaced_by(self, later: Attach) -> bool:
        """Tell whether a peer asks for another connection in place of the one that it got by this."""
        return (self.gid, self.port, self.qpn) == (later.gid, later.port, later.replaces)


class Attached(Frame, tag="attached"):
    """The peer is connected.

    Attributes:
        dtype: the array's type, as `control.dtypes` writes it; `shape` and `strides` (bytes) as numpy's.
        address: the iova of the array's first element, to be used with `rkey`.
        span: bytes the region allows from its first byte at `start`.
        access: rights of the region (nic.abi.Access).
        path_mtu: the smaller of both ends'.
    """

    dtype: str
    shape: list[int]
    strides: list[int]
    address: int
    start: int
    span: int
    rkey: int
    access: int
    qpn: int
    psn: int
    gid: bytes
    port: int
    path_mtu: int
    max_rd_atomic: int
    proof: bytes = b""


class Denied(Frame, tag="denied"):
    """The peer is refused. A wrong token and an unknown share get the same answer."""

    code: str
    message: str


class Ended(Frame, tag="ended"):
    """The region is gone.

    Attributes:
        cause: ``"withdrawn"``, ``"owner exited"`` or ``"server stopping"``.
    """

    cause: str


AnyFrame = Challenge | Attach | Attached | Denied | Ended

_encoder = msgspec.msgpack.Encoder()


def proof_of(frame: Attach | Attached, token: bytes, nonce: bytes) -> bytes:
    """Compute the proof a frame must carry: HMAC-SHA256 over the nonce and the frame without its proof."""
    bare = msgspec.structs.replace(frame, proof=b"")
    return hmac.new(token, nonce + _encoder.encode(bare), hashlib.sha256).digest()
