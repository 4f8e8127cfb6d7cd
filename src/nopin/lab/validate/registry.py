"""Which experiments there are, and how they are run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nopin.errors import UsageError
from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings, in_turn
from nopin.model.costs import NAMES, override
from nopin.model.presets import preset_named

MODULES = {
    "V1": "v1_fault",
    "V2": "v2_stream",
    "V3": "v3_ethernet",
    "V4": "v4_overcommit",
    "V5": "v5_timers",
    "V6": "v6_part",
    "V7": "v7_uffd",
    "V8": "v8_prefetch",
}
"""The module of each experiment, which has it as `EXPERIMENT`."""


@dataclass(frozen=True)
class Report:
    """What came of an experiment.

    Attributes:
        parameters: what it ran with: its own, and costs of its machine that were changed.
        passed: no row with a published value is out of tolerance.
    """

    experiment: Experiment
    parameters: Mapping[str, Parameter]
    rows: Sequence[Row]

    @property
    def passed(self) -> bool:
        """Whether every visible target was met."""
        return all(row.passed is not False for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return all of it under its names."""
        return {
            "name": self.experiment.name,
            "title": self.experiment.title,
            "machine": self.experiment.machine,
            "source": self.experiment.source,
            "missing": self.experiment.missing,
            "passed": self.passed,
            "parameters": {
                name: {"value": each.value, "unit": each.unit, "tag": each.tag, "source": each.source}
                for name, each in self.parameters.items()
            },
            "rows": [row.as_json() for row in self.rows],
        }


def experiment_named(name: str) -> Experiment:
    """Return an experiment.

    Raises:
        UsageError: there is none of that name.
    """
    module = MODULES.get(name.upper())
    if module is None:
        raise UsageError(f"no experiment {name!r}; there are: {', '.join(MODULES)}")
    found = importlib.import_module(f"nopin.lab.validate.{module}").EXPERIMENT
    assert isinstance(found, Experiment)
    return found


def run_experiment(
    experiment: Experiment,
    *,
    changes: Mapping[str, float] | None = None,
    seed: int = 0,
    map_points: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]] = in_turn,
) -> Report:
    """Run an experiment on its machine.

    Args:
        changes: parameters of the experiment or of its machine, by name.

    Raises:
        UsageError: a change names neither.
    """
    changes = changes or {}
    of_machine = {name: round(value) for name, value in changes.items() if name in NAMES}
    values = experiment.values({name: value for name, value in changes.items() if name not in NAMES})
    costs = override(preset_named(experiment.machine).costs(), of_machine)
    rows = experiment.run(Settings(costs, values, seed, map_points))
    assert rows, f"{experiment.name} predicts nothing"
    changed = {name: Parameter(value, "", "X", "set for this run") for name, value in changes.items()}
    return Report(experiment, {**experiment.parameters, **changed}, rows)
