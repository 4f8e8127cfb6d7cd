"""How an arena shows in its owner's address space: to devices as windows, to whoever watches a range as news."""

from __future__ import annotations

from collections.abc import Callable

from nopin.iommu.iommu import Iommu
from nopin.iommu.windows import DeviceArena
from nopin.mm.causes import Cause
from nopin.ranges import Range
from nopin.server.mapper import Placed
from nopin.units import PAGE_BYTES

Changed = Callable[[Range, Cause], object]
"""Called with addresses of the owner, and what it did to them."""


class OwnerView:
    """One arena in one process that has a PASID.

    Args:
        pasid: bound, and of the process that maps the arena.
        changed: told of what the owner does, for those who watch its memory: the arena's own userfaultfd has the
            mapping, so the watch of plain memory cannot hear it.
    """

    def __init__(self, iommu: Iommu, pasid: int, device: DeviceArena, changed: Changed) -> None:
        self._iommu = iommu
        self._pasid = pasid
        self._device = device
        self._changed = changed

    @property
    def dead(self) -> bool:
        """True once the connection it was made for has ended."""
        return self._iommu.space(self._pasid) is None

    def show(self, place: Placed) -> None:
        """Pages are mapped here from now on."""
        if not self.dead:
            self._iommu.map_window(self._pasid, place.where, self._device, place.first * PAGE_BYTES)

    def hide(self, where: Range) -> None:
        """Nothing of the arena is mapped here any more."""
        self._iommu.unmap_window(self._pasid, where)

    def tell(self, where: Range, cause: Cause) -> None:
        """The owner did this."""
        self._changed(where, cause)
