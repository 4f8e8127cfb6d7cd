"""Published regions: what peers may attach to, by a random name and a secret token."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nopin.control.dtypes import parse_dtype
from nopin.control.url import TOKEN_BYTES
from nopin.nic.errors import VerbsError
from nopin.nic.mr import Region
from nopin.server.domain import Domain
from nopin.units import U64_MAX

N_DIMENSIONS_MAX = 64
"""As many as a numpy array can have."""


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """An array inside a region.

    Attributes:
        dtype: as `control.dtypes` writes it.
        strides: bytes.
        offset: from the region's first byte to the array's first element.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(slots=True, eq=False)
class Share:
    """A published region.

    Attributes:
        domain: the region's protection domain, where attached peers' queue pairs live.
        owner_pid: the process whose memory it is.
    """

    name: str
    token: bytes = field(repr=False)
    region: Region
    domain: Domain
    layout: ArrayLayout
    owner_pid: int


class ShareTable:
    """All shares of the server by name.

    Attributes:
        withdrawn: called with a share that was just removed and the cause.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Share] = {}
        self.withdrawn: Callable[[Share, str], None] | None = None

    def __len__(self) -> int:
        return len(self._by_name)

    def publish(
        self, region: Region, domain: Domain, layout: ArrayLayout, owner_pid: int, known_as: tuple[str, bytes] | None
    ) -> Share:
        """Add a share under a fresh name with a fresh token, or under those that peers know it by already.

        Raises:
            VerbsError: EINVAL, the array does not lie inside the region, or is described wrongly; EEXIST, there is a
                share of that name.
        """
        check_layout(layout, region.length)
        name, token = known_as or (secrets.token_urlsafe(12), secrets.token_bytes(TOKEN_BYTES))
        if name in self._by_name:
            raise VerbsError(f"there is a share {name} already", errno.EEXIST)
        share = self._by_name[name] = Share(name, token, region, domain, layout, owner_pid)
        return share

    def find(self, name: str) -> Share | None:
        """Return the share of that name."""
        return self._by_name.get(name)

    def withdraw(self, share: Share, cause: str) -> None:
        """Remove a share: nobody can attach any more, and who is attached is told."""
        del self._by_name[share.name]
        if self.withdrawn is not None:
            self.withdrawn(share, cause)


def check_layout(layout: ArrayLayout, region_length: int) -> None:
    """Check that every byte of every element lies inside a region.

    Raises:
        VerbsError: EINVAL; the message says what is wrong.
    """
    itemsize = _itemsize(layout.dtype)
    if len(layout.shape) != len(layout.strides) or len(layout.shape) > N_DIMENSIONS_MAX:
        raise VerbsError(f"{len(layout.shape)} dimensions with {len(layout.strides)} strides")
    if any(not 0 <= n <= U64_MAX for n in layout.shape):
        raise VerbsError(f"impossible shape {layout.shape}")
    if 0 in layout.shape:
        if not 0 <= layout.offset <= region_length:
            raise VerbsError(f"offset {layout.offset} outside of a region of {region_length} bytes")
        return
    first, end = extent(layout.shape, layout.strides, itemsize)
    if layout.offset + first < 0 or layout.offset + end > region_length:
        where = f"{layout.offset + first} ... {layout.offset + end}"
        raise VerbsError(f"an array over bytes {where} does not fit into a region of {region_length} bytes")


def extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the byte range [first, end) of a non-empty array, relative to its first element."""
    reaches = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(r for r in reaches if r < 0), sum(r for r in reaches if r > 0) + itemsize


def _itemsize(dtype: str) -> int:
    try:
        return parse_dtype(dtype).itemsize
    except ValueError as problem:
        raise VerbsError(str(problem)) from problem
