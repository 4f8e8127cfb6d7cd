"""Received packets of one queue pair, header fields beside them, as the responder and completer take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import Staging
from nopin.nic.wire.opcodes import HEADER_BYTES, ICRC_BYTES

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
            np.array([self.psn], np.uint32),
            np.array([self.ack_req], np.bool_),
            np.array([self.solicited], np.bool_),
            np.array([self.pad], np.uint8),
            np.array([self.length], np.int64),
            np.array([self.header], np.int64),
            np.array([self.payload], np.int64),
        )


@dataclass(slots=True, eq=False)
class Packets:
    """n packets for one queue pair, in order of arrival; arrays are (n,).

    Attributes:
        staging: holds the bytes; the link's buffer unless `detach` was called.
        offsets: of each BTH. `header`: bytes from there to the payload. `payload`: bytes of payload, which is
            negative for a packet too short for its own opcode.
    """

    staging: Staging
    offsets: NDArray[np.int64]
    opcode: NDArray[np.uint8]
    psn: NDArray[np.uint32]
    ack_req: NDArray[np.bool_]
    solicited: NDArray[np.bool_]
    pad: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    header: NDArray[np.int64]
    payload: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets)

    def one(self, at: int) -> Packet:
        """Take out one packet."""
        return Packet(
            self.staging,
            int(self.offsets[at]),
            int(self.opcode[at]),
            int(self.psn[at]),
            bool(self.ack_req[at]),
            bool(self.solicited[at]),
            int(self.pad[at]),
            int(self.lengths[at]),
            int(self.header[at]),
            int(self.payload[at]),
        )

    def part(self, start: int, end: int) -> Packets:
        """View packets [start, end)."""
        cut = slice(start, end)
        return Packets(
            self.staging,
            self.offsets[cut],
            self.opcode[cut],
            self.psn[cut],
            self.ack_req[cut],
            self.solicited[cut],
            self.pad[cut],
            self.lengths[cut],
            self.header[cut],
            self.payload[cut],
        )

    def count_full(self, start: int, end: int, mtu: int) -> int:
        """Count the leading packets of [start, end) that carry one MTU of payload and no pad."""
        wrong = first_true((self.payload[start:end] != mtu) | (self.pad[start:end] != 0))
        return end - start if wrong < 0 else wrong

    def detach(self) -> Packets:
        """Copy the bytes out of the link's buffer, so that the packets can be kept."""
        ends = np.cumsum(self.lengths)
        staging = Staging.of_size(int(ends[-1]) if len(ends) else 0)
        starts = ends - self.lengths
        for source, target, length in zip(self.offsets.tolist(), starts.tolist(), self.lengths.tolist(), strict=True):
            staging.array[target : target + length] = self.staging.array[source : source + length]
        return Packets(
            staging,
            starts,
            self.opcode,
            self.psn,
            self.ack_req,
            self.solicited,
            self.pad,
            self.lengths,
            self.header,
            self.payload,
        )

    def payload_iov(self, start: int, end: int) -> NDArray[np.uint64]:
        """Return where the payloads of packets [start, end) lie in the staging buffer: (end - start, 2) uint64."""
        iov = np.empty((end - start, 2), np.uint64)
        iov[:, 0] = self.offsets[start:end]
        iov[:, 0] += self.header[start:end].view(np.uint64)
        iov[:, 1] = self.payload[start:end]
        return iov


def describe(
    staging: Staging,
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    opcode: NDArray[np.uint8],
    psn: NDArray[np.uint32],
    ack_req: NDArray[np.bool_],
    solicited: NDArray[np.bool_],
    pad: NDArray[np.uint8],
) -> Packets:
    """Add header and payload lengths to parsed headers."""
    header = HEADER_BYTES[opcode]
    payload = lengths - header - pad - ICRC_BYTES
    return Packets(staging, offsets, opcode, psn, ack_req, solicited, pad, lengths, header, payload)
