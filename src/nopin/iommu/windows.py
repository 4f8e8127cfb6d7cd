"""Windows: where a process has arenas of managed memory mapped.

To its owner an arena is memory like any other, at some addresses among the rest. To the device it is not: the rest is
reached through the kernel, page by page as the owner has it now, while an arena is reached through its mirror and the
device's own mapping of the frames. (It must be: a copy through the kernel would fault on an absent page and wait for
the pager, which is the one who copies.) So an access by address is cut where windows begin and end.

    addresses of a process      |  plain  |  window of A  |  plain  |  window of A  |  window of B  |  plain ...
    pages of arena A                        0 ......... 511           900 .... 1023

A window maps pages in order. A part of it that the owner unmapped is no longer one; what moved has moved with it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from nopin.iommu.mirror import Mirror
from nopin.mm.effects import Procedure
from nopin.mm.space import AddressSpace, ByteMemory
from nopin.ranges import Range
from nopin.units import PAGE_MASK, PAGE_SHIFT


class FaultRunner(Protocol):
    """Carries out procedures of an arena's pager."""

    def start(self, procedure: Procedure[Any]) -> object:
        """Run a procedure, now as far as it goes without waiting."""
        ...

    def finish(self, procedure: Procedure[Any]) -> Any:
        """Run one that does not wait to its end; returns its result, before anything else can happen, or None."""
        ...


@dataclass(slots=True, eq=False)
class DeviceArena:
    """An arena as the device reaches it.

    Attributes:
        mirror: says which of its pages may be accessed.
        memory: the device's way to all of it, holes included; only what the mirror holds may be touched. On a live
            machine it is one mapping (`Staging`), on a modelled one frames here and there.
        runner: carries out what answers a fault when it is raised: an access whose pages come so quickly does not park.
            None: faults wait for `take_faults`.
        key: what its page requests are filed under: negative, where a PASID is positive. 0 while not attached.
    """

    mirror: Mirror
    memory: ByteMemory
    runner: FaultRunner | None = None
    key: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """Addresses [start, end) of a process, whole pages: bytes of `arena` from `offset` on, in order."""

    start: int
    end: int
    arena: DeviceArena
    offset: int

    def at(self, address: int) -> int:
        """Return which byte of the arena an address is."""
        return address - self.start + self.offset


class Part(NamedTuple):
    """A piece of an access that lies wholly in one window, or wholly outside all (None)."""

    address: int
    length: int
    window: Window | None


class WindowedSpace:
    """The memory of one process: plain, with windows laid over it."""

    def __init__(self, plain: AddressSpace) -> None:
        self.plain = plain
        self._starts: list[int] = []
        self._windows: list[Window] = []

    def __bool__(self) -> bool:
        return bool(self._windows)

    @property
    def windows(self) -> list[Window]:
        """The windows, by address."""
        return list(self._windows)

    def add(self, where: Range, arena: DeviceArena, offset: int) -> None:
        """Lay a window over `where`, in place of what was there. Requires: whole pages inside the arena."""
        assert not (where.start | where.end | offset) & PAGE_MASK, "windows are whole pages"
        assert offset + where.length <= len(arena.memory.view), "a window beyond its arena"
        self.remove(where)
        at = bisect_right(self._starts, where.start)
        self._windows.insert(at, Window(where.start, where.end, arena, offset))
        self._starts.insert(at, where.start)

    def remove(self, where: Range) -> None:
        """Take windows away from `where`; what of them lies outside stays."""
        assert not (where.start | where.end) & PAGE_MASK, "windows are whole pages"
        left: list[Window] = []
        for window in self._windows:
            if window.end <= where.start or where.end <= window.start:
                left.append(window)
                continue
            if window.start < where.start:
                left.append(Window(window.start, where.start, window.arena, window.offset))
            if where.end < window.end:
                left.append(Window(where.end, window.end, window.arena, window.at(where.end)))
        self._replace(left)

    def drop(self, arena: DeviceArena) -> None:
        """Take away all windows of an arena."""
        self._replace([window for window in self._windows if window.arena is not arena])

    def find(self, address: int, length: int) -> Window | None:
        """Return the window that all of an access lies in."""
        at = bisect_right(self._starts, address)
        if not at:
            return None
        window = self._windows[at - 1]
        return window if address + length <= window.end else None

    def is_plain(self, address: int, length: int) -> bool:
        """Tell whether no part of an access lies in a window."""
        after = bisect_right(self._starts, address)
        if after and address < self._windows[after - 1].end:
            return False
        return after == len(self._starts) or address + length <= self._starts[after]

    def parts(self, address: int, length: int) -> list[Part]:
        """Cut an access where windows begin and end."""
        if not self._windows:
            return [Part(address, length, None)] if length > 0 else []
        parts: list[Part] = []
        at, end = bisect_right(self._starts, address) - 1, address + length
        while address < end:
            window = self._windows[at] if at >= 0 else None
            if window is not None and address < window.end:
                stop = min(window.end, end)
            else:
                window = None
                stop = min(self._starts[at + 1], end) if at + 1 < len(self._starts) else end
            parts.append(Part(address, stop - address, window))
            address = stop
            if at + 1 < len(self._starts) and self._starts[at + 1] <= address:
                at += 1
        return parts

    def _replace(self, windows: list[Window]) -> None:
        self._windows = windows
        self._starts = [window.start for window in windows]


def page_run(at: int, length: int) -> tuple[int, int]:
    """Return the pages that bytes [at, at + length) of an arena lie in: the first, and how many. Not for no bytes."""
    first = at >> PAGE_SHIFT
    return first, ((at + length - 1) >> PAGE_SHIFT) - first + 1
