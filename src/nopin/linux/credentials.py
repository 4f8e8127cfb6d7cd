"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_UCRED = struct.Struct("<3i")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Process, user and group that connected, as the kernel recorded them at connect()."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Credentials:
    """Ask the kernel who connected (SO_PEERCRED).

    Raises:
        OSError: not a connected Unix socket.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(raw))
