"""``nopin explore``: every order of events of a scenario, or many drawn ones, on the modelled machine."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.table import Table

from nopin.cli.exits import COUNTER_EXAMPLE
from nopin.cli.options import examples, json_option
from nopin.cli.output import put, put_json, say, show
from nopin.cli.sweeping import jobs_option, sweeping
from nopin.errors import UsageError
from nopin.lab.explore import ALL, Campaign, Caught, Result, hunt_all
from nopin.model.explore.mutants import mutants
from nopin.model.explore.record import CounterExample, save
from nopin.model.explore.scenario import scenarios
from nopin.model.explore.search import DEPTH, MAX_SCHEDULES, MAX_SCHEDULES_OF_ALL, Bounds

CEX = Path("cex.json")


@click.command(
    epilog=examples(
        "nopin explore fault_vs_munmap",
        "nopin explore fault_vs_munmap --faults 1 --depth 12",
        "nopin explore all --runs 10000 --seed 7",
        "nopin explore all --mutant drop_retry",
        "nopin explore my_driver.py:driver_vs_munmap",
    )
)
@click.argument("scenario", required=False)
@click.option("--depth", type=click.IntRange(0), default=DEPTH, help="Choice points searched; default: all.")
@click.option("--faults", type=click.IntRange(0), default=0, help="Times trouble may happen in one searched run.")
@click.option("--max-schedules", type=click.IntRange(1), help="Runs per searched scenario: 200000; of all, 1000 each.")
@click.option("--runs", type=click.IntRange(1), help="Draw so many schedules with trouble, of all scenarios together.")
@click.option("--seed", type=click.IntRange(0), help="Of the first drawn run; implies --runs 1000.")
@click.option("--mutant", help="Break a rule first: the name of a mutant, or all.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=CEX, help=f"Counter-example file; {CEX}.")
@click.option("--list", "listed", is_flag=True, help="List scenarios and mutants.")
@json_option
@jobs_option
def command(
    scenario: str | None,
    depth: int,
    faults: int,
    max_schedules: int | None,
    runs: int | None,
    seed: int | None,
    mutant: str | None,
    output: Path,
    listed: bool,
    as_json: bool,
    jobs: int,
) -> int:
    """Look at every order of events of SCENARIO, or of all of them.

    Ends when a property breaks, with exit code 4 and a file for `nopin replay`. The number of processes changes nothing
    but the time.
    """
    if listed:
        return _list(as_json=as_json)
    if scenario is None:
        raise UsageError("say which scenario, or 'all'; --list shows them")
    if mutant == ALL:
        if scenario != ALL:
            raise UsageError("all mutants are hunted in their own scenarios: nopin explore all --mutant all")
        return _hunt(jobs, as_json=as_json)
    seeds = None
    if runs is not None or seed is not None:
        seeds = range(seed or 0, (seed or 0) + (runs or 1000))
        say(f"{len(seeds)} drawn schedules, seeds {seeds.start} to {seeds.stop - 1}")
    if max_schedules is None:
        max_schedules = MAX_SCHEDULES_OF_ALL if scenario == ALL else MAX_SCHEDULES
    bounds = Bounds(depth=depth, n_faults=faults, max_schedules=max_schedules)
    campaign = Campaign(scenario, mutant=mutant, bounds=bounds, seeds=seeds)
    began = time.monotonic()
    with sweeping(jobs, "explores") as sweep:
        results = campaign.run(sweep)
    return _report(results, time.monotonic() - began, output, as_json=as_json)


def _report(results: list[Result], elapsed_s: float, output: Path, *, as_json: bool) -> int:
    example = next((result.example for result in results if result.example is not None), None)
    if example is not None:
        save(example, output)
    n_schedules = sum(result.found.n_schedules for result in results)
    if as_json:
        figures = {
            "scenarios": [_figures(result) for result in results],
            "schedules": n_schedules,
            "elapsed_s": round(elapsed_s, 3),
            "schedules_per_s": round(n_schedules / elapsed_s, 1),
            "counter_example": example,
        }
        put_json(figures)
    else:
        show(_table(results))
        put(f"{n_schedules} schedules in {elapsed_s:.1f} s: {n_schedules / elapsed_s:.0f} a second")
    if example is None:
        return 0
    for line in _sentences(example, output):
        say(line)
    return COUNTER_EXAMPLE


def _sentences(example: CounterExample, output: Path) -> list[str]:
    n = sum(choice != 0 for choice in example.choices)
    return [
        f"{example.property} in {example.scenario}: {example.detail}",
        f"{len(example.choices)} choices, {n} of them out of the ordinary: nopin replay {output}",
    ]


def _figures(result: Result) -> dict[str, object]:
    found = result.found
    return {
        "scenario": result.piece.scenario,
        "mutant": result.piece.mutant,
        "seed": None if result.piece.seeds is None else result.piece.seeds.start,
        "schedules": found.n_schedules,
        "states": found.n_states,
        "deepest": found.deepest,
        "finished": found.finished,
        "trouble": found.fired,
        "broken": None if result.example is None else result.example.property,
    }


def _table(results: list[Result]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("scenario")
    for title in ("schedules", "states", "choices"):
        table.add_column(title, justify="right")
    table.add_column("result")
    for name in dict.fromkeys(result.piece.scenario for result in results):
        own = [result for result in results if result.piece.scenario == name]
        found = [result.found for result in own]
        table.add_row(
            name,
            str(sum(each.n_schedules for each in found)),
            str(max(each.n_states for each in found)),
            str(max(each.deepest for each in found)),
            _outcome(own),
        )
    return table


def _outcome(results: list[Result]) -> str:
    broken = [result.example.property for result in results if result.example is not None]
    if broken:
        return f"[red]{broken[0]}[/]"
    if results[0].piece.seeds is not None:
        return "holds in these"
    return "[green]holds in all[/]" if all(result.found.finished for result in results) else "holds so far"


def _hunt(jobs: int, *, as_json: bool) -> int:
    """Hunt all mutants; exit code 1 if one gets away."""
    began = time.monotonic()
    with sweeping(jobs, "hunts") as sweep:
        all_caught = hunt_all(sweep)
    n_caught = sum(each.example is not None for each in all_caught)
    if as_json:
        figures = {each.mutant: _mutant_figures(each) for each in all_caught}
        put_json({"mutants": figures, "caught": n_caught, "elapsed_s": round(time.monotonic() - began, 3)})
    else:
        show(_mutant_table(all_caught))
        put(f"{n_caught} of {len(all_caught)} mutants caught in {time.monotonic() - began:.1f} s")
    return 0 if n_caught == len(all_caught) else 1


def _mutant_figures(caught: Caught) -> dict[str, object]:
    example = caught.example
    return {
        "caught": example is not None,
        "rule": caught.rule,
        "property": None if example is None else example.property,
        "scenario": None if example is None else example.scenario,
        "schedule": None if example is None else example.choices,
        "detail": None if example is None else example.detail,
        "schedules": caught.n_schedules,
    }


def _mutant_table(all_caught: list[Caught]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("mutant", "broken", "scenario", "schedule"):
        table.add_column(title)
    table.add_column("schedules", justify="right")
    for each in all_caught:
        if each.example is None:
            table.add_row(each.mutant, "[red]nothing[/]", "", "", str(each.n_schedules))
            continue
        example = each.example
        schedule = " ".join(map(str, example.choices)) or "any"
        table.add_row(each.mutant, example.property, example.scenario, schedule, str(each.n_schedules))
    return table


def _list(*, as_json: bool) -> int:
    if as_json:
        put_json(
            {
                "scenarios": {each.name: each.about for each in scenarios().values()},
                "mutants": {each.name: each.rule for each in mutants().values()},
            }
        )
        return 0
    for title, named in (
        ("scenario", {each.name: each.about for each in scenarios().values()}),
        ("mutant: the rule it breaks", {each.name: each.rule for each in mutants().values()}),
    ):
        table = Table(title, "", box=None, header_style="bold", pad_edge=False)
        for name, about in named.items():
            table.add_row(name, about)
        show(table)
    return 0
