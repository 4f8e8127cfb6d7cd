"""What every link offers, and the two small computations all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nopin.nic.wire.batch import Endpoint, PacketBatch, Segment, TxBatch

PATH_MTUS = (4096, 2048, 1024, 512, 256)
OVERHEAD_BYTES = 80
"""IPv6 and UDP headers, the longest transport headers and ICRC, as Soft-RoCE reserves them."""


class Link(Protocol):
    """A way to send and receive packets, without loss promised.

    Trouble on the way (no route, a full buffer, a refusing host) is counted in `statistics` and never raised:
    the reliable connection above resends.

    Attributes:
        endpoint: our end; the source of what we send.
        mtu: the largest path MTU that fits, 256 to 4096.
    """

    endpoint: Endpoint
    mtu: int

    def send(self, batch: TxBatch, now: int) -> None:
        """Send the packets; when this returns, the staging may be reused."""
        ...

    def receive(self, now: int) -> Iterable[PacketBatch]:
        """What has arrived, a bounded amount; each batch is valid until the next is asked for.

        Also the call to make when `next_deadline` has passed: held packets go out then.
        """
        ...

    def filenos(self) -> list[int]:
        """Descriptors that become readable when packets arrive."""
        ...

    def next_deadline(self) -> int | None:
        """When `receive` must be called even if nothing arrives, on the clock of `now`; None for never."""
        ...

    def close(self) -> None:
        """Give everything back. Twice is fine."""
        ...

    def statistics(self) -> dict[str, int]:
        """Counters by name, from the outermost layer to the innermost."""
        ...


def path_mtu_for(interface_mtu: int) -> int:
    """The largest path MTU whose packets fit an interface; 256 when even that does not."""
    room = interface_mtu - OVERHEAD_BYTES
    return next((mtu for mtu in PATH_MTUS if mtu <= room), PATH_MTUS[-1])


def packets_of(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Offset and length of every single packet, in order."""
    for offset, length, stride in segments:
        end = offset + length
        for at in range(offset, end, max(stride, 1)):
            yield at, min(stride, end - at)


def split_slots(
    lengths: NDArray[np.uint32], segment_bytes: NDArray[np.uint32], slot_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and lengths of the packets in slots, each cut every segment_bytes.

    Args:
        lengths: (n,) bytes in each slot; slot i starts at i x slot_bytes.
        segment_bytes: (n,) size of each packet in the slot but the last, which may be shorter.
        slot_bytes: distance of slots.
    Returns:
        two (p,) int64 arrays; an empty slot has no packet.
    """
    sizes = np.maximum(segment_bytes, 1).astype(np.int64)
    n_bytes = lengths.astype(np.int64)
    n_packets = (n_bytes + sizes - 1) // sizes
    slot = np.repeat(np.arange(len(sizes)), n_packets)
    before = np.cumsum(n_packets) - n_packets
    within = (np.arange(len(slot)) - before[slot]) * sizes[slot]
    return slot * slot_bytes + within, np.minimum(sizes[slot], n_bytes[slot] - within)
