"""Which addresses belong to arenas, and arrays there by reference.

A reference is an address with a shape: nothing is copied and nothing translated, because owner and worker have each
arena at the same address.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from nopin.control.dtypes import dtype_text, parse_dtype
from nopin.errors import UsageError
from nopin.ranges import Range


class ArrayRef(msgspec.Struct, frozen=True, array_like=True):
    """An array by reference.

    Attributes:
        address: of its first element; 0 for an array without elements.
        shape: as numpy's.
        strides: bytes, as numpy's.
        dtype: as `control.dtypes` writes it.
        writable: stores through it are allowed.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    writable: bool

    @classmethod
    def of(cls, array: NDArray[Any]) -> ArrayRef:
        """The reference of an array.

        Raises:
            UsageError: it holds Python objects, or a mask beside its values.
        """
        if array.dtype.hasobject:
            raise UsageError("an array of Python objects holds addresses of its own process, not values")
        if isinstance(array, np.ma.MaskedArray):
            raise UsageError("a masked array has its mask elsewhere; give its .data, and its .mask beside it")
        address: int = array.__array_interface__["data"][0] if array.size else 0
        return cls(address, array.shape, array.strides, dtype_text(array.dtype), bool(array.flags.writeable))

    @property
    def extent(self) -> Range | None:
        """The bytes between its lowest and its highest, strides of either sign; None when it has no elements."""
        itemsize = parse_dtype(self.dtype).itemsize
        if 0 in self.shape or not itemsize:
            return None
        reaches = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(reach for reach in reaches if reach < 0)
        high = self.address + sum(reach for reach in reaches if reach > 0) + itemsize
        return Range(low, high)

    def __str__(self) -> str:
        return f"{parse_dtype(self.dtype)}{list(self.shape)}"


class Window(NamedTuple):
    """One arena: its addresses and, in a worker, its bytes ((length,) uint8)."""

    where: Range
    memory: memoryview


class Windows:
    """The arenas a process has mapped, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._windows: list[Window] = []

    def add(self, where: Range) -> None:
        """Know of an arena; it is mapped at `where` in this process and stays so until removed.

        Raises:
            ValueError: it overlaps one known already.
        """
        if any(window.where.overlaps(where) for window in self._windows):
            raise ValueError(f"{where} overlaps an arena that is mapped")
        memory = memoryview((ctypes.c_uint8 * where.length).from_address(where.start)).cast("B")
        at = bisect_right(self._starts, where.start)
        self._starts.insert(at, where.start)
        self._windows.insert(at, Window(where, memory))

    def remove(self, start: int) -> Range:
        """Forget the arena at `start`, where it was.

        Raises:
            KeyError: there is none.
        """
        if start not in self._starts:
            raise KeyError(start)
        at = self._starts.index(start)
        del self._starts[at]
        return self._windows.pop(at).where

    def find(self, address: int, length: int) -> Window | None:
        """The arena that has all of `length` bytes from `address`, or None."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        window = self._windows[at]
        return window if address + length <= window.where.end else None

    def array(self, ref: ArrayRef) -> NDArray[Any]:
        """The array a reference means, in place.

        Raises:
            ValueError: some byte of it is outside every arena.
        """
        dtype, extent = parse_dtype(ref.dtype), ref.extent
        if extent is None:
            return np.empty(ref.shape, dtype)
        window = self.find(extent.start, extent.length)
        if window is None:
            raise ValueError(f"no arena has all of {extent}")
        offset = ref.address - window.where.start
        array: NDArray[Any] = np.ndarray(ref.shape, dtype, window.memory, offset, ref.strides)
        array.flags.writeable = ref.writable
        return array
