"""Campaigns of exploration: which pieces of work there are, each done on its own, and what they came to."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import msgspec

from nopin import __version__
from nopin.lab.sweep import Sweep
from nopin.model.explore.mutants import mutant_named, mutants
from nopin.model.explore.record import CounterExample, replay
from nopin.model.explore.scenario import named, scenarios
from nopin.model.explore.search import Bounds, Found, search
from nopin.model.explore.shrink import shrink
from nopin.model.explore.wander import wander

ALL = "all"
SEEDS_A_PIECE = 100


@dataclass(frozen=True, slots=True)
class Piece:
    """One scenario, with the code as it is or one mutant, searched or run for each of some seeds.

    Attributes:
        seeds: None: search within `bounds`.
    """

    scenario: str
    mutant: str | None
    bounds: Bounds
    seeds: range | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a piece; see `Found`.

    Attributes:
        example: the counter-example, shrunk; None if nothing broke.
    """

    piece: Piece
    found: Found
    example: CounterExample | None


def do(piece: Piece) -> Result:
    """Do a piece of work, and shrink what it finds."""
    scenario = named(piece.scenario)
    with mutant_named(piece.mutant).applied() if piece.mutant else nullcontext():
        found = wander(scenario, piece.seeds) if piece.seeds is not None else search(scenario, piece.bounds)
        if found.breach is None:
            return Result(piece, found, None)
        breach = shrink(scenario, found.breach, jumps=found.jumps)
    example = CounterExample(
        scenario=piece.scenario,
        mutant=piece.mutant,
        jumps=found.jumps,
        choices=list(breach.choices),
        property=breach.which,
        detail=breach.detail,
        trace="",
        seed=found.seed,
        version=__version__,
    )
    seen = replay(example, keep=False)
    return Result(piece, found, msgspec.structs.replace(example, trace=seen.trace.digest()))


class Campaign:
    """A scenario or all of them, with a mutant or none, searched, or run for each of some seeds.

    Args:
        what: the name of a scenario, or `ALL`.
        seeds: None: search within `bounds`. Else one run for each; of all scenarios each in turn gets one, so that
            together they take as many.

    Attributes:
        pieces: what it is made of, in the order in which they count.

    Raises:
        UsageError: a name that is none.
    """

    def __init__(
        self, what: str, *, mutant: str | None = None, bounds: Bounds | None = None, seeds: range | None = None
    ) -> None:
        names = list(scenarios()) if what == ALL else [named(what).name]
        if mutant is not None:
            mutant = mutant_named(mutant).name
        within = bounds or Bounds()
        if seeds is None:
            self.pieces = [Piece(name, mutant, within) for name in names]
            return
        shares = [(name, range(seeds[at], seeds.stop, len(names))) for at, name in enumerate(names[: len(seeds)])]
        self.pieces = [
            Piece(name, mutant, within, part)
            for at in range(0, len(shares[0][1]), SEEDS_A_PIECE)
            for name, share in shares
            if (part := share[at : at + SEEDS_A_PIECE])
        ]

    def run(self, sweep: Sweep) -> list[Result]:
        """Do piece after piece, up to the first in which something breaks."""
        results: list[Result] = []
        for result in sweep.each(do, self.pieces):
            results.append(result)
            if result.example is not None:
                break
        return results


@dataclass(frozen=True, slots=True)
class Caught:
    """What became of one mutant.

    Attributes:
        n_schedules: taken until it was seen.
        example: how; None if it was not.
    """

    mutant: str
    rule: str
    n_schedules: int
    example: CounterExample | None


def hunt(mutant: str) -> Caught:
    """Search the scenarios that must see a mutant, until one does."""
    known = mutant_named(mutant)
    n_schedules = 0
    for name in known.scenarios:
        result = do(Piece(name, mutant, Bounds(n_faults=known.n_faults)))
        n_schedules += result.found.n_schedules
        if result.example is not None:
            return Caught(mutant, known.rule, n_schedules, result.example)
    return Caught(mutant, known.rule, n_schedules, None)


def hunt_all(sweep: Sweep) -> list[Caught]:
    """Return what becomes of each mutant, in order."""
    return sweep.map(hunt, mutants())
