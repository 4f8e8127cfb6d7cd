"""The swap area: slots that hold pages' bytes, who uses them, and the pages that are in memory beside their copy.

A slot has *users*: page table entries that say the bytes are there, and whoever is writing to it. While one process's
entry was brought back and another's still says "swapped", both must come to the same page: the *swap cache* finds it by
the slot. A slot is free when nobody uses it and no page is cached for it.
"""

from __future__ import annotations

import heapq

from nopin.model.host.frames import Frames
from nopin.model.host.page import Page
from nopin.units import PAGE_BYTES


class SwapArea:
    """See above.

    Args:
        n_slots: of a page each.
        frames: where references of cached pages are counted.

    Attributes:
        cache: pages in memory, by slot.
    """

    def __init__(self, n_slots: int, frames: Frames) -> None:
        self.n_slots = n_slots
        self.cache: dict[int, Page] = {}
        self._frames = frames
        self._users: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}
        self._never_used = 0
        self._freed: list[int] = []  # heap

    @property
    def n_used(self) -> int:
        """Slots that are not free."""
        return len(self._users)

    def n_users(self, slot: int) -> int:
        """Return how many use it, beside the cache."""
        return self._users[slot]

    def users(self) -> dict[int, int]:
        """Return the slots that somebody uses beside the cache, with how many do."""
        return {slot: n for slot, n in self._users.items() if n}

    def allocate(self) -> int | None:
        """Take the lowest free slot, with the caller as its user; None when there is none."""
        if self._freed:
            slot = heapq.heappop(self._freed)
        elif self._never_used < self.n_slots:
            slot = self._never_used
            self._never_used += 1
        else:
            return None
        self._users[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """Become a user of a slot that is not free."""
        self._users[slot] += 1

    def let_go(self, slot: int) -> None:
        """Stop using it."""
        self._users[slot] -= 1
        assert self._users[slot] >= 0
        self._free_if_unused(slot)

    def add(self, page: Page, slot: int) -> None:
        """Have a page found by a slot. Requires: neither has the other's like."""
        assert page.slot is None
        assert slot not in self.cache
        page.slot = slot
        self.cache[slot] = page
        self._frames.get(page.frame)

    def drop(self, page: Page) -> None:
        """Take a page out of the cache; the reference that the cache had is given back."""
        slot, page.slot = page.slot, None
        assert slot is not None
        del self.cache[slot]
        self._frames.put(page.frame)
        self._free_if_unused(slot)

    def write(self, slot: int, data: bytes) -> None:
        """Keep bytes of a page."""
        assert len(data) == PAGE_BYTES
        self._bytes[slot] = data

    def read(self, slot: int) -> bytes:
        """Return what was kept last."""
        return self._bytes[slot]

    def _free_if_unused(self, slot: int) -> None:
        if self._users[slot] == 0 and slot not in self.cache:
            del self._users[slot]
            self._bytes.pop(slot, None)
            heapq.heappush(self._freed, slot)
