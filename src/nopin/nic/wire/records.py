"""Gather and scatter of packed records at arbitrary byte offsets of a buffer.

One view of the buffer has a record starting at every byte (they overlap); indexing it with byte offsets moves
any number of records in one numpy operation. The move itself runs on a plain void type of the same size,
which numpy copies as bytes; a structured type would be copied field by field, four times slower.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes

Offsets = NDArray[np.int64]
"""Byte positions in a buffer, (n,)."""


def gather(buffer: Bytes, offsets: Offsets, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """Copy the records that start at offsets, (n,) of dtype.

    Raises:
        IndexError: a record would end past the buffer.
    """
    return _every_byte(buffer, dtype.itemsize)[offsets].view(dtype)


def scatter(buffer: Bytes, offsets: Offsets, records: NDArray[np.void] | NDArray[np.uint32]) -> None:
    """Write the records so that they start at offsets; IndexError when one would end past the buffer."""
    n_bytes = records.dtype.itemsize
    _every_byte(buffer, n_bytes)[offsets] = records.view(np.dtype((np.void, n_bytes)))


def _every_byte(buffer: Bytes, n_bytes: int) -> NDArray[np.void]:
    n_records = max(0, len(buffer) - n_bytes + 1)
    return np.ndarray((n_records,), np.dtype((np.void, n_bytes)), buffer, strides=(1,))
