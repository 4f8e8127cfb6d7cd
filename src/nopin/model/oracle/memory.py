"""What programs may find in memory: of each word that was ever written, the values it may have.

A word is eight bytes at a multiple of eight; accesses are of whole words. One that was never written holds zero. A
store leaves one value; while pages are being given up, or copied for a child, more than one outcome is right, and the
first read that shows which it was decides.

The words of two places may be the same word (memory that is moving, memory that is shared): both then have the same
list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct

from nopin.ranges import Range, subtract
from nopin.units import PAGE_SHIFT

WORD_BYTES = 8

Values = list[int]
"""What a word may hold: at least one value."""


class Memory:
    """The words of one address space, or of one file, whose addresses count from its start."""

    def __init__(self) -> None:
        self._words: dict[int, Values] = {}
        self._discards: list[tuple[Range, set[int]]] = []  # with the words stored to since it began
        self._given_up: set[int] = set()  # pages that may become zeros at any moment, until something is stored there
        self._giving_up: list[Range] = []  # where that is just beginning
        self._moves: list[tuple[Range, Range]] = []
        self._windows: list[tuple[Range, Memory, int]] = []  # parts that are other memory, from that address on

    def store(self, va: int, value: int) -> None:
        """A program stored a value."""
        home, at = self.home(va) if self._windows else (self, va)
        values = home._words.get(at) or home._first_access(at)
        values[0] = value
        if len(values) > 1:
            del values[1:]
        if home._given_up:
            home._take_again(at, values)
        for where, stored in home._discards:
            if where.start <= at < where.end:
                stored.add(at)
                if 0 not in values:
                    values.append(0)

    def load(self, va: int, found: int) -> Values | None:
        """A program found a value; returns what would have been right if this is not."""
        home, at = self.home(va) if self._windows else (self, va)
        values = home._words.get(at) or home._first_access(at)
        if found not in values:
            return list(values)
        if len(values) > 1 and (found == 0 or not home._discarding(at)):
            values[:] = [found]
        return None

    def map(self, where: Range) -> None:
        """Zeros are there from here on."""
        self._forget(where)
        if self._windows:
            self._windows = [
                (part, memory, start + part.start - seen.start)
                for seen, memory, start in self._windows
                for part in subtract([seen], where)
            ]

    def map_window(self, where: Range, memory: Memory, start: int) -> None:
        """Other memory is there from here on, from its address `start`."""
        self.map(where)
        self._windows.append((where, memory, start))

    def windows_of(self, memory: Memory) -> list[tuple[Range, int]]:
        """Return where other memory is seen, each with the address in it where that begins."""
        return [(where, start) for where, home, start in self._windows if home is memory]

    def discard_begins(self, where: Range) -> None:
        """Zeros take the place of what is there, at some moment from here on. Not of what is other memory's."""
        self._discards.append((where, set()))
        for _, values in self._within(where):
            if 0 not in values:
                values.append(0)

    def discard_ends(self, where: Range) -> None:
        """They have, but where something was stored meanwhile: there it may have come before or after."""
        at = next(at for at, discard in enumerate(self._discards) if discard[0] == where)
        _, stored = self._discards.pop(at)
        for va, values in self._within(where):
            if va not in stored:
                values[:] = [0]

    def give_up_begins(self, where: Range) -> None:
        """What is there may become zeros from here on, a page at a time; what is stored meanwhile, too."""
        self._giving_up.append(where)
        self._given_up.update(_pages(where))
        for _, values in self._within(where):
            if 0 not in values:
                values.append(0)

    def give_up_ends(self, where: Range) -> None:
        """What is stored from here on stays, with its whole page as that is by then."""
        self._giving_up.remove(where)

    def _take_again(self, va: int, values: Values) -> None:
        """Something was stored in a page that may have been given up."""
        if not any(where.start <= va < where.end for where in self._giving_up):
            self._given_up.discard(va >> PAGE_SHIFT)
        elif 0 not in values:
            values.append(0)

    def move_begins(self, source: Range, target: Range) -> None:
        """The same words are at both places from here on."""
        self._forget(target)
        self._moves.append((source, target))
        shift = (target.start - source.start) >> PAGE_SHIFT
        self._given_up |= {page + shift for page in self._given_up.intersection(_pages(source))}
        for va, values in self._within(source):
            self._words[va - source.start + target.start] = values

    def move_ends(self, source: Range, target: Range) -> None:
        """They are at the old place no more."""
        self._moves.remove((source, target))
        self._forget(source)

    def copy(self) -> Memory:
        """Return words of their own with the same values; what is other memory's is so there, too."""
        twin = Memory()
        twin._words = {va: list(values) for va, values in self._words.items()}
        twin._windows = list(self._windows)
        twin._given_up = set(self._given_up)
        return twin

    def also(self, va: int, value: int) -> None:
        """A value is possible, too."""
        home, at = self.home(va)
        values = home._words.get(at) or home._first_access(at)
        if value not in values:
            values.append(value)

    def peek(self, va: int) -> Values:
        """Return the values a word may have."""
        return self._words.get(va) or self._first_access(va)

    def known(self, where: Range) -> list[int]:
        """Return the addresses of words of a range that were ever accessed."""
        return [va for va, _ in self._within(where)]

    def home(self, va: int) -> tuple[Memory, int]:
        """Return whose word that is, and its address there."""
        for where, memory, start in self._windows:
            if where.start <= va < where.end:
                return memory, va - where.start + start
        return self, va

    def _within(self, where: Range) -> list[tuple[int, Values]]:
        """Return the words of a range that were ever accessed."""
        start, end = where.start, where.end
        return [(va, values) for va, values in self._words.items() if start <= va < end]

    def _first_access(self, va: int) -> Values:
        assert va % WORD_BYTES == 0, "accesses are of whole words"
        values = self._words[va] = [0]
        for source, target in self._moves:
            if source.start <= va < source.end:
                self._words[va - source.start + target.start] = values
            elif target.start <= va < target.end:
                self._words[va - target.start + source.start] = values
        return values

    def _discarding(self, va: int) -> bool:
        if self._given_up and va >> PAGE_SHIFT in self._given_up:
            return True
        return bool(self._discards) and any(where.start <= va < where.end for where, _ in self._discards)

    def _forget(self, where: Range) -> None:
        start, end = where.start, where.end
        if self._given_up:
            self._given_up = {page for page in self._given_up if not start <= page << PAGE_SHIFT < end}
        for va in [va for va in self._words if start <= va < end]:
            del self._words[va]


def _pages(where: Range) -> range:
    return range(where.start >> PAGE_SHIFT, where.end >> PAGE_SHIFT)


class _Words(dict[int, Callable[[bytes], tuple[int, ...]]]):
    """See `WORDS`."""

    def __missing__(self, n_bytes: int) -> Callable[[bytes], tuple[int, ...]]:
        assert n_bytes % WORD_BYTES == 0, "accesses are of whole words"
        unpack = self[n_bytes] = Struct(f"<{n_bytes // WORD_BYTES}Q").unpack
        return unpack


WORDS = _Words()
"""By how many bytes there are: what returns the words in them."""


def words_of(va: int, data: bytes) -> Iterator[tuple[int, int]]:
    """Cut bytes into words: (address, value)."""
    return zip(range(va, va + len(data), WORD_BYTES), WORDS[len(data)](data), strict=True)
