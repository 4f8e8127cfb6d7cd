"""What a server leaves to its successor, per arena: its files and its mappers' userfaultfds, with a word about each.

Kept in the owner's process (`linux.fd_store`), which need not do anything for it. Of several entries about one thing
the last one counts. Once more are outdated than not, the store is *turned over* from the front: what is outdated is
dropped, what counts is first put in again at the end. So processes may come and go, and change their mappings, as often
as they like.

The owner can write here what it likes, so a successor believes nothing: what does not parse, or is not what it says,
costs that owner its arena, and nobody else anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from typing import NamedTuple

import msgspec

from nopin.linux.fd_store import LABEL_BYTES_MAX, FdStore

VERSION = 3
_ARENA = 0
"""What an entry is about that is about no mapper; their numbers begin at 1."""
_OUTDATED_MAX = 64
"""Outdated entries, beyond as many as count, before the store is turned over."""


class ArenaEntry(msgspec.Struct, tag="arena"):
    """Beside it: the file of the bytes, that of the page table, the swap file.

    Attributes:
        budget_pages: None: whatever its family has.
        family: names the arenas that have a budget in common, those of one client; `family_pages` is that budget.
    """

    version: int
    name: str
    n_pages: int
    budget_pages: int | None
    family: int
    family_pages: int


class MapperEntry(msgspec.Struct, tag="mapper"):
    """Beside it: the userfaultfd; and the pidfd of its process.

    Attributes:
        places: (first page, pages, address) each; none: it maps nothing any more.
    """

    number: int
    places: list[tuple[int, int, int]]
    worker: bool
    pid: int


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


class _Queued(NamedTuple):
    """What the store's queue holds at one place.

    Attributes:
        about: number of a mapper, or `_ARENA`.
    """

    about: int
    serial: int


class ArenaStore:
    """The store of one arena. Owns it.

    Attributes:
        n_refused: entries for which there was no room: a successor knows an older state, or nothing, of those.
    """

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self._queue: deque[_Queued] = deque()
        self._newest: dict[int, int] = {}
        self._serial = 0
        self.n_refused = 0

    @property
    def ends(self) -> tuple[int, int]:
        """The two descriptors that the owner keeps copies of."""
        return self._store.ends

    def put_arena(self, entry: ArenaEntry, memory_fd: int, table_fd: int, swap_fd: int) -> bool:
        """Say what the arena is; False if there is no room."""
        return self._put(_ARENA, _encode(entry), [memory_fd, table_fd, swap_fd])

    def put_mapper(self, entry: MapperEntry, fds: list[int]) -> bool:
        """Say how a process maps it; False if there is no room."""
        return self._put(entry.number, _encode(entry), fds)

    def forget_mapper(self, number: int) -> None:
        """A process maps it no more: its last entry says so, or its address space has ended, which a successor sees."""
        self._newest.pop(number, None)

    def _put(self, about: int, label: bytes, fds: list[int]) -> bool:
        if len(label) > LABEL_BYTES_MAX:  # a process may cut its mapping into as many pieces as it likes
            self.n_refused += 1
            return False
        if len(self._queue) > 2 * len(self._newest) + _OUTDATED_MAX:
            self._turn_over()
        try:
            try:
                self._store.put(label, fds)
            except OSError:
                self._turn_over()
                self._store.put(label, fds)
        except OSError:
            self.n_refused += 1
            return False
        self._note(about)
        return True

    def _note(self, about: int) -> None:
        self._serial += 1
        self._queue.append(_Queued(about, self._serial))
        self._newest[about] = self._serial

    def _turn_over(self) -> None:
        """Drop what is outdated; stop where there is no room to go on, or where the owner has taken something out."""
        with contextlib.suppress(OSError):
            for _ in range(len(self._queue)):
                about, serial = self._queue[0]
                if self._newest.get(about) == serial:
                    self._put_again(about)
                self._store.drop_oldest()
                self._queue.popleft()

    def _put_again(self, about: int) -> None:
        """Put the oldest entry in at the end as well.

        Raises:
            OSError: there is no room, or no such entry.
        """
        oldest = self._store.oldest()
        if oldest is None:
            raise OSError(errno.ENOENT, "the store is empty")
        try:
            self._store.put(oldest.label, oldest.fds)
        finally:
            _close_all(oldest.fds)
        self._note(about)

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
                    self._note(_ARENA)
                    if len(fds) == 3 and entry.version == VERSION:
                        arena = entry, fds
                else:
                    self._note(entry.number)
                    if len(fds) == 2:
                        mappers[entry.number] = Mapped(entry, fds)
            if arena is None:
                return None
            alive = [mapped for mapped in mappers.values() if mapped.entry.places]
            for number in mappers.keys() - {mapped.entry.number for mapped in alive}:
                self.forget_mapper(number)
            return Left(arena[0], _copies(arena[1]), [Mapped(each.entry, _copies(each.fds)) for each in alive])

    def close(self) -> None:
        """Let go of our ends."""
        self._store.close()


def _copies(fds: list[int]) -> list[int]:
    return [os.dup(fd) for fd in fds]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
