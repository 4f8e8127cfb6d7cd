"""Packets made and read by hand, for tests: right ones, wrong ones, and floods of damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.nic.wire import icrc
from nopin.nic.wire.aeth import Aeth
from nopin.nic.wire.batch import PacketBatch, Path
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.headers import AtomicEth, Reth
from nopin.nic.wire.opcodes import BTH_BYTES, HAS_AETH, HEADER_BYTES, ICRC_BYTES, Opcode

Flood = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]
"""Packets of one length back to back: the bytes, and where each starts, and how long each is."""


class Seen(NamedTuple):
    """A packet as read off the wire."""

    bth: Bth
    aeth: Aeth | None
    raw: bytes

    @property
    def opcode(self) -> Opcode:
        """What it is."""
        return Opcode(self.bth.opcode)

    @property
    def payload(self) -> bytes:
        """Its payload, without pad."""
        return self.raw[int(HEADER_BYTES[self.bth.opcode]) : len(self.raw) - ICRC_BYTES - self.bth.pad]

    @property
    def reth(self) -> Reth:
        """Its RETH. Requires: it has one."""
        return Reth.parse(self.raw, BTH_BYTES)


def seen(raw: bytes) -> Seen:
    """Read a packet."""
    bth = Bth.parse(raw)
    return Seen(bth, Aeth.parse(raw, BTH_BYTES) if HAS_AETH[bth.opcode] else None, raw)


def make_packet(bth: Bth, headers: bytes = b"", payload: bytes = b"", *, pad_with: bytes = b"\0") -> bytes:
    """Put a packet together, pad included; its ICRC is still four zero bytes."""
    n_pad = -len(payload) & 3
    base = bytearray(BTH_BYTES)
    bth._replace(pad=bth.pad or n_pad).emit(base)
    return bytes(base) + headers + payload + pad_with * n_pad + bytes(ICRC_BYTES)


def reth_bytes(address: int, rkey: int, length: int) -> bytes:
    """Encode a RETH."""
    buffer = bytearray(16)
    Reth(address, rkey, length).emit(buffer, 0)
    return bytes(buffer)


def atomic_bytes(address: int, rkey: int, swap_or_add: int, compare: int = 0) -> bytes:
    """Encode an AtomicETH."""
    buffer = bytearray(28)
    AtomicEth(address, rkey, swap_or_add, compare).emit(buffer, 0)
    return bytes(buffer)


def aeth_bytes(syndrome: int, msn: int) -> bytes:
    """Encode an AETH."""
    buffer = bytearray(4)
    Aeth(syndrome, msn).emit(buffer, 0)
    return bytes(buffer)


def sealed_batch(packets: Sequence[bytes], path: Path) -> PacketBatch:
    """Give packets their right ICRC and put them into one buffer, as they arrive along `path`."""
    lengths = np.array([len(packet) for packet in packets], np.int64)
    ends = np.cumsum(lengths)
    buffer = np.frombuffer(b"".join(packets), np.uint8).copy()
    icrc.seal(buffer, ends - lengths, lengths, Path(path.remote, path.local))
    return PacketBatch(path, buffer, ends - lengths, lengths)


def templates(qpn: int, psn: int, address: int, rkey: int, mtu: int) -> list[bytes]:
    """Return one well-formed packet for every opcode, with several sizes where there is a payload."""

    def bth(opcode: int) -> Bth:
        return Bth(opcode, qpn, psn, ack_req=True)

    made: list[bytes] = []
    for opcode in Opcode:
        sizes = (0, 1, 8, mtu) if opcode in _WITH_PAYLOAD else (0,)
        for size in sizes:
            headers = {
                16: reth_bytes(address, rkey, size or 8),
                20: reth_bytes(address, rkey, size or 8) + b"\x01\x02\x03\x04",
                28: atomic_bytes(address & ~7, rkey, _FILL, _FILL),
                12: aeth_bytes(0x1F, 1) + bytes([_FILL] * 8),
                4: aeth_bytes(0x1F, 1),
                0: b"",
            }[int(HEADER_BYTES[opcode]) - BTH_BYTES]
            made.append(make_packet(bth(opcode), headers, bytes([_FILL]) * size))
    return made


_FILL = 0xEE
_WITH_PAYLOAD = frozenset(op for op in Opcode if op.name.startswith(("SEND", "WRITE", "READ_RESPONSE")))


def floods(
    sources: Callable[[], list[bytes]], path: Path, n_packets: int, per_flood: int, seed: int
) -> Iterator[Flood]:
    """Yield at least n_packets damaged packets, each flood made from one of `sources()`, as they go along `path`.

    Of each flood a third is random from the first byte on, the others have some bytes changed, mostly in the headers;
    half of all are sealed afterwards, so that only what they say is wrong and not their ICRC. Lengths vary from flood
    to flood: cut short, as they were, or with bytes to spare.
    """
    rng = np.random.default_rng(seed)
    choose = random.Random(seed)
    for _ in range(-(-n_packets // per_flood)):
        source = choose.choice(sources())
        length = choose.choice((len(source), len(source), len(source), choose.randrange(1, 64), len(source) + 4))
        packets = _damaged(source.ljust(length, b"\xee")[:length], per_flood, rng)
        offsets = np.arange(per_flood, dtype=np.int64) * length
        lengths = np.full(per_flood, length, np.int64)
        if length > BTH_BYTES + ICRC_BYTES:
            good = rng.random(per_flood) < 0.5
            icrc.seal(packets, offsets[good], lengths[good], path)
        yield packets, offsets, lengths


def _damaged(source: bytes, n: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    length = len(source)
    packets = np.tile(np.frombuffer(source, np.uint8), (n, 1))
    rows = np.arange(n)
    for _ in range(3):
        hit = rng.random(n) < 0.5
        where = np.where(rng.random(n) < 0.8, rng.integers(0, min(length, 40), n), rng.integers(0, length, n))
        packets[rows[hit], where[hit]] = rng.integers(0, 256, int(hit.sum()), np.uint8)
    packets[rng.random(n) < 0.1] = rng.integers(0, 256, length, np.uint8)
    if length >= BTH_BYTES:  # any opcode, any nearby PSN
        reborn = rng.random(n) < 0.3
        packets[reborn, 0] = rng.integers(0, 0x18, int(reborn.sum()), np.uint8)
        packets[:, 11] += rng.integers(-2, 6, n).astype(np.uint8)
    return packets.reshape(-1)
