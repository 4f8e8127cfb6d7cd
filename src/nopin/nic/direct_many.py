"""Many short READs or WRITEs copied as one: the steady state of batched small messages on the direct path.

Their ring entries are decoded and judged as arrays, and the bytes go by two calls for all. So it is for works of one
kind between one region and another, short ones; who is different ends the row and goes by itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nopin.nic.abi import ONE_SGE, Discipline, WrOpcode, one_sge_dtype
from nopin.nic.core import Core, sends_done
from nopin.nic.mr import Region
from nopin.nic.packets import first_true
from nopin.nic.parts import n_packets_of
from nopin.nic.qp import QueuePair
from nopin.nic.rights import LOCAL_WRITE, NOTHING, REMOTE_READ, REMOTE_WRITE
from nopin.nic.runs import RUN_MIN, n_alike
from nopin.nic.wire.psn import psn_add

LENGTH_MAX = 16 << 10
"""Longer works gain nothing: 8 KiB go 2.1 times as fast together as one by one, 16 KiB 1.7, 64 KiB 0.8 times."""

TOGETHER_BYTES = 512 << 10
"""What one call each way copies at most: it waits in the second-level cache in between."""

_READ, _WRITE = int(WrOpcode.RDMA_READ), int(WrOpcode.RDMA_WRITE)
NOT_DONE = 0, 0
"""No works were carried out, and no bytes of them; what was copied all the same is copied again."""


def copy_many(core: Core, qp: QueuePair, peer: QueuePair, n_posted: int) -> tuple[int, int]:
    """Carry out the oldest of n posted works together; returns how many, and their bytes. (0, 0) if they do not go so.

    Requires: as `direct_posted.copy_posted`, and room for a scatter entry in each work.
    """
    ring = qp.send_ring
    _, opcode, _, _, _, _, rkey, _, _, _, _, length, lkey = ring.fields(ONE_SGE)
    if not 0 < length <= LENGTH_MAX or not _allows(peer, opcode):
        return NOT_DONE
    read = opcode == _READ
    ours = _usable(core.regions.find(lkey, qp.pd), LOCAL_WRITE if read else NOTHING)
    theirs = _usable(core.regions.find(rkey, peer.pd), REMOTE_READ if read else REMOTE_WRITE)
    if ours is None or theirs is None:
        return NOT_DONE
    entries = ring.peek(min(n_posted, TOGETHER_BYTES // length + 1))
    posts = entries.view(one_sge_dtype(entries.shape[1])).reshape(-1)
    posts = posts[: n_alike(posts, opcode, ours, LENGTH_MAX)]
    posts = posts[: _n_inside(posts, theirs)]
    posts = posts[: int(np.searchsorted(np.cumsum(posts["local_length"]), TOGETHER_BYTES, "right"))]
    if len(posts) < RUN_MIN:
        return NOT_DONE
    here = ours.pasid, ours.places(posts["local_address"], posts["local_length"])
    there = theirs.pasid, theirs.places(posts["remote_address"], posts["local_length"])
    source, target = (there, here) if read else (here, there)
    if not core.iommu.copy_present_v(*source, *target, core.plan.staging):
        return NOT_DONE
    side = qp.send
    n_psn = int(n_packets_of(posts["local_length"], qp.mtu).sum())
    side.next_psn = side.una = side.sent = side.high = psn_add(side.next_psn, n_psn)
    ring.skip(len(posts))
    sends_done(core, qp, posts, opcode)
    return len(posts), int(posts["local_length"].sum())


def _allows(peer: QueuePair, opcode: int) -> bool:
    """Say whether the peer's queue pair lets us do that at all."""
    access = peer.attr.access or 0
    if opcode == _READ:
        return bool(access & REMOTE_READ and peer.attr.max_dest_rd_atomic)
    return opcode == _WRITE and bool(access & REMOTE_WRITE)


def _usable(region: Region | None, need: int) -> Region | None:
    """Return the region if it gives the right, and its memory takes no preparations."""
    if region is None or need & ~region.access or region.discipline is Discipline.SHORT_TERM:
        return None
    return region


def _n_inside(posts: NDArray[np.void], region: Region) -> int:
    """Count the posts, from the first on, whose other end is inside the region."""
    good = (posts["rkey"] == region.rkey) & region.hold_each(posts["remote_address"], posts["local_length"])
    other = first_true(~good)
    return len(posts) if other < 0 else other
