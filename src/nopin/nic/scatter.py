"""Copies between packets and scatter lists: neighbours in one region go with one call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from nopin.iommu.access import PARKED, Access, Span
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


def pull(core: Core, pieces: Iterable[Piece]) -> int:
    """Copy pieces of process memory that were looked at, one after the other, to the start of the staging buffer.

    Returns as `gather`. This form needs no scatter list of its own, which pays for single small pieces.
    """
    return _copy_flat(core, pieces, core.plan.staging, None, offset=0, write=False)


def push(core: Core, pieces: Iterable[Piece], staging: Staging, waiter: Waiter | None, *, offset: int = 0) -> int:
    """Copy what lies at an offset of a staging buffer into pieces of process memory, one after the other.

    Returns as `scatter`.
    """
    return _copy_flat(core, pieces, staging, waiter, offset=offset, write=True)


def _copy_flat(
    core: Core, pieces: Iterable[Piece], staging: Staging, waiter: Waiter | None, *, offset: int, write: bool
) -> int:
    pieces = list(pieces)
    if len(pieces) > 1 and waiter is not None:
        if not core.iommu.admit_all(accesses(pieces, waiter, write=write)):
            return PARKED
        waiter = None
    done = 0
    for piece in pieces:
        n = copy_piece(core, piece, staging, offset + done, waiter, write=write)
        if n == PARKED:
            return PARKED
        done += n
        if n < piece.length:
            return done
    return done


def copy_piece(core: Core, piece: Piece, staging: Staging, offset: int, waiter: Waiter | None, *, write: bool) -> int:
    """Copy one piece of process memory to, or from, a place of a staging buffer.

    Returns as `gather` or `scatter`.
    """
    region = piece.region
    if not region.alive:
        return 0
    copy = core.iommu.write if write else core.iommu.read
    return copy(region.pasid, piece.va, piece.length, staging, offset, region.meter, waiter_for(region, waiter))


def _copy(
    core: Core, pieces: list[Piece], staging: Staging, local: IoVec, waiter: Waiter | None, *, write: bool
) -> int:
    """Copy region by region; all of them are looked at before anything is copied, and wait together."""
    if len(pieces) == 1:
        (piece,) = pieces
        if not piece.region.alive:
            return 0
        remote = np.array([[piece.va, piece.length]], np.uint64)
        who = waiter_for(piece.region, waiter)
        return _copy_region(core, piece.region, remote, staging, local, who, write=write)
    runs = [(region, list(run)) for region, run in groupby(pieces, key=lambda piece: piece.region)]
    if len(runs) > 1 and waiter is not None:
        if not core.iommu.admit_all(accesses(pieces, waiter, write=write)):
            return PARKED
        waiter = None
    done = 0
    for region, run in runs:
        if not region.alive:
            return done
        remote = np.array([(piece.va, piece.length) for piece in run], np.uint64)
        total = int(remote[:, 1].sum())
        part = cut_iov(local, done, total)
        n = _copy_region(core, region, remote, staging, part, waiter_for(region, waiter), write=write)
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
    if not short:
        return True
    return core.iommu.prepare(accesses(short, waiter, write=write), waiter)


def accesses(pieces: Iterable[Piece], waiter: Waiter, *, write: bool) -> list[Access]:
    """Return what is to be looked at before pieces are copied; those whose region is gone will not be."""
    looks: list[Access] = []
    for piece in pieces:
        region = piece.region
        if region.alive:
            span = Span(region.pasid, piece.va, region.meter, waiter_for(region, waiter))
            looks.append(Access(span, piece.length, write))
    return looks


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
