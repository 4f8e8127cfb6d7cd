"""Received packets of one queue pair, header fields beside them, as the responder and completer take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Staging
from nopin.nic.wire.bth import PAD_SHIFT, SOLICITED_BIT, BthBatch
from nopin.nic.wire.opcodes import HEADER_BYTES, ICRC_BYTES
from nopin.nic.wire.psn import PSN_MASK

HELD_PACKETS_MAX = 2048
"""Packets a queue pair keeps each way while it is parked; more are dropped and will be sent again."""


def first_true(mask: NDArray[np.bool_]) -> int:
    """Return the index of the first True, or -1; quicker than `numpy.flatnonzero` on the arrays of a batch."""
    if not len(mask):
        return -1
    at = int(mask.argmax())
    return at if mask[at] else -1


@dataclass(slots=True, eq=False)
class Packet:
    """One packet in plain numbers, fields as in `Packets`: what is no run of many is handled by these."""

    staging: Staging
    offset: int
    opcode: int
    psn: int
    ack_req: bool
    solicited: bool
    pad: int
    length: int
    header: int
    payload: int

    def alone(self) -> Packets:
        """Return it as a batch of one."""
        return Packets(
            self.staging,
            np.array([self.offset], np.int64),
            np.array([self.opcode], np.uint8),
            np.array([self.solicited * SOLICITED_BIT | self.pad << PAD_SHIFT], np.uint8),
            np.array([self.psn], np.uint32),
            np.array([self.ack_req], np.bool_),
            np.array([self.length], np.int64),
            np.array([[self.offset + self.header, self.payload]], np.int64),
            bool(self.pad),
        )


@dataclass(slots=True, eq=False)
class Packets:
    """n packets for one queue pair, in order of arrival; arrays are (n,) but for `places`.

    Attributes:
        staging: holds the bytes; the link's buffer unless `detach` was called.
        offsets: of each BTH.
        flags: the byte of the BTH with solicited and pad bits.
        places: (n, 2) int64, where in the staging buffer each payload starts, and its bytes.
        padded: some packet may have pad bytes; none does in the middle of a long message.
    """

    staging: Staging
    offsets: NDArray[np.int64]
    opcode: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    psn: NDArray[np.uint32]
    ack_req: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    places: NDArray[np.int64]
    padded: bool

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def payload(self) -> NDArray[np.int64]:
        """Payload bytes of each; negative for a packet too short for its own opcode."""
        return self.places[:, 1]

    @property
    def pads(self) -> NDArray[np.uint8]:
        """Pad bytes of each."""
        return self.flags >> np.uint8(PAD_SHIFT) & np.uint8(3)

    def pad(self, at: int) -> int:
        """Pad bytes of one packet."""
        return int(self.flags[at]) >> PAD_SHIFT & 3

    def solicited(self, at: int) -> bool:
        """Say whether one packet asks for a solicited event."""
        return int(self.flags[at]) >= SOLICITED_BIT

    def one(self, at: int) -> Packet:
        """Take out one packet."""
        offset = int(self.offsets[at])
        payload_at, payload = self.places[at].tolist()
        return Packet(
            self.staging,
            offset,
            int(self.opcode[at]),
            int(self.psn[at]),
            bool(self.ack_req[at]),
            self.solicited(at),
            self.pad(at),
            int(self.lengths[at]),
            payload_at - offset,
            payload,
        )

    def part(self, start: int, end: int) -> Packets:
        """View packets [start, end)."""
        cut = slice(start, end)
        return Packets(
            self.staging,
            self.offsets[cut],
            self.opcode[cut],
            self.flags[cut],
            self.psn[cut],
            self.ack_req[cut],
            self.lengths[cut],
            self.places[cut],
            self.padded,
        )

    def breaks(self) -> list[int]:
        """Return the indexes after runs of consecutive PSNs, the last of which is the number of packets."""
        n = len(self.offsets)
        if n < 2:
            return [n]
        steps = self.psn[1:] - self.psn[:-1]
        broken = steps != 1
        if first_true(broken) < 0:
            return [n]  # the steady state; where the PSN wraps a closer look is needed
        broken = (steps & np.uint32(PSN_MASK)) != 1
        return [*(broken.nonzero()[0] + 1).tolist(), n]

    def count_full(self, start: int, end: int, mtu: int) -> int:
        """Count the leading packets of [start, end) that carry one MTU of payload and no pad."""
        wrong = self.places[start:end, 1] != mtu
        if self.padded:
            wrong |= self.pads[start:end] != 0
        at = first_true(wrong)
        return end - start if at < 0 else at

    def asks_ack(self, start: int, end: int) -> bool:
        """Say whether one of packets [start, end) asks for an acknowledgement."""
        return first_true(self.ack_req[start:end]) >= 0

    def detach(self) -> Packets:
        """Copy the bytes out of the link's buffer, so that the packets can be kept."""
        ends = np.cumsum(self.lengths)
        staging = Staging.of_size(int(ends[-1]) if len(ends) else 0)
        starts = ends - self.lengths
        for source, target, length in zip(self.offsets.tolist(), starts.tolist(), self.lengths.tolist(), strict=True):
            staging.array[target : target + length] = self.staging.array[source : source + length]
        places = self.places.copy()
        places[:, 0] += starts - self.offsets
        return replace(self, staging=staging, offsets=starts, places=places)

    def payload_iov(self, start: int, end: int) -> NDArray[np.uint64]:
        """Return where the payloads of packets [start, end) lie in the staging buffer: a view, (end - start, 2)."""
        return self.places[start:end].view(np.uint64)


def describe(staging: Staging, offsets: NDArray[np.int64], lengths: NDArray[np.int64], bth: BthBatch) -> Packets:
    """Add the places of payloads to parsed headers."""
    header = HEADER_BYTES[bth.opcode]
    places = np.empty((len(offsets), 2), np.int64)
    np.add(offsets, header, out=places[:, 0])
    payload = lengths - header
    payload -= ICRC_BYTES
    padded = bool(bth.flags.any())
    if padded:
        payload -= bth.pad
    places[:, 1] = payload
    return Packets(staging, offsets, bth.opcode, bth.flags, bth.psn, bth.ack_req, lengths, places, padded)
