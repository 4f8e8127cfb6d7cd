"""A process that gives pages of its own up now and then: their bytes are zeros until it stores to them again."""

from __future__ import annotations

from nopin.lab.stress.actor import Actor
from nopin.lab.stress.log import Layout, Words
from nopin.linux.libc import LIBC, checked

MADV_REMOVE = 9


class Giver:
    """Of the pages that are given up, a share is its own: nobody else stores there.

    Args:
        actor: by which it stores and reads; its index says which share, of `n_givers`.
        array: all pages, mapped in this process.
    """

    def __init__(self, actor: Actor, array: Words, index: int, n_givers: int) -> None:
        self._actor = actor
        self._array = array
        self._pages = _share(actor.log.layout, index, n_givers)

    def store(self) -> None:
        """Store to a page of its own, and read it."""
        page = self._actor.draw.choice(self._pages)
        self._actor.write(page)
        self._actor.read(slice(page, page + 1))

    def give_up(self) -> None:
        """Give up a run of pages with MADV_REMOVE."""
        first = self._actor.draw.choice(self._pages)
        pages = slice(first, self._actor.draw.randrange(first, self._pages.stop) + 1)
        part = self._array[pages]
        self._actor.log.announce_removal(pages)
        checked(LIBC.madvise(part.ctypes.data, part.nbytes, MADV_REMOVE), "madvise")
        self._actor.log.note_removal(pages)


def _share(layout: Layout, index: int, n_givers: int) -> range:
    n = layout.n_given_up // n_givers
    first = layout.n_plain + index * n
    return range(first, first + n)
