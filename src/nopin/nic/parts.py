"""Consecutive packets of messages that follow one another: where messages begin and end, and what packets carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import IoVec


def n_packets_of(lengths: NDArray[np.uint32], mtu: int) -> NDArray[np.int64]:
    """Return how many packets carry each of some messages, none of which is empty: (n,)."""
    return (lengths.astype(np.int64) + (mtu - 1)) // mtu


@dataclass(slots=True, eq=False)
class Part:
    """Packets that carry the bytes of messages, k of which have some among them.

    Attributes:
        n_packets: how many.
        nth: which of the messages it was cut from is its first.
        starts, ends: (k,) int64, where each message begins and ends, counted from the part's first packet: the first
            may have begun before it, and the last may end after the part does.
        lengths: (k,) uint32, bytes of each message.
        mtu: payload bytes of each packet but a message's last.
    """

    n_packets: int
    nth: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    mtu: int

    @classmethod
    def cut(cls, ends: NDArray[np.int64], lengths: NDArray[np.uint32], mtu: int, start: int, end: int) -> Part:
        """Return packets [start, end), at least one, of messages whose packets end at `ends`."""
        first, last = np.searchsorted(ends, (start, end - 1), "right").tolist()
        stops = ends[first : last + 1] - start
        starts = np.empty_like(stops)
        starts[0] = (ends[first - 1] if first else 0) - start
        starts[1:] = stops[:-1]
        return cls(end - start, first, starts, stops, lengths[first : last + 1], mtu)

    @property
    def messages(self) -> slice:
        """Which of the messages it was cut from have packets here."""
        return slice(self.nth, self.nth + len(self.starts))

    @property
    def begins_late(self) -> bool:
        """True if its first message began before it."""
        return bool(self.starts[0] < 0)

    @property
    def n_ended(self) -> int:
        """How many of its messages, from the first on, end in it."""
        return len(self.ends) - int(self.ends[-1] > self.n_packets)

    def first_packets(self) -> NDArray[np.int64]:
        """Return which packets begin a message."""
        return self.starts[1:] if self.begins_late else self.starts

    def last_packets(self) -> NDArray[np.int64]:
        """Return which packets end a message."""
        return self.ends[: self.n_ended] - 1

    def only_packets(self) -> NDArray[np.int64]:
        """Return which packets are a whole message."""
        only: NDArray[np.int64] = self.starts[self.ends - self.starts == 1]
        return only

    def payloads(self) -> NDArray[np.int64]:
        """Return the bytes each packet has for payload: (n_packets,)."""
        payloads = np.full(self.n_packets, self.mtu, np.int64)
        n = self.n_ended
        payloads[self.ends[:n] - 1] = self.lengths[:n] - (self.ends - self.starts - 1)[:n] * self.mtu
        return payloads

    def clip(self, places: IoVec) -> IoVec:
        """Cut the places of whole messages, (k, 2) and the caller's own, down to the bytes of these packets."""
        before = max(0, -int(self.starts[0])) * self.mtu
        if int(self.ends[-1]) > self.n_packets:  # so its last packet, which may be shorter, is not among these
            places[-1, 1] = (self.n_packets - int(self.starts[-1])) * self.mtu
        if before:
            places[0, 0] += np.uint64(before)
            places[0, 1] -= np.uint64(before)
        return places


def n_whole(ends: NDArray[np.int64], start: int, n_packets: int) -> int:
    """Return as many of n packets from `start` on as end with a message; all, if that were not even half of them.

    So batches of equal messages have one shape, and few messages arrive in two parts.
    """
    n_messages = int(np.searchsorted(ends, start + n_packets, "right"))
    n = int(ends[n_messages - 1]) - start if n_messages else 0
    return n if 2 * n >= n_packets else n_packets
