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
class RunPart:
    """Some consecutive packets that carry the bytes of a run: those of WRITEs, the responses to READs.

    Attributes:
        n_packets: how many.
        posts: entries of the works that have packets among them, oldest first: (k,).
        starts, ends: (k,) int64, where each begins and ends, counted from the part's first packet: the first may have
            begun before it, and the last may end after the part does.
        region, mtu: of the run.
    """

    n_packets: int
    posts: NDArray[np.void]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    region: Region
    mtu: int

    def beginning(self) -> tuple[NDArray[np.int64], RethBatch]:
        """Return which packets begin a work, and where those works go."""
        late = int(self.starts[0] < 0)
        posts = self.posts[late:]
        return self.starts[late:], RethBatch(posts["remote_address"], posts["rkey"], posts["local_length"])

    def ending(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return which packets end a work, the bytes each has for payload, and whether it asked for a completion."""
        n = len(self.posts) - int(self.ends[-1] > self.n_packets)
        posts, n_full = self.posts[:n], (self.ends - self.starts)[:n] - 1
        payload = posts["local_length"] - n_full * self.mtu
        return self.ends[:n] - 1, payload, np.asarray((posts["flags"] & _SIGNALED) != 0)

    def payloads(self) -> NDArray[np.int64]:
        """Return the bytes each packet has for payload: (n_packets,)."""
        payloads = np.full(self.n_packets, self.mtu, np.int64)
        ends, payload, _ = self.ending()
        payloads[ends] = payload
        return payloads

    def local(self) -> IoVec:
        """Return where the bytes of the packets are, by virtual address: (k, 2) uint64."""
        places = self.region.places(self.posts["local_address"], self.posts["local_length"])
        before = max(0, -int(self.starts[0])) * self.mtu
        if int(self.ends[-1]) > self.n_packets:  # so its last packet, which may be shorter, is not among these
            places[-1, 1] = (self.n_packets - int(self.starts[-1])) * self.mtu
        if before:
            places[0, 0] += np.uint64(before)
            places[0, 1] -= np.uint64(before)
        return places


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

    @property
    def n_psn(self) -> int:
        """PSNs it takes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def part(self, start: int, end: int) -> RunPart:
        """Return its packets [start, end), at least one."""
        first, last = np.searchsorted(self.ends, (start, end - 1), "right").tolist()
        ends = self.ends[first : last + 1] - start
        starts = np.empty_like(ends)
        starts[0] = (self.ends[first - 1] if first else 0) - start
        starts[1:] = ends[:-1]
        return RunPart(end - start, self.posts[first : last + 1], starts, ends, self.region, self.mtu)

    def n_whole(self, start: int, n_packets: int) -> int:
        """Return as many of n packets from `start` on as end with a work; all, if that were not even half of them.

        So batches of equal messages have one shape, and few messages arrive in two parts.
        """
        n_works = int(np.searchsorted(self.ends, start + n_packets, "right"))
        n = int(self.ends[n_works - 1]) - start if n_works else 0
        return n if 2 * n >= n_packets else n_packets

    def n_requests(self, start: int, n_psn: int, n_max: int) -> tuple[int, int]:
        """Return how many whole READs, n_max at most, from PSN `start` on take at most so many PSNs, and how many."""
        first, last = np.searchsorted(self.ends, (start, start + n_psn), "right").tolist()
        last = min(last, first + n_max)
        return last - first, int(self.ends[last - 1]) - start if last > first else 0

    def take(self, n_acked: int) -> tuple[NDArray[np.void], int]:
        """Take out the works that are whole within the first n packets; returns their entries, and packets left."""
        n_works = int(np.searchsorted(self.ends, n_acked, "right"))
        taken = self.posts[:n_works]
        n_done = int(self.ends[n_works - 1]) if n_works else 0
        self.posts, self.ends = self.posts[n_works:], self.ends[n_works:] - n_done
        self.first_psn = psn_add(self.first_psn, n_done)
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
    n_packets = (posts["local_length"][:n].astype(np.int64) + (mtu - 1)) // mtu
    return Run(opcode, posts[:n], region, mtu, np.cumsum(n_packets))


def n_alike(posts: NDArray[np.void], opcode: int, region: Region, length_max: int) -> int:
    """Count the posts, from the first on, that are of one kind, not too long, and one range of that region."""
    length = posts["local_length"]
    good = (posts["opcode"] == opcode) & (posts["num_sge"] == 1) & (posts["local_lkey"] == region.lkey)
    good &= (posts["flags"] & ~_SIGNALED) == 0  # nothing inline, no fence
    good &= (length > 0) & (length <= length_max)
    good &= region.hold_each(posts["local_address"], length)
    other = first_true(~good)
    return len(posts) if other < 0 else other
