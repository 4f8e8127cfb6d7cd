"""Every floor in one run: what this machine does when nothing of RDMA's semantics is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from nopin.lab.floor_memory import MemcpyFloor, ProcessVmFloor
from nopin.lab.floor_udp import UdpFloor
from nopin.lab.floor_wake import WakeFloor
from nopin.lab.rounds import Floor, measure_all

SIZES_BYTES = (4 << 10, 64 << 10, 1 << 20)
N_ROUNDS = 5
ROUND_S = 0.1


class FloorFigure(msgspec.Struct, kw_only=True, frozen=True):
    """One floor: the median of its rounds and their spread, in `unit` ("bytes_per_s" or "ns")."""

    name: str
    unit: str
    median: float
    min: float
    max: float
    n_rounds: int


def measure_floors(
    sizes_bytes: Sequence[int] = SIZES_BYTES, *, n_rounds: int = N_ROUNDS, round_s: float = ROUND_S
) -> list[FloorFigure]:
    """Measure all floors by turns.

    Raises:
        HostLacks: the kernel refuses something a floor needs.
    """
    floors: list[Floor] = []
    try:
        floors += [MemcpyFloor(size) for size in sizes_bytes]
        floors += [ProcessVmFloor(size) for size in sizes_bytes]
        floors += [UdpFloor(crc=False), UdpFloor(crc=True), WakeFloor(), WakeFloor(one_cpu=True)]
        rounds = measure_all(floors, n_rounds=n_rounds, seconds=round_s)
    finally:
        for floor in floors:
            floor.close()
    return [_figure(floor, rounds[floor.name]) for floor in floors]


def _figure(floor: Floor, rounds: list[float]) -> FloorFigure:
    return FloorFigure(
        name=floor.name,
        unit=floor.unit,
        median=median(rounds),
        min=min(rounds),
        max=max(rounds),
        n_rounds=len(rounds),
    )
