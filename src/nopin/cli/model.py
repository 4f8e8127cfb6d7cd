"""``nopin model``: comparisons of disciplines on machines that nobody here has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nopin.cli.options import examples, json_option
from nopin.cli.output import put, put_json, say
from nopin.cli.sweeping import assignments, jobs_option, sweeping
from nopin.lab.calibration import calibrate, measured_presets, store
from nopin.lab.plot import plot
from nopin.lab.scenarios.registry import SCENARIOS, scenario_named
from nopin.lab.scenarios.scenario import Result, Scenario, run_points
from nopin.model.presets import OVERLAYS, PRESETS, Preset, preset_named


@click.group(
    epilog=examples(
        "nopin model list",
        "nopin model list --machine connectx6",
        "nopin model run overcommit --set vms=2,4 --discipline pinned,on_demand",
        "nopin model calibrate",
    )
)
def command() -> None:
    """Compare disciplines on modelled machines."""


@command.command("list")
@click.option("--machine", help="Print every parameter of this machine.")
@json_option
def list_(machine: str | None, as_json: bool) -> None:
    """List scenarios and machines, or what one machine costs."""
    if machine is not None:
        _list_parameters(preset_named(machine, measured_presets()), as_json=as_json)
        return
    scenarios = [scenario_named(name) for name in SCENARIOS]
    presets = [*PRESETS.values(), *measured_presets().values()]
    if as_json:
        put_json({"scenarios": [_described(each) for each in scenarios], "machines": [_machine(p) for p in presets]})
        return
    for scenario in scenarios:
        put(f"{scenario.name:<20} {scenario.question}")
        put(f"{'':<20} disciplines {', '.join(scenario.disciplines)}; on {scenario.machine}")
        for name, setting in scenario.settings.items():
            values = ",".join(_word(name, value) for value in setting.values)
            put(f"{'':<20} {name}={values}  {setting.meaning}")
    put("")
    for preset in presets:
        put(f"{preset.name:<20} {preset.title}")
    for overlay in OVERLAYS.values():
        put(f"{'+' + overlay.name:<20} {overlay.title}")


def _word(name: str, value: int) -> str:
    """Write a value as one may say it on the command line."""
    for suffix, shift in (("t", 40), ("g", 30), ("m", 20), ("k", 10)):
        if name.endswith("_bytes") and value and not value % (1 << shift):
            return f"{value >> shift}{suffix}"
    return str(value)


def _described(scenario: Scenario) -> dict[str, Any]:
    settings = {
        name: {"values": list(setting.values), "meaning": setting.meaning}
        for name, setting in scenario.settings.items()
    }
    return {
        "name": scenario.name,
        "question": scenario.question,
        "machine": scenario.machine,
        "disciplines": list(scenario.disciplines),
        "settings": settings,
    }


def _machine(preset: Preset) -> dict[str, str]:
    return {"name": preset.name, "title": preset.title, "notes": preset.notes}


def _list_parameters(preset: Preset, *, as_json: bool) -> None:
    rows = list(preset.rows())
    if as_json:
        put_json({**_machine(preset), "parameters": [row._asdict() for row in rows]})
        return
    put(f"{preset.name}: {preset.title}")
    if preset.notes:
        put(preset.notes)
    for row in rows:
        origin = "inherited " if row.inherited else ""
        meaning = f"; {row.meaning}" if row.meaning else ""
        put(f" {row.name:<34} {row.value:>15,} [{row.tag}] {origin}{row.source}{meaning}")


@command.command(epilog=examples("nopin model run registration --machine connectib56 --set size_bytes=1g,1t"))
@click.argument("name")
@click.option("--machine", help="Preset, with overlays: connectib56+slow_quiesce. See nopin model list.")
@click.option("--discipline", "disciplines", default="", help="Some of the scenario's, joined by commas; default all.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE[,VALUE]", help="A setting, or any cost parameter.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw it (extra report).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
@json_option
@jobs_option
def run(
    name: str,
    machine: str | None,
    disciplines: str,
    given: tuple[str, ...],
    plot_path: Path | None,
    seed: int,
    as_json: bool,
    jobs: int,
) -> None:
    """Run a scenario: each discipline at each value of its settings."""
    scenario = scenario_named(name)
    preset = preset_named(machine or scenario.machine, measured_presets())
    chosen = [each.strip() for each in disciplines.split(",") if each.strip()]
    points = scenario.points(preset, chosen, assignments(given), seed)
    with sweeping(min(jobs, len(points)), scenario.name) as sweep:
        results = run_points(scenario, points, sweep.map)
    if as_json:
        rows = [result.as_json() for result in results]
        put_json({"scenario": name, "machine": preset.name, "seed": seed, "results": rows})
    else:
        put(f"{scenario.question}  [machine {preset.name}; seed {seed}]")
        for line in table(scenario, results):
            put(line)
    if plot_path is not None:
        plot(scenario, results, plot_path)
        say(f"drawn: {plot_path}")


def table(scenario: Scenario, results: Sequence[Result]) -> list[str]:
    """Return results as lines: settings that were swept, discipline, measures."""
    swept = [
        name for name in scenario.settings if name == scenario.axis or len({each.point[name] for each in results}) > 1
    ]
    heads = [*swept, "discipline", *results[0].measures]
    rows = [
        [f"{result.point[name]:,}" for name in swept]
        + [result.point.discipline]
        + [f"{value:,.6g}" for value in result.measures.values()]
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]


@command.command("calibrate")
@json_option
def calibrate_(as_json: bool) -> None:
    """Measure this host for machine this_host: some seconds."""
    calibration = calibrate()
    path = store(calibration)
    if as_json:
        put_json(calibration)
    else:
        for name, value in calibration.figures.items():
            put(f"{name:<30} {value:>18,}")
    say(f"kept in {path}; use it with: nopin model run NAME --machine this_host")
