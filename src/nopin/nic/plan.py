"""A plan of packets to send: filled by requester or responder, laid out and sealed as one batch.

The steps are always: `add_*` for each run of packets, `layout`, write the extension headers, gather the payloads
into the places `layout` gave them, `finish`. Every step is a handful of numpy operations for any number of packets.
A lone packet, which is what latency is made of, needs none of them: `start_one`, the rest of it, `finish_one`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import IoVec, Staging
from nopin.nic.parts import Part
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Path, Runs, Segment, Slices, TxBatch
from nopin.nic.wire.bth import DEFAULT_PKEY, PAD_SHIFT, emit_bth
from nopin.nic.wire.kinds import KINDS
from nopin.nic.wire.opcodes import HEADER_BYTES, ICRC_BYTES, MAX_HEADER_BYTES, Opcode

PACKETS_MAX = 512
"""Two MiB at the largest MTU; four were no quicker. What a batch costs whatever its size is some 50 us where the caches
still hold our code, and several times that when it comes back from sending megabytes."""
_PACKET_BYTES_MAX = MAX_HEADER_BYTES + 4096 + 3 + ICRC_BYTES

_SHAPES_MAX = 32
"""Layouts whose slices of the staging buffer are kept: 0.1 MB each."""

SEGMENT_PACKETS_MAX = 128
SEGMENT_BYTES_MAX = 65507
"""UDP_SEGMENT: at most 128 segments and one UDP datagram's worth of bytes a call."""


class Family(NamedTuple):
    """The opcodes of one kind of message, by a packet's position in it."""

    only: Opcode
    first: Opcode
    middle: Opcode
    last: Opcode


