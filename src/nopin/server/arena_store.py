"""What a server leaves to its successor, per arena: its files and its mappers' userfaultfds, with a word about each.

Kept in the owner's process (`linux.fd_store`), which need not do anything for it. Entries are only ever added; of
several about one mapper the last one counts. The owner can write here what it likes, so a successor believes nothing:
what does not parse, or is not what it says, costs that owner its arena, and nobody else anything.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import msgspec

from nopin.linux.fd_store import LABEL_BYTES_MAX, FdStore

VERSION = 1


class ArenaEntry(msgspec.Struct, tag="arena"):
    """Beside it: the file of the bytes, that of the page table, the swap file.

    Attributes:
        budget_pages: None: whatever the server allows.
    """

    version: int
    name: str
    n_pages: int
    budget_pages: int | None


class MapperEntry(msgspec.Struct, tag="mapper"):
    """Beside it: the userfaultfd; and the pidfd of its process, if that is known.

    Attributes:
        places: (first page, pages, address) each; none: it maps nothing any more.
    """

    number: int
    places: list[tuple[int, int, int]]
    worker: bool
    pid: int | None


class Mapped(NamedTuple):
    """A mapper as a predecessor left it; the descriptors are the caller's."""

    entry: MapperEntry
    fds: list[int]


class Left(NamedTuple):
    """An arena as a predecessor left it; the descriptors are the caller's."""

    entry: ArenaEntry
    fds: list[int]
    mappers: list[Mapped]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ArenaEntry | MapperEntry).decode


class ArenaStore:
    """The store of one arena. Owns it."""

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self.n_refused = 0

    @property
    def ends(self) -> tuple[int, int]:
        """The two descriptors that the owner keeps copies of."""
        return self._store.ends

    def put_arena(self, entry: ArenaEntry, memory_fd: int, table_fd: int, swap_fd: int) -> None:
        """Say what the arena is; the first entry.

        Raises:
            OSError: there is no room.
        """
        self._store.put(_encode(entry), [memory_fd, table_fd, swap_fd])

    def put_mapper(self, entry: MapperEntry, fds: list[int]) -> None:
        """Say how a process maps it. Where there is no room, a successor will not know, which is counted."""
        label = _encode(entry)
        if len(label) > LABEL_BYTES_MAX:  # a process may cut its mapping into as many pieces as it likes
            self.n_refused += 1
            return
        try:
            self._store.put(label, fds)
        except OSError:
            self.n_refused += 1

    def left(self) -> Left | None:
        """Return what a predecessor left; None if it makes no sense.

        Raises:
            OSError: out of descriptors.
        """
        arena: tuple[ArenaEntry, list[int]] | None = None
        mappers: dict[int, Mapped] = {}
        with contextlib.ExitStack() as unused:
            for label, fds in self._store.entries():
                unused.callback(_close_all, fds)
                try:
                    entry = _decode(label)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    return None
                if isinstance(entry, ArenaEntry):
                    if arena is None and len(fds) == 3 and entry.version == VERSION:
                        arena = entry, fds
                elif len(fds) == 1 + (entry.pid is not None):
                    mappers[entry.number] = Mapped(entry, fds)
            if arena is None:
                return None
            alive = [mapped for mapped in mappers.values() if mapped.entry.places]
            return Left(arena[0], _copies(arena[1]), [Mapped(each.entry, _copies(each.fds)) for each in alive])

    def close(self) -> None:
        """Let go of our ends."""
        self._store.close()


def _copies(fds: list[int]) -> list[int]:
    return [os.dup(fd) for fd in fds]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
