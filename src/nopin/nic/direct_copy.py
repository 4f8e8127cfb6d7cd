"""How the direct path moves the bytes of a message: from one process to another, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nopin.iommu.iommu import PARKED, Span
from nopin.iommu.relay import Relayed
from nopin.nic.core import Core, Waiter, waiter_for
from nopin.nic.qp import QueuePair
from nopin.nic.refusal import Parked
from nopin.nic.scatter import pull, push
from nopin.nic.work import Piece, SendWork, slice_pieces

CHUNK_BYTES = 1 << 20


class End(NamedTuple):
    """One side of a message.

    Attributes:
        pieces: the memory of the whole message; for the source, none if the data is inline.
        waiter: who waits when a page of it is out.
        fault: makes what is raised when it cannot be accessed.
    """

    pieces: list[Piece]
    waiter: Waiter
    fault: Callable[[], Exception]


def move(core: Core, qp: QueuePair, work: SendWork, *, source: End, target: End) -> None:
    """Copy the next chunk of a message; `work.done_bytes` tells how far it is.

    Where the source ends early, what would have left in whole packets on the wire is written.

    Raises:
        Parked: pages of either side are on their way; nothing was written.
        Exception: what `source` or `target` say, if its memory cannot be accessed.
    """
    at = work.done_bytes
    n_bytes = min(CHUNK_BYTES, work.length - at)
    taken, put = _part(source.pieces, at, n_bytes), _part(target.pieces, at, n_bytes)
    if len(taken) == len(put) == 1:
        outcome = _relay(core, qp, (taken[0], source.waiter), (put[0], target.waiter))
    else:
        n_read = _to_staging(core, work, taken, source.waiter)
        outcome = _from_staging(core, qp, put, target.waiter, n_read, n_bytes)
    n_left = _whole_packets(qp, outcome.n_read, n_bytes)
    if outcome.n_written < n_left:
        raise target.fault()
    if n_left < n_bytes:
        raise source.fault()
    work.done_bytes += n_bytes


def _part(pieces: list[Piece], at: int, length: int) -> list[Piece]:
    if at == 0 and len(pieces) == 1 and pieces[0].length == length:
        return pieces
    return list(slice_pieces(pieces, at, length))


def _relay(core: Core, qp: QueuePair, source: tuple[Piece, Waiter], target: tuple[Piece, Waiter]) -> Relayed:
    """Copy from one range to one range of the same length.

    Raises:
        Parked: pages of either side are on their way; nothing was copied.
    """
    taken, put = source[0], target[0]
    if not taken.region.alive:
        return Relayed(0, 0)
    if not put.region.alive:
        return Relayed(taken.length, 0)
    outcome = core.iommu.relay(_span(*source), _span(*target), taken.length, core.plan.staging, qp.mtu)
    if outcome is None:
        raise Parked
    return outcome


def _span(piece: Piece, waiter: Waiter) -> Span:
    region = piece.region
    return Span(region.pasid, piece.va, region.meter, waiter_for(region, waiter))


def _to_staging(core: Core, work: SendWork, pieces: list[Piece], waiter: Waiter) -> int:
    """Bring a chunk into the staging buffer; returns bytes.

    Raises:
        Parked: pages are on their way.
    """
    if work.inline is not None:
        core.plan.staging.view[: len(work.inline)] = work.inline
        return len(work.inline)
    n_read = pull(core, pieces, waiter)
    if n_read == PARKED:
        raise Parked
    return n_read


def _from_staging(core: Core, qp: QueuePair, pieces: list[Piece], waiter: Waiter, n_read: int, n_bytes: int) -> Relayed:
    """Write what was read of a chunk.

    Raises:
        Parked: pages are on their way; nothing was written.
    """
    n_left = _whole_packets(qp, n_read, n_bytes)
    n_written = push(core, slice_pieces(pieces, 0, n_left), core.plan.staging, waiter)
    if n_written == PARKED:
        raise Parked
    return Relayed(n_read, n_written)


def _whole_packets(qp: QueuePair, n_read: int, n_bytes: int) -> int:
    """Cut a short read to what would have left in whole packets on the wire."""
    return n_read if n_read == n_bytes else n_read - n_read % qp.mtu
