"""The invariant CRC: CRC-32 over masked IP and UDP headers and the packet, stored low byte first.

The headers are not in our buffers (the kernel makes them), so their part is computed once per path and length
and given to the CRC as its starting register, the `seed`. One byte of the packet itself, BTH byte 4 with the
congestion bits, counts as all ones whatever it holds. We never touch the packet for that: CRC is linear, so a
change of the register before the packet can stand for a change of that byte inside it. `_ONES_BEFORE` is that
change of register for a byte that holds zero, the usual case; it is part of every seed and costs nothing per
packet. A byte that holds something (a router marked congestion) is made up for by `_mark_effect`.

A receiver does not look at the stored CRC either: the CRC over a message followed by its own CRC is always
`RESIDUE`, so one pass per packet and one comparison per batch do.

Source: IBTA annex A17 (RoCEv2), section A17.3.3; field offsets as listed for Linux Soft-RoCE `rxe_icrc_hdr`.
"""

from __future__ import annotations

import itertools
import struct
from functools import lru_cache

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from nopin.mm.space import Bytes
from nopin.nic.wire.batch import Endpoint, Path, Runs, Slices
from nopin.nic.wire.gid import is_ipv4
from nopin.nic.wire.opcodes import ICRC_BYTES, MIN_PACKET_BYTES
from nopin.nic.wire.records import Offsets, scatter

CRC_AFTER_ONES = 0x2144DF1C
"""CRC-32 of the eight ff bytes that stand for the local routing header."""

RESIDUE = 0x2144DF1C
"""CRC-32 of any message followed by its own CRC (least significant byte first)."""

DONT_FRAGMENT = 0x4000
"""Identification 0 and the DF bit, as one 32-bit word of the IPv4 header: what an unconnected socket with
IP_MTU_DISCOVER = DO puts there, and so what nopin's ends agree on."""

