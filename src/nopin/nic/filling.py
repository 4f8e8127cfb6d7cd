"""The requester's packets filled: extension headers, and payloads from the client's memory.

Payloads go straight into the packets, one copy call per region. A copy that meets a page on a medium parks the queue
pair; one that meets a hole halts it at that work, which fails once all before it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from nopin.iommu.access import PARKED
from nopin.nic.abi import Discipline, WcStatus, WrOpcode
from nopin.nic.core import Core, waiter_for
from nopin.nic.mr import Region
from nopin.nic.plan import Plan
from nopin.nic.qp import QueuePair
from nopin.nic.runs import Run
from nopin.nic.scatter import copy_piece, gather, prepare_pieces
from nopin.nic.wire.headers import AtomicEth, Reth, emit_reth, emit_u32
from nopin.nic.wire.opcodes import BTH_BYTES, IMM_BYTES
from nopin.nic.wire.psn import psn_add, psn_diff
from nopin.nic.work import IS_WRITE, NEEDS_ANSWER, Piece, SendWork
from nopin.units import U64_MAX

_READ, _CMP_AND_SWP = WrOpcode.RDMA_READ, WrOpcode.ATOMIC_CMP_AND_SWP

WITH_WORD = frozenset({WrOpcode.SEND_WITH_IMM, WrOpcode.SEND_WITH_INV, WrOpcode.RDMA_WRITE_WITH_IMM})
"""Work whose last packet carries a word of its own."""


class Chunk(NamedTuple):
    """Consecutive packets of one work, or one run of works, in a plan.

    Attributes:
        nth: the work's packet (or, for a READ, response) it begins with.
        n_psn: PSNs it takes; a READ request takes as many as it asks responses for.
        at: its first packet in the plan; `n_packets` of them there.
    """

    work: SendWork | Run
    nth: int
    n_psn: int
    at: int
    n_packets: int


def write_headers(qp: QueuePair, plan: Plan, chunks: list[Chunk]) -> None:
    """Write the extension headers: RETH where a WRITE begins or a READ asks, immediates where messages end."""
    view = plan.staging.view
    for chunk in chunks:
        work = chunk.work
        if isinstance(work, Run):
            part = work.part(chunk.nth, chunk.nth + chunk.n_psn)
            # A READ is asked for by one packet.
            first_packets = np.arange(chunk.n_packets) if work.opcode is _READ else part.first_packets()
            emit_reth(plan.staging.array, plan.offsets[chunk.at + first_packets] + BTH_BYTES, work.reth(part))
            continue
        if work.opcode in NEEDS_ANSWER:
            start = chunk.nth * qp.mtu
            words = request_words(work, start, min(work.length - start, chunk.n_psn * qp.mtu))
            header = Reth(*words) if work.opcode is _READ else AtomicEth(*words)
            header.emit(view, int(plan.offsets[chunk.at]) + BTH_BYTES)
            continue
        if chunk.nth == 0 and work.opcode in IS_WRITE:
            at = int(plan.offsets[chunk.at]) + BTH_BYTES
            Reth(work.remote_address, work.rkey, work.length).emit(view, at)
        if work.opcode in WITH_WORD and chunk.nth + chunk.n_psn == work.n_psn:
            last = chunk.at + chunk.n_packets - 1
            emit_u32(view, plan.payload_at(last) - IMM_BYTES, work.imm)


def request_words(work: SendWork, start: int, length: int) -> tuple[int, ...]:
    """Return the words of the extension header of a READ of a part of a message, or of an atomic."""
    if work.opcode is _READ:
        return (work.remote_address + start & U64_MAX, work.rkey, length)
    if work.opcode is _CMP_AND_SWP:
        return (work.remote_address, work.rkey, work.swap, work.compare_add)
    return (work.remote_address, work.rkey, work.compare_add, 0)


def message_words(work: SendWork) -> tuple[int, ...]:
    """Return the words of the extension headers of a message of one packet."""
    reth = (work.remote_address, work.rkey, work.length) if work.opcode in IS_WRITE else ()
    return (*reth, work.imm) if work.opcode in WITH_WORD else reth


def gather_payloads(core: Core, qp: QueuePair, plan: Plan, chunks: list[Chunk]) -> int:
    """Bring all payloads into the packets; returns how many leading packets are complete."""
    for group in _groups(chunks):
        at = group[0].at
        n = group[-1].at + group[-1].n_packets - at
        n_ready = _gather_group(core, qp, plan, group, at, n)
        if n_ready < n:
            return at + n_ready
    return plan.n


def _groups(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """Join neighbours whose payload comes from one range each of one region: they are copied with one call."""
    group: list[Chunk] = []
    joinable: Region | None = None
    for chunk in chunks:
        region = _region(chunk)
        if group and (region is None or region is not joinable):
            yield group
            group = []
        group.append(chunk)
        joinable = region
    if group:
        yield group


def _region(chunk: Chunk) -> Region | None:
    """The region of a chunk that comes from one range and may be joined with others."""
    if isinstance(chunk.work, Run):
        return None
    pieces = chunk.work.pieces
    if len(pieces) != 1 or chunk.work.opcode in NEEDS_ANSWER:
        return None
    region = pieces[0].region
    return None if region.discipline is Discipline.SHORT_TERM else region


def _gather_group(core: Core, qp: QueuePair, plan: Plan, group: list[Chunk], at: int, n: int) -> int:
    work = group[0].work
    sizes = plan.payload[at : at + n]
    if isinstance(work, Run) and work.opcode is not _READ:
        done = _gather_run(core, qp, plan, work, group[0])
    elif isinstance(work, SendWork) and group[0].nth == 0 and not prepared(core, qp, work):
        return 0
    elif isinstance(work, Run) or work.opcode in NEEDS_ANSWER or work.length == 0:
        core.iommu.settle(qp.requester_waiter)
        return n
    elif work.inline is not None:
        _copy_inline(plan, group[0], work.inline, qp.mtu)
        return n
    elif n == 1 and len(work.pieces) == 1:
        done = _gather_one(core, qp, plan, work.pieces[0], group[0])
    else:
        pieces = [piece for chunk in group for piece in _pieces(chunk, plan, qp.mtu)]
        done = gather(core, pieces, plan.staging, plan.payload_iov(at, at + n), qp.requester_waiter)
    if done == int(sizes.sum()):
        return n
    if done == PARKED:
        _park(core, qp)
        return 0
    whole = int(np.searchsorted(np.cumsum(sizes), done, "right"))
    bad = next(chunk for chunk in group if at + whole < chunk.at + chunk.n_packets)
    _halt(core, qp, psn_add(bad.work.first_psn, bad.nth + at + whole - bad.at))
    return whole


def _halt(core: Core, qp: QueuePair, psn: int) -> None:
    """Stop at the work that has this PSN, whose bytes cannot be read; it fails once all before it is done."""
    works = qp.send.unroll()
    bad = next(work for work in works if 0 <= psn_diff(psn, work.first_psn) < work.n_psn)
    bad.status = WcStatus.LOC_PROT_ERR
    qp.send.halted = bad
    core.counters.local_protection_error += 1


def _gather_run(core: Core, qp: QueuePair, plan: Plan, run: Run, chunk: Chunk) -> int:
    region = run.region
    if not region.alive:
        return 0
    remote = run.local(run.part(chunk.nth, chunk.nth + chunk.n_packets))
    local = plan.payload_iov(chunk.at, chunk.at + chunk.n_packets)
    waiter = waiter_for(region, qp.requester_waiter)
    return core.iommu.read_v(region.pasid, remote, plan.staging, local, region.meter, waiter)


def _gather_one(core: Core, qp: QueuePair, plan: Plan, piece: Piece, chunk: Chunk) -> int:
    region = piece.region
    if not region.alive:
        return 0
    offset = plan.payload_at(chunk.at)
    length = int(plan.payload[chunk.at])
    va = piece.va + chunk.nth * qp.mtu
    waiter = waiter_for(region, qp.requester_waiter)
    return core.iommu.read(region.pasid, va, length, plan.staging, offset, region.meter, waiter)


def _pieces(chunk: Chunk, plan: Plan, mtu: int) -> Iterable[Piece]:
    work = chunk.work
    assert isinstance(work, SendWork), "a run makes a group of its own"
    if chunk.n_packets == work.n_psn:
        return work.pieces
    length = int(plan.payload[chunk.at : chunk.at + chunk.n_packets].sum())
    return work.slice(chunk.nth * mtu, length)


def prepared(core: Core, qp: QueuePair, work: SendWork) -> bool:
    """Make a short-term work's pages present before its first byte is copied."""
    write = work.opcode in NEEDS_ANSWER
    if prepare_pieces(core, work.pieces, qp.requester_waiter, write=write):
        return True
    _park(core, qp)
    return False


def _park(core: Core, qp: QueuePair) -> None:
    core.counters.parked += 1
    qp.send.parked = "gather"


def _copy_inline(plan: Plan, chunk: Chunk, inline: bytes, mtu: int) -> None:
    at = chunk.nth * mtu
    for k in range(chunk.at, chunk.at + chunk.n_packets):
        n_bytes = int(plan.payload[k])
        start = plan.payload_at(k)
        plan.staging.view[start : start + n_bytes] = inline[at : at + n_bytes]
        at += n_bytes


def fetch_payload(core: Core, qp: QueuePair, work: SendWork, at: int) -> bool:
    """Bring the bytes of a work of one piece to their place; False when they are not there, now or at all."""
    if work.inline is not None:
        core.plan.staging.view[at : at + work.length] = work.inline
        return True
    done = 0
    for piece in work.pieces:
        done = copy_piece(core, piece, core.plan.staging, at, qp.requester_waiter, write=False)
    if done == work.length:
        return True
    if done == PARKED:
        _park(core, qp)
    else:
        _halt(core, qp, work.first_psn)
    return False
