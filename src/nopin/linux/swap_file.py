"""A nameless file that pages go to, read at once where its bytes are cached."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nopin.mm.space import Bytes
from nopin.units import PAGE_BYTES

_NOWAIT = os.RWF_NOWAIT
_PIECES_PER_CALL = 1024  # IOV_MAX
_SHORT_BYTES = 2 * PAGE_BYTES
"""To find out where memory begins takes longer than a slow copy of this much, and to get some takes as long as that."""


class SwapFile:
    """One swap file, without a name, so that it vanishes with its last descriptor. Grows as it is written.

    Errors of reading and writing are returned, not raised: the pager decides what they mean.

    Args:
        directory: where it lies; on a disk, not on tmpfs, if it is to save memory.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, directory: Path) -> None:
        self._begin(_open_nameless(directory))

    def _begin(self, fd: int) -> None:
        self._fd = fd
        self._nowait = True
        self._short = np.empty(_SHORT_BYTES, np.uint8)  # where little is read to, again and again
        self._places: dict[int, tuple[Bytes, list[memoryview]]] = {}  # as much of it as is wanted, by length

    @classmethod
    def adopt(cls, fd: int) -> SwapFile:
        """Go on with a swap file that is open already; owns the descriptor."""
        file = cls.__new__(cls)
        file._begin(fd)
        return file

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def read_cached(self, offset_bytes: int, length_bytes: int) -> Bytes | None:
        """Return the bytes if they need not come from a medium; None if they must, or cannot be told.

        What is returned is valid until the next call. One thread at a time.
        """
        if not self._nowait:
            return None
        buffer, pieces = self._places.get(length_bytes) or self._place_of(length_bytes)
        try:
            n_read = os.preadv(self._fd, pieces, offset_bytes, _NOWAIT)
        except BlockingIOError:
            return None
        except OSError as problem:
            self._nowait = problem.errno != errno.EOPNOTSUPP  # a file system without it
            return None
        return buffer if n_read == length_bytes else None

    def _place_of(self, length_bytes: int) -> tuple[Bytes, list[memoryview]]:
        """Return where to read so much to."""
        if length_bytes > _SHORT_BYTES:
            buffer = _page_aligned(length_bytes)
            return buffer, [buffer.data]
        buffer = self._short[:length_bytes]
        place = self._places[length_bytes] = buffer, [buffer.data]
        return place

    def read(self, offset_bytes: int, length_bytes: int) -> Bytes | int:
        """Return (length_bytes,) uint8, or the errno; EIO where the file ends before. May wait; any thread."""
        buffer = _page_aligned(length_bytes)
        view, done = buffer.data, 0
        try:
            while done < length_bytes:
                n_read = os.preadv(self._fd, [view[done:]], offset_bytes + done)
                if n_read == 0:
                    return errno.EIO
                done += n_read
        except OSError as problem:
            return problem.errno or errno.EIO
        return buffer

    def write(self, offset_bytes: int, pieces: Sequence[Bytes]) -> int:
        """Write pieces one after the other; returns the errno, 0 if all was written. May wait; any thread."""
        try:
            for at in range(0, len(pieces), _PIECES_PER_CALL):
                offset_bytes += self._write_all(offset_bytes, pieces[at : at + _PIECES_PER_CALL])
        except OSError as problem:
            return problem.errno or errno.EIO
        return 0

    def close(self) -> None:
        """Close this descriptor. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_all(self, offset_bytes: int, pieces: Sequence[Bytes]) -> int:
        """Write pieces; returns their bytes.

        Raises:
            OSError: as pwritev; ENOSPC also where it takes nothing any more.
        """
        length = sum(piece.nbytes for piece in pieces)
        done = os.pwritev(self._fd, [piece.data for piece in pieces], offset_bytes)
        if done < length:  # a short write; what is left goes in one piece, which is rare enough
            rest = memoryview(b"".join(piece.data for piece in pieces))
            while done < length:
                n_written = os.pwrite(self._fd, rest[done:], offset_bytes + done)
                if n_written == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += n_written
        return length


def _page_aligned(length_bytes: int) -> Bytes:
    """Return fresh memory that begins with a page, unless it is short.

    Large allocations of malloc begin 16 bytes into one. A copy from the page cache to there is three to four times as
    slow: each load follows a store to the same offset in another page, and the processor takes one for the other.
    """
    if length_bytes <= _SHORT_BYTES:
        return np.empty(length_bytes, np.uint8)
    memory = np.empty(length_bytes + PAGE_BYTES, np.uint8)
    return memory[-memory.ctypes.data % PAGE_BYTES :][:length_bytes]


def _open_nameless(directory: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # a file system without nameless files
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    fd, path = tempfile.mkstemp(prefix="nopin-swap-", dir=directory)
    os.unlink(path)
    return fd
