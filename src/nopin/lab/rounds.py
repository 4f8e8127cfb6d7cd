"""How two things are compared on a noisy machine: in short rounds by turns, then the medians.

A virtual machine's speed drifts by tens of per cent within a minute. Rounds that alternate see the same
drift, so their ratio is steadier than either figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol, TypeVar

Sample = TypeVar("Sample")


class Floor(Protocol):
    """What the machine can do without RDMA semantics, measurable a little at a time.

    Attributes:
        name: as in the JSON figures.
        unit: ``"bytes_per_s"`` or ``"ns"``.
    """

    name: str
    unit: str

    def measure(self, seconds: float) -> float:
        """Measure for about that long and return one figure in `unit`."""
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


def alternate(
    contenders: Sequence[Callable[[], Sample]], floor: Floor | None, *, n_rounds: int, floor_s: float
) -> tuple[list[list[Sample]], float | None]:
    """Run contenders and the floor by turns; return each one's samples and the floor's median.

    Every other round the contenders come in reverse: none always has the caches as the floor left them.
    """
    samples: list[list[Sample]] = [[] for _ in contenders]
    floors: list[float] = []
    order = list(zip(contenders, samples, strict=True))
    for _ in range(n_rounds):
        if floor is not None:
            floors.append(floor.measure(floor_s))
        for contender, taken in order:
            taken.append(contender())
        order.reverse()
    return samples, median(floors) if floors else None


def measure_all(floors: Sequence[Floor], *, n_rounds: int, seconds: float) -> dict[str, list[float]]:
    """Measure several floors by turns; return every round of each, by name."""
    rounds: dict[str, list[float]] = {floor.name: [] for floor in floors}
    for _ in range(n_rounds):
        for floor in floors:
            rounds[floor.name].append(floor.measure(seconds))
    return rounds