_IPV4 = struct.Struct(">BBHIBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_UDP = struct.Struct(">HHHH")
_U32 = struct.Struct("<I")
_UDP_PROTOCOL = 17
_MASKED_BYTE = 4
"""Position in the BTH of the byte that counts as ones."""

_POLYNOMIAL = 0xEDB88320
"""The CRC-32 polynomial, reflected."""


def _rewound(register: int, n_bytes: int) -> int:
    """The register that n zero bytes would turn into this one: the CRC run backwards, bit by bit."""
    for _ in range(8 * n_bytes):
        carry = register >> 31
        register = (register ^ _POLYNOMIAL * carry) << 1 & 0xFFFFFFFF | carry
    return register


_ONES_BEFORE = _rewound(crc32(b"\xff") ^ crc32(b"\0"), _MASKED_BYTE + 1)
"""A difference of registers before the BTH with the effect of ones instead of zero in the masked byte."""


def _seed(source: Endpoint, destination: Endpoint, length: int, fragment_word: int = DONT_FRAGMENT) -> int:
    """The CRC of everything before the BTH, with the fields that routers change, and BTH byte 4, set to ones.

    Args:
        source, destination: the packet's two ends; both IPv4 or both IPv6.
        length: bytes of UDP payload, BTH to ICRC inclusive.
        fragment_word: IPv4 header bytes 4 to 8, identification and flags; IPv6 has none.
    """
    udp_length = length + _UDP.size & 0xFFFF
    if is_ipv4(source.gid):
        total = udp_length + _IPV4.size & 0xFFFF
        addresses = source.gid[12:], destination.gid[12:]
        ip = _IPV4.pack(0x45, 0xFF, total, fragment_word, 0xFF, _UDP_PROTOCOL, 0xFFFF, *addresses)
    else:
        ip = _IPV6.pack(0x6FFFFFFF, udp_length, _UDP_PROTOCOL, 0xFF, source.gid, destination.gid)
    udp = _UDP.pack(source.port, destination.port, udp_length, 0xFFFF)
    return crc32(ip + udp, CRC_AFTER_ONES) ^ _ONES_BEFORE


seed = lru_cache(maxsize=4096)(_seed)
"""`_seed`, remembered: a connection uses few lengths. Bounded, because strangers choose addresses."""


@lru_cache(maxsize=4096)
def _mark_effect(length: int, mark: int) -> int:
    """What a BTH byte 4 that holds `mark` instead of zero changes in the CRC of length bytes of packet."""
    return crc32(bytes(_MASKED_BYTE) + bytes([mark]) + bytes(length - _MASKED_BYTE - 1)) ^ crc32(bytes(length))


def seal(
    buffer: Bytes,
    offsets: Offsets,
    lengths: NDArray[np.int64],
    path: Path,
    fragment_words: NDArray[np.uint32] | None = None,
    runs: Runs | None = None,
    slices: Slices | None = None,
) -> None:
    """Write the ICRC into the last four bytes of each packet.

    Args:
        buffer: holds the packets, complete but for the ICRC.
        offsets, lengths: (n,) where each packet starts and its bytes, ICRC included; each at least 16.
        path: the packets go from `path.local` to `path.remote`.
        fragment_words: (n,) IPv4 identification and flags when they are not 0 and DF.
        runs: `runs_of` them, where that is known.
        slices: `slices_of` them without their ICRC, where those are at hand.
    """
    if len(offsets) == 0:
        return
    ends = path.local, path.remote
    slices = slices or slices_of(buffer.data, offsets, lengths - ICRC_BYTES)
    crcs = np.array(_crcs(slices, lengths, ends, fragment_words, runs), np.uint32)
    _allow_for_marks(crcs, buffer, offsets, lengths - ICRC_BYTES)
    scatter(buffer, offsets + (lengths - ICRC_BYTES), crcs.astype("<u4", copy=False))


def verify(
    buffer: Bytes,
    offsets: Offsets,
    lengths: NDArray[np.int64],
    path: Path,
    fragment_words: NDArray[np.uint32] | None = None,
) -> NDArray[np.bool_]:
    """Say of each packet whether its ICRC is right, (n,) bool; False for one too short to be a packet.

    Args:
        buffer: holds the packets.
        offsets, lengths: (n,) where each packet starts and its bytes, ICRC included.
        path: the packets came from `path.remote` to `path.local`.
        fragment_words: (n,) IPv4 identification and flags when they are known not to be 0 and DF.
    """
    whole = lengths >= MIN_PACKET_BYTES
    if not whole.all():
        good = np.zeros(len(offsets), np.bool_)
        words = None if fragment_words is None else fragment_words[whole]
        good[whole] = verify(buffer, offsets[whole], lengths[whole], path, words)
        return good
    if len(offsets) == 0:
        return np.zeros(0, np.bool_)
    slices = slices_of(buffer.data, offsets, lengths)
    crcs = np.array(_crcs(slices, lengths, (path.remote, path.local), fragment_words), np.uint32)
    _allow_for_marks(crcs, buffer, offsets, lengths)
    right: NDArray[np.bool_] = crcs == RESIDUE
    return right


def all_intact(slices: Slices, lengths: NDArray[np.int64], path: Path, runs: Runs | None = None) -> bool:
    """Tell whether `verify` would say True of all packets, the usual case, with less ado.

    Requires: each is at least MIN_PACKET_BYTES long, and its masked byte holds zero.
    """
    found = _crcs(slices, lengths, (path.remote, path.local), None, runs)
    return found.count(RESIDUE) == len(found)


def seal_one(view: memoryview, offset: int, length: int, path: Path) -> None:
    """`seal` for a lone packet."""
    end = offset + length - ICRC_BYTES
    crc = crc32(view[offset:end], seed(path.local, path.remote, length))
    mark = view[offset + _MASKED_BYTE]
    _U32.pack_into(view, end, crc ^ _mark_effect(length - ICRC_BYTES, mark) if mark else crc)


def verify_one(view: memoryview, offset: int, length: int, path: Path) -> bool:
    """`verify` for a lone packet of at least MIN_PACKET_BYTES."""
    crc = crc32(view[offset : offset + length], seed(path.remote, path.local, length))
    mark = view[offset + _MASKED_BYTE]
    return (crc ^ _mark_effect(length, mark) if mark else crc) == RESIDUE


def _crcs(
    slices: Slices,
    lengths: NDArray[np.int64],
    ends: tuple[Endpoint, Endpoint],
    fragment_words: NDArray[np.uint32] | None,
    runs: Runs | None = None,
) -> list[int]:
    """The CRC of each slice, headers included, of packets that have such lengths.

    This is the price of a packet: 0.4 us of CRC at 4 KiB. Cutting its slice takes half as much again, and naming its
    seed, so who sees the same shape again and again has both at hand.
    """
    return list(map(crc32, slices, _seeds(lengths, ends, fragment_words, runs)))


def slices_of(view: memoryview, offsets: Offsets, lengths: NDArray[np.int64]) -> list[memoryview]:
    """Return the bytes of each packet, or of as much of it as lengths say."""
    return [view[at : at + length] for at, length in zip(offsets.tolist(), lengths.tolist(), strict=True)]


def runs_of(lengths: NDArray[np.int64]) -> Runs:
    """Return the runs of packets of one size that follow one another. Requires: there is a packet."""
    edges = [0, *((lengths[1:] != lengths[:-1]).nonzero()[0] + 1).tolist(), len(lengths)]
    return [(int(lengths[first]), after - first) for first, after in itertools.pairwise(edges)]


def _seeds(
    lengths: NDArray[np.int64],
    ends: tuple[Endpoint, Endpoint],
    fragment_words: NDArray[np.uint32] | None,
    runs: Runs | None,
) -> list[int]:
    """The seed of each packet."""
    if fragment_words is not None:
        words = zip(lengths.tolist(), fragment_words.tolist(), strict=True)
        return [_seed(*ends, size, word) for size, word in words]
    seeds: list[int] = []
    for size, n in runs or runs_of(lengths):
        seeds += [seed(*ends, size)] * n
    return seeds


def _allow_for_marks(crcs: NDArray[np.uint32], buffer: Bytes, offsets: Offsets, n_covered: NDArray[np.int64]) -> None:
    """Correct the CRCs of packets whose masked byte holds something."""
    marks = buffer[offsets + _MASKED_BYTE]
    for at in marks.nonzero()[0].tolist():
        crcs[at] ^= np.uint32(_mark_effect(int(n_covered[at]), int(marks[at])))