@dataclass(frozen=True, slots=True, eq=False)  # layouts are told apart by which they are
class Layout:
    """Where packets lie, back to back from the start of a buffer, and how they are cut; read-only.

    Attributes:
        offsets, sizes: (n,) int64, each packet's start and bytes, ICRC included.
        places: (n, 2) uint64, where its payload starts, and its bytes.
        pad: (n,) uint8, its pad bytes; 0 where none has any.
        before_icrc: (k,) int64, where the ICRCs of those that have pad bytes start.
        n_bytes: of all.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: NDArray[np.uint64]
    pad: NDArray[np.uint8] | int
    before_icrc: NDArray[np.int64]
    segments: tuple[Segment, ...]
    runs: Runs
    n_bytes: int


@lru_cache(maxsize=256)
def _layout_of(opcodes: bytes, payloads: bytes) -> Layout:
    """Lay out packets: opcodes as uint8, bytes of payload as int64. Remembered: long messages repeat their shape."""
    payload = np.frombuffer(payloads, np.int64)
    header = HEADER_BYTES[np.frombuffer(opcodes, np.uint8)]
    pad = -payload & 3
    sizes = header + payload + pad + ICRC_BYTES
    ends = np.cumsum(sizes)
    offsets = ends - sizes
    places = np.stack((offsets + header, payload), axis=1).astype(np.uint64)
    for array in (offsets, sizes, places):
        array.flags.writeable = False
    return Layout(
        offsets,
        sizes,
        places,
        pad.astype(np.uint8) if pad.any() else 0,
        ends[pad != 0] - ICRC_BYTES,
        tuple(segments_of(offsets, sizes)),
        icrc.runs_of(sizes),
        int(ends[-1]),
    )


class Plan:
    """Up to `packets_max` packets for one queue pair.

    After `layout`: `offsets` says where each BTH goes, (n,) int64, `payload_at` where each payload. `n` is how many
    packets there are, `n_bytes` their bytes once they have been laid out.
    """

    def __init__(self, packets_max: int = PACKETS_MAX) -> None:
        self.packets_max = packets_max
        self.staging = Staging.of_size(packets_max * _PACKET_BYTES_MAX)
        self.n = 0
        self.n_bytes = 0
        self._opcode = np.zeros(packets_max, np.uint8)
        self._psn = np.zeros(packets_max, np.uint32)
        self._payload = np.zeros(packets_max, np.int64)
        self._ack_req = np.zeros(packets_max, np.bool_)
        self._solicited = np.zeros(packets_max, np.bool_)
        self._count = np.arange(packets_max, dtype=np.uint32)
        self.offsets: NDArray[np.int64] = self._payload[:0]
        self._solicits = False
        self._layout: Layout | None = None  # None for a lone packet
        self._slices_of = lru_cache(maxsize=_SHAPES_MAX)(self._cut_slices)

    @property
    def payload(self) -> NDArray[np.int64]:
        """Payload bytes of each packet."""
        return self._payload[: self.n]

    @property
    def room(self) -> int:
        """Packets that still fit."""
        return self.packets_max - self.n

    def start(self) -> None:
        """Begin a new plan."""
        self.n = 0
        self._ack_req[:] = False
        if self._solicits:
            self._solicits = False
            self._solicited[:] = False

    def add_one(self, opcode: int, psn: int, payload: int, *, ack_req: bool, solicited: bool = False) -> None:
        """Add one packet."""
        at = self.n
        self._opcode[at] = opcode
        self._psn[at] = psn
        self._payload[at] = payload
        if ack_req:
            self._ack_req[at] = True
        if solicited:
            self.solicit(at)
        self.n = at + 1

    def add_run(
        self, family: Family, psn: int, n: int, mtu: int, last_payload: int, *, starts: bool, ends: bool
    ) -> None:
        """Add n consecutive packets of one message; `starts` and `ends` say which of its ends they include."""
        first, after = self.n, self.n + n
        self._opcode[first:after] = family.middle
        self._payload[first:after] = mtu
        self._psn[first:after] = (self._count[:n] + np.uint32(psn)) & np.uint32(0xFFFFFF)
        if ends:
            self._opcode[after - 1] = family.last
            self._payload[after - 1] = last_payload
        if starts:
            self._opcode[first] = family.only if ends and n == 1 else family.first
        self.n = after

    def add_messages(self, family: Family, psn: int, part: Part) -> None:
        """Add consecutive packets of several messages."""
        first, n = self.n, part.n_packets
        after = first + n
        opcode = self._opcode[first:after]
        opcode[:] = family.middle
        opcode[part.last_packets()] = family.last
        opcode[part.first_packets()] = family.first
        opcode[part.only_packets()] = family.only
        self._payload[first:after] = part.payloads()
        self._psn[first:after] = (self._count[:n] + np.uint32(psn)) & np.uint32(0xFFFFFF)
        self.n = after

    def add_requests(self, opcode: int, psn: int, part: Part) -> None:
        """Add the requests for several READs, of which the part is all responses."""
        first, after = self.n, self.n + len(part.starts)
        self._opcode[first:after] = opcode
        self._payload[first:after] = 0
        self._psn[first:after] = (part.starts + psn) & 0xFFFFFF
        self._ack_req[first:after] = True
        self.n = after

    def request_ack(self, at: int | slice | NDArray[np.int64]) -> None:
        """Set the acknowledge request bit of packets already added."""
        self._ack_req[at] = True

    def solicit(self, at: int) -> None:
        """Set the solicited event bit of a packet."""
        self._solicits = True
        self._solicited[at] = True

    def layout(self) -> None:
        """Give every packet its place, back to back, and zero the pad bytes (payloads come later)."""
        layout = self._lay_out()
        if len(layout.before_icrc):
            # A padded packet has at least four bytes of payload and pad, so these three never touch its headers.
            for back in (1, 2, 3):
                self.staging.array[layout.before_icrc - back] = 0

    def cut(self, n: int) -> None:
        """Keep only the first n packets, after `layout`: their places stay, and so do the payloads that are there."""
        self.n = n
        if n:
            self._lay_out()

    def _lay_out(self) -> Layout:
        n = self.n
        self._layout = layout = _layout_of(self._opcode[:n].tobytes(), self._payload[:n].tobytes())
        self.offsets, self.n_bytes = layout.offsets, layout.n_bytes
        return layout

    @property
    def _laid(self) -> Layout:
        assert self._layout is not None, "a plan that was not laid out"
        return self._layout

    def payload_at(self, k: int) -> int:
        """Return where the payload of a packet goes."""
        return int(self._laid.places[k, 0])

    def payload_iov(self, start: int, end: int) -> IoVec:
        """Return where the payloads of packets [start, end) go: (n, 2) uint64, read-only."""
        return self._laid.places[start:end]

    def finish(self, path: Path, qpn: int, *, singly: bool) -> TxBatch:
        """Write base headers and ICRCs; returns the batch, valid until the next `start`."""
        n, layout = self.n, self._laid
        emit_bth(
            self.staging.array,
            layout.offsets,
            opcode=self._opcode[:n],
            qpn=qpn,
            psn=self._psn[:n],
            ack_req=self._ack_req[:n],
            solicited=self._solicited[:n] if self._solicits else False,
            pad=layout.pad,
        )
        slices = self._slices_of(layout)
        icrc.seal(self.staging.array, layout.offsets, layout.sizes, path, runs=layout.runs, slices=slices)
        segments = segments_of(layout.offsets, layout.sizes, singly=True) if singly else layout.segments
        return TxBatch(path, self.staging, segments)

    def _cut_slices(self, layout: Layout) -> Slices:
        """Return the bytes of each packet that its ICRC covers."""
        return icrc.slices_of(self.staging.view, layout.offsets, layout.sizes - ICRC_BYTES)

    def start_one(
        self,
        opcode: int,
        qpn: int,
        psn: int,
        payload: int,
        words: Iterable[int] = (),
        *,
        ack_req: bool = False,
        solicited: bool = False,
    ) -> int:
        """Begin a plan of one packet, without arrays: write its headers and pad; returns where its payload goes.

        Args:
            payload: bytes of it.
            words: of its extension headers, in order (`Kind.pack`).

        Then comes `finish_one`.
        """
        kind, pad = KINDS[opcode], -payload & 3
        header = kind.header_bytes
        end = header + payload
        view = self.staging.view
        flags = solicited << 7 | pad << PAD_SHIFT
        kind.pack(view, 0, opcode, flags, DEFAULT_PKEY, qpn, ack_req << 31 | psn, *words)
        if pad:
            view[end : end + pad] = bytes(pad)
        self.n, self._layout = 1, None
        self.n_bytes = end + pad + ICRC_BYTES
        return header

    def finish_one(self, path: Path) -> TxBatch:
        """Write the ICRC of the only packet; returns the batch, valid until the next plan is begun."""
        size = self.n_bytes
        icrc.seal_one(self.staging.view, 0, size, path)
        return TxBatch(path, self.staging, _lone_segment(size))


@lru_cache(maxsize=_PACKET_BYTES_MAX)
def _lone_segment(size: int) -> tuple[Segment]:
    """Return a packet by itself. Remembered: there are few sizes, and making one is dear."""
    return (Segment(0, size, size),)


def segments_of(offsets: NDArray[np.int64], sizes: NDArray[np.int64], *, singly: bool = False) -> list[Segment]:
    """Group packets that lie back to back into segmentation-offload sends.

    All packets of a segment have its stride as size, but the last may be shorter.
    """
    if singly:
        return [Segment(o, s, s) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True)]
    segments: list[Segment] = []
    edges = [0, *((sizes[1:] != sizes[:-1]).nonzero()[0] + 1).tolist(), len(sizes)]
    at, offset = 0, int(offsets[0])
    for edge, after in itertools.pairwise(edges):
        at = max(at, edge)  # the run before may have taken our first packet as its short tail
        stride = int(sizes[edge])
        most = max(1, min(SEGMENT_PACKETS_MAX, SEGMENT_BYTES_MAX // stride))
        while at < after:
            n = min(most, after - at)
            end = at + n
            length = n * stride
            if end == after and n < most and end < len(sizes) and sizes[end] < stride:
                length += int(sizes[end])
                end += 1
            segments.append(Segment(offset, length, stride))
            at, offset = end, offset + length
    return segments
