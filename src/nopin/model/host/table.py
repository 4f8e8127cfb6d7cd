"""The page table of a modelled process: entries by page number, each of one of a few kinds.

An absent entry (None) means: nothing was ever there, fault by the mapping. All others say where the bytes are; only a
`Present` one lets a CPU reach them without a fault.

Entries are replaced, never changed: only the bits of use, `young` and `dirty`, change in place. So a procedure that
looked at an entry, let others go on, and finds the same object there again knows that nothing happened to the page in
between (what pte_same is for in Linux, without its blind spot for a value that went away and came back).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nopin.model.host.page import Page

if TYPE_CHECKING:
    from nopin.model.host.device_memory import DeviceMemory

LEAF_SHIFT = 9
LEAF_PAGES = 1 << LEAF_SHIFT
"""Pages whose entries are together in one table of x86-64, and may be one page of 2 MiB."""


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


class Table:
    """See above. Pages are numbered by address >> 12.

    A dictionary, so that it costs what is mapped, wherever that lies, and a look into it is no call of ours: there is
    one in every access.

    Attributes:
        get: returns the entry of a page, or None.
    """

    __slots__ = ("_entries", "_huge", "get")

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._huge: set[int] = set()  # leaves, whose 512 entries are all there, that are one page
        self.get: Callable[[int], Entry | None] = self._entries.get

    def set(self, page: int, entry: Entry) -> None:
        """Make or replace an entry; a huge page there is huge no more."""
        self._entries[page] = entry
        if self._huge:
            self.split(page)

    def replace(self, page: int, entry: Entry) -> None:
        """Replace an entry; a huge page there is huge no more. Requires: there is an entry."""
        assert page in self._entries
        self.set(page, entry)

    def lower(self, page: int, entry: Entry) -> None:
        """Replace an entry by one with fewer rights, as the others of a huge page are too, which stays one."""
        assert page in self._entries
        self._entries[page] = entry

    def clear(self, page: int) -> Entry | None:
        """Take an entry out; returns what was there."""
        if self._huge:
            self.split(page)
        return self._entries.pop(page, None)

    def entries(self, first: int, end: int) -> Iterator[tuple[int, Entry]]:
        """Yield the entries of pages in [first, end), in order, each as it is then: others may change meanwhile.

        Of a range with more pages than there are entries only those that were there at first.
        """
        numbers: Sequence[int] = range(first, end)
        if len(numbers) > max(len(self._entries), LEAF_PAGES):
            numbers = sorted(page for page in self._entries if first <= page < end)
        for page in numbers:
            entry = self._entries.get(page)
            if entry is not None:
                yield page, entry

    def __len__(self) -> int:
        return len(self._entries)

    # Huge pages

    def set_huge(self, page: int) -> None:
        """Say that the 512 entries from a multiple of 512 are one huge page. Requires: all are present."""
        assert all(each in self._entries for each in range(page, page + LEAF_PAGES))
        self._huge.add(page >> LEAF_SHIFT)

    def is_huge(self, page: int) -> bool:
        """Tell whether the page is part of a huge one."""
        return page >> LEAF_SHIFT in self._huge

    def split(self, page: int) -> None:
        """Say that the 512 pages around this one are pages of their own from here on."""
        self._huge.discard(page >> LEAF_SHIFT)

    def check_huge(self) -> None:
        """Assert that what is called huge is: 512 pages in consecutive frames, all with the same right to write."""
        for leaf in self._huge:
            start = leaf << LEAF_SHIFT
            entries = [each for _, each in self.entries(start, start + LEAF_PAGES) if isinstance(each, Present | Shut)]
            assert len(entries) == LEAF_PAGES, "a huge page with a part that is not there"
            base = entries[0].page.frame
            assert base % LEAF_PAGES == 0, "a huge page that does not begin where one may"
            assert [each.page.frame for each in entries] == list(range(base, base + LEAF_PAGES)), "not in a row"
            rights = {isinstance(each, Present) and each.writable for each in entries}
            assert len(rights) == 1, "a huge page with rights of two kinds"

    def split_edges(self, first: int, end: int) -> None:
        """Split the huge pages of which [first, end) has only a part."""
        for edge in (first, end):
            if edge % LEAF_PAGES:
                self.split(edge)
