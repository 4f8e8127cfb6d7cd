"""What a scenario is: one measurement of a modelled machine, swept over a setting, for each of several disciplines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nopin.errors import UsageError
from nopin.lab.validate.experiment import in_turn
from nopin.model.costs import NAMES, Costs, override, parse_value
from nopin.model.presets import Preset

Measures = dict[str, float]
"""What a point measured, by name; units last."""


@dataclass(frozen=True)
class Setting:
    """Something a user can set.

    Attributes:
        values: what it is swept over; one value where it is not.
        least: below it there is nothing to measure. Shares (``_permille``) are at most 1000.
    """

    values: Sequence[int]
    meaning: str
    least: int = 1


@dataclass(frozen=True)
class Point:
    """One measurement to be made; can be sent to another process."""

    costs: Costs
    discipline: str
    settings: Mapping[str, int]
    seed: int

    def __getitem__(self, name: str) -> int:
        return self.settings[name]


@dataclass(frozen=True)
class Scenario:
    """A comparison.

    Attributes:
        question: what it answers.
        measure: a function of a module: measures one point.
        settings: the first one is the horizontal axis of plots. plotted: the measure on the vertical one.
    """

    name: str
    question: str
    machine: str
    disciplines: Sequence[str]
    settings: Mapping[str, Setting]
    plotted: str
    measure: Callable[[Point], Measures]

    @property
    def axis(self) -> str:
        """The setting that plots and tables go along."""
        return next(iter(self.settings))

    def points(self, preset: Preset, disciplines: Sequence[str], given: Mapping[str, str], seed: int) -> list[Point]:
        """Return the points of a sweep.

        Args:
            given: settings and cost parameters as text; a setting may have several values, joined by commas.

        Raises:
            UsageError: a discipline or name that is not known here, or a value that is none.
        """
        for name in disciplines:
            if name not in self.disciplines:
                raise UsageError(f"{self.name} has no discipline {name!r}; it has: {', '.join(self.disciplines)}")
        swept = {name: list(setting.values) for name, setting in self.settings.items()}
        changes: dict[str, int] = {}
        for name, text in given.items():
            if name in swept:
                swept[name] = [self._checked(name, parse_value(name, each)) for each in text.split(",")]
            elif name in NAMES:
                changes[name] = parse_value(name, text)
            else:
                raise UsageError(f"{self.name} has no setting {name!r}; it has: {', '.join(swept)}, and all costs")
        costs = override(preset.costs(), changes)
        combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
        return [
            Point(costs, discipline, settings, seed)
            for settings in combinations
            for discipline in disciplines or self.disciplines
        ]

    def _checked(self, name: str, value: int) -> int:
        least = self.settings[name].least
        if value < least:
            raise UsageError(f"{name}={value} leaves nothing to measure; it is at least {least}")
        if name.endswith("_permille") and value > 1000:
            raise UsageError(f"{name}={value} is more than all; it is at most 1000")
        return value


@dataclass(frozen=True)
class Result:
    """A point and what it measured."""

    point: Point
    measures: Measures

    def as_json(self) -> dict[str, Any]:
        """Return discipline, settings and measures, flat."""
        return {"discipline": self.point.discipline, **self.point.settings, **self.measures}


def run_points(
    scenario: Scenario,
    points: Sequence[Point],
    map_points: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]] = in_turn,
) -> list[Result]:
    """Measure points; the results, in their order."""
    return [Result(*pair) for pair in zip(points, map_points(scenario.measure, points), strict=True)]
