"""Posted READs and WRITEs carried out straight from the ring: the direct path where nothing is special.

No work is held and nothing waits: an entry is decoded, both ranges are judged by the table that judges all, the bytes
are copied if their pages are there, and the completion is written. Latency is made of short ones. Long ones that follow
each other are given to the relay together, which needs a moment to get both CPUs going and to bring both to an end,
once a call: more than a turn's bytes, for it looks around at the end of each turn whether anybody else waits. Many
short ones that are alike go by two calls (`direct_many.py`). An entry that asks for anything else, or meets anything
else, is left in its ring as it was, and the general way (`direct.py`) finds out what it is; so is the rest where a copy
ends early after all. Copying some bytes again is harmless.

Of works that go together, a later one may be read before an earlier one is written, which shows only where one writes
what another reads. On the wire it is the same: a WRITE's bytes are gathered while earlier ones are on their way, and a
READ's leave the peer before those of an earlier READ have arrived. Who needs more asks for a fence or waits for the
completion.
"""

from __future__ import annotations

from nopin.iommu.iommu import SHORT_BYTES
from nopin.iommu.relay import TURN_BYTES, Copy, Turn
from nopin.nic.abi import ONE_SGE, Discipline, SendFlags, WrOpcode
from nopin.nic.core import Core, others_wait, posted_done
from nopin.nic.direct_many import NOT_DONE, copy_many
from nopin.nic.mr import Region
from nopin.nic.qp import QueuePair
from nopin.nic.rights import LOCAL_WRITE, NOTHING, REMOTE_READ, REMOTE_WRITE
from nopin.nic.runs import RUN_MIN
from nopin.nic.wire.psn import psn_add

TOGETHER_BYTES = 4 * TURN_BYTES
"""Of long messages that are given to the relay in one call: 1 MiB READs go 1.07 times as fast as by one turn's."""

RUN_LENGTH_MIN, RUN_BYTES_MIN = 32 << 10, 512 << 10
"""Of works that are not long, if what is posted may make up so many bytes: 32 KiB go 1.3 times as fast so."""

_READ, _WRITE = int(WrOpcode.RDMA_READ), int(WrOpcode.RDMA_WRITE)
_INLINE, _FENCE = int(SendFlags.INLINE), int(SendFlags.FENCE)
_SHORT_TERM = Discipline.SHORT_TERM

Ends = tuple[Region, int, Region, int]
"""Where bytes come from and where they go, each a region and a virtual address."""


def copy_posted(core: Core, qp: QueuePair, peer: QueuePair, n_posted: int, max_bytes: int) -> tuple[int, int]:
    """Carry out the oldest of n posted works while nothing is special about them; returns how many, and their bytes.

    Begins none once `max_bytes` are copied. Requires: the queue pair may take posted work, and holds none.
    """
    assert not qp.send.works
    if not qp.caps.max_send_sge:
        return NOT_DONE
    n_done = n_bytes = 0
    alike = True
    while n_done < n_posted and n_bytes < max_bytes:
        n_left = n_posted - n_done
        n, length = copy_many(core, qp, peer, n_left) if alike and n_left >= RUN_MIN else NOT_DONE
        alike = n > 0
        if not n:
            n, length = _copy_next(core, qp, peer, n_left)
        if not n:
            break
        n_done += n
        n_bytes += length
    core.counters.direct_messages += n_done
    core.counters.direct_bytes += n_bytes
    return n_done, n_bytes


def _copy_next(core: Core, qp: QueuePair, peer: QueuePair, n_posted: int) -> tuple[int, int]:
    """Carry out the oldest work, with others that go along if it is long; returns how many, and their bytes."""
    wr_id, opcode, flags, n_sge, _, there, rkey, _, _, _, here, length, lkey = qp.send_ring.fields(ONE_SGE)
    if n_sge != 1 or flags & _INLINE or not length:
        return NOT_DONE
    if length > SHORT_BYTES or (length >= RUN_LENGTH_MIN and length * n_posted >= RUN_BYTES_MIN):
        return _copy_long(core, qp, peer, n_posted)
    ends = _judge(core, qp, peer, opcode, here, lkey, there, rkey, length)
    if ends is None:
        return NOT_DONE
    source, source_va, target, target_va = ends
    meters = source.meter, target.meter
    if not core.iommu.copy_present(source.pasid, source_va, target.pasid, target_va, length, core.plan.staging, meters):
        return NOT_DONE
    _retire(core, qp, wr_id, opcode, flags, length)
    return 1, length


def _copy_long(core: Core, qp: QueuePair, peer: QueuePair, n_posted: int) -> tuple[int, int]:
    """Carry out long works of one kind, between two spaces; returns how many, and their bytes."""
    works: list[tuple[int, int, int, int]] = []
    copies: list[Copy] = []
    kind: tuple[int, int, int] | None = None
    n_bytes = 0
    for nth in range(n_posted):
        wr_id, opcode, flags, n_sge, _, there, rkey, _, _, _, here, length, lkey = qp.send_ring.fields(ONE_SGE, nth)
        n_bytes += length
        if (
            n_sge != 1
            or flags & (_INLINE | _FENCE)
            or not RUN_LENGTH_MIN <= length <= TURN_BYTES
            or n_bytes > TOGETHER_BYTES
        ):
            break
        ends = _judge(core, qp, peer, opcode, here, lkey, there, rkey, length)
        if ends is None:
            break
        source, source_va, target, target_va = ends
        kind = kind or (opcode, source.pasid, target.pasid)
        if kind != (opcode, source.pasid, target.pasid):
            break
        works.append((wr_id, opcode, flags, length))
        copies.append(Copy(source_va, target_va, length))
    if kind is None:
        return NOT_DONE
    turn = Turn(lambda: others_wait(core, qp))
    _, source_pasid, target_pasid = kind
    n_written = core.iommu.relay_run(source_pasid, target_pasid, copies, core.plan.staging, qp.mtu, turn)
    n_done = n_bytes = 0
    for work in works:
        if n_bytes + work[3] > n_written:
            break
        n_done += 1
        n_bytes += work[3]
        _retire(core, qp, *work)
    return n_done, n_bytes


def _judge(
    core: Core, qp: QueuePair, peer: QueuePair, opcode: int, here: int, lkey: int, there: int, rkey: int, length: int
) -> Ends | None:
    """Return the ends of a READ or WRITE if nothing speaks against it, and its memory takes no preparations."""
    regions, attr = core.regions, peer.attr
    if opcode == _READ:
        if not attr.max_dest_rd_atomic:
            return None
        need, remote = LOCAL_WRITE, REMOTE_READ
    elif opcode == _WRITE:
        need, remote = NOTHING, REMOTE_WRITE
    else:
        return None
    ours = regions.check(lkey, qp.pd, here, length, need)
    theirs = regions.check(rkey, peer.pd, there, length, remote)
    if ours is None or theirs is None or remote & ~(attr.access or 0):
        return None
    if ours.discipline is _SHORT_TERM or theirs.discipline is _SHORT_TERM:
        return None
    if opcode == _READ:
        return theirs, theirs.va(there), ours, ours.va(here)
    return ours, ours.va(here), theirs, theirs.va(there)


def _retire(core: Core, qp: QueuePair, wr_id: int, opcode: int, flags: int, length: int) -> None:
    """The oldest posted work is done: give its slot back, count its PSNs, complete it."""
    side = qp.send
    n_psn = 1 if length <= qp.mtu else -(-length // qp.mtu)
    side.next_psn = side.una = side.sent = side.high = psn_add(side.next_psn, n_psn)
    posted_done(core, qp, wr_id, opcode, flags, length)
