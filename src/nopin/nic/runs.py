"""Small WRITEs in a row, held as one: the steady state of batched small messages on the requester's side.

Each is one packet from one range of one region. Their ring entries are decoded, judged, planned and gathered as arrays,
so that a message costs a share of a few numpy operations instead of some 25 us of Python. A run stands among the works
of a queue pair like one work of as many packets; whatever is special about one of its messages takes it apart
(`SendSide.unroll`), and the ordinary way finds out what that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes, IoVec
from nopin.nic.abi import Discipline, SendFlags, WcStatus, WrOpcode, one_sge_dtype
from nopin.nic.mr import Pd, Region, RegionTable
from nopin.nic.packets import first_true
from nopin.nic.wire.headers import RethBatch
from nopin.nic.wire.psn import psn_add
from nopin.nic.work import Piece, SendWork

RUN_MIN = 4
"""From this many in a row it pays to handle them together."""

_SIGNALED = np.uint8(SendFlags.SIGNALED)
_WRITE = int(WrOpcode.RDMA_WRITE)


@dataclass(slots=True, eq=False)
class WriteRun:
    """WRITEs of one packet each, PSNs consecutive, payloads in one region.

    Attributes:
        posts: their ring entries, copied: (n,) of `abi.one_sge_dtype`.
        region: holds every local range, as `decode_writes` found.
        first_psn: of the first of them.
    """

    opcode: ClassVar = WrOpcode.RDMA_WRITE
    status: ClassVar = WcStatus.SUCCESS
    flags: ClassVar = 0

    posts: NDArray[np.void]
    region: Region
    first_psn: int = 0

    @property
    def n_psn(self) -> int:
        """PSNs it takes: how many works it is."""
        return len(self.posts)

    def lengths(self, start: int, end: int) -> NDArray[np.uint32]:
        """Return the bytes of works [start, end): (n,) uint32, each at least 1."""
        lengths: NDArray[np.uint32] = self.posts["local_length"][start:end]
        return lengths

    def signaled(self, start: int, end: int) -> NDArray[np.bool_]:
        """Say which of works [start, end) asked for a completion: (n,) bool."""
        return np.asarray((self.posts["flags"][start:end] & _SIGNALED) != 0)

    def reth(self, start: int, end: int) -> RethBatch:
        """Return where works [start, end) go."""
        part = self.posts[start:end]
        return RethBatch(part["remote_address"], part["rkey"], part["local_length"])

    def local(self, start: int, end: int) -> IoVec:
        """Return where the bytes of works [start, end) are, by virtual address: (n, 2) uint64."""
        part = self.posts[start:end]
        return self.region.places(part["local_address"], part["local_length"])

    def take(self, n: int) -> NDArray[np.void]:
        """Take the first n works out; returns their entries."""
        taken = self.posts[:n]
        self.posts = self.posts[n:]
        self.first_psn = psn_add(self.first_psn, n)
        return taken

    def works(self) -> Iterator[SendWork]:
        """Yield its works by themselves; the run must not be used any more."""
        for nth, post in enumerate(self.posts):
            length = int(post["local_length"])
            yield SendWork(
                int(post["wr_id"]),
                self.opcode,
                int(post["flags"]),
                int(post["imm"]),
                int(post["remote_address"]),
                int(post["rkey"]),
                int(post["compare_add"]),
                int(post["swap"]),
                length,
                [Piece(self.region, self.region.va(int(post["local_address"])), length)],
                first_psn=psn_add(self.first_psn, nth),
            )


def decode_writes(entries: Bytes, regions: RegionTable, pd: Pd, mtu: int) -> WriteRun | None:
    """Decode the send ring entries that make a run, from the first on; None if they are too few to be worth it.

    Args:
        entries: (n, stride) uint8, a copy that nobody else can change; each has room for a scatter entry.
        mtu: bytes of payload that one packet carries.
    """
    posts = entries.view(one_sge_dtype(entries.shape[1])).reshape(-1)
    region = regions.find(int(posts["local_lkey"][0]), pd)
    if region is None or region.discipline is Discipline.SHORT_TERM:
        return None
    n = n_alike(posts, _WRITE, region, mtu)
    return WriteRun(posts[:n], region) if n >= RUN_MIN else None


def n_alike(posts: NDArray[np.void], opcode: int, region: Region, mtu: int) -> int:
    """Count the posts, from the first on, that are of one kind, one packet and one range of that region."""
    length = posts["local_length"]
    good = (posts["opcode"] == opcode) & (posts["num_sge"] == 1) & (posts["local_lkey"] == region.lkey)
    good &= (posts["flags"] & ~_SIGNALED) == 0  # nothing inline, no fence
    good &= (length > 0) & (length <= mtu)
    good &= region.hold_each(posts["local_address"], length)
    other = first_true(~good)
    return len(posts) if other < 0 else other
