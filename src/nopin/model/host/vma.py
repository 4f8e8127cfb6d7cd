"""Mappings of an address space: which ranges exist, with which rights, and what is behind them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from enum import Flag, auto
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

if TYPE_CHECKING:
    from nopin.model.host.files import File

_first = attrgetter("first")


NO_PAGE = 1 << 52
"""One past the last page of any address space."""


class Prot(Flag):
    """Rights of a mapping."""

    NONE = 0
    READ = auto()
    WRITE = auto()


RW = Prot.READ | Prot.WRITE

_WRITABLE = (RW, Prot.WRITE)


class Vma(msgspec.Struct, frozen=True):
    """Pages [first, end) of an address space that are alike (vm_area_struct).

    Attributes:
        shared: stores are seen by all who map the same; otherwise each has a copy of what it wrote.
        file: what is behind it, from page `offset` on; None: zeros.
        huge: whole 2 MiB may be brought as one page.
        fork: ``"copy"``, ``"omit"`` (MADV_DONTFORK) or ``"wipe"`` (MADV_WIPEONFORK).
        mergeable: pages with the same bytes may become one (MADV_MERGEABLE).
    """

    first: int
    end: int
    prot: Prot
    shared: bool = False
    file: File | None = None
    offset: int = 0
    huge: bool = False
    fork: str = "copy"
    mergeable: bool = False

    @property
    def n(self) -> int:
        """Pages covered."""
        return self.end - self.first

    def allows(self, *, write: bool) -> bool:
        """Tell whether an access is allowed; what may be written may be read, as on the machines there are."""
        return self.prot in _WRITABLE if write else self.prot is not Prot.NONE

    def index(self, page: int) -> int:
        """Return the page of the file that a page of this mapping shows."""
        return self.offset + page - self.first

    def cut(self, first: int, end: int) -> Vma:
        """Return the part in [first, end), which is not empty."""
        first, end = max(first, self.first), min(end, self.end)
        if first == self.first and end == self.end:
            return self
        return replace(self, first=first, end=end, offset=self.index(first) if self.file else 0)

    def continues_in(self, other: Vma) -> bool:
        """Tell whether another mapping goes on where this one ends, and is alike."""
        if self.end != other.first or self.prot is not other.prot or self.file is not other.file:
            return False
        if self.file is not None and self.index(self.end) != other.offset:
            return False
        return replace(self, first=other.first, end=other.end, offset=other.offset) == other


class Vmas:
    """The mappings of an address space: sorted, disjoint."""

    __slots__ = ("_vmas",)

    def __init__(self) -> None:
        self._vmas: list[Vma] = []

    def find(self, page: int) -> Vma | None:
        """Return the mapping that contains a page."""
        at = bisect_right(self._vmas, page, key=_first) - 1
        return self._vmas[at] if at >= 0 and page < self._vmas[at].end else None

    def overlapping(self, first: int, end: int) -> list[Vma]:
        """Return the mappings that share a page with [first, end), whole, in order."""
        at = max(bisect_right(self._vmas, first, key=_first) - 1, 0)
        found = []
        for vma in self._vmas[at:]:
            if vma.first >= end:
                break
            if vma.end > first:
                found.append(vma)
        return found

    def covers(self, first: int, end: int) -> bool:
        """Tell whether every page of [first, end) is mapped."""
        for vma in self.overlapping(first, end):
            if vma.first > first:
                return False
            first = vma.end
        return first >= end

    def insert(self, vma: Vma) -> None:
        """Add a mapping; it becomes one with neighbours that are alike. Requires: nothing is mapped there."""
        at = bisect_right(self._vmas, vma.first, key=_first)
        before = self._vmas[at - 1] if at else None
        after = self._vmas[at] if at < len(self._vmas) else None
        assert before is None or before.end <= vma.first
        assert after is None or vma.end <= after.first
        if after is not None and vma.continues_in(after):
            vma = replace(vma, end=after.end)
            del self._vmas[at]
        if before is not None and before.continues_in(vma):
            self._vmas[at - 1] = replace(before, end=vma.end)
        else:
            self._vmas.insert(at, vma)

    def remove(self, first: int, end: int) -> list[Vma]:
        """Take [first, end) out, splitting what straddles an edge; returns the parts taken."""
        taken = []
        for vma in self.overlapping(first, end):
            self._vmas.remove(vma)
            taken.append(vma.cut(first, end))
            if vma.first < first:
                self.insert(vma.cut(vma.first, first))
            if end < vma.end:
                self.insert(vma.cut(end, vma.end))
        return taken

    def gap(self, n: int, above: int, *, align: int = 1) -> int:
        """Return the lowest page from `above` on, a multiple of `align`, that begins a gap of n pages."""
        at = -(-above // align) * align
        for vma in self.overlapping(above, NO_PAGE):
            if vma.first - at >= n:
                break
            at = max(at, -(-vma.end // align) * align)
        return at

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)
