"""Trouble on demand: loss, duplicates, reordering, delay, and single flipped bits, from a seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nopin.errors import UsageError
from nopin.link.base import Link, packets_of
from nopin.link.wrapper import Wrapper
from nopin.mm.space import Staging
from nopin.nic.wire.batch import PacketBatch, Path, Segment, TxBatch
from nopin.units import US_NS

REORDER_NS = 200 * US_NS
"""A reordered packet is held back for up to this long, while later ones pass it."""


class _Held(NamedTuple):
    """A packet on its way; ordered by when it is due, then by when it was sent."""

    due: int
    number: int
    path: Path
    packet: bytearray


class FaultyLink(Wrapper):
    """Mistreats what this end sends, packet by packet; what it receives is left alone.

    Same seed, same packets, same times: same faults. Give both ends one for trouble in both directions.

    Args:
        inner: the link that sends what is left.
        seed: of the private random generator.
        loss, duplicate, reorder, corrupt: probabilities for each packet, independent of each other.
        delay_ns: added to every packet.

    Raises:
        UsageError: a probability outside [0, 1], or a negative delay.
    """

    def __init__(
        self,
        inner: Link,
        *,
        seed: int,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay_ns: int = 0,
    ) -> None:
        super().__init__(inner)
        for name, value in (
            ("loss", loss),
            ("duplicate", duplicate),
            ("reorder", reorder),
            ("corrupt", corrupt),
        ):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} is a probability between 0 and 1, not {value}")
        if delay_ns < 0:
            raise UsageError(f"a delay cannot be negative: {delay_ns} ns")
        self._random = random.Random(seed)
        self._loss = loss
        self._duplicate = duplicate
        self._reorder = reorder
        self._corrupt = corrupt
        self._delay_ns = delay_ns
        self._held: list[_Held] = []
        self._n_held_ever = 0
        self._counts = dict.fromkeys(("lost", "duplicated", "reordered", "corrupted"), 0)

    def send(self, batch: TxBatch, now: int) -> None:
        """Decide the fate of each packet; untouched ones go at once, the others when they are due."""
        self._release(now)
        untouched: list[Segment] = []
        for offset, length in packets_of(batch.segments):
            is_lost = self._happens("lost", self._loss)
            n_copies = 2 if self._happens("duplicated", self._duplicate) else 1
            is_corrupt = self._happens("corrupted", self._corrupt)
            wait_ns = self._delay_ns
            if self._happens("reordered", self._reorder):
                wait_ns += self._random.randrange(1, REORDER_NS)
            if is_lost:
                continue
            if not is_corrupt and wait_ns == 0:
                untouched += [Segment(offset, length, length)] * n_copies
                continue
            packet = bytearray(batch.staging.view[offset : offset + length])
            if is_corrupt:
                self._flip_one_bit(packet)
            for _ in range(n_copies):
                self._hold(_Held(now + wait_ns, self._n_held_ever, batch.path, packet))
        if untouched:
            self.inner.send(TxBatch(batch.path, batch.staging, untouched), now)
        self._release(now)

    def receive(self, now: int) -> Iterable[PacketBatch]:
        """Let out what is due, then receive as the inner link does."""
        self._release(now)
        return self.inner.receive(now)

    def next_deadline(self) -> int | None:
        """When the next held packet is due, or the inner link's deadline."""
        deadlines = [self.inner.next_deadline(), self._held[0].due if self._held else None]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def close(self) -> None:
        """Close the inner link; held packets are lost."""
        self._held.clear()
        self.inner.close()

    def statistics(self) -> dict[str, int]:
        """What was done to packets, then the inner link's."""
        return {**{f"fault_{name}": count for name, count in self._counts.items()}, **self.inner.statistics()}

    def _happens(self, name: str, probability: float) -> bool:
        """Draw once, always: so that one dial does not shift what the others do."""
        happens = self._random.random() < probability
        self._counts[name] += happens
        return happens

    def _flip_one_bit(self, packet: bytearray) -> None:
        """The error that is hardest to notice."""
        bit = self._random.randrange(8 * len(packet))
        packet[bit >> 3] ^= 1 << (bit & 7)

    def _hold(self, held: _Held) -> None:
        heapq.heappush(self._held, held)
        self._n_held_ever += 1

    def _release(self, now: int) -> None:
        while self._held and self._held[0].due <= now:
            held = heapq.heappop(self._held)
            whole = Segment(0, len(held.packet), len(held.packet))
            staging = Staging(np.frombuffer(held.packet, np.uint8))
            self.inner.send(TxBatch(held.path, staging, [whole]), now)
