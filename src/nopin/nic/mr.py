"""Protection domains, regions and the check every access by key goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.page_requests import Meter
from nopin.mm.space import IoVec
from nopin.nic.abi import Access, Discipline
from nopin.nic.errors import VerbsError
from nopin.nic.rights import ANY_REMOTE, LOCAL_WRITE, REMOTE_ATOMIC, REMOTE_WRITE
from nopin.units import U64_MAX

LENGTH_BYTES_MAX = 1 << 31
"""The longest RDMA message (RETH length, IBTA 9.3.3)."""

_KNOWN = ANY_REMOTE | LOCAL_WRITE | Access.ON_DEMAND


@dataclass(slots=True, eq=False)
class Pd:
    """A protection domain: queue pairs reach only regions of their own."""

    n_users: int = 0
    owner: object = None


@dataclass(slots=True, eq=False)
class Region:
    """A registered range of one address space.

    Attributes:
        pasid: the address space.
        start: first virtual address; `end` one past the last (2^64 for the implicit region).
        access: rights, an integer of `Access` bits.
        iova: the address that work requests use for `start`.
        alive: False once deregistered or invalidated; nobody may touch memory through it then.
    """

    pd: Pd
    pasid: int
    start: int
    end: int
    iova: int
    access: int
    discipline: Discipline
    lkey: int
    rkey: int
    alive: bool = True
    meter: Meter = field(default_factory=Meter)
    owner: object = None

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def implicit(self) -> bool:
        """True for the region that is the whole process."""
        return self.start == 0 and self.end == U64_MAX + 1

    def va(self, address: int) -> int:
        """Translate an iova inside the region to the process's virtual address."""
        return address - self.iova + self.start

    def places(self, address: NDArray[np.uint64], length: NDArray[np.uint32]) -> IoVec:
        """Translate many ranges inside the region to virtual addresses: (n, 2) uint64."""
        places = np.empty((len(address), 2), np.uint64)
        np.add(address, np.uint64((self.start - self.iova) & U64_MAX), out=places[:, 0])
        places[:, 1] = length
        return places

    def hold_each(self, address: NDArray[np.uint64], length: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Tell of many ranges, each of at least a byte, whether it lies inside: (n,) bool."""
        span = min(self.length, U64_MAX)  # where that cuts it short, the last byte of all goes the ordinary way
        offset = address - np.uint64(self.iova)  # wraps below, which the first comparison rejects
        room = np.uint64(span) - np.minimum(offset, np.uint64(span))
        return np.asarray((address >= np.uint64(self.iova)) & (length <= room))


class RegionTable:
    """All regions of the device by key.

    A region's lkey and rkey are one random number. Keys are not reused while anything might still carry the
    old one: a fresh draw of 32 bits against all living keys.
    """

    def __init__(self, draw: Callable[[int], int]) -> None:
        self._draw = draw
        self._by_key: dict[int, Region] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def register(
        self,
        pd: Pd,
        *,
        pasid: int,
        address: int,
        length: int | None,
        iova: int,
        access: Access,
        discipline: Discipline,
    ) -> Region:
        """Add a region: O(1), whatever its length.

        Raises:
            VerbsError: EINVAL for a zero or wrapping range, unknown rights, remote write or atomic without local
                write (ibv_reg_mr(3)), or an implicit region that does not start at 0.
        """
        if length is None:
            if address != 0 or iova != 0:
                raise VerbsError(f"an implicit region starts at 0, not at {address:#x} (iova {iova:#x})")
            length = U64_MAX + 1
        if length <= 0 or address < 0 or address + length > U64_MAX + 1:
            raise VerbsError(f"range {address:#x} + {length:#x} is empty or wraps")
        if iova < 0 or iova + length > U64_MAX + 1:
            raise VerbsError(f"iova {iova:#x} + {length:#x} wraps")
        if access & ~_KNOWN:
            raise VerbsError(f"unknown access rights {int(access & ~_KNOWN):#x}")
        if access & (REMOTE_WRITE | REMOTE_ATOMIC) and not access & LOCAL_WRITE:
            raise VerbsError("remote write and remote atomic need local write as well")
        key = self._free_key()
        region = Region(pd, pasid, address, address + length, iova, int(access), discipline, key, key)
        self._by_key[key] = region
        pd.n_users += 1
        return region

    def deregister(self, region: Region) -> None:
        """Remove a region. Accesses are synchronous, so none is under way when this returns."""
        if self._by_key.pop(region.rkey, None) is None:
            return
        region.alive = False
        region.pd.n_users -= 1

    def find(self, key: int, pd: Pd) -> Region | None:
        """Return the living region with this key in this domain."""
        region = self._by_key.get(key)
        if region is None or not region.alive or region.pd is not pd:
            return None
        return region

    def check(self, key: int, pd: Pd, address: int, length: int, need: int) -> Region | None:
        """Return the region if key, domain, rights and range allow the access, else None."""
        region = self._by_key.get(key)
        if region is None or not region.alive or region.pd is not pd or need & ~region.access:
            return None
        offset = address - region.iova  # Python integers do not wrap
        return region if 0 <= offset <= region.end - region.start - length else None

    def invalidate(self, rkey: int, pd: Pd) -> bool:
        """Carry out SEND with invalidate: the region stays registered, its key opens nothing any more."""
        region = self.find(rkey, pd)
        if region is None or not region.access & ANY_REMOTE or region.implicit:
            return False
        region.alive = False
        return True

    def _free_key(self) -> int:
        while True:
            key = self._draw(1 << 32)
            if key and key not in self._by_key:
                return key
