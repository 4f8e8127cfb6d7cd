"""What a device asks of the pager: pages in the file, held until it has used them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nopin.mm.effects import PageRun, Procedure
from nopin.mm.residency import Pages
from nopin.mm.space import Bytes, Reason


class FaultPages(NamedTuple):
    """How far a device fault came.

    Attributes:
        n_done: pages from the start of the run that are in the file and held.
        reason: why the next one is not, when fewer than all are done. Only `Reason.BUSY` is worth another try.
    """

    n_done: int
    reason: Reason | None = None


class DeviceFaults(Protocol):
    """The pager, as mirrors know it."""

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages into the file and hold them: a held page is not evicted. With `write` they count as dirty."""
        ...

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """Tell whether all pages are in the file and none is on its way; if so, with `write` they count as dirty."""
        ...

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """Make pages settled, as far as nothing has to be waited for; True if all are now, in the step it ends in.

        With `write` they count as dirty then. They are not held; none is evicted for others.
        """
        ...

    def release(self, pages: PageRun) -> None:
        """End one hold of pages, those that `device_fault` said were done. Holds are counted."""
        ...


class Frames(Protocol):
    """The pages of an arena as the device server reaches them."""

    def view(self, pages: PageRun) -> Bytes:
        """Return (n * 4096,) uint8, the bytes themselves. Requires: every page of the run is in the file."""
        ...

    def begin_with_zeros(self, pages: Pages) -> NDArray[np.bool_]:
        """Tell of each page whether its first word is zero. One that its owner took out of the file is zeros."""
        ...
