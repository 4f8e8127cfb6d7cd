"""What may be found in private mappings of files: the file's words, until a page is copied, then words of its own.

When a page is copied is not for programs to know: a store copies it for certain, and whoever else may write there may
have had it copied before. So a word may hold what the file held at any time since the mapping was made, or since the
word was last seen; one that is seen with a value that the file has no more was copied, and its page follows the file no
more.

Source: mmap(2), MAP_PRIVATE: whether changes of the file show is unspecified; Linux shows them until it copies.
"""

from __future__ import annotations

from nopin.model.oracle.memory import Memory, Values
from nopin.ranges import Range, subtract
from nopin.units import PAGE_SHIFT


class PrivateMemory(Memory):
    """The words of an address space that has private mappings of files.

    It is told before and after a word of a file changes (`before_change`, `after_change`). What is discarded or moved
    must not be of such a mapping.
    """

    def __init__(self) -> None:
        super().__init__()
        self._private: list[tuple[Range, Memory, int]] = []  # as `_windows`
        self._copied: set[int] = set()  # pages that follow their file no more

    @classmethod
    def over(cls, memory: Memory) -> PrivateMemory:
        """Return the words of an address space that had no such mapping, to go on with; they are the same lists."""
        if isinstance(memory, PrivateMemory):
            return memory
        made = cls()
        vars(made).update(vars(memory))
        return made

    def map_private(self, where: Range, file: Memory, start: int) -> None:
        """A file is mapped there from here on, from its address `start`."""
        self.map(where)
        self._private.append((where, file, start))

    def discard_begins(self, where: Range) -> None:
        """See `Memory`; not of a private mapping of a file."""
        self._refuse(where)
        super().discard_begins(where)

    def move_begins(self, source: Range, target: Range) -> None:
        """See `Memory`; not of a private mapping of a file, nor over one."""
        self._refuse(source)
        self._refuse(target)
        super().move_begins(source, target)

    def _refuse(self, where: Range) -> None:
        followed = all(not private.overlaps(where) for private, _, _ in self._private)
        assert followed, f"what MADV_DONTNEED and mremap do to a private mapping of a file is not followed: {where}"

    def before_change(self, file: Memory, where: Range) -> None:
        """Words of a file are about to change, those that were ever accessed."""
        for va, _ in self._seen_in(file, where):
            self._own(va)

    def after_change(self, file: Memory, where: Range) -> None:
        """They have; more than one outcome may be right."""
        for va, values in self._seen_in(file, where):
            if va >> PAGE_SHIFT not in self._copied:
                own = self._own(va)
                own += [value for value in values if value not in own]

    def store(self, va: int, value: int) -> None:
        """See `Memory`."""
        if self._file_of(va) is None:
            super().store(va, value)
            return
        self._own(va)[:] = [value]
        self._copied.add(va >> PAGE_SHIFT)

    def load(self, va: int, found: int) -> Values | None:
        """See `Memory`."""
        of = self._file_of(va)
        if of is None:
            return super().load(va, found)
        own = self._own(va)
        if found not in own:
            return list(own)
        now, page = of[0].peek(of[1]), va >> PAGE_SHIFT
        if found not in now:
            self._copied.add(page)
        own[:] = [found] if page in self._copied else [found, *(value for value in now if value != found)]
        return None

    def also(self, va: int, value: int) -> None:
        """See `Memory`."""
        if self._file_of(va) is None:
            super().also(va, value)
        elif value not in self._own(va):
            self._own(va).append(value)

    def map(self, where: Range) -> None:
        """See `Memory`."""
        super().map(where)
        self._private = [
            (part, file, start + part.start - seen.start)
            for seen, file, start in self._private
            for part in subtract([seen], where)
        ]
        self._copied -= set(range(where.start >> PAGE_SHIFT, where.end >> PAGE_SHIFT))

    def windows_of(self, memory: Memory) -> list[tuple[Range, int]]:
        """See `Memory`."""
        return super().windows_of(memory) + [(where, start) for where, file, start in self._private if file is memory]

    def copy(self) -> Memory:
        """See `Memory`; of what may be copied just now the twin may have either."""
        twin = PrivateMemory.over(super().copy())
        twin._private = list(self._private)
        twin._copied = set(self._copied)
        return twin

    def _file_of(self, va: int) -> tuple[Memory, int] | None:
        for where, file, start in self._private:
            if where.start <= va < where.end:
                return file, va - where.start + start
        return None

    def _own(self, va: int) -> Values:
        """Return the values that a word of a private mapping may have: at first what the file has."""
        values = self._words.get(va)
        if values is None:
            of = self._file_of(va)
            assert of is not None
            values = self._words[va] = list(of[0].peek(of[1]))
        return values

    def _seen_in(self, file: Memory, where: Range) -> list[tuple[int, Values]]:
        """Return where words of a file, those in `where` that were ever accessed, are seen here, with their values."""
        found = []
        for seen, home, start in self._private:
            for at in file.known(where) if home is file else ():
                va = seen.start + at - start
                if seen.start <= va < seen.end:
                    found.append((va, file.peek(at)))
        return found
