"""Causes: what is about to happen to a range, in the words that events and counters use.

Linux has eight notifier events and sends CLEAR for swapping, migration, compaction, copy-on-write, KSM and madvise
alike (include/linux/mmu_notifier.h), so a driver must treat the harmless like the urgent. Here each has its own
name, because a subscriber can do better when it knows: hold a page it is using against RECLAIM, keep reading through
PROTECT, forget a range for good at UNMAP.
"""

from __future__ import annotations

from enum import Enum


class Cause(Enum):
    """What happens to the range. Those of `DEFERRABLE` may be put off; after all others nothing old is reachable."""

    UNMAP = "unmap"
    """The range is no longer mapped, or something else was mapped over it."""
    REMAP = "remap"
    """The range moved to another address; the old one is no longer mapped."""
    REMOVE = "remove"
    """The pages are being dropped; the range stays mapped and reads as zeros or as the file."""
    FORK = "fork"
    """The process forked: private pages are shared with the child until either side writes."""
    RELEASE = "release"
    """The address space is gone, all of it."""
    PROTECT = "protect"
    """Stores are no longer allowed; the bytes stay where they are. Reads may go on."""
    RECLAIM = "reclaim"
    """The memory manager wants the frames back; the bytes are kept elsewhere."""
    MIGRATE = "migrate"
    """The bytes move to other frames."""
    COW = "cow"
    """A shared page is about to be replaced by a private copy."""
    EXCLUSIVE = "exclusive"
    """One device gets the page to itself, for atomics; or gives it up because a CPU touched it."""
    TRUNCATE = "truncate"
    """The bytes are given up: the file behind the range ends before it, or its owner discarded it."""
    SYNC = "sync"
    """The page has been written back: tell whether a device wrote it, and notice its next write. It stays mapped."""

    __hash__ = object.__hash__
    """By identity, as causes are equal: an enumeration's own takes a call, and causes are counted and looked up."""

    @property
    def deferrable(self) -> bool:
        """True if reads may go on until the frame is used anew, and a subscriber may refuse."""
        return self in DEFERRABLE


DEFERRABLE = frozenset({Cause.RECLAIM, Cause.MIGRATE})
"""Nobody but the memory manager wants these, so they can wait: the old frame holds the same bytes until then."""

WITH_OWNER = frozenset({Cause.MIGRATE, Cause.EXCLUSIVE})
"""What a subscriber may have asked for itself, and then need not hear (mmu_notifier_range.owner)."""
