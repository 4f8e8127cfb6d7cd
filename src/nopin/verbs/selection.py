"""Which bytes of a remote array a numpy index means: equal runs at regular places, computed without I/O.

A selection is normalised to memory order (descending strides, no negative one), so that as many bytes as
possible form one run, and exactly the selected bytes travel. `arrange` turns the bytes, run after run in one
buffer, back into what numpy would have returned; `flatten` is its inverse for a value to be written.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.errors import UsageError

Array = NDArray[Any]

_FORWARD, _BACKWARD = slice(None), slice(None, None, -1)


class SelectionError(UsageError, IndexError):
    """An index that numpy's basic indexing would refuse, or that is not basic indexing."""


class _Dim(NamedTuple):
    """One dimension of the result: how many elements, how many bytes apart in the array."""

    n: int
    stride: int


@dataclass(slots=True)  # not frozen: that would make it three times as slow to make
class Selection:
    """Bytes of an array, as equal runs. Never changed.

    Attributes:
        shape: of the result, as numpy gives it.
        itemsize: bytes of one element.
        run_bytes: length of each run.
        n_runs: how many runs; 0 when the result is empty.
        in_memory_order: the order of the result is that of memory: the common case, and nothing to arrange.
    """

    shape: tuple[int, ...]
    itemsize: int
    run_bytes: int
    n_runs: int
    _base: int
    _outer: tuple[_Dim, ...]
    _order: tuple[int, ...]
    _flips: tuple[slice, ...]
    in_memory_order: bool

    @property
    def n_bytes(self) -> int:
        """Bytes that travel."""
        return self.run_bytes * self.n_runs

    def offsets(self, first: int = 0, n: int | None = None) -> NDArray[np.int64]:
        """Return where runs [first, first + n) start, in bytes from the array's first element.

        Run i lies at i * run_bytes in the buffer. Negative where the array has negative strides.
        """
        n = self.n_runs - first if n is None else n
        if not self._outer:
            return np.full(n, self._base, np.int64)
        index = np.arange(first, first + n, dtype=np.int64)
        found = np.full(n, self._base, np.int64)
        for dim in reversed(self._outer):
            index, position = np.divmod(index, dim.n)
            found += position * dim.stride
        return found

    def first_offset(self) -> int:
        """Return where the first run starts: a plain int, for the common case of a single run."""
        return self._base

    def buffer_shape(self) -> tuple[int, ...]:
        """Return the shape of the buffer's elements in memory order."""
        return tuple(self.shape[axis] for axis in self._order)

    def arrange(self, buffer: Array) -> Array:
        """View the bytes of all runs, in order and typed, as the result."""
        if self.in_memory_order:
            return buffer.reshape(self.shape)
        inverse = np.argsort(self._order)
        return buffer.reshape(self.buffer_shape()).transpose(inverse)[self._flips]

    def flatten(self, value: Array) -> Array:
        """Return a value of the result's shape as one contiguous buffer, run after run."""
        if self.in_memory_order:
            return np.ascontiguousarray(value).reshape(-1)
        return np.ascontiguousarray(value[self._flips].transpose(self._order)).reshape(-1)


def select(key: object, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Selection:
    """Work out what an index selects.

    Args:
        key: integers, slices with any step, one ellipsis, None for a new axis; or a tuple of them.
        shape: of the remote array.
        strides: bytes, any sign.
        itemsize: bytes of one element.

    Raises:
        SelectionError: out of range, too many indices, or advanced indexing (arrays, lists, booleans).
    """
    base = 0
    dims: list[_Dim] = []
    axis = 0
    for part in _expanded(key, len(shape)):
        if part is None:
            dims.append(_Dim(1, 0))
            continue
        if isinstance(part, slice):
            start, dim = _sliced(part, shape[axis], strides[axis])
            base += start
            dims.append(dim)
        else:
            base += _checked(part, axis, shape[axis]) * strides[axis]
        axis += 1
    return _normalised(base, dims, itemsize)


def _expanded(key: object, n_dims: int) -> list[int | slice | None]:
    """Return one part for each dimension, new axes in between, the ellipsis written out."""
    parts = list(key) if isinstance(key, tuple) else [key]
    places = [i for i, part in enumerate(parts) if part is Ellipsis]
    n_used = len(parts) - len(places) - sum([part is None for part in parts])
    if n_used > n_dims:
        raise SelectionError(f"{n_used} indices for an array of {n_dims} dimensions")
    if len(places) > 1:
        raise SelectionError("an index can have one ellipsis (...) only")
    at = places[0] if places else len(parts)
    parts[at : at + 1] = [slice(None)] * (n_dims - n_used)
    return [_basic(part) for part in parts]


def _basic(part: object) -> int | slice | None:
    if part is None or isinstance(part, slice):
        return part
    if isinstance(part, bool | np.bool_):
        raise SelectionError("a boolean is advanced indexing; read a slice, then index the result")
    try:
        return operator.index(part)  # type: ignore[arg-type]  # TypeError is the answer for whatever is no integer
    except TypeError:
        raise SelectionError(
            f"cannot index a remote array with {type(part).__name__}: integers, slices, ... and None only; "
            "read a slice, then index the result"
        ) from None


def _checked(index: int, axis: int, size: int) -> int:
    if not -size <= index < size:
        raise SelectionError(f"index {index} is out of bounds for axis {axis} with size {size}")
    return index % size


def _sliced(part: slice, size: int, stride: int) -> tuple[int, _Dim]:
    try:
        start, stop, step = part.indices(size)
    except (TypeError, ValueError) as problem:
        raise SelectionError(str(problem)) from None
    count = len(range(start, stop, step))
    return (start * stride if count else 0), _Dim(count, step * stride)


def _normalised(base: int, dims: list[_Dim], itemsize: int) -> Selection:
    if not dims:  # one element
        return Selection((), itemsize, itemsize, 1, base, (), (), (), True)
    shape = tuple([dim.n for dim in dims])
    if 0 in shape:
        return Selection(shape, itemsize, itemsize, 0, base, (), tuple(range(len(dims))), (), True)
    flips = tuple([_BACKWARD if dim.stride < 0 else _FORWARD for dim in dims])
    base += sum([(dim.n - 1) * dim.stride for dim in dims if dim.stride < 0])
    order = tuple(sorted(range(len(dims)), key=lambda axis: -abs(dims[axis].stride)))
    outer = [_Dim(dims[axis].n, abs(dims[axis].stride)) for axis in order if dims[axis].n > 1]
    run_bytes = itemsize
    while outer and outer[-1].stride == run_bytes:
        run_bytes *= outer.pop().n
    n_runs = math.prod([dim.n for dim in outer])
    plain = order == tuple(range(len(dims))) and _BACKWARD not in flips
    return Selection(shape, itemsize, run_bytes, n_runs, base, tuple(outer), order, flips, plain)
