"""The accelerator's own kernels.

A kernel is a generator: it computes a chunk, yields, and so on, and returns its result. Between two chunks a job can be
stopped; inside one it runs at numpy's speed. A function of the user's may be a generator for the same purpose.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nopin.accel.memory import Windows
from nopin.ranges import Range

CHUNK_BYTES = 4 << 20
"""Of the first array. Some milliseconds with its pages there, some tens of milliseconds when all come from swap."""
HOPS_PER_CHUNK = 4096

Array = NDArray[Any]
Kernel = Generator[None, None, Any]


def fill(target: Array, value: Any) -> Kernel:
    """Set every element to `value`."""
    for (piece,) in pieces(target):
        piece[...] = value
        yield


def copy(target: Array, source: Array) -> Kernel:
    """Copy `source`, broadcast, into `target`. Of overlapping arrays the result is not defined."""
    for to, piece in pieces(target, np.broadcast_to(source, target.shape)):
        np.copyto(to, piece)
        yield


def sum_(array: Array) -> Kernel:
    """Sum of all elements, in the type numpy sums them in; 0 of none.

    Chunks are summed first and their sums then, pairwise both, so that rounding grows as slowly as in `numpy.sum`.
    """
    sums = []
    for (piece,) in pieces(array):
        sums.append(np.add.reduce(piece, axis=None))
        yield
    return np.add.reduce(np.array(sums)) if sums else np.add.reduce(array, axis=None)


def add(a: ArrayLike, b: ArrayLike, out: Array) -> Kernel:
    """Set `out` to a + b, both broadcast; they may be `out` itself."""
    for left, right, to in pieces(*_broadcast(out, a, b), out):
        np.add(left, right, out=to)
        yield


def scale(array: Array, factor: Any) -> Kernel:
    """Multiply every element by `factor` in place."""
    for (piece,) in pieces(array):
        np.multiply(piece, factor, out=piece)
        yield


def gather(source: Array, indices: Array, out: Array) -> Kernel:
    """Set `out[i]` to `source[indices[i]]`, along the first axis; an index out of bounds raises IndexError.

    Raises:
        ValueError: `out` is not of the shape that gives.
    """
    expected = indices.shape + source.shape[1:]
    if out.shape != expected:
        raise ValueError(f"out has shape {out.shape}; these indices give {expected}")
    if indices.ndim != 1:
        raise ValueError(f"indices have {indices.ndim} dimensions; give one")
    n = max(1, CHUNK_BYTES // max(1, out[:1].nbytes, indices.itemsize))
    for first in range(0, len(indices), n):
        out[first : first + n] = source[indices[first : first + n]]
        yield


def chase(
    memory: Windows, head: Array | int, value_offset: int = 8, value_format: str = "q", n_max: int | None = None
) -> Kernel:
    """Follow a linked list of real pointers from `head`, and add up the values along it.

    A node begins with the address of the next one, 8 bytes, 0 at the end; `value_offset` bytes further is its value.

    Args:
        memory: the arenas; every pointer must lead into one of them.
        head: address of the first node, or an array that begins with it.
        value_offset: bytes, from 8 to 65536.
        value_format: of the value, a letter of the module `struct`.
        n_max: stop after so many nodes; None follows the list to its end, and a cycle until the job is stopped.

    Returns:
        (nodes visited, sum of their values).

    Raises:
        ValueError: a pointer leads outside every arena; the message says which and where it stood.
    """
    if not 8 <= value_offset <= 65536:
        raise ValueError(f"a value offset of {value_offset} bytes; it follows the pointer, so from 8 to 65536")
    node = struct.Struct(f"<Q{value_offset - 8}x{value_format}")
    address = head if isinstance(head, int) else int(head.__array_interface__["data"][0])
    where, count, total, came_from = Range(0, 1), 0, 0, 0
    at = memoryview(b"")
    while address and (n_max is None or count < n_max):
        if not where.start <= address <= where.end - node.size:
            window = memory.find(address, node.size)
            if window is None:
                raise ValueError(f"node {count}: {address:#x}, from the node at {came_from:#x}, is outside every arena")
            where, at = window
        came_from = address
        address, value = node.unpack_from(at, address - where.start)
        total += value
        count += 1
        if count % HOPS_PER_CHUNK == 0:
            yield
    return count, total


KERNELS: dict[str, Callable[..., Kernel]] = {
    "fill": fill,
    "copy": copy,
    "sum": sum_,
    "add": add,
    "scale": scale,
    "gather": gather,
    "chase": chase,
}
"""By the name a job gives. `chase` takes the worker's memory first."""


def pieces(*arrays: Array) -> Iterator[Sequence[Array]]:
    """Cut arrays of one shape into the same pieces, each at most CHUNK_BYTES of the first array.

    They are cut across the axis along which the first array's elements lie furthest apart, so that a piece is
    compact in memory whatever the array's order.

    Raises:
        ValueError: the shapes differ.
    """
    shape = arrays[0].shape
    for other in arrays:
        if other.shape != shape:
            raise ValueError(f"arrays of different shapes: {shape} and {other.shape}")
    if arrays[0].size:
        order = sorted(range(len(shape)), key=lambda axis: -abs(arrays[0].strides[axis]))
        yield from _cut([array.transpose(order) for array in arrays])


def _cut(arrays: Sequence[Array]) -> Iterator[Sequence[Array]]:
    first = arrays[0]
    if first.nbytes <= CHUNK_BYTES or first.ndim == 0:
        yield arrays
        return
    row_bytes = first.nbytes // len(first)
    if row_bytes > CHUNK_BYTES:
        for index in range(len(first)):
            yield from _cut([array[index, ...] for array in arrays])
        return
    n_rows = max(1, CHUNK_BYTES // row_bytes)
    for index in range(0, len(first), n_rows):
        yield [array[index : index + n_rows] for array in arrays]


def _broadcast(out: Array, *operands: ArrayLike) -> list[Array]:
    return [np.broadcast_to(np.asarray(operand), out.shape) for operand in operands]
