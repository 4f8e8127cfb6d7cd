"""Latency histograms as the server counts them: entry k is how many took from 2^(k-1) up to 2^k nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

Counts = Sequence[int]


def joined(histograms: Iterable[Counts]) -> list[int]:
    """Return the sum of histograms, entry by entry."""
    return [sum(entries) for entries in zip_longest(*histograms, fillvalue=0)]


def since(after: Counts, before: Counts) -> list[int]:
    """Return what came between two looks at one histogram."""
    return [now - then for now, then in zip_longest(after, before, fillvalue=0)]


def by_bound(counts: Counts) -> dict[int, int]:
    """Return the entries that have samples, by what these took less than, in nanoseconds."""
    return {1 << k: n for k, n in enumerate(counts) if n}


def quantile_ns(counts: Counts, share: float) -> int | None:
    """Return a bound that `share` of the samples took less than; None if there are no samples."""
    wanted = share * sum(counts)
    so_far = 0
    for bound_ns, n in by_bound(counts).items():
        so_far += n
        if so_far >= wanted:
            return bound_ns
    return None
