"""WRITEs or READs in a row, held as one: the steady state of batched messages on the requester's side.

Each has one local range, all in one region. Their ring entries are decoded, judged and planned as arrays, and their
bytes are gathered or placed by one call for a batch, so that a message costs a share of a few numpy operations instead
of some 25 us of Python. A run stands among the works of a queue pair like one work of as many packets; whatever is
special about one of its messages takes it apart (`SendSide.unroll`), and the ordinary way finds out what that is.
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
from nopin.nic.parts import Part, n_packets_of
from nopin.nic.rights import LOCAL_WRITE, NOTHING
from nopin.nic.wire.headers import RethBatch
from nopin.nic.wire.psn import psn_add
from nopin.nic.work import Piece, SendWork

RUN_MIN = 4
"""From this many in a row it pays to handle them together."""

MESSAGE_PACKETS_MAX = 256
"""Of a message in a run. Longer ones cost little by themselves, and 512 of these stay far below half the PSN circle."""

_SIGNALED = np.uint8(SendFlags.SIGNALED)
_KINDS: dict[int, tuple[WrOpcode, int]] = {
    opcode: (opcode, need) for opcode, need in ((WrOpcode.RDMA_WRITE, NOTHING), (WrOpcode.RDMA_READ, LOCAL_WRITE))
}
"""What may be a run, and the right its local memory has to give."""


@dataclass(slots=True, eq=False)
class Run:
    """WRITEs, or READs, with consecutive PSNs and local ranges in one region.

    Attributes:
        posts: their ring entries, copied: (n,) of `abi.one_sge_dtype`.
        region: holds every local range, as `decode_run` found.
        mtu: payload bytes of each packet but a work's last.
        ends: (n,) int64, packets up to the end of each work.
        first_psn: of the first of them.
    """

    status: ClassVar = WcStatus.SUCCESS
    flags: ClassVar = 0

    opcode: WrOpcode
    posts: NDArray[np.void]
    region: Region
    mtu: int
    ends: NDArray[np.int64]
    first_psn: int = 0
    _part: Part | None = None
    _cut_at: tuple[int, int] = (0, 0)

    @property
    def n_psn(self) -> int:
        """PSNs it takes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def part(self, start: int, end: int) -> Part:
        """Return its packets [start, end), at least one: those of WRITEs, the responses to READs."""
        part = self._part
        if part is None or self._cut_at != (start, end):  # it is asked for at each step of a batch
            part = self._part = Part.cut(self.ends, self.posts["local_length"], self.mtu, start, end)
            self._cut_at = start, end
        return part

    def reth(self, part: Part) -> RethBatch:
        """Return where the works that begin in a part go."""
        posts = self.posts[part.messages][int(part.begins_late) :]
        return RethBatch(posts["remote_address"], posts["rkey"], posts["local_length"])

    def signaled(self, part: Part) -> NDArray[np.bool_]:
        """Say which of the works that end in a part asked for a completion."""
        return np.asarray((self.posts["flags"][part.messages][: part.n_ended] & _SIGNALED) != 0)

    def local(self, part: Part) -> IoVec:
        """Return where the bytes of a part are, by virtual address: (k, 2) uint64."""
        posts = self.posts[part.messages]
        return part.clip(self.region.places(posts["local_address"], posts["local_length"]))

    def n_requests(self, start: int, n_psn: int, n_max: int) -> tuple[int, int]:
        """Return how many whole READs, n_max at most, from PSN `start` on take at most so many PSNs, and how many."""
        first, last = np.searchsorted(self.ends, (start, start + n_psn), "right").tolist()
        last = min(last, first + max(0, n_max))
        return last - first, int(self.ends[last - 1]) - start if last > first else 0

    def take(self, n_acked: int) -> tuple[NDArray[np.void], int]:
        """Take out the works that are whole within the first n packets; returns their entries, and packets left."""
        n_works = int(np.searchsorted(self.ends, n_acked, "right"))
        taken = self.posts[:n_works]
        n_done = int(self.ends[n_works - 1]) if n_works else 0
        self.posts, self.ends = self.posts[n_works:], self.ends[n_works:] - n_done
        self.first_psn = psn_add(self.first_psn, n_done)
        self._part = None
        return taken, n_acked - n_done

    def works(self) -> Iterator[SendWork]:
        """Yield its works by themselves; the run must not be used any more."""
        start = 0
        for post, end in zip(self.posts, self.ends.tolist(), strict=True):
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
                first_psn=psn_add(self.first_psn, start),
                n_psn=end - start,
            )
            start = end


def decode_run(entries: Bytes, regions: RegionTable, pd: Pd, mtu: int, window: int) -> Run | None:
    """Decode the send ring entries that make a run, from the first on; None if they are too few to be worth it.

    Args:
        entries: (n, stride) uint8, a copy that nobody else can change; each has room for a scatter entry.
        mtu: bytes of payload that one packet carries.
        window: PSNs that may be outstanding: a READ of a run is asked for whole, and takes up to half of them.
    """
    posts = entries.view(one_sge_dtype(entries.shape[1])).reshape(-1)
    kind = _KINDS.get(int(posts["opcode"][0]))
    if kind is None:
        return None
    opcode, need = kind
    region = regions.find(int(posts["local_lkey"][0]), pd)
    if region is None or need & ~region.access or region.discipline is Discipline.SHORT_TERM:
        return None
    n_packets_max = min(MESSAGE_PACKETS_MAX, window // 2) if opcode is WrOpcode.RDMA_READ else MESSAGE_PACKETS_MAX
    n = n_alike(posts, opcode, region, n_packets_max * mtu)
    if n < RUN_MIN:
        return None
    posts = posts[:n]
    return Run(opcode, posts, region, mtu, np.cumsum(n_packets_of(posts["local_length"], mtu)))


def n_alike(posts: NDArray[np.void], opcode: int, region: Region, length_max: int) -> int:
    """Count the posts, from the first on, that are of one kind, not too long, and one range of that region."""
    length = posts["local_length"]
    good = (posts["opcode"] == opcode) & (posts["num_sge"] == 1) & (posts["local_lkey"] == region.lkey)
    good &= (posts["flags"] & ~_SIGNALED) == 0  # nothing inline, no fence
    good &= (length > 0) & (length <= length_max)
    good &= region.hold_each(posts["local_address"], length)
    other = first_true(~good)
    return len(posts) if other < 0 else other
