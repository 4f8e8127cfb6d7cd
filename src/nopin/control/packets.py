"""Packets with descriptors over a Unix SEQPACKET socket, the same for both sides.

`socket.recv_fds` is not used: it ignores its flags in some Python versions, and so cannot close on exec.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nopin.control.codec import ProtocolError
from nopin.control.messages import MESSAGE_BYTES_MAX

_FD_BYTES = array.array("i").itemsize


class OutOfDescriptors(ProtocolError):
    """Descriptors came that this process has no room for: the packet is lost with them, and the connection goes on."""


class Packet(NamedTuple):
    """One packet: its bytes (empty at the end of the connection) and the descriptors beside it, now ours."""

    data: bytes
    fds: list[int]


def send_packet(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet; the descriptors stay ours.

    Raises:
        OSError: as sendmsg does (BlockingIOError on a full non-blocking socket, BrokenPipeError, ...).
    """
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], beside, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket, max_fds: int, flags: int = 0) -> Packet:
    """Receive one packet with at most max_fds descriptors, which close on exec.

    Raises:
        ProtocolError: the packet was longer than any message, or more descriptors came; nothing is kept.
        OutOfDescriptors: there was room for them in the call, and none in this process; nothing is kept.
        OSError: as recvmsg does.
    """
    # CMSG_LEN, not CMSG_SPACE: the padding of the latter has room for one descriptor more.
    room = socket.CMSG_LEN(max_fds * _FD_BYTES) if max_fds else 0
    data, beside, got, _ = sock.recvmsg(MESSAGE_BYTES_MAX, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in beside:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        if got & socket.MSG_TRUNC:
            raise ProtocolError("the other side sent an oversized packet")
        if len(fds) < max_fds:
            raise OutOfDescriptors("this process has too many open files; raise its limit (ulimit -n)")
        raise ProtocolError(f"the other side sent more than {max_fds} descriptors")
    return Packet(data, fds.tolist())


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; one that is closed already is no error."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
