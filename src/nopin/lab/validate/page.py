"""The page of predictions, `docs/validation.md`, written by `nopin validate --page`: no figure in it is typed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nopin.lab.validate.experiment import Row
from nopin.lab.validate.registry import Report

INTRO = """# Published experiments on the modelled machine

`nopin validate` runs published measurements of real machines on the modelled one. This page is its output, written by
`nopin validate --page docs/validation.md`; a test compares parts of it with a new run.

How to read it:

- A *published* value was known when the model was written, and the prediction must be within the tolerance.
- Where it says *held out* the published value was not looked up. The prediction stands as it is, with the parameters
  that gave it, for somebody else to compare.
- *calibrated* marks a value that a parameter was set from. That it agrees shows nothing.
- Costs of machines are those of `model/presets.py`; what an experiment needs beside them is listed with it. The letter
  is the kind of evidence: P primary paper, A abstract, S second-hand, C source code or data file, L measured on a small
  virtual machine, D arithmetic on those, X an assumption. Predictions are as good as their X.
"""


def page_of(reports: Sequence[Report]) -> str:
    """Return the page."""
    return "\n".join([INTRO, *(section_of(report) for report in reports)])


def section_of(report: Report) -> str:
    """Return the part of one experiment."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    experiment = report.experiment
    yield f"## {experiment.name}: {experiment.title}"
    yield ""
    yield f"Machine `{experiment.machine}`. Source: {experiment.source}."
    if experiment.missing:
        yield f"Left out: {experiment.missing.rstrip('.')}."
    yield ""
    yield "| parameter | value | | |"
    yield "|---|---|---|---|"
    for name, each in report.parameters.items():
        yield f"| `{name}` | {each.value:,.10g} {each.unit} | {each.tag} | {each.source} |".replace("  |", " |")
    yield ""
    yield "| | predicted | published | error |"
    yield "|---|---|---|---|"
    for row in report.rows:
        if not row.here:
            yield _row(row)


def _row(row: Row) -> str:
    published, error = "held out", ""
    if row.published is not None and row.error is not None:
        published = f"{row.published:,.4g}" + (", calibrated" if row.calibrated else "")
        error = f"{row.error:+.1%}" + ("" if row.tolerance is None else f" of ±{row.tolerance:.0%}")
    label = f"{row.label} [{row.unit}]" if row.unit else row.label
    return f"| {label} | {row.predicted:,.4g} | {published} | {error} |"
