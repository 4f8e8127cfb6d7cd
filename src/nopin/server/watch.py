"""Watching a client's mappings: userfaultfd messages become notifier invalidations.

Regions overlap and come and go, the kernel knows only "registered" or not, so covers are counted and the
kernel holds their union, in whole pages. Where a mapping cannot be watched (nothing there, a special kind,
another userfaultfd) sharing works all the same, without events: such parts are kept as unwatched and tried
again by `rearm`, as are parts the owner unmapped, because something may be mapped there later.

The owner waits in its munmap, mremap, madvise or fork until `drain` has read the message. The event loop must
therefore come here whenever the descriptor is readable, before anything that takes long. The server holds the
only descriptor, so when the server dies the kernel drops it and lets the owner go on.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from nopin.linux.userfaultfd import Forked, Message, Remapped, Removed, Unmapped, Userfaultfd
from nopin.mm.causes import Cause
from nopin.mm.notifier import EVERYTHING, Notifiers
from nopin.ranges import CountedRanges, Range, coalesce, subtract
from nopin.units import U64_MAX, page_floor

MappingsWithin = Callable[[Range], Iterable[Range]]
"""Lists the mappings that overlap a range, by address."""


@dataclass(slots=True)
class WatchCounters:
    """Messages read, by what the owner did."""

    unmaps: int = 0
    remaps: int = 0
    removes: int = 0
    forks: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to count."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Watcher:
    """The watch over one client's address space. Owns the userfaultfd.

    Args:
        uffd: opened by the client, passed to us.
        notifiers: told of every change.
        mappings_within: where the client has mappings now. The kernel registers a range all or nothing, so a
            range with one unwatchable mapping in it is registered mapping by mapping.
    """

    def __init__(self, uffd: Userfaultfd, notifiers: Notifiers, mappings_within: MappingsWithin) -> None:
        self._uffd = uffd
        self._notifiers = notifiers
        self._mappings_within = mappings_within
        self._covers = CountedRanges()
        self._unwatched: list[Range] = []  # covered, but not registered when last tried
        self.counters = WatchCounters()

    def fileno(self) -> int:
        """Readable when messages wait; register it with the event loop."""
        return self._uffd.fileno()

    def watch(self, where: Range) -> bool:
        """Cover a range once more. True if all of it is watched now; False is no error."""
        pages = _pages(where)
        for piece in self._covers.add(pages):
            self._register(piece)
        return not self.unwatched(pages)

    def unwatch(self, where: Range) -> None:
        """Take one cover of `where` away.

        Raises:
            ValueError: it was not watched.
        """
        for piece in self._covers.remove(_pages(where)):
            self._unwatched = subtract(self._unwatched, piece)
            self._unregister(piece)

    def unwatched(self, within: Range) -> list[Range]:
        """Covered parts of `within` that could not be watched when last tried."""
        parts = (part.intersection(within) for part in self._unwatched)
        return [part for part in parts if part is not None]

    def unclaimed(self, where: Range) -> bool:
        """True if pages of one mapping belong to no userfaultfd but ours: then nobody can hold back a fault there.

        What we watch is ours. Of the rest the kernel tells by letting us register it, which touches no page; what it
        never lets anybody register (EPERM) is nobody's. What should be watched stays so then: memory that is mapped
        anew all the time would otherwise count as held back for as long as that goes on, and its accesses starve.
        """
        if not all(self._take(part) for part in self.unwatched(where)):
            return False
        rest = [where]
        for part in self._covers.covered(where):
            rest = subtract(rest, part)
        return all(self._is_free(part) for part in rest)

    def _take(self, part: Range) -> bool:
        """Watch a covered part again; False if it is somebody else's, or cannot be told."""
        try:
            self._uffd.register(part)
        except OSError as error:
            return error.errno == errno.EPERM
        self._unwatched = subtract(self._unwatched, part)
        return True

    def _is_free(self, part: Range) -> bool:
        """Tell the same of a part nobody asked to watch, leaving it as it was."""
        try:
            self._uffd.register(part)
            self._uffd.unregister(part)
        except OSError as error:
            return error.errno == errno.EPERM
        return True

    @property
    def needs_rearm(self) -> bool:
        """True while covered parts are unwatched: call `rearm` about once a second."""
        return bool(self._unwatched)

    def rearm(self) -> None:
        """Try again to watch what is covered and unwatched."""
        waiting, self._unwatched = self._unwatched, []
        for piece in waiting:
            self._register_each_mapping(piece)

    def drain(self) -> int:
        """Read every message that waits and tell the notifiers; returns how many. Never waits.

        Raises:
            UsageError: the client tampered with the descriptor; disconnect it.
        """
        messages = self._uffd.read()  # all of them first: reading is what lets the owner go on
        for message in messages:
            self._handle(message)
        return len(messages)

    def close(self) -> None:
        """Stop watching everything. Twice is fine."""
        self._uffd.close()

    def _handle(self, message: Message) -> None:
        match message:
            case Unmapped(where):
                self.counters.unmaps += 1
                self._mark_unwatched(where)
                self._notifiers.invalidate(where, Cause.UNMAP)
            case Remapped(where, moved_to):
                self.counters.remaps += 1
                self._mark_unwatched(where)
                self._leave(Range.of_length(moved_to, where.length))
                self._notifiers.invalidate(where, Cause.REMAP)
            case Removed(where):
                self.counters.removes += 1
                self._notifiers.invalidate(where, Cause.REMOVE)
            case Forked():
                self.counters.forks += 1
                self._notifiers.invalidate(EVERYTHING, Cause.FORK)

    def _register(self, piece: Range) -> None:
        """Register all of `piece` at once, which quietly leaves its holes out: these are remembered."""
        holes = [piece]
        for mapping in self._mappings_within(piece):  # first: what is mapped from here on is registered, or a hole
            holes = subtract(holes, mapping)
        try:
            self._uffd.register(piece)
        except OSError:
            self._register_each_mapping(piece)
        else:
            self._unwatched = coalesce([*self._unwatched, *holes])

    def _register_each_mapping(self, piece: Range) -> None:
        """Register what can be in `piece`, and remember the rest."""
        left = [piece]
        for mapping in self._mappings_within(piece):
            part = mapping.intersection(piece)
            if part is None:
                continue
            with contextlib.suppress(OSError):
                self._uffd.register(part)
                left = subtract(left, part)
        self._unwatched = coalesce([*self._unwatched, *left])

    def _unregister(self, piece: Range) -> None:
        try:
            self._uffd.unregister(piece)
        except OSError:  # nothing is mapped at its start, or not all of it can be watched
            for mapping in self._mappings_within(piece):
                part = mapping.intersection(piece)
                if part is not None:
                    with contextlib.suppress(OSError):  # gone meanwhile, or never registered
                        self._uffd.unregister(part)

    def _mark_unwatched(self, where: Range) -> None:
        self._unwatched = coalesce([*self._unwatched, *self._covers.covered(where)])

    def _leave(self, moved_to: Range) -> None:
        """A mapping took its registration along to a place nobody asked to watch; drop it there."""
        nobodys = [moved_to]
        for covered in self._covers.covered(moved_to):
            nobodys = subtract(nobodys, covered)
            self._unwatched = subtract(self._unwatched, covered)
        for piece in nobodys:
            self._unregister(piece)


def _pages(where: Range) -> Range:
    """Whole pages, short of the last one: all of 64 bits would not fit the kernel's length word."""
    return Range(where.to_pages().start, min(where.to_pages().end, page_floor(U64_MAX)))
