"""``nopin validate``: published experiments on the modelled machine, each prediction beside the published value."""

from __future__ import annotations

from pathlib import Path

import click

from nopin.cli.options import examples, json_option
from nopin.cli.output import put, put_json, say
from nopin.cli.sweeping import assignments, jobs_option, showing
from nopin.errors import UsageError
from nopin.lab.sweep import Sweep
from nopin.lab.validate.experiment import Row
from nopin.lab.validate.page import page_of
from nopin.lab.validate.registry import MODULES, Report, experiment_named, run_experiment
from nopin.model.costs import parse_value

RULE = "-" * 110
COLUMNS = f" {'':<58} {'predicted':>11} {'published':>11} {'error':>8} {'within':>7}  of"


@click.command(epilog=examples("nopin validate", "nopin validate V1 V3 -v", "nopin validate V1 --set V1.N_SAMPLES=500"))
@click.argument("names", nargs=-1, metavar="[V1 ...]")
@click.option("--set", "given", multiple=True, metavar="V7.NAME=VALUE", help="Change a parameter of an experiment.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
@click.option("--page", "page_path", type=click.Path(dir_okay=False, path_type=Path), help="Write it all as Markdown.")
@click.option("-v", "--verbose", is_flag=True, help="Print the parameters and what the models leave out.")
@json_option
@jobs_option
def command(
    names: tuple[str, ...],
    given: tuple[str, ...],
    seed: int,
    page_path: Path | None,
    verbose: bool,
    as_json: bool,
    jobs: int,
) -> int:
    """Run published experiments on the modelled machine.

    Without names all of them. The exit code is 1 if a prediction misses a published value that is known here by more
    than is allowed. Values marked held out are known elsewhere only: the prediction was made without them.
    """
    experiments = [experiment_named(name) for name in names or sorted(MODULES)]
    changes = _changes(given, [each.name for each in experiments])
    reports = []
    if not as_json:
        put(f"seed {seed}")
    with Sweep(jobs) as sweep:
        for experiment in experiments:
            with showing(sweep, experiment.name):
                mine = changes.get(experiment.name)
                report = run_experiment(experiment, changes=mine, seed=seed, map_points=sweep.map)
            reports.append(report)
            if not as_json:
                for line in lines_of(report, verbose=verbose):
                    put(line)
    if page_path is not None:
        page_path.write_text(page_of(reports))
        say(f"written: {page_path}")
    if as_json:
        put_json({"seed": seed, "experiments": [report.as_json() for report in reports]})
    return 0 if all(report.passed for report in reports) else 1


def _changes(given: tuple[str, ...], known: list[str]) -> dict[str, dict[str, float]]:
    changes: dict[str, dict[str, float]] = {}
    for name, value in assignments(given).items():
        experiment, dot, parameter = name.partition(".")
        if not dot or experiment.upper() not in known:
            raise UsageError(f"--set {name}={value}: say of which experiment, as in {known[0]}.{parameter or name}")
        changes.setdefault(experiment.upper(), {})[parameter] = _number(parameter, value)
    return changes


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return parse_value(name, text)


def lines_of(report: Report, *, verbose: bool = False) -> list[str]:
    """Return the table of one experiment."""
    experiment = report.experiment
    lines = [
        RULE,
        f"{experiment.name}  {experiment.title}  [machine {experiment.machine}; {experiment.source}]",
        COLUMNS,
    ]
    lines += [_line(row) for row in report.rows]
    if verbose:
        lines += [f"   {line}" for line in parameter_lines(report)]
        if experiment.missing:
            lines.append(f"   missing: {experiment.missing}")
    return lines


def parameter_lines(report: Report) -> list[str]:
    """Return a line for each parameter it ran with."""
    return [
        f"{name} = {each.value:g} {(each.unit + ' ') if each.unit else ''}[{each.tag}] {each.source}"
        for name, each in report.parameters.items()
    ]


def _line(row: Row) -> str:
    published = "held out" if row.published is None else f"{row.published:.4g}"
    error = "" if row.error is None else f"{row.error:+.1%}"
    within = "" if row.tolerance is None else f"{row.tolerance:.0%}"
    verdict = {None: "", True: "", False: "  MISSED"}[row.passed]
    note = "  calibrated on it" if row.calibrated else ""
    label = f"{row.label} [{row.unit}]" if row.unit else row.label
    figures = f"{row.predicted:>11.4g} {published:>11} {error:>8} {within:>7}"
    return f" {label:<58} {figures}  {row.tag}{verdict}{note}".rstrip()
