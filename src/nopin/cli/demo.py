"""``nopin demo``: the same work pinned and on demand, side by side."""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from nopin.cli.options import examples, json_option
from nopin.cli.output import data, put, put_json, say, talk
from nopin.lab.demo import COHERENT, DISCIPLINES, WORK_BYTES, DemoFigures, DisciplineFigures, run_demo
from nopin.lab.demo_managed import ManagedFigures
from nopin.lab.demo_owner import HAZARDS
from nopin.units import format_bytes

TITLES = {"pinned": "pinned", "on_demand": "on demand"}
HAZARD_TITLES = {
    "madvise_dontneed": "after MADV_DONTNEED and a store",
    "remap": "after munmap, mmap there and a store",
    "mremap_away_and_back": "after mremap away, back and a store",
    "fork_write": "after fork and a store",
}
NEXT = "Next: nopin share FILE.npy, then with the URL it prints: nopin get URL 0:10"


@click.command(epilog=examples("nopin demo", "nopin demo --seed 7 -j"))
@click.option("--seed", type=int, help="Seed of the bytes; default random, printed.")
@json_option
def command(seed: int | None, as_json: bool) -> int:
    """Move 512 MiB over RoCEv2, pinned and on demand, and compare.

    Takes under a minute on two cores, needs no privilege and leaves nothing behind.
    """
    figures = _run(seed)
    for name, reason in figures.left_out.items():
        say(f"{TITLES[name]} is left out, this host forbids it: {reason}")
    if as_json:
        put_json(figures)
    else:
        data().print(table_of(figures))
        for sentence in sentences(figures):
            put(sentence)
        put(NEXT)
    return 0 if figures.as_promised else 1


def _run(seed: int | None) -> DemoFigures:
    columns = TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(*columns, TransferSpeedColumn(), console=talk(), disable=not talk().is_terminal) as bars:
        tasks: dict[str, TaskID] = {
            name: bars.add_task(TITLES[name], total=WORK_BYTES, start=False) for name in DISCIPLINES
        }

        def advance(name: str, n_bytes: int) -> None:
            bars.start_task(tasks[name])
            bars.advance(tasks[name], n_bytes)

        figures = run_demo(advance, seed=seed)
        for name in figures.left_out:
            if name in tasks:
                bars.remove_task(tasks[name])
    return figures


def table_of(figures: DemoFigures) -> Table:
    """Return the disciplines side by side."""
    columns = figures.disciplines
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{format_bytes(figures.work_bytes)} over RoCEv2, seed {figures.seed}")
    for name in columns:
        table.add_column(TITLES[name], justify="right")
    rows = {title: [text(column) for column in columns.values()] for title, text in _ROWS.items()}
    for title, cells in rows.items():
        table.add_row(title, *cells)
    table.add_section()
    for hazard in HAZARDS:
        table.add_row(HAZARD_TITLES[hazard], *(_marked(column.hazards[hazard]) for column in columns.values()))
    return table


_ROWS: dict[str, Callable[[DisciplineFigures], str]] = {
    "registration": lambda c: _duration(c.register_s),
    "memory pinned (VmPin)": lambda c: format_bytes(c.vm_pin_bytes),
    "fork of the owner": lambda c: _duration(c.fork_s),
    "moved": lambda c: format_bytes(c.bytes_moved),
    "throughput": lambda c: f"{c.throughput_bytes_per_s / 1e9:.2f} GB/s",
    "page faults of the device": lambda c: str(c.page_faults),
    "bytes verified": lambda c: str(c.bytes_verified),
    "bytes wrong": lambda c: str(c.bytes_wrong),
}


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _marked(outcome: str) -> str:
    return f"[green]{outcome}[/]" if outcome == COHERENT else f"[red]{outcome}[/]"


def sentences(figures: DemoFigures) -> list[str]:
    """Say in a sentence each what was shown; they follow from the figures."""
    on_demand = figures.disciplines["on_demand"]
    said = [_work_sentence(on_demand, figures.disciplines.get("pinned")), _hazard_sentence(figures)]
    return said if figures.managed is None else [*said, _managed_sentence(figures.managed)]


def _managed_sentence(managed: ManagedFigures) -> str:
    return (
        f"Managed, an array of {format_bytes(managed.array_bytes)} was filled by its owner, read and written by a peer "
        f"and added up by an accelerator with at most {format_bytes(managed.resident_bytes_max)} resident of "
        f"{format_bytes(managed.budget_bytes)} allowed: {managed.page_faults} page faults, {managed.evicted_pages} "
        f"pages evicted, {managed.bytes_wrong} of {managed.bytes_verified} bytes wrong."
    )


def _work_sentence(on_demand: DisciplineFigures, pinned: DisciplineFigures | None) -> str:
    said = (
        f"On demand, sharing {format_bytes(on_demand.bytes_moved)} took {_duration(on_demand.register_s)} and "
        f"pinned {format_bytes(on_demand.vm_pin_bytes)}, and {on_demand.bytes_wrong} of "
        f"{on_demand.bytes_verified} bytes were wrong"
    )
    if pinned is None:
        return f"{said}."
    return (
        f"{said}; pinned, it took {_duration(pinned.register_s)}, held {format_bytes(pinned.vm_pin_bytes)} and "
        f"made fork {pinned.fork_s / on_demand.fork_s:.0f} times as long."
    )


def _hazard_sentence(figures: DemoFigures) -> str:
    stale = {
        name: [hazard for hazard, outcome in column.hazards.items() if outcome != COHERENT]
        for name, column in figures.disciplines.items()
    }
    n_coherent = len(HAZARDS) - len(stale["on_demand"])
    said = f"On demand, the device saw the process's own bytes after {n_coherent} of {len(HAZARDS)} hazards"
    if "pinned" not in stale:
        return f"{said}."
    if not stale["pinned"]:
        return f"{said}, and pinned after all of them."
    return f"{said}; pinned, it kept to pages the process no longer has after {' and '.join(stale['pinned'])}."
