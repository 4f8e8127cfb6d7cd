"""What programs may find in memory: of each word that was ever written, the values it may have.

A word is eight bytes at a multiple of eight; accesses are of whole words. One that was never written holds zero. A
store leaves one value; while pages are being given up, or copied for a child, more than one outcome is right, and the
first read that shows which it was decides.

The words of two places may be the same word (memory that is moving, memory that is shared): both then have the same
list.
"""

from __future__ import annotations

from collections.abc import Sequence

from nopin.ranges import Range

WORD_BYTES = 8

Values = list[int]


class Memory:
    """The words of one address space."""

    def __init__(self) -> None:
        self._words: dict[int, Values] = {}
        self._discards: list[Range] = []
        self._moves: list[tuple[Range, Range]] = []

    def words(self, where: Range) -> list[tuple[int, Values]]:
        """Return the words of a range that were ever accessed, by address."""
        return sorted((va, values) for va, values in self._words.items() if where.start <= va < where.end)

    def store(self, va: int, value: int) -> None:
        """A program stored a value."""
        self._values(va)[:] = [value, 0] if value and self._discarding(va) else [value]

    def load(self, va: int, found: int) -> Values | None:
        """A program found a value; returns what would have been right if this is not."""
        values = self._values(va)
        if found not in values:
            return list(values)
        if len(values) == 1:
            return None
        if found == 0 or not self._discarding(va):
            values[:] = [found]
        return None

    def map(self, where: Range) -> None:
        """Zeros are there from here on."""
        self._forget(where)

    def discard_begins(self, where: Range) -> None:
        """Zeros take the place of what is there, at some moment from here on."""
        self._discards.append(where)
        for _, values in self.words(where):
            if 0 not in values:
                values.append(0)

    def discard_ends(self, where: Range) -> None:
        """They have."""
        self._discards.remove(where)

    def move_begins(self, source: Range, target: Range) -> None:
        """The same words are at both places from here on."""
        self._forget(target)
        self._moves.append((source, target))
        for va, values in self.words(source):
            self._words[va - source.start + target.start] = values

    def move_ends(self, source: Range, target: Range) -> None:
        """They are at the old place no more."""
        self._moves.remove((source, target))
        self._forget(source)

    def copy(self) -> Memory:
        """Return words of their own with the same values."""
        twin = Memory()
        twin._words = {va: list(values) for va, values in self._words.items()}
        return twin

    def also(self, va: int, value: int) -> None:
        """A value is possible, too."""
        values = self._values(va)
        if value not in values:
            values.append(value)

    def _values(self, va: int) -> Values:
        assert va % WORD_BYTES == 0, "accesses are of whole words"
        values = self._words.get(va)
        if values is None:
            values = self._words[va] = [0]
            for source, target in self._moves:
                if source.start <= va < source.end:
                    self._words[va - source.start + target.start] = values
                elif target.start <= va < target.end:
                    self._words[va - target.start + source.start] = values
        return values

    def _discarding(self, va: int) -> bool:
        return bool(self._discards) and any(where.start <= va < where.end for where in self._discards)

    def _forget(self, where: Range) -> None:
        for va, _ in self.words(where):
            del self._words[va]


def words_of(va: int, data: bytes) -> Sequence[tuple[int, int]]:
    """Cut bytes into words: (address, value)."""
    assert va % WORD_BYTES == len(data) % WORD_BYTES == 0, "accesses are of whole words"
    if len(data) == WORD_BYTES:  # the common case
        return ((va, int.from_bytes(data, "little")),)
    return [(va + at, int.from_bytes(data[at : at + WORD_BYTES], "little")) for at in range(0, len(data), WORD_BYTES)]
