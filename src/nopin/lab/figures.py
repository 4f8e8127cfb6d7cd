"""What a benchmark reports, with perftest's names in its JSON form."""

from __future__ import annotations

from statistics import fmean, median, pstdev
from typing import Any

import msgspec
import numpy as np

MIB = 1 << 20


class BandwidthFigure(msgspec.Struct, kw_only=True, frozen=True):
    """One message size of a bandwidth test: one rate for each round, and the floor's.

    `n_iterations` counts messages over all rounds; rates are payload bytes a second.
    """

    size_bytes: int
    n_iterations: int
    rounds_bytes_per_s: list[float]
    floor_name: str | None = None
    floor_bytes_per_s: float | None = None

    @property
    def average(self) -> float:
        """The median of the rounds, in bytes a second."""
        return median(self.rounds_bytes_per_s)

    @property
    def peak(self) -> float:
        """The best round, in bytes a second."""
        return max(self.rounds_bytes_per_s)

    @property
    def messages_per_s(self) -> float:
        """Messages a second at the average rate."""
        return self.average / self.size_bytes

    @property
    def ratio_to_floor(self) -> float | None:
        """Average rate over the floor's: 1 is as fast, below is slower."""
        return self.average / self.floor_bytes_per_s if self.floor_bytes_per_s else None

    def as_json(self) -> dict[str, Any]:
        """Return perftest's keys (MiB/s and million messages a second), then ours."""
        return {
            "MsgSize": self.size_bytes,
            "n_iterations": self.n_iterations,
            "BW_peak": self.peak / MIB,
            "BW_average": self.average / MIB,
            "MsgRate": self.messages_per_s / 1e6,
            "bytes_per_s": self.average,
            "messages_per_s": self.messages_per_s,
            "rounds_bytes_per_s": self.rounds_bytes_per_s,
            "floor": self.floor_name,
            "floor_bytes_per_s": self.floor_bytes_per_s,
            "ratio_to_floor": self.ratio_to_floor,
        }


class LatencyFigure(msgspec.Struct, kw_only=True, frozen=True):
    """One message size of a latency test: every sample in nanoseconds, and the floor's round trip."""

    size_bytes: int
    samples_ns: list[float]
    floor_name: str | None = None
    floor_ns: float | None = None

    @property
    def typical_ns(self) -> float:
        """The median."""
        return median(self.samples_ns)

    @property
    def ratio_to_floor(self) -> float | None:
        """Median over the floor's median: 1 is as fast, above is slower."""
        return self.typical_ns / self.floor_ns if self.floor_ns else None

    def percentile_ns(self, percent: float) -> float:
        """Return a percentile of the samples."""
        return float(np.percentile(self.samples_ns, percent))

    def columns_us(self) -> dict[str, float]:
        """Return perftest's columns, in microseconds, under its names."""
        figures_ns = {
            "t_min": min(self.samples_ns),
            "t_max": max(self.samples_ns),
            "t_typical": self.typical_ns,
            "t_avg": fmean(self.samples_ns),
            "t_stdev": pstdev(self.samples_ns),
            "percentile_99": self.percentile_ns(99),
            "percentile_99.9": self.percentile_ns(99.9),
        }
        return {name: value / 1000 for name, value in figures_ns.items()}

    def as_json(self) -> dict[str, Any]:
        """Return perftest's keys (microseconds), then ours."""
        return {
            "MsgSize": self.size_bytes,
            "n_iterations": len(self.samples_ns),
            **self.columns_us(),
            "floor": self.floor_name,
            "floor_ns": self.floor_ns,
            "ratio_to_floor": self.ratio_to_floor,
        }


Figure = BandwidthFigure | LatencyFigure


def ratio(ours: Figure, other: Figure) -> float:
    """Return our median over another's of the same kind: rates are better above 1, latencies below."""
    if isinstance(ours, BandwidthFigure) and isinstance(other, BandwidthFigure):
        return ours.average / other.average
    assert isinstance(ours, LatencyFigure)
    assert isinstance(other, LatencyFigure)
    return ours.typical_ns / other.typical_ns


def ratios_of_rounds(ours: BandwidthFigure, other: BandwidthFigure) -> list[float]:
    """Return the ratio of each pair of rounds that were run one after the other."""
    pairs = zip(ours.rounds_bytes_per_s, other.rounds_bytes_per_s, strict=True)
    return [rate / other_rate for rate, other_rate in pairs]
