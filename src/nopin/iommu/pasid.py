"""The PASID table: process address space ids, and the space each one names."""

from __future__ import annotations

from nopin.mm.space import AddressSpace

PASID_BITS = 20
"""Width of a PASID in PCIe."""


class PasidTable:
    """Spaces by id. Ids go up and wrap late, so that one just freed does not soon name another space."""

    def __init__(self) -> None:
        self._spaces: dict[int, AddressSpace] = {}
        self._next = 1  # 0 is "no PASID"
        self.get = self._spaces.get  # looked up on every access

    def bind(self, space: AddressSpace) -> int:
        """Give a space an id.

        Raises:
            OverflowError: all ids are in use.
        """
        limit = 1 << PASID_BITS
        if len(self._spaces) >= limit - 1:
            raise OverflowError("every PASID is in use")
        while self._next in self._spaces:
            self._next = self._next % (limit - 1) + 1
        pasid = self._next
        self._next = self._next % (limit - 1) + 1
        self._spaces[pasid] = space
        return pasid

    def unbind(self, pasid: int) -> None:
        """Free an id. One that names nothing is fine."""
        self._spaces.pop(pasid, None)
