"""How the direct path moves the bytes of a message: from one process to another, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable

from nopin.iommu.access import Span
from nopin.iommu.relay import Relayed
from nopin.nic.core import Core, Waiter, waiter_for
from nopin.nic.qp import QueuePair
from nopin.nic.refusal import Parked
from nopin.nic.scatter import accesses, pull, push
from nopin.nic.work import Piece, SendWork, slice_pieces

CHUNK_BYTES = 1 << 20
"""What the staging buffer holds at a time."""

RELAY_BYTES = 4 << 20
"""A relay minds the buffer itself, and is the better the more it has to do."""


class LocalFault(Exception):
    """Our own memory cannot be accessed."""


def move(
    core: Core, qp: QueuePair, work: SendWork, theirs: list[Piece], fault: Callable[[], Exception], *, read: bool
) -> None:
    """Copy the next chunk of a message; `work.done_bytes` tells how far it is.

    Where the source ends early, what would have left in whole packets on the wire is written.

    Args:
        theirs: the peer's memory of the whole message.
        fault: makes what is raised when that cannot be accessed.
        read: from the peer's memory to ours, not the other way.

    Raises:
        Parked: pages of either side are on their way; nothing was written.
        LocalFault: our memory cannot be accessed.
        Exception: what `fault` makes.
    """
    at = work.done_bytes
    longest = RELAY_BYTES if len(work.pieces) == len(theirs) == 1 else CHUNK_BYTES
    n_bytes = min(longest, work.length - at)
    local, remote = _part(work.pieces, at, n_bytes), _part(theirs, at, n_bytes)
    source, target = (remote, local) if read else (local, remote)
    source_waiter, target_waiter = qp.requester_waiter, qp.direct_waiter
    if read:
        source_waiter, target_waiter = target_waiter, source_waiter
    if len(source) == len(target) == 1:
        outcome = _relay(core, qp, source[0], source_waiter, target[0], target_waiter)
    else:
        looks = accesses(source, source_waiter, write=False) + accesses(target, target_waiter, write=True)
        if not core.iommu.admit_all(looks):
            raise Parked
        n_read = _to_staging(core, work, source)
        outcome = _from_staging(core, qp, target, n_read, n_bytes)
    n_left = _whole_packets(qp, outcome.n_read, n_bytes)
    if outcome.n_written < n_left:
        raise LocalFault if read else fault()
    if n_left < n_bytes:
        raise fault() if read else LocalFault
    work.done_bytes += n_bytes


def _part(pieces: list[Piece], at: int, length: int) -> list[Piece]:
    if at == 0 and len(pieces) == 1 and pieces[0].length == length:
        return pieces
    return list(slice_pieces(pieces, at, length))


def _relay(
    core: Core, qp: QueuePair, source: Piece, source_waiter: Waiter, target: Piece, target_waiter: Waiter
) -> Relayed:
    """Copy from one range to one range of the same length.

    Raises:
        Parked: pages of either side are on their way; nothing was copied.
    """
    if not source.region.alive:
        return Relayed(0, 0)
    if not target.region.alive:
        return Relayed(source.length, 0)
    spans = _span(source, source_waiter), _span(target, target_waiter)
    outcome = core.iommu.relay(*spans, source.length, core.plan.staging, qp.mtu)
    if outcome is None:
        raise Parked
    return outcome


def _span(piece: Piece, waiter: Waiter) -> Span:
    region = piece.region
    return Span(region.pasid, piece.va, region.meter, waiter_for(region, waiter))


def _to_staging(core: Core, work: SendWork, pieces: list[Piece]) -> int:
    """Bring a chunk that was looked at into the staging buffer; returns bytes."""
    if work.inline is not None:
        core.plan.staging.view[: len(work.inline)] = work.inline
        return len(work.inline)
    return pull(core, pieces)


def _from_staging(core: Core, qp: QueuePair, pieces: list[Piece], n_read: int, n_bytes: int) -> Relayed:
    """Write what was read of a chunk, to where was looked."""
    n_left = _whole_packets(qp, n_read, n_bytes)
    return Relayed(n_read, push(core, slice_pieces(pieces, 0, n_left), core.plan.staging, None))


def _whole_packets(qp: QueuePair, n_read: int, n_bytes: int) -> int:
    """Cut a short read to what would have left in whole packets on the wire."""
    return n_read if n_read == n_bytes else n_read - n_read % qp.mtu
