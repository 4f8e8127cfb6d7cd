"""Copies between packets and scatter lists: neighbours in one region go with one call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from nopin.iommu.iommu import PARKED
from nopin.mm.space import IoVec, Staging
from nopin.nic.abi import Discipline
from nopin.nic.core import Core, Waiter, waiter_for
from nopin.nic.mr import Region
from nopin.nic.work import Piece


def gather(core: Core, pieces: list[Piece], staging: Staging, local: IoVec, waiter: Waiter | None) -> int:
    """Copy pieces of process memory, in order, into staging ranges of the same total length.

    Returns bytes done (short: the byte there cannot be read), or PARKED: nothing useful was copied, try again.
    """
    return _copy(core, pieces, staging, local, waiter, write=False)


def scatter(core: Core, pieces: list[Piece], staging: Staging, local: IoVec, waiter: Waiter | None) -> int:
    """Copy staging ranges, in order, into pieces of process memory of the same total length.

    Returns bytes done (short: the byte there cannot be written), or PARKED: nothing was written.
    """
    return _copy(core, pieces, staging, local, waiter, write=True)


def pull(core: Core, pieces: Iterable[Piece], waiter: Waiter | None) -> int:
    """Copy pieces of process memory, one after the other, to the start of the staging buffer.

    Returns as `gather`. This form needs no scatter list of its own, which pays for single small pieces.
    """
    return _copy_flat(core, pieces, core.plan.staging, waiter, write=False)


def push(core: Core, pieces: Iterable[Piece], staging: Staging, waiter: Waiter | None) -> int:
    """Copy the start of a staging buffer into pieces of process memory, one after the other.

    Returns as `scatter`.
    """
    return _copy_flat(core, pieces, staging, waiter, write=True)


def _copy_flat(core: Core, pieces: Iterable[Piece], staging: Staging, waiter: Waiter | None, *, write: bool) -> int:
    copy = core.iommu.write if write else core.iommu.read
    done = 0
    for piece in pieces:
        region = piece.region
        if not region.alive:
            return done
        who = waiter_for(region, waiter) if done == 0 else None  # as in `_copy`
        n = copy(region.pasid, piece.va, piece.length, staging, done, region.meter, who)
        if n == PARKED:
            return PARKED
        done += n
        if n < piece.length:
            return done
    return done


def _copy(
    core: Core, pieces: list[Piece], staging: Staging, local: IoVec, waiter: Waiter | None, *, write: bool
) -> int:
    """Copy region by region.

    Only the first region may park. A later one is waited for in place: lists over several regions are rare, and
    parking after some bytes were written would have to be undone.
    """
    if len(pieces) == 1:
        (piece,) = pieces
        if not piece.region.alive:
            return 0
        remote = np.array([[piece.va, piece.length]], np.uint64)
        who = waiter_for(piece.region, waiter)
        return _copy_region(core, piece.region, remote, staging, local, who, write=write)
    done = 0
    for region, run in groupby(pieces, key=lambda piece: piece.region):
        if not region.alive:
            return done
        remote = np.array([(piece.va, piece.length) for piece in run], np.uint64)
        total = int(remote[:, 1].sum())
        who = waiter_for(region, waiter) if done == 0 else None
        n = _copy_region(core, region, remote, staging, cut_iov(local, done, total), who, write=write)
        if n == PARKED:
            return PARKED
        done += n
        if n < total:
            return done
    return done


def _copy_region(
    core: Core,
    region: Region,
    remote: IoVec,
    staging: Staging,
    local: IoVec,
    waiter: Waiter | None,
    *,
    write: bool,
) -> int:
    if write:
        return core.iommu.write_v(region.pasid, remote, staging, local, region.meter, waiter)
    return core.iommu.read_v(region.pasid, remote, staging, local, region.meter, waiter)


def prepare_pieces(core: Core, pieces: list[Piece], waiter: Waiter, *, write: bool) -> bool:
    """Make the pages of short-term pieces present; False when they are on their way."""
    short = [piece for piece in pieces if piece.region.discipline is Discipline.SHORT_TERM]
    return not short or prepare_all(core, short, waiter, write=write)


def prepare_all(core: Core, pieces: list[Piece], waiter: Waiter, *, write: bool) -> bool:
    """Make the pages of all pieces present; False when some are on their way."""
    ranges = [(piece.region.pasid, piece.va, piece.length, piece.region.meter) for piece in pieces]
    return core.iommu.prepare_all(ranges, waiter, write=write)


def cut_iov(iov: IoVec, offset: int, length: int) -> IoVec:
    """Return the part of a scatter list that holds bytes [offset, offset + length) of it: (m, 2) uint64."""
    ends = np.cumsum(iov[:, 1].astype(np.int64))
    if offset == 0 and length == int(ends[-1]):
        return iov
    first = int(np.searchsorted(ends, offset, "right"))
    last = int(np.searchsorted(ends, offset + length, "left"))
    part = iov[first : last + 1].copy()
    skip = np.uint64(offset - (int(ends[first]) - int(iov[first, 1])))
    part[0, 0] += skip
    part[0, 1] -= skip
    part[-1, 1] -= np.uint64(int(ends[last]) - (offset + length))
    return part
