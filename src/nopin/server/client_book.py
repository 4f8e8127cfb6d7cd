"""A client's share book, as the server keeps it: in memory that the client holds, found by a successor."""

from __future__ import annotations

import errno
import fcntl
import os

from nopin.control.share_book import SLOT_BYTES, BookFull, ShareBook, ShareEntry
from nopin.errors import UsageError
from nopin.linux import memfd
from nopin.server.refusal import refuse_limit
from nopin.server.registry import Record, Registry


class ClientBook:
    """The book behind a descriptor, which stays the caller's.

    Args:
        pid: of the client, which holds the same memfd.
        fresh: nothing is in it.

    Attributes:
        left: what was in it already.
        record: names it in the registry.

    Raises:
        UsageError: the descriptor is no share book.
        OSError: it cannot be mapped, or the process is gone.
    """

    def __init__(self, registry: Registry, pid: int, fd: int, *, fresh: bool) -> None:
        try:
            seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
        except OSError as problem:
            raise UsageError(f"the share book is no memfd: {problem.strerror}") from problem
        if not seals & fcntl.F_SEAL_SHRINK or not size or size % SLOT_BYTES:
            raise UsageError("the share book is of an odd size, or could be cut short under whoever has it mapped")
        self.record = Record.of(pid, [fd])
        self._registry = registry
        self._book = ShareBook(memfd.map_array(fd), b"" if fresh else os.pread(fd, size, 0))
        self.left: list[ShareEntry] = self._book.entries
        self._is_noted = False

    def note(self, entry: ShareEntry) -> None:
        """Write a share down, so that it outlives the server.

        Raises:
            ServerRefused: there is no room for it.
        """
        try:
            self._book.note(entry)
        except BookFull as problem:
            raise refuse_limit(f"the share book is full: {problem}", errno.ENOSPC) from problem
        self.announce()

    def strike(self, name: str) -> None:
        """A share has ended."""
        self._book.strike(name)

    def announce(self) -> None:
        """Have the registry name it; not before there is something in it, because most clients never share."""
        if not self._is_noted:
            self._is_noted = True
            self._registry.add_book(self.record)

    def close(self) -> None:
        """The client has ended."""
        if self._is_noted:
            self._registry.remove_book(self.record)


def make_book(n_shares: int) -> int:
    """Make the memfd of a book with room for so many shares, which take memory only once they are there.

    Raises:
        OSError: out of descriptors.
    """
    return memfd.create("nopin-shares", n_shares * SLOT_BYTES)
