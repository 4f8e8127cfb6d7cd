"""Plots of sweeps, for reports. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nopin.errors import HostLacks
from nopin.lab.scenarios.scenario import Result, Scenario


def plot(scenario: Scenario, results: Sequence[Result], path: Path) -> None:
    """Draw the scenario's measure along its axis, a line for each discipline; the suffix says in which format.

    Raises:
        HostLacks: matplotlib is not installed.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise HostLacks("plots", "matplotlib is not installed", "run: pip install 'nopin[report]'") from None
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    for discipline in dict.fromkeys(result.point.discipline for result in results):
        mine = [result for result in results if result.point.discipline == discipline]
        along = [result.point[scenario.axis] for result in mine]
        axes.plot(along, [result.measures[scenario.plotted] for result in mine], marker="o", label=discipline)
    values = [result.measures[scenario.plotted] for result in results]
    if min(values) >= 0 and max(values) > 30 * max(min(values), 1):
        axes.set_yscale("symlog")
    along = [result.point[scenario.axis] for result in results]
    if min(along) > 0 and max(along) > 30 * min(along):
        axes.set_xscale("log", base=2)
    axes.set_xlabel(scenario.axis)
    axes.set_ylabel(scenario.plotted)
    axes.set_title(scenario.question, fontsize="medium")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
