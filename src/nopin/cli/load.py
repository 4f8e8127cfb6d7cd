"""What a server was doing between two looks at its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nopin.cli import histogram

Row = dict[str, Any]

FAULT_KINDS = ("zero", "swap", "minor", "protect", "device")
"""Zero fill, swap-in, mapping of a resident page, first store to a clean one; pages brought for devices."""


class ArenaLoad(msgspec.Struct, kw_only=True, frozen=True):
    """One arena: where it stands, and what happened to it, a second.

    Attributes:
        arena: its number among the client's.
        faults_per_s: by `FAULT_KINDS`.
        evictions_per_s, refaults_per_s: pages.
        swap_read_bytes_per_s, swap_written_bytes_per_s: as stored, so after compression.
    """

    arena: int
    name: str
    pid: int
    comm: str
    capacity_bytes: int
    budget_bytes: int
    resident_bytes: int
    swapped_bytes: int
    faults_per_s: dict[str, float]
    refaults_per_s: float
    evictions_per_s: float
    swap_read_bytes_per_s: float
    swap_written_bytes_per_s: float


class RegionLoad(msgspec.Struct, kw_only=True, frozen=True):
    """One memory region: page faults and invalidations of devices, a second."""

    mrn: int
    pid: int
    comm: str
    length_bytes: int
    faults_per_s: float
    invalidations_per_s: float


class Load(msgspec.Struct, kw_only=True, frozen=True):
    """A whole server.

    Attributes:
        seconds: between the two looks.
        regions: the hottest first.
        fault_latency: faults of processes by how long answering them took, all arenas together: less than so many
            nanoseconds (and no less than half of it).
        fault_latency_ever: the same since the arenas were made.
    """

    seconds: float
    n_clients: int
    arenas: list[ArenaLoad]
    regions: list[RegionLoad]
    fault_latency: dict[int, int]
    fault_latency_ever: dict[int, int]

    def total(self, figure: str) -> float:
        """Return the sum of one figure over all arenas; `faults_per_s` over its kinds too."""
        values = [getattr(arena, figure) for arena in self.arenas]
        return sum(sum(value.values()) if isinstance(value, dict) else value for value in values)


def compare(before: Sequence[Row], after: Sequence[Row], seconds: float) -> Load:
    """Return the load between two looks; what was not there at the first one counts from zero."""
    then = {_identity(row): row for row in before}
    pairs = [(row, then.get(_identity(row), {})) for row in after]
    arenas = [(row, old) for row, old in pairs if row["kind"] == "arena"]
    regions = [_region(row, old, seconds) for row, old in pairs if row["kind"] == "mr"]
    ever = histogram.joined(_latency(row) for row, _ in arenas)
    ever_then = histogram.joined(_latency(old) for _, old in arenas)
    return Load(
        seconds=seconds,
        n_clients=sum(row["kind"] == "client" for row in after),
        arenas=[_arena(row, old, seconds) for row, old in arenas],
        regions=sorted(regions, key=lambda region: (-region.faults_per_s, -region.invalidations_per_s, region.mrn)),
        fault_latency=histogram.by_bound(histogram.since(ever, ever_then)),
        fault_latency_ever=histogram.by_bound(ever),
    )


def _identity(row: Row) -> tuple[Any, ...]:
    return row["kind"], row.get("pid"), row.get("arena"), row.get("mrn")


def _latency(row: Row) -> list[int]:
    return histogram.joined(row.get("latency_ns", {}).values())


def _rate(row: Row, old: Row, key: str, seconds: float) -> float:
    return float((row[key] - old.get(key, 0)) / seconds)


def _arena(row: Row, old: Row, seconds: float) -> ArenaLoad:
    return ArenaLoad(
        arena=row["arena"],
        name=row["name"],
        pid=row["pid"],
        comm=row["comm"],
        capacity_bytes=row["capacity"],
        budget_bytes=row["budget"],
        resident_bytes=row["resident"],
        swapped_bytes=row["swapped_bytes"],
        faults_per_s={kind: _rate(row, old, f"faults_{kind}", seconds) for kind in FAULT_KINDS},
        refaults_per_s=_rate(row, old, "refaults", seconds),
        evictions_per_s=_rate(row, old, "evicted", seconds),
        swap_read_bytes_per_s=_rate(row, old, "swap_read_bytes", seconds),
        swap_written_bytes_per_s=_rate(row, old, "swap_written_bytes", seconds),
    )


def _region(row: Row, old: Row, seconds: float) -> RegionLoad:
    return RegionLoad(
        mrn=row["mrn"],
        pid=row["pid"],
        comm=row["comm"],
        length_bytes=row["mrlen"],
        faults_per_s=_rate(row, old, "page_faults", seconds),
        invalidations_per_s=_rate(row, old, "page_invalidations", seconds),
    )
