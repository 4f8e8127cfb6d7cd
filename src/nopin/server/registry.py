"""Where a successor finds what outlives a server: a file beside the socket that names the processes that hold it.

A process number may be used again, so the time at which the process started goes with it. The descriptors are named by
what they are (`linux.fd_identity`), not by number: the process may hold them under any, and so may a forked child, when
its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from nopin.control.legacy import Legacy
from nopin.control.packets import close_all
from nopin.linux.fd_identity import Identity, find_fds, holders, identity_of
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import start_time


class Place(msgspec.Struct, frozen=True):
    """Where peers reach a server: its RoCEv2 address, and its exchange."""

    roce_host: str
    exchange_host: str
    exchange_port: int


class Held(NamedTuple):
    """Descriptors that some process holds for a successor: that process, and copies. Both are the caller's."""

    process: PidFd
    fds: list[int]

    def close(self) -> None:
        """Let go of them."""
        self.process.close()
        close_all(self.fds)


class Record(msgspec.Struct, frozen=True):
    """Descriptors kept in a process.

    Attributes:
        pid: of the owner; `started` says when it did, in clock ticks since the machine did.
        kept: what they are.
    """

    pid: int
    started: int
    kept: tuple[Identity, ...]

    @classmethod
    def of(cls, pid: int, fds: list[int]) -> Record:
        """Make the record of a process that has copies of these descriptors of ours.

        Raises:
            OSError: the process is gone.
        """
        return cls(pid, start_time(pid), tuple(identity_of(fd) for fd in fds))

    def from_owner(self) -> Held | None:
        """Take the descriptors out of their owner; None if it is gone, or has let go of them."""
        try:
            process = PidFd.open(self.pid)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            if start_time(self.pid) == self.started and not process.exited():
                held = self._take(process)
                if held is not None:
                    return held
        process.close()
        return None

    def from_anyone(self) -> Held | None:
        """Take the descriptors out of their owner, or else of a process that inherited them; None: nobody has them."""
        return self.from_owner() or next(self._others(), None)

    def _others(self) -> Iterator[Held]:
        for pid in holders(self.kept):
            with contextlib.suppress(OSError):
                process = PidFd.open(pid)
                held = self._take(process)
                if held is None:
                    process.close()
                else:
                    yield held

    def _take(self, process: PidFd) -> Held | None:
        numbers = find_fds(process.pid, self.kept)
        taken: list[int] = []
        with contextlib.suppress(OSError, KeyError):
            for each in self.kept:
                taken.append(process.take_fd(numbers[each]))
            if tuple(identity_of(fd) for fd in taken) == self.kept:  # else a number was used again meanwhile
                return Held(process, taken)
        close_all(taken)
        return None


class Content(msgspec.Struct):
    """What is in the file.

    Attributes:
        arenas: stores of arenas (`server.arena_store`).
        books: share books of clients (`control.share_book`).
    """

    place: Place | None = None
    arenas: list[Record] = msgspec.field(default_factory=list)
    books: list[Record] = msgspec.field(default_factory=list)


_decode = msgspec.json.Decoder(Content).decode


class Registry:
    """The file at `path`: each change replaces it as a whole.

    Attributes:
        place: where peers reach us; goes with the records.
        left: what a predecessor left; empty where there was none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.place: Place | None = None
        self.left = self._read()
        self._arenas = Legacy(self.left.arenas)
        self._books = Legacy(self.left.books)

    def _read(self) -> Content:
        try:
            return _decode(self._path.read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return Content()

    def add_arena(self, record: Record) -> None:
        """Note an arena."""
        self._arenas.add(record)
        self._write()

    def remove_arena(self, record: Record) -> None:
        """An arena has ended, or cannot be taken over. Not noted is fine."""
        if self._arenas.remove(record):
            self._write()

    def add_book(self, record: Record) -> None:
        """Note a client's share book."""
        self._books.add(record)
        self._write()

    def remove_book(self, record: Record) -> None:
        """A client has ended, or cannot be taken over. Not noted is fine."""
        if self._books.remove(record):
            self._write()

    def disown(self) -> None:
        """Take over nothing of what a predecessor left."""
        self._arenas.disown()
        self._books.disown()

    @property
    def n_arenas(self) -> int:
        """Arenas noted."""
        return len(self._arenas.records)

    def _write(self) -> None:
        """Replace the file. A full disk costs the successor, not us."""
        fresh = self._path.with_name(self._path.name + ".new")
        with contextlib.suppress(OSError):
            content = Content(self.place, list(self._arenas.records), list(self._books.records))
            if not content.arenas and not content.books:
                self._path.unlink(missing_ok=True)
                return
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(content))
            fresh.rename(self._path)
