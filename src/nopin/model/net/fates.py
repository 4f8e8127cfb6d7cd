"""What befalls packets on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from random import Random

from nopin.model.scheduler import Scheduler


class Fate(Enum):
    """Of one packet."""

    PASS = "passes"
    LOSE = "is lost"
    TWICE = "comes twice"
    LATE = "is overtaken"


Fates = Callable[[int], Sequence[Fate] | None]
"""Decides about so many packets, in order; None: all pass."""


def all_pass(n_packets: int) -> None:
    """Nothing befalls anything."""


def drawn(random: Random, *, loss: float = 0.0, duplicate: float = 0.0, reorder: float = 0.0) -> Fates:
    """Draw for each packet by itself; probabilities add up to 1 at most.

    Raises:
        ValueError: they are no such probabilities.
    """
    edges = loss, loss + duplicate, loss + duplicate + reorder
    if min(loss, duplicate, reorder) < 0 or edges[2] > 1:
        raise ValueError(f"not probabilities of one packet: loss {loss}, duplicate {duplicate}, reorder {reorder}")
    if not edges[2]:
        return all_pass

    def draw(n_packets: int) -> Sequence[Fate]:
        return [_fate_of(random.random(), edges) for _ in range(n_packets)]

    return draw


def chosen(scheduler: Scheduler, site: str) -> Fates:
    """Leave it to the scheduler's chooser which packets are lost; none where nobody chooses."""
    fates = Fate.PASS, Fate.LOSE
    words = [fate.value for fate in fates]

    def choose(n_packets: int) -> Sequence[Fate]:
        return [fates[scheduler.choose(site, words)] for _ in range(n_packets)]

    return choose


def _fate_of(drawn: float, edges: tuple[float, float, float]) -> Fate:
    lost, doubled, overtaken = edges
    if drawn < lost:
        return Fate.LOSE
    if drawn < doubled:
        return Fate.TWICE
    return Fate.LATE if drawn < overtaken else Fate.PASS
