"""``nopin bench model``: how fast the modelled machine runs."""

from __future__ import annotations

from nopin.cli.output import put, put_json
from nopin.lab.bench_model import ModelFigure, measure_model

TEST = "model"


def run(*, as_json: bool) -> int:
    """Measure and print; returns the exit code."""
    figures = measure_model()
    if as_json:
        put_json({"figures": figures})
        return 0
    put(f" {'modelled machine, one core':<34} {'measured':>12} {'asked':>12}")
    for figure in figures:
        put(line(figure))
    return 0


def line(figure: ModelFigure) -> str:
    """Return the line of one figure."""
    asked = "" if figure.asked is None else f">= {figure.asked:,.0f}"
    missed = "  no" if figure.reached is False else ""
    return f" {figure.name:<34} {figure.value:>12,.4g} {asked:>12}  {figure.unit}{missed}"
