"""What an experiment is: a published measurement, the parameters of its model, and rows of predictions.

**Three kinds of row.** A *visible* row has a published value that was known when the model was written; it passes or it
fails. A *held-out* row has none here: the published value was not looked up, so the row is a prediction that somebody
else compares. A *calibrated* row is one that a parameter was set from; that it agrees proves nothing, and it says so.

**Parameters.** What a model needs beyond `model/costs.py` is declared by name, with a value, the kind of its evidence
and a source. There is no number in a model without one of the two. `nopin validate -v` prints them, and any can be
changed: ``--set V3.backup_ring_entries=64``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nopin.errors import UsageError
from nopin.model.costs import Costs

Point = TypeVar("Point")
Result = TypeVar("Result")

CALIBRATED = "calibrated"
"""The source of a parameter that was set so that a published value comes out."""


@dataclass(frozen=True)
class Parameter:
    """A number of a model that is no cost of a machine.

    Attributes:
        tag: kind of evidence, see `model.costs`.
        source: where it comes from; begins with the word calibrated if from the published result itself.
    """

    value: float
    unit: str
    tag: str
    source: str


@dataclass(frozen=True)
class Row:
    """A prediction.

    Attributes:
        published: the measured value; None where it is held out.
        tolerance: the relative error that passes; None: for the reader to judge.
        tag: kind of evidence of the published value.
        calibrated: a parameter was set from this very value.
        here: measured on this host's own clock, beside the prediction; another host has another value.
    """

    label: str
    unit: str
    predicted: float
    published: float | None = None
    tolerance: float | None = None
    tag: str = ""
    calibrated: bool = False
    here: bool = False

    @property
    def held_out(self) -> bool:
        """No published value is known here."""
        return self.published is None

    @property
    def error(self) -> float | None:
        """Relative error; None where there is nothing to compare with."""
        return None if self.published is None else self.predicted / self.published - 1

    @property
    def passed(self) -> bool | None:
        """Whether it is within its tolerance; None where it has none."""
        if self.error is None or self.tolerance is None:
            return None
        return abs(self.error) <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Return all of it under its names."""
        return {
            "label": self.label,
            "unit": self.unit,
            "predicted": self.predicted,
            "published": "held out" if self.held_out else self.published,
            "error": self.error,
            "tolerance": self.tolerance,
            "tag": self.tag,
            "calibrated": self.calibrated,
            "here": self.here,
            "passed": self.passed,
        }


def in_turn(function: Callable[[Any], Any], points: Iterable[Any]) -> list[Any]:
    """Call with each point, one after the other."""
    return [function(point) for point in points]


@dataclass(frozen=True)
class Settings:
    """What a run of an experiment is given.

    Attributes:
        costs: of its machine.
        values: its parameters, by name.
        seed: of everything drawn.
        map: calls a function of a module with each of several points, in several processes perhaps; results come in
            the order of the points.
    """

    costs: Costs
    values: Mapping[str, float]
    seed: int = 0
    map: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]] = in_turn

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def integer(self, name: str) -> int:
        """Return a parameter that counts something, or is in nanoseconds."""
        return round(self.values[name])


@dataclass(frozen=True)
class Experiment:
    """A published experiment.

    Attributes:
        name: V1 to V8.
        machine: name of its preset.
        source: where it was published.
        run: makes the rows. parameters: what it needs beside the costs.
        missing: what the model leaves out, known to matter or not.
    """

    name: str
    title: str
    machine: str
    source: str
    run: Callable[[Settings], list[Row]]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    missing: str = ""

    def values(self, changes: Mapping[str, float]) -> dict[str, float]:
        """Return its parameters, some changed.

        Raises:
            UsageError: a change names none of them.
        """
        for name in changes:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise UsageError(f"{self.name} has no parameter {name!r}; it has: {known}")
        return {name: parameter.value for name, parameter in self.parameters.items()} | dict(changes)
