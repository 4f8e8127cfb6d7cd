"""How long answering faults took: counts by powers of two."""

from __future__ import annotations

from nopin.linux.paging_uffd import FAULT_MINOR, FAULT_WP

_N_FLAGS, _N_BUCKETS = 8, 64
_KINDS = ["protect" if flags & FAULT_WP else "minor" if flags & FAULT_MINOR else "missing" for flags in range(_N_FLAGS)]


class FaultTimes:
    """See above.

    Attributes:
        counts: by the flags of the fault's message, then by the bits that its nanoseconds take.
    """

    def __init__(self) -> None:
        self.counts = [[0] * _N_BUCKETS for _ in range(_N_FLAGS)]

    def by_kind(self) -> dict[str, list[int]]:
        """How often it took less than 2^k ns (and no less than half of it), by kind, then by k."""
        times = {kind: [0] * _N_BUCKETS for kind in ("missing", "minor", "protect")}
        for kind, counts in zip(_KINDS, self.counts, strict=True):
            times[kind] = [a + b for a, b in zip(times[kind], counts, strict=True)]
        return {kind: _without_empty_end(counts) for kind, counts in times.items()}


def _without_empty_end(counts: list[int]) -> list[int]:
    n = len(counts)
    while n and not counts[n - 1]:
        n -= 1
    return counts[:n]
