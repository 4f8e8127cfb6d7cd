"""``nopin demo``: the same work pinned and on demand, side by side."""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from nopin.cli.options import examples, json_option
from nopin.cli.output import put_json, say, show, talk
from nopin.lab.demo import COHERENT, DISCIPLINES, WORK_BYTES, DemoFigures, DisciplineFigures, run_demo
from nopin.lab.demo_managed import ManagedFigures
from nopin.lab.demo_owner import HAZARDS
from nopin.units import format_bytes, format_ns

TITLES = {"pinned": "pinned", "on_demand": "on demand", "managed": "managed memory"}
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
    for name, reason in figures.reduced.items():
        moved = format_bytes(figures.disciplines[name].bytes_moved)
        say(f"{TITLES[name]} moves {moved} only, this host forbids more: {reason}")
    if as_json:
        put_json(figures)
    else:
        show(table_of(figures))
        for sentence in [*sentences(figures), NEXT]:
            show(Text(sentence))
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
    "registration": lambda c: format_ns(c.register_s * 1e9),
    "memory pinned (VmPin)": lambda c: format_bytes(c.vm_pin_bytes),
    "fork of the owner": lambda c: format_ns(c.fork_s * 1e9),
    "moved": lambda c: format_bytes(c.bytes_moved),
    "throughput": lambda c: f"{c.throughput_bytes_per_s / 1e9:.2f} GB/s",
    "page faults of the device": lambda c: str(c.page_faults),
    "bytes verified": lambda c: str(c.bytes_verified),
    "bytes wrong": lambda c: str(c.bytes_wrong),
}


def _marked(outcome: str) -> str:
    return f"[green]{outcome}[/]" if outcome == COHERENT else f"[red]{outcome}[/]"


def sentences(figures: DemoFigures) -> list[str]:
    """Say in a sentence each what was shown; they follow from the figures."""
    on_demand, pinned = figures.disciplines["on_demand"], figures.disciplines.get("pinned")
    said = [
        f"On demand, sharing {format_bytes(on_demand.bytes_moved)} took {format_ns(on_demand.register_s * 1e9)} and "
        f"pinned {format_bytes(on_demand.vm_pin_bytes)}; {on_demand.bytes_wrong} of {on_demand.bytes_verified} bytes "
        "were wrong."
    ]
    if pinned is not None:
        said.append(_cost_of_pinning(pinned, on_demand))
    said.append(
        f"On demand, the device saw the process's own bytes after {len(HAZARDS) - len(_stale(on_demand))} of "
        f"{len(HAZARDS)} hazards."
    )
    if pinned is not None:
        stale = _stale(pinned)
        kept = f"kept to pages the process no longer has after {' and '.join(stale)}" if stale else "saw them after all"
        said.append(f"Pinned, it {kept}.")
    if figures.managed is not None:
        said.append(_managed_sentence(figures.managed))
    return said


def _cost_of_pinning(pinned: DisciplineFigures, on_demand: DisciplineFigures) -> str:
    took = format_ns(pinned.register_s * 1e9)
    if pinned.bytes_moved < on_demand.bytes_moved:
        moved, work = format_bytes(pinned.bytes_moved), format_bytes(on_demand.bytes_moved)
        return f"Pinned, {moved} took {took}; {work} are more than this host lets a process pin."
    held, ratio = format_bytes(pinned.vm_pin_bytes), pinned.fork_s / on_demand.fork_s
    return f"Pinned, it took {took}, held {held} and made fork {ratio:.0f} times as long."


def _stale(figures: DisciplineFigures) -> list[str]:
    return [hazard for hazard, outcome in figures.hazards.items() if outcome != COHERENT]


def _managed_sentence(managed: ManagedFigures) -> str:
    return (
        f"Managed, {format_bytes(managed.array_bytes)} were filled, read, written and added up by owner, peer and "
        f"accelerator in {format_bytes(managed.resident_bytes_max)} of {format_bytes(managed.budget_bytes)} allowed: "
        f"{managed.page_faults} page faults, {managed.evicted_pages} pages evicted, {managed.bytes_wrong} of "
        f"{managed.bytes_verified} bytes wrong."
    )
