"""Moving bytes between two buffers of this process by scatter lists, without a system call.

What moves is known to be there, so this is only about speed. Python moves one segment in a fifth of a microsecond,
which is nothing for a kilobyte and much for eight bytes; so lists that are regular, as those of packets are, move by
numpy in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nopin.mm.space import ByteMemory, IoVec, Staging

FEW = 8
"""Up to this many segments are handled one by one; with more it pays to look whether they are regular."""

_TINY_BYTES = 64
"""Segments up to this length move quicker byte by byte in one call than one by one in many."""


Segments = IoVec | Sequence[Sequence[int]]
"""(n, 2): start and length. Short ones may as well be a list, which is quicker made and read."""


def move(source: ByteMemory, there: Segments, target: ByteMemory, here: Segments) -> None:
    """Copy segments of `source` in order into segments of `target`; totals are equal.

    Where segments of the target overlap, later bytes win.
    """
    n_there, n_here = len(there), len(here)
    if n_there <= FEW >= n_here or not (isinstance(source, Staging) and isinstance(target, Staging)):
        _walk(source, _as_list(there), target, _as_list(here))
        return
    there, here = np.asarray(there, np.uint64), np.asarray(here, np.uint64)
    if n_there == 1 and _is_regular(here):
        start = int(there[0, 0])
        length = int(there[0, 1])
        _rows(target, here, source, start, length, scatter=True)
    elif n_here == 1 and _is_regular(there):
        _rows(source, there, target, int(here[0, 0]), int(here[0, 1]), scatter=False)
    elif n_there == n_here and _is_tiny(there, here):
        index = np.arange(int(there[0, 1]), dtype=np.int64)
        target.array[here[:, :1].astype(np.int64) + index] = source.array[there[:, :1].astype(np.int64) + index]
    else:
        _walk(source, there.tolist(), target, here.tolist())


def _as_list(segments: Segments) -> Sequence[Sequence[int]]:
    if isinstance(segments, np.ndarray):
        listed: list[list[int]] = segments.tolist()
        return listed
    return segments


def _is_regular(segments: IoVec) -> bool:
    """Tell whether segments have one length (the last may be shorter) and one distance, and do not overlap."""
    starts, lengths = segments[:, 0].astype(np.int64), segments[:, 1]
    steps = starts[1:] - starts[:-1]
    return bool(
        (lengths[:-1] == lengths[0]).all()
        and lengths[-1] <= lengths[0]
        and steps[0] >= int(lengths[0]) > 0
        and (steps == steps[0]).all()
    )


def _is_tiny(there: IoVec, here: IoVec) -> bool:
    length = int(there[0, 1])
    return length <= _TINY_BYTES and bool((there[:, 1] == length).all() and (here[:, 1] == length).all())


def _rows(strided: Staging, segments: IoVec, flat: Staging, start: int, length: int, *, scatter: bool) -> None:
    """Move between regular segments of one buffer and [start, start + length) of the other.

    All but the last segment are the first columns of a matrix whose rows lie one distance apart.
    """
    n_rows = len(segments) - 1
    first, n_bytes = int(segments[0, 0]), int(segments[0, 1])
    step = int(segments[1, 0]) - first
    rows = strided.array[first : first + n_rows * step].reshape(n_rows, step)[:, :n_bytes]
    middle = start + n_rows * n_bytes
    block = flat.array[start:middle].reshape(n_rows, n_bytes)
    last, n_last = segments[-1].tolist()
    assert middle + n_last == start + length, "scatter lists of different length"
    if scatter:
        rows[:] = block
        strided.view[last : last + n_last] = flat.view[middle : middle + n_last]
    else:
        block[:] = rows
        flat.view[middle : middle + n_last] = strided.view[last : last + n_last]


def _walk(
    source: ByteMemory, there: Sequence[Sequence[int]], target: ByteMemory, here: Sequence[Sequence[int]]
) -> None:
    """Move what two lists have in common, piece after piece."""
    sources, targets = iter(there), iter(here)
    start = at = left = room = 0
    while True:
        while not left:
            segment = next(sources, None)
            if segment is None:
                return
            start, left = segment
        while not room:
            at, room = next(targets)
        step = min(left, room)
        target.view[at : at + step] = source.view[start : start + step]
        start, left, at, room = start + step, left - step, at + step, room - step
