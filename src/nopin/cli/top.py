"""``nopin top``: what a running server's managed memory is doing, live on a terminal, else as one report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from nopin.cli.load import FAULT_KINDS, Load, compare
from nopin.cli.options import Seconds, examples, json_option, socket_option
from nopin.cli.output import data, put_json, show
from nopin.control.paths import default_socket_path
from nopin.units import format_bytes, format_ns
from nopin.verbs.device import Device

N_REGIONS = 10
_BAR_WIDTH = 40


@click.command(epilog=examples("nopin top", "nopin top -d 0.2", "nopin top -j -n 10 > load.json"))
@click.option(
    "-d", "--delay", "delay_s", type=Seconds(0.05), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("-n", "--iterations", "n_looks", type=click.IntRange(min=1), help="How many reports.")
@socket_option
@json_option
def command(delay_s: float, n_looks: int | None, socket_path: Path | None, as_json: bool) -> int:
    """Show live what managed memory and shared regions are doing.

    Residency, faults, evictions, swap traffic, the hottest regions and how long faults took: on a terminal until
    Ctrl-C, every DELAY seconds; otherwise, and with -j, one report over DELAY seconds.
    """
    live = _is_live(data()) and not as_json
    n = n_looks if n_looks is not None or live else 1
    with Device(server=socket_path or default_socket_path()) as device:
        loads = itertools.islice(_loads(device, delay_s), n)
        if live:
            _watch(device, loads)
            return 0
        for load in loads:
            if as_json:
                put_json(load)
            else:
                show(report(load, device.info.server_pid))
    return 0


def _is_live(console: Console) -> bool:
    """Tell whether one report can be drawn over the last."""
    return console.is_terminal and not console.is_dumb_terminal


def _loads(device: Device, delay_s: float) -> Iterator[Load]:
    rows, looked_s = device.stat(), time.monotonic()
    while True:
        time.sleep(delay_s)
        before, before_s = rows, looked_s
        rows, looked_s = device.stat(), time.monotonic()
        yield compare(before, rows, looked_s - before_s)


def _watch(device: Device, loads: Iterator[Load]) -> None:
    with Live("looking ...", console=data(), screen=True, auto_refresh=False) as screen:
        try:
            for load in loads:
                screen.update(report(load, device.info.server_pid), refresh=True)
        except KeyboardInterrupt:
            return  # how one leaves a live display


def report(load: Load, server_pid: int) -> Group:
    """Return one report."""
    parts: list[RenderableType] = [_head(load, server_pid)]
    if load.arenas:
        parts += ["", _arenas(load)]
    if load.regions:
        parts += ["", _regions(load)]
    if load.fault_latency_ever:
        parts += ["", _latency(load)]
    return Group(*parts)


def _head(load: Load, server_pid: int) -> str:
    resident, swapped = load.total("resident_bytes"), load.total("swapped_bytes")
    faults, evictions = load.total("faults_per_s"), load.total("evictions_per_s")
    read, written = load.total("swap_read_bytes_per_s"), load.total("swap_written_bytes_per_s")
    return (
        f"server {server_pid}: clients {load.n_clients}, arenas {len(load.arenas)}, regions {len(load.regions)}; "
        f"over {load.seconds:.1f} s\n"
        f"resident {format_bytes(resident)}, swapped {format_bytes(swapped)}, {faults:.0f} faults/s, "
        f"{evictions:.0f} evictions/s, swap read {format_bytes(read)}/s, written {format_bytes(written)}/s"
    )


def _arenas(load: Load) -> Table:
    faults = [f"{kind}/s" for kind in FAULT_KINDS]
    figures = ["resident", "budget", "swapped", *faults, "refault/s", "evict/s", "read/s", "write/s"]
    table = _table("arena", figures)
    for arena in load.arenas:
        table.add_row(
            f"{arena.arena} {arena.name}",
            str(arena.pid),
            arena.comm,
            format_bytes(arena.resident_bytes),
            format_bytes(arena.budget_bytes),
            format_bytes(arena.swapped_bytes),
            *(f"{arena.faults_per_s[kind]:.0f}" for kind in FAULT_KINDS),
            f"{arena.refaults_per_s:.0f}",
            f"{arena.evictions_per_s:.0f}",
            format_bytes(arena.swap_read_bytes_per_s),
            format_bytes(arena.swap_written_bytes_per_s),
        )
    return table


def _regions(load: Load) -> Table:
    table = _table("region", ["length", "faults/s", "invalidations/s"])
    for region in load.regions[:N_REGIONS]:
        table.add_row(
            f"mr {region.mrn}",
            str(region.pid),
            region.comm,
            format_bytes(region.length_bytes),
            f"{region.faults_per_s:.0f}",
            f"{region.invalidations_per_s:.0f}",
        )
    return table


def _table(what: str, figures: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (what, "pid", "command", *figures):
        table.add_column(name, justify="right" if name in (*figures, "pid") else "left")
    return table


def _latency(load: Load) -> Table:
    """Faults by how long they took: in this interval, with a bar, and ever."""
    now, ever = load.fault_latency, load.fault_latency_ever
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("fault latency", justify="right")
    table.add_column("now", justify="right")
    table.add_column("", width=_BAR_WIDTH)
    table.add_column("ever", justify="right")
    most = max(now.values(), default=0)
    bound_ns = min(ever)
    while bound_ns <= max(ever):
        n = now.get(bound_ns, 0)
        bar = "█" * -(-_BAR_WIDTH * n // most) if n else ""
        table.add_row(f"< {format_ns(bound_ns)}", str(n), bar, str(ever.get(bound_ns, 0)))
        bound_ns *= 2
    return table
