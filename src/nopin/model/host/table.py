"""The page table of a modelled process: sparse, in leaves of 512 entries, each of one of a few kinds.

An absent entry (None) means: nothing was ever there, fault by the mapping. All others say where the bytes are; only a
`Present` one lets a CPU reach them without a fault.

Entries are replaced, never changed: only the bits of use, `young` and `dirty`, change in place. So a procedure that
looked at an entry, let others go on, and finds the same object there again knows that nothing happened to the page in
between (what pte_same is for in Linux, without its blind spot for a value that went away and came back).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nopin.model.host.page import Page

if TYPE_CHECKING:
    from nopin.model.host.device_memory import DeviceMemory

LEAF_SHIFT = 9
LEAF_PAGES = 1 << LEAF_SHIFT
_LEAF_MASK = LEAF_PAGES - 1


@dataclass(slots=True, eq=False)
class Present:
    """A translation.

    Attributes:
        writable: stores pass; only if the mapping allows it, and nobody else's bytes change with it.
        young, dirty: a CPU used it, wrote it, since that was last collected.
    """

    page: Page
    writable: bool
    young: bool = True
    dirty: bool = False

    @property
    def frame(self) -> int:
        """Where the bytes are, now."""
        return self.page.frame


@dataclass(slots=True, eq=False)
class Swapped:
    """The bytes are in the swap area; counts as a user of the slot."""

    slot: int


@dataclass(slots=True, eq=False)
class Shut:
    """The page is there, and the mapping allows no access (PROT_NONE)."""

    page: Page


@dataclass(slots=True, eq=False)
class Exclusive:
    """One device has the page to itself, for atomics; a CPU that touches it takes it back.

    Attributes:
        owner: as whom the device asked for it.
    """

    page: Page
    owner: object


@dataclass(slots=True, eq=False)
class Private:
    """The page is in memory of a device that no CPU reaches.

    Attributes:
        writable: the device may write it; then it is nobody else's.
    """

    page: Page
    memory: DeviceMemory
    writable: bool

    @property
    def frame(self) -> int:
        """Where the bytes are, now."""
        return self.page.frame


@dataclass(slots=True, eq=False)
class Moving:
    """The page is being moved to another frame: wait for its lock.

    Attributes:
        was: what it is going to be again: another entry like this one.
    """

    page: Page
    was: Present | Shut | Exclusive | Private


Entry = Present | Swapped | Moving | Exclusive | Private | Shut
"""All but `Swapped` are mappings of their page, and hold a reference of its frame."""


class _Leaf:
    """512 entries.

    Attributes:
        n: how many are not None. huge: they are one page of 2 MiB, present all.
    """

    __slots__ = ("entries", "huge", "n")

    def __init__(self) -> None:
        self.entries: list[Entry | None] = [None] * LEAF_PAGES
        self.n = 0
        self.huge = False


class Table:
    """See above. Pages are numbered by address >> 12."""

    __slots__ = ("_leaves",)

    def __init__(self) -> None:
        self._leaves: dict[int, _Leaf] = {}

    def get(self, page: int) -> Entry | None:
        """Return the entry of a page."""
        leaf = self._leaves.get(page >> LEAF_SHIFT)
        return None if leaf is None else leaf.entries[page & _LEAF_MASK]

    def set(self, page: int, entry: Entry) -> None:
        """Make or replace an entry; a huge page there is huge no more."""
        leaf = self._leaves.get(page >> LEAF_SHIFT)
        if leaf is None:
            leaf = self._leaves[page >> LEAF_SHIFT] = _Leaf()
        low = page & _LEAF_MASK
        leaf.n += leaf.entries[low] is None
        leaf.huge = False
        leaf.entries[low] = entry

    def replace(self, page: int, entry: Entry) -> None:
        """Replace an entry by one for the same bytes; a huge page stays one. Requires: there is an entry."""
        entries = self._leaves[page >> LEAF_SHIFT].entries
        assert entries[page & _LEAF_MASK] is not None
        entries[page & _LEAF_MASK] = entry

    def clear(self, page: int) -> Entry | None:
        """Take an entry out; returns what was there."""
        leaf = self._leaves.get(page >> LEAF_SHIFT)
        if leaf is None:
            return None
        low = page & _LEAF_MASK
        entry = leaf.entries[low]
        if entry is not None:
            leaf.entries[low] = None
            leaf.n -= 1
            leaf.huge = False
            if not leaf.n:
                del self._leaves[page >> LEAF_SHIFT]
        return entry

    def entries(self, first: int, end: int) -> Iterator[tuple[int, Entry]]:
        """Yield the entries of pages in [first, end), in order, each as it is then: others may change meanwhile."""
        for index in self._leaves_between(first >> LEAF_SHIFT, -(-end >> LEAF_SHIFT)):
            leaf = self._leaves.get(index)
            if leaf is None:
                continue
            base = index << LEAF_SHIFT
            for low in range(max(first - base, 0), min(end - base, LEAF_PAGES)):
                entry = leaf.entries[low]
                if entry is not None:
                    yield base + low, entry
                    leaf = self._leaves.get(index)  # it may have been emptied, and made anew
                    if leaf is None:
                        break

    def _leaves_between(self, first: int, end: int) -> list[int]:
        """Return the leaves there are, in order, by whichever way is shorter."""
        if end - first <= len(self._leaves):
            return [index for index in range(first, end) if index in self._leaves]
        return sorted(index for index in self._leaves if first <= index < end)

    def __len__(self) -> int:
        return sum(leaf.n for leaf in self._leaves.values())

    # Huge pages

    def set_huge(self, page: int) -> None:
        """Say that the 512 entries from a multiple of 512 are one huge page. Requires: all are present."""
        leaf = self._leaves[page >> LEAF_SHIFT]
        assert leaf.n == LEAF_PAGES
        leaf.huge = True

    def is_huge(self, page: int) -> bool:
        """Tell whether the page is part of a huge one."""
        leaf = self._leaves.get(page >> LEAF_SHIFT)
        return leaf is not None and leaf.huge

    def split(self, page: int) -> None:
        """Say that the 512 pages around this one are pages of their own from here on."""
        leaf = self._leaves.get(page >> LEAF_SHIFT)
        if leaf is not None:
            leaf.huge = False

    def split_edges(self, first: int, end: int) -> None:
        """Split the huge pages of which [first, end) has only a part."""
        for edge in (first, end):
            if edge & _LEAF_MASK:
                self.split(edge)
