"""Copies of accesses that are cut by windows: part by part, or in one move where all of it lies in one window.

Requires throughout: the access was looked at (`ManagedAccess.look`), so what lies in windows is held by the mirrors, up
to the limit the look returned. Plain parts may still turn out bad; a copy then ends there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nopin.iommu.moves import FEW, move
from nopin.iommu.relay import Relayed
from nopin.iommu.windows import Part, WindowedSpace, page_run
from nopin.mm.space import IoVec, Staging
from nopin.units import PAGE_SHIFT

Segments = Sequence[Sequence[int]]
"""Addresses and lengths."""

_PAGES_MAX = 4096
"""An irregular list of more pages than this is handled part by part, so that a list of them stays small."""


def parts_of(space: WindowedSpace, segments: Segments) -> Iterator[Part]:
    """Cut all segments at window borders, in order."""
    for address, length in segments:
        yield from space.parts(address, length)


def copy_in_window(space: WindowedSpace, remote: IoVec, staging: Staging, local: IoVec, *, write: bool) -> int | None:
    """Copy a list that lies in one window and is all held; None if it is not such a list, and nothing was done."""
    if len(remote) <= FEW:
        return _copy_few(space, remote.tolist(), staging, local, write=write)
    lengths = remote[:, 1]
    first = int(remote[:, 0].min())
    last = int((remote[:, 0] + lengths).max())
    window = space.find(first, last - first)
    if window is None:
        return None
    places = remote - np.array([window.start, 0], np.uint64) + np.array([window.offset, 0], np.uint64)
    pages = _pages_of(places.astype(np.int64))
    if pages is None or not window.arena.mirror.use_pages(pages, write=write):
        return None
    memory = window.arena.memory
    if write:
        move(staging, local, memory, places)
    else:
        move(memory, places, staging, local)
    return int(lengths.sum())


def _copy_few(
    space: WindowedSpace, segments: list[list[int]], staging: Staging, local: IoVec, *, write: bool
) -> int | None:
    """Do the same for a list so short that arrays would cost more than they save."""
    places: list[tuple[int, int]] = []
    first = segments[0][0]
    window = space.find(first, 0)
    if window is None:
        return None
    mirror, total = window.arena.mirror, 0
    for address, length in segments:
        if length <= 0 or address < window.start or address + length > window.end:
            return None
        at = window.at(address)
        places.append((at, length))
        if not mirror.holds(*page_run(at, length), write=write):
            return None
        total += length
    for at, length in places:
        mirror.use(*page_run(at, length), write=write)
    memory, there = window.arena.memory, local.tolist() if len(local) <= FEW else local
    if write:
        move(staging, there, memory, places)
    else:
        move(memory, places, staging, there)
    return total


def copy_parts(
    space: WindowedSpace, segments: Segments, limit: int, staging: Staging, offset: int, *, write: bool
) -> int:
    """Copy the first `limit` bytes of segments from or to staging, one after the other; returns bytes done."""
    done = 0
    for part in parts_of(space, segments):
        n = min(part.length, limit - done)
        if n <= 0:
            break
        n_done = _copy_part(space, part, n, staging, offset + done, write=write)
        done += n_done
        if n_done < n:
            break
    return done


def copy_packed(
    space: WindowedSpace, segments: Segments, limit: int, staging: Staging, local: IoVec, *, write: bool
) -> int:
    """Copy the first `limit` bytes of segments from or to a scattered list of staging; returns bytes done."""
    packed = Staging(np.empty(int(local[:, 1].sum()), np.uint8))
    flat = np.array([[0, len(packed.array)]], np.uint64)
    if write:
        move(staging, local, packed, flat)
        return copy_parts(space, segments, limit, packed, 0, write=True)
    done = copy_parts(space, segments, limit, packed, 0, write=False)
    if done:
        flat[0, 1] = done
        move(packed, flat, staging, _head(local, done))
    return done


def relay(
    source: tuple[WindowedSpace, int],
    target: tuple[WindowedSpace, int],
    n_readable: int,
    n_writable: int,
    length: int,
    staging: Staging,
    grain: int,
) -> Relayed:
    """Copy between (space, address) pairs, as `relay.Relay` does.

    Args:
        n_readable, n_writable: what the looks at source and target returned.
        length: what is wanted; a source that ends earlier is cut to a multiple of `grain` bytes.
    """
    (source_space, source_address), (target_space, target_address) = source, target
    n_left = min(_whole(n_readable, length, grain), n_writable)
    done = 0
    for part in source_space.parts(source_address, n_left) if n_left else ():
        memory = part.window.arena.memory if part.window is not None else None
        if part.window is not None and isinstance(memory, Staging):  # it can be written from where it lies
            at = part.window.at(part.address)
            part.window.arena.mirror.touch(*page_run(at, part.length), write=False)
            there = (target_address + done, part.length)
            n_done = copy_parts(target_space, (there,), part.length, memory, at, write=True)
            done += n_done
            if n_done < part.length:
                return Relayed(n_readable, done)
            continue
        longest = len(staging.array) // grain * grain
        for at in range(0, part.length, longest):
            step = min(part.length - at, longest)
            n_read = _copy_part(source_space, part._replace(address=part.address + at), step, staging, 0, write=False)
            n_step = n_read if n_read == step else max(0, _whole(done + n_read, length, grain) - done)
            there = (target_address + done, n_step)
            n_done = copy_parts(target_space, (there,), n_step, staging, 0, write=True)
            if n_done < step:
                return Relayed(done + n_read, done + n_done)
            done += n_done
    return Relayed(n_readable, done)


def _whole(n_bytes: int, length: int, grain: int) -> int:
    """Cut a short source to what would have left in whole packets."""
    return n_bytes if n_bytes == length else n_bytes - n_bytes % grain


def _copy_part(space: WindowedSpace, part: Part, n: int, staging: Staging, offset: int, *, write: bool) -> int:
    """Copy the first `n` bytes of a part."""
    if part.window is None:
        copy = space.plain.write if write else space.plain.read
        return copy(part.address, n, staging, offset)
    arena, at = part.window.arena, part.window.at(part.address)
    arena.mirror.touch(*page_run(at, n), write=write)
    if write:
        arena.memory.view[at : at + n] = staging.view[offset : offset + n]
    else:
        staging.view[offset : offset + n] = arena.memory.view[at : at + n]
    return n


def _pages_of(places: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the pages that segments of an arena lie in, sorted, each once; None if there are too many."""
    used = places[places[:, 1] > 0]
    firsts = used[:, 0] >> PAGE_SHIFT
    counts = ((used[:, 0] + used[:, 1] - 1) >> PAGE_SHIFT) - firsts + 1
    total = int(counts.sum())
    if not 0 < total <= _PAGES_MAX:
        return None
    if total == len(used):
        return np.unique(firsts)
    starts = np.cumsum(counts) - counts
    return np.unique(np.repeat(firsts - starts, counts) + np.arange(total))


def _head(segments: IoVec, n_bytes: int) -> IoVec:
    """Return the first `n_bytes` of a scatter list."""
    ends = np.cumsum(segments[:, 1].astype(np.int64))
    last = int(np.searchsorted(ends, n_bytes))
    head = segments[: last + 1].copy()
    head[last, 1] -= np.uint64(int(ends[last]) - n_bytes)
    return head
