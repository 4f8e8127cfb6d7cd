"""What the server needs of an arena's pager. There is one, `mm.pager.Pager`; tests have simpler ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nopin.mm.device_faults import DeviceFaults, FaultPages
from nopin.mm.effects import Mapper as MapperNumber
from nopin.mm.effects import PageRun, Procedure
from nopin.mm.residency import Pages


class FirstTouch(Protocol):
    """What the server needs of `mm.first_touch.FirstTouch`."""

    def open(self, mapper: MapperNumber, n_most: int) -> None:
        """Begin a row of up to `n_most` faults."""
        ...

    def begin(self, page: int) -> int:
        """Say how many zero pages from a missing one on answer it; 0 if that is not all it takes."""
        ...

    def failed(self) -> None:
        """The one page that was begun last did not come: it must be answered by `cpu_fault`."""
        ...

    def came(self, page: int, n: int, n_done: int) -> bool:
        """Take note of how many of several pages came; False: the fault must be answered by `cpu_fault`."""
        ...

    def close(self) -> None:
        """End the row."""
        ...


class Removals(Protocol):
    """Who is told what processes give up, before their word of it is read."""

    def expect_removal(self, runs: Sequence[PageRun]) -> Pages:
        """Have a successor give pages up, should we be killed; returns what to hand to `expect_no_more`."""
        ...

    def expect_no_more(self, expected: Pages, read: Sequence[PageRun]) -> None:
        """Take that back but for the runs of which word was read: those are going to be given up here."""
        ...


class ArenaPager(DeviceFaults, Removals, Protocol):
    """What the server needs of `mm.pager.Pager`."""

    def cpu_fault(
        self, mapper: MapperNumber, page: int, *, write: bool, minor: bool, protected: bool
    ) -> Procedure[None]:
        """Answer a process's fault."""
        ...

    @property
    def first_touch(self) -> FirstTouch:
        """What answers a fault that needs no procedure."""
        ...

    def prefetch(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages before they are asked for."""
        ...

    def discard(self, pages: PageRun) -> Procedure[None]:
        """Make pages read as zeros."""
        ...

    def removed(self, mapper: MapperNumber, pages: PageRun, *, dropped: bool | None) -> Procedure[None]:
        """A process used madvise: `dropped` if it gave the bytes up, None if that is not known."""
        ...

    def reclaim(self) -> Procedure[int]:
        """Bring residency below the low mark."""
        ...

    @property
    def wants_reclaim(self) -> bool:
        """True while `reclaim` has something to do."""
        ...

    @property
    def uses_swap(self) -> bool:
        """True while bytes of some page are in swap, perhaps there alone, or may be on their way there."""
        ...

    def give_back(self, n_pages: int) -> Procedure[int]:
        """Evict pages for others."""
        ...

    def set_budget(self, n_pages: int) -> Procedure[None]:
        """Change the budget."""
        ...

    def recover(self) -> Procedure[None]:
        """Take over from a predecessor that was killed."""
        ...

    def statistics(self) -> Any:
        """Return a dataclass of counts."""
        ...
