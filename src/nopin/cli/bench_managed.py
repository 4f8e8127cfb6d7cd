"""``nopin bench fault`` and ``nopin bench overcommit``: managed memory beside the barest thing that could be done."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from nopin.cli.output import put, put_json, talk
from nopin.cli.perftest import RULE
from nopin.lab.bench_fault import FaultFigure, fault_bench
from nopin.lab.bench_overcommit import BUDGET_BYTES, OvercommitFigure, run_overcommit, scan_pages
from nopin.lab.figures import LatencyFigure
from nopin.units import format_bytes, format_ns

TESTS = ("fault", "overcommit")


def run(test: str, *, as_json: bool) -> int:
    """Run one of `TESTS`; returns the exit code."""
    return _fault(as_json=as_json) if test == "fault" else _overcommit(as_json=as_json)


def _fault(*, as_json: bool) -> int:
    results = []
    with fault_bench() as bench:
        if not as_json:
            for line in heading():
                put(line)
        for result in bench.all():
            results.append(result)
            if not as_json:
                put(row(result))
    if as_json:
        put_json({"results": [result.as_json() for result in results]})
    else:
        put(RULE)
    return 0


def heading() -> list[str]:
    """Return the lines above the results of `nopin bench fault`."""
    columns = f" {'fault':<14} {'median':>12} {'floor':>12}  {'ratio_to_floor':<15} {'asked':<9} floor is"
    return [RULE, f"{'Page faults of managed memory, all on one CPU':^95}".rstrip(), RULE, columns]


def row(result: FaultFigure) -> str:
    """Return the line of one result."""
    figure = result.figure
    if isinstance(figure, LatencyFigure):
        values, sign = (figure.typical_ns, figure.floor_ns or 0), "<="
        ours, floor = (format_ns(value) for value in values)
    else:
        ours, floor = (f"{rate / 1e9:.2f} GB/s" for rate in (figure.average, figure.floor_bytes_per_s or 0))
        sign = ">="
    asked = f"{sign} {result.asked}{'' if result.reached else ' no'}"
    return (
        f" {result.name:<14} {ours:>12} {floor:>12}  {figure.ratio_to_floor or 0:<15.2f} {asked:<9} {figure.floor_name}"
    )


def _overcommit(*, as_json: bool) -> int:
    with Progress(console=talk(), transient=True, disable=not talk().is_terminal) as bar:
        task = bar.add_task("scanning", total=scan_pages(BUDGET_BYTES))
        figure = run_overcommit(lambda n_pages: bar.advance(task, n_pages))
    if as_json:
        put_json(figure.as_json())
    else:
        for line in lines_of(figure):
            put(line)
    return 1 if figure.wrong else 0


def lines_of(figure: OvercommitFigure) -> list[str]:
    """Return the results of `nopin bench overcommit`."""
    rows: dict[str, Any] = {
        "budget": format_bytes(figure.budget_bytes),
        "array": format_bytes(figure.array_bytes),
        "working set": format_bytes(figure.hot_bytes),
        "accesses to it": f"{figure.hot_accesses}, of which {figure.hot_faults} faulted",
        "pages scanned": f"{figure.scan_accesses}, with {figure.scan_faults} faults",
        "share that faulted": f"{figure.share:.2%}, asked <= {figure.asked:.0%}",
        "resident at most": format_bytes(figure.resident_bytes_max),
        "words wrong": figure.wrong,
    }
    title = f"{'A working set in an overcommitted array, with a scan':^95}".rstrip()
    return [RULE, title, RULE, *(f" {name:<20}: {value}" for name, value in rows.items()), RULE]
