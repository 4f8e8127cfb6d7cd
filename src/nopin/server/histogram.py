"""Counts in buckets that double in width."""

from __future__ import annotations

N_BUCKETS = 40


class Histogram:
    """How often values fell into [2^k, 2^(k+1)); 0 counts as 1."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * N_BUCKETS

    def add(self, value: int) -> None:
        """Count one value, not negative."""
        self._counts[min((value or 1).bit_length() - 1, N_BUCKETS - 1)] += 1

    def counts(self) -> list[int]:
        """Return the counts by k, without the empty ones at the end."""
        n = N_BUCKETS
        while n and not self._counts[n - 1]:
            n -= 1
        return self._counts[:n]
