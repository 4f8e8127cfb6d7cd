"""Packets in batches: what a link hands to the NIC and what the NIC hands to a link.

A packet here is the UDP payload: BTH to ICRC. All packets of a batch lie in one buffer; arrays say where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Bytes, Staging

ROCE_PORT = 4791


class Endpoint(NamedTuple):
    """One end of a path: a 16-byte GID (IPv4 as ::ffff:a.b.c.d) and a UDP port."""

    gid: bytes
    port: int


class Path(NamedTuple):
    """Where packets travel: our end and the other end."""

    local: Endpoint
    remote: Endpoint


Runs = list[tuple[int, int]]
"""Packets of a batch by their size: the size of neighbours, and how many there are (`icrc.runs_of`)."""

Slices = list[memoryview]
"""The bytes of each packet of a batch (`icrc.slices_of`)."""


@dataclass(slots=True)
class PacketBatch:
    """Received packets of one path, in order of arrival.

    Attributes:
        path: as seen by us; `path.remote.port` is the sender's source port.
        buffer: holds the packets; valid only until the NIC's `receive` returns.
        offsets: (n,) int64, where each BTH starts.
        lengths: (n,) int64, bytes from BTH to ICRC inclusive; may be too short to be a packet at all.
        icrc_checked: the link has verified the ICRC against the real IP header (raw receive).
        runs, slices: `icrc.runs_of` and `icrc.slices_of` the packets, where the link remembers them from batches of the
            same shape.
    """

    path: Path
    buffer: Bytes
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    icrc_checked: bool = False
    runs: Runs | None = None
    slices: Slices | None = None


class Segment(NamedTuple):
    """Packets to send in one system call: `length` bytes at `offset`, cut every `stride` bytes.

    The last packet may be shorter. At most 128 packets and 65507 bytes (UDP_SEGMENT limits).
    """

    offset: int
    length: int
    stride: int


@dataclass(slots=True)
class TxBatch:
    """Packets to send along one path, ICRC in place.

    Attributes:
        path: `path.local` is ours.
        staging: holds the packets; the link must be done with it when `send` returns.
        segments: in sending order.
    """

    path: Path
    staging: Staging
    segments: Sequence[Segment]

    def arrived(self) -> PacketBatch:
        """Return the packets as the other end of the path receives them: a copy. Requires: there are some."""
        offsets, lengths = zip(*(_spans(segment) for segment in self.segments), strict=True)
        starts, sizes = np.concatenate(offsets), np.concatenate(lengths)
        first, last = int(starts.min()), int((starts + sizes).max())
        buffer = self.staging.array[first:last].copy()
        return PacketBatch(Path(self.path.remote, self.path.local), buffer, starts - first, sizes)


def _spans(segment: Segment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return offset and length of each packet of a segment."""
    end = segment.offset + segment.length
    offsets = np.arange(segment.offset, end, max(segment.stride, 1), dtype=np.int64)
    return offsets, np.minimum(segment.stride, end - offsets)
