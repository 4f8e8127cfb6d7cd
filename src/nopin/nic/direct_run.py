"""Several long messages of one queue pair copied as one: the direct path's way to keep two CPUs busy.

A relay needs a moment to get both CPUs going and to bring both to an end, once a call. So READs or WRITEs that follow
each other go in one call, as far as nothing about them could make them wait or fail. What could goes the ordinary
way, one by one, and so does the rest where a copy ends early after all; copying some bytes again is harmless.

The second message may be read before the first is written, which shows only where one writes what the other reads.
On the wire it is the same: a WRITE's bytes are gathered while earlier ones are on their way, and a READ's leave the
peer before those of an earlier READ have arrived. Who needs more asks for a fence or waits for the completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from nopin.iommu.access import Span
from nopin.nic.abi import SendFlags, WrOpcode
from nopin.nic.core import Core
from nopin.nic.qp import QueuePair
from nopin.nic.rights import REMOTE_READ, REMOTE_WRITE
from nopin.nic.work import SendWork

LONG_BYTES = 64 << 10
"""Shorter messages gain nothing from company."""

RUN_BYTES = 8 << 20

_FENCE = int(SendFlags.FENCE)


def copy_run(core: Core, qp: QueuePair, peer: QueuePair) -> list[SendWork]:
    """Copy the works at the head of the queue; returns those that are done, often none."""
    run = list(_run(core, qp, peer))
    if len(run) < 2:
        return []
    n_written = core.iommu.relay_run([spans for _, spans in run], core.plan.staging, qp.mtu)
    ends = accumulate(work.length for work, _ in run)
    return [work for (work, _), end in zip(run, ends, strict=True) if end <= n_written]


def _run(core: Core, qp: QueuePair, peer: QueuePair) -> Iterator[tuple[SendWork, tuple[Span, Span, int]]]:
    """Yield works of one kind that nothing speaks against, each with its source, target and length."""
    opcode, left = qp.send.works[0].opcode, RUN_BYTES
    for work in qp.send.works:
        assert isinstance(work, SendWork), "runs are of the wire"
        left -= work.length
        if left < 0 or work.opcode is not opcode or work.length < LONG_BYTES:
            return
        spans = _spans(core, qp, peer, work)
        if spans is None:
            return
        ours, theirs = spans
        source, target = (theirs, ours) if opcode is WrOpcode.RDMA_READ else (ours, theirs)
        yield work, (source, target, work.length)


def _spans(core: Core, qp: QueuePair, peer: QueuePair, work: SendWork) -> tuple[Span, Span] | None:
    """Return our memory and the peer's; None for a work that has to go by itself."""
    if work.opcode is WrOpcode.RDMA_READ:
        need, allowed = REMOTE_READ, bool(peer.attr.max_dest_rd_atomic)
    else:
        need, allowed = REMOTE_WRITE, work.opcode is WrOpcode.RDMA_WRITE
    if not allowed or need & ~(peer.attr.access or 0) or work.status or work.done_bytes or work.flags & _FENCE:
        return None
    region = core.regions.check(work.rkey, peer.pd, work.remote_address, work.length, need)
    if region is None or len(work.pieces) != 1 or not work.pieces[0].region.alive:
        return None
    (piece,) = work.pieces
    ours = Span(piece.region.pasid, piece.va, piece.region.meter, None)
    return ours, Span(region.pasid, region.va(work.remote_address), region.meter, None)
