"""A store of descriptors that lives in somebody else's process.

What must outlive a process that may be killed at any moment is kept by another that need not do anything for it: a
connected pair of sockets whose both ends the *keeper* holds. A descriptor sent into one end and never received stays
open in the queue of the other, with the few bytes sent beside it. Whoever can take the two ends out of the keeper
(`pidfd_getfd`) can look at everything that is there, without taking it out (MSG_PEEK), and go on adding.

That is how a killed device server leaves a client blocked at a page fault instead of reading zeros: the userfaultfd is
still open in the client's store, and the next server finds it there. The keeper's threads may all be blocked meanwhile.

The order is that of `put`. Only the oldest entry can be removed, so whoever wants to be rid of one in the middle puts
those before it in again at the end, each before it is removed in front: at every moment everything is there. The queue
bounds how much fits (some thousand entries, fewer for the unprivileged), which is said by `put`.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

_SO_PEEK_OFF = 42
"""asm-generic/socket.h: where in the queue the next MSG_PEEK looks."""
_SO_SNDBUFFORCE = 32
_QUEUE_BYTES = 4 << 20
LABEL_BYTES_MAX = 4096
FDS_MAX = 8
_FD_BYTES = array.array("i").itemsize


class Stored(NamedTuple):
    """One entry: the bytes given with it, and duplicates of its descriptors, now the caller's."""

    label: bytes
    fds: list[int]


class FdStore:
    """A store, by its two ends. Owns them if it does not raise.

    Raises:
        OSError: they are not the ends of a SOCK_SEQPACKET pair.
    """

    def __init__(self, inbox_fd: int, outbox_fd: int) -> None:
        self._inbox = socket.socket(fileno=inbox_fd)
        self._outbox = socket.socket(fileno=outbox_fd)
        if self._inbox.family != socket.AF_UNIX or self._inbox.type != socket.SOCK_SEQPACKET:
            self._inbox.detach()
            self._outbox.detach()
            raise OSError(errno.EINVAL, "these descriptors are no store")

    @classmethod
    def create(cls) -> FdStore:
        """Make an empty store.

        Raises:
            OSError: out of descriptors.
        """
        inbox, outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            outbox.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _QUEUE_BYTES)
        except PermissionError:  # without CAP_NET_ADMIN no more than net.core.wmem_max
            outbox.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
        return cls(inbox.detach(), outbox.detach())

    @property
    def ends(self) -> tuple[int, int]:
        """The two descriptors, for the keeper to have copies of."""
        return self._inbox.fileno(), self._outbox.fileno()

    def put(self, label: bytes, fds: Sequence[int]) -> None:
        """Add an entry; the descriptors stay the caller's.

        Raises:
            OSError: EAGAIN when the store is full, EMFILE or ETOOMANYREFS when too many descriptors are under way.
        """
        assert len(label) <= LABEL_BYTES_MAX
        assert 0 < len(fds) <= FDS_MAX
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._outbox.sendmsg([label], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def entries(self) -> list[Stored]:
        """Return every entry, oldest first, leaving all of them where they are.

        Raises:
            OSError: out of descriptors; those received so far were closed.
        """
        self._inbox.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        found: list[Stored] = []
        try:
            while (entry := self._peek()) is not None:
                found.append(entry)
        except OSError:
            for entry in found:
                _close_all(entry.fds)
            raise
        return found

    def oldest(self) -> Stored | None:
        """Return the oldest entry, leaving it where it is; None if there is none.

        Raises:
            OSError: out of descriptors.
        """
        self._inbox.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        return self._peek()

    def drop_oldest(self) -> None:
        """Remove the oldest entry. There has to be one."""
        self._inbox.recv(1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)  # no room for descriptors: they are closed

    def close(self) -> None:
        """Close this process's ends; the entries live on with the keeper's. Twice is fine."""
        self._inbox.close()
        self._outbox.close()

    def _peek(self) -> Stored | None:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        room = socket.CMSG_SPACE(FDS_MAX * _FD_BYTES)
        try:
            label, beside, got, _ = self._inbox.recvmsg(LABEL_BYTES_MAX, room, flags)
        except BlockingIOError:
            return None
        fds = array.array("i")
        for level, kind, payload in beside:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
        if got & socket.MSG_CTRUNC:
            _close_all(fds)
            raise OSError(errno.EMFILE, "no room for the descriptors of a store")
        return Stored(label, fds.tolist()) if label else None


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
