"""What can be registered: objects with memory, addresses, or nothing at all."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.control.dtypes import dtype_text
from nopin.errors import UsageError
from nopin.units import U64_MAX

USER_ADDRESSES = 1 << 47
"""Virtual addresses a process on x86-64 can use, unless it asks for more (56 bits, five-level tables)."""

TYPE_TEXT_BYTES_MAX = 1000
"""Of the text of a type; a share's entry in its book is no larger than 2 KiB (`control.share_book`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process and the array it holds.

    Attributes:
        address: the first byte that belongs to it.
        length: bytes; None for the whole process (then `address` is 0).
        dtype: as `control.dtypes` writes it; `shape` and `strides` (bytes) as numpy's.
        offset: from `address` to the array's first element.
        read_only: stores through it are forbidden.
        keep: holds the exporting object, so that its memory stays where it is.
    """

    address: int
    length: int | None
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    read_only: bool = False
    keep: object = None


def memory_of(what: object = None, length: int | None = None) -> Memory:
    """Find the memory behind an object.

    Args:
        what: a numpy array or anything with the buffer protocol; an address, with `length`; None for the
            whole process.
        length: bytes, for an address only.

    Raises:
        UsageError: it has no memory of its own, holds Python objects, or is empty.
    """
    if what is None:
        if length is not None:
            raise UsageError("a length needs an address before it")
        return Memory(0, None, "|u1", (USER_ADDRESSES,), (1,))
    if not isinstance(what, np.ndarray) and (address := _integer(what)) is not None:
        return _of_address(address, length)
    if length is not None:
        raise UsageError("a length goes with an address only; slice the object to share a part")
    return _of_array(what, what.view()) if isinstance(what, np.ndarray) else _of_buffer(what)


def _integer(what: object) -> int | None:
    try:
        return operator.index(what)  # type: ignore[arg-type]  # TypeError: it is no integer
    except TypeError:
        return None


def _of_address(address: int, length: object) -> Memory:
    if length is None:
        raise UsageError(f"address {address:#x} needs a length")
    n_bytes = _integer(length)
    if n_bytes is None or n_bytes <= 0 or address < 0 or address + n_bytes > U64_MAX:
        raise UsageError(f"no such range: address {address:#x}, {length!r} bytes")
    return Memory(address, n_bytes, "|u1", (n_bytes,), (1,))


def _of_buffer(what: object) -> Memory:
    try:
        view = memoryview(what)  # type: ignore[arg-type]  # TypeError: it has no buffer
    except TypeError:
        raise UsageError(
            f"{type(what).__name__} has no memory to share: give a numpy array, bytearray, mmap or another "
            "object with the buffer protocol, or an address and a length; a tensor's numpy() is an array of its memory"
        ) from None
    return _of_array(np.asarray(view), view)


def _of_array(array: NDArray[Any], keep: object) -> Memory:
    if array.dtype.hasobject:
        raise UsageError("an array of Python objects holds addresses of this process, not values")
    if array.size == 0 or array.itemsize == 0:
        raise UsageError("an empty buffer has no memory to share")
    first: int = array.__array_interface__["data"][0]
    low, high = extent(array.shape, array.strides, array.itemsize)
    return Memory(
        address=first + low,
        length=high - low,
        dtype=_text_of(array.dtype),
        shape=array.shape,
        strides=array.strides,
        offset=-low,
        read_only=not array.flags.writeable,
        keep=keep,
    )


def _text_of(dtype: np.dtype[Any]) -> str:
    """Write a type for peers; records with overlapping fields, or too many, are so many bytes to them."""
    with contextlib.suppress(ValueError):
        text = dtype_text(dtype)
        if len(text.encode()) <= TYPE_TEXT_BYTES_MAX:
            return text
    return dtype.str


def extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the byte range [low, high) of a non-empty array, relative to its first element."""
    reaches = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(r for r in reaches if r < 0), sum(r for r in reaches if r > 0) + itemsize
