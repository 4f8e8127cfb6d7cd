"""The share book: what a client has published, in memory that it holds itself, so that it outlives the server.

A book is a memfd of equal slots. The server writes a share into a free slot before it answers, and clears the slot when
the share ends; a successor reads what is there. Either side may be killed at any moment, which leaves its stores up to
then, in program order: so the text goes in first, then its length and checksum. A slot that does not check is a share
that was never told of.

The client writes only one thing: it clears the slot of a share that it closes while there is no server.
It can write anything else, too, so what is read is judged like any other message.
"""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np
from numpy.typing import NDArray

SLOT_BYTES = 2048
"""An array of 64 dimensions, numpy's most, takes some 1.4 KB."""
VERSION = 1
_HEADER = struct.Struct("<II")  # length of the text, its checksum
_CLEAR = bytes(_HEADER.size)


class ShareEntry(msgspec.Struct, kw_only=True):
    """A share: its name and secret, and what was asked for when its region was registered and when it was published.

    Attributes as of `control.messages.Register`, `Publish` and `Published`.
    """

    version: int = VERSION
    name: str
    token: bytes
    address: int
    length: int | None
    iova: int
    access: int
    discipline: int
    ring_fd: int | None
    dtype: str
    shape: list[int]
    strides: list[int]
    offset: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ShareEntry).decode


class BookFull(Exception):
    """Every slot is taken, or the share takes more than one."""


class ShareBook:
    """A book.

    Args:
        memory: (n * SLOT_BYTES,) uint8; another process may write there at any time. Only touched where a share is or
            comes: looking at an untouched page of a memfd would make it take memory.
        before: its bytes, if there may be shares in it already; a fresh book has none.

    Attributes:
        entries: what was in it.
    """

    def __init__(self, memory: NDArray[np.uint8], before: bytes = b"") -> None:
        self._memory = memory.data
        self._n_slots = len(memory) // SLOT_BYTES
        self._n_used = len(before) // SLOT_BYTES
        self._free: list[int] = []
        self._slots: dict[str, int] = {}
        self.entries: list[ShareEntry] = []
        for slot in range(self._n_used):
            entry = _read(before, slot * SLOT_BYTES)
            if entry is None or entry.name in self._slots:
                self._free.append(slot)
            else:
                self._slots[entry.name] = slot
                self.entries.append(entry)

    def note(self, entry: ShareEntry) -> None:
        """Write a share down.

        Raises:
            BookFull: there is no room for it.
        """
        text = _encode(entry)
        if len(text) > SLOT_BYTES - _HEADER.size or (not self._free and self._n_used == self._n_slots):
            raise BookFull(f"{len(self._slots)} shares are in it, and this one takes {len(text)} bytes")
        if not self._free:
            self._free.append(self._n_used)
            self._n_used += 1
        slot = self._slots[entry.name] = self._free.pop()
        start = slot * SLOT_BYTES + _HEADER.size
        self._memory[start : start + len(text)] = text
        _HEADER.pack_into(self._memory, slot * SLOT_BYTES, len(text), zlib.crc32(text))

    def strike(self, name: str) -> None:
        """Clear a share's slot. Not being there is fine."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._memory[slot * SLOT_BYTES : slot * SLOT_BYTES + _HEADER.size] = _CLEAR
            self._free.append(slot)


def _read(book: bytes, start: int) -> ShareEntry | None:
    """Return the share of the slot at `start`, if a whole one is there."""
    length, checksum = _HEADER.unpack_from(book, start)
    if not 0 < length <= SLOT_BYTES - _HEADER.size:
        return None
    text = book[start + _HEADER.size : start + _HEADER.size + length]
    if zlib.crc32(text) != checksum:
        return None
    try:
        entry = _decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return entry if entry.version == VERSION else None
