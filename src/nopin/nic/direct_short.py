"""Short READs and WRITEs straight from the ring: the direct path where nothing is special, of which latency is made.

No work is held, no list is made, nothing waits: the entry is decoded, both ranges are judged by the table that judges
all, the bytes are copied if their pages are there, and the completion is written. An entry that asks for anything else,
or meets anything else, is left in its ring as it was, and the general way (`direct.py`) finds out what it is.
"""

from __future__ import annotations

from nopin.iommu.iommu import SHORT_BYTES
from nopin.nic.abi import ONE_SGE, Discipline, SendFlags, WrOpcode
from nopin.nic.core import Core, posted_done
from nopin.nic.direct_many import copy_many
from nopin.nic.qp import QueuePair
from nopin.nic.rights import LOCAL_WRITE, NOTHING, REMOTE_READ, REMOTE_WRITE
from nopin.nic.runs import RUN_MIN
from nopin.nic.wire.psn import psn_add

_READ, _WRITE = int(WrOpcode.RDMA_READ), int(WrOpcode.RDMA_WRITE)
_INLINE = int(SendFlags.INLINE)
_SHORT_TERM = Discipline.SHORT_TERM


def copy_posted(core: Core, qp: QueuePair, peer: QueuePair, n_posted: int) -> int:
    """Carry out the oldest of n posted works as long as nothing is special about them; returns how many.

    Requires: the queue pair may take posted work, and holds none.
    """
    assert not qp.send.works
    if not qp.caps.max_send_sge:
        return 0
    n_together = 0
    while n_posted - n_together >= RUN_MIN and (n := copy_many(core, qp, peer, n_posted - n_together)):
        n_together += n
    n_done, n_bytes = n_together, 0
    while n_done < n_posted and (length := _copy_one(core, qp, peer)):
        n_done += 1
        n_bytes += length
    core.counters.direct_messages += n_done - n_together
    core.counters.direct_bytes += n_bytes
    return n_done


def _copy_one(core: Core, qp: QueuePair, peer: QueuePair) -> int:
    """Carry out the oldest posted work; returns its bytes. 0: it was not; what was copied is copied again."""
    ring, attr = qp.send_ring, peer.attr
    wr_id, opcode, flags, n_sge, _, there, rkey, _, _, _, here, length, lkey = ring.fields(ONE_SGE)
    if n_sge != 1 or flags & _INLINE or not 0 < length <= SHORT_BYTES:
        return 0
    if opcode == _READ:
        ours_need, need = LOCAL_WRITE, REMOTE_READ
        if not attr.max_dest_rd_atomic:
            return 0
    elif opcode == _WRITE:
        ours_need, need = NOTHING, REMOTE_WRITE
    else:
        return 0
    ours = core.regions.check(lkey, qp.pd, here, length, ours_need)
    theirs = core.regions.check(rkey, peer.pd, there, length, need)
    if ours is None or theirs is None or need & ~(attr.access or 0):
        return 0
    if ours.discipline is _SHORT_TERM or theirs.discipline is _SHORT_TERM:
        return 0
    if opcode == _READ:
        source, source_va, target, target_va = theirs, theirs.va(there), ours, ours.va(here)
    else:
        source, source_va, target, target_va = ours, ours.va(here), theirs, theirs.va(there)
    meters = source.meter, target.meter
    if not core.iommu.copy_present(source.pasid, source_va, target.pasid, target_va, length, core.plan.staging, meters):
        return 0
    side = qp.send
    n_psn = 1 if length <= qp.mtu else -(-length // qp.mtu)
    side.next_psn = side.una = side.sent = side.high = psn_add(side.next_psn, n_psn)
    posted_done(core, qp, wr_id, opcode, flags, length)
    return length
