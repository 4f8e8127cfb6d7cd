"""The speed of the model, measured on a little."""

from __future__ import annotations

from nopin.cli.bench_model import line
from nopin.lab.bench_model import ModelFigure, measure_model


def test_all_figures_are_measured_and_a_terabyte_costs_what_is_touched() -> None:
    figures = {figure.name: figure for figure in measure_model(n_steps=2_000, n_schedules=5, n_pages=200)}
    assert all(figure.value > 0 for figure in figures.values() if figure.unit != "ms")
    assert figures["memory of each touched page"].value < 5_000, "mostly a chunk of the mirror"


def test_a_figure_that_is_not_reached_says_so() -> None:
    assert line(ModelFigure(name="steps", value=10, unit="steps/s", asked=20)).endswith(">= 20  steps/s  no")
    assert line(ModelFigure(name="steps", value=30, unit="steps/s", asked=20)).endswith(">= 20  steps/s")
