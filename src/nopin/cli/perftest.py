"""Benchmark results as perftest prints them, with one column more: the ratio to the floor."""

from __future__ import annotations

from nopin.lab.bench_spec import BenchSpec
from nopin.lab.figures import MIB, BandwidthFigure, Figure, ratio, ratios_of_rounds
from nopin.lab.floor import FloorFigure
from nopin.lab.rendezvous import Coordinates

RULE = "-" * 95
_TITLES = {"write": "RDMA_Write", "read": "RDMA_Read", "send": "Send", "atomic": "Atomic FETCH_AND_ADD"}
_KINDS = {"bw": "BW", "lat": "Latency"}
GBIT_BYTES = 1e9 / 8


def heading(spec: BenchSpec, *, path: str, path_mtu: int, local: list[Coordinates], gbits: bool) -> list[str]:
    """Return the lines above the results: title, parameters in two columns, our queue pairs, columns."""
    settings = [
        ("Device", path),
        ("Number of qps", str(spec.n_queue_pairs)),
        ("Transport type", "IB"),
        ("Connection type", "RC"),
        ("TX depth", str(spec.tx_depth)),
        ("Mtu", f"{path_mtu}[B]"),
        ("Link type", "Ethernet"),
        ("Memory", spec.memory),
    ]
    pairs = zip(settings[::2], settings[1::2], strict=True)
    rows = [f" {a:<16}: {b:<28} {c:<16}: {d}" for (a, b), (c, d) in pairs]
    addresses = [f" local address: LID 0000 QPN {c.qpn:#08x} PSN {c.psn:#08x}" for c in local]
    title = f"{_TITLES[spec.operation]} {_KINDS[spec.kind]} Test"
    return [RULE, f"{title:^95}".rstrip(), *rows, RULE, *addresses, RULE, _columns(spec, gbits=gbits)]


def _columns(spec: BenchSpec, *, gbits: bool) -> str:
    if spec.kind == "bw":
        unit = "Gb/sec" if gbits else "MiB/sec"
        return (
            f" {'#bytes':<10} {'#iterations':<12} {f'BW peak[{unit}]':<18} {f'BW average[{unit}]':<18} "
            f"{'MsgRate[Mpps]':<14} ratio_to_floor"
        )
    names = ("t_min[usec]", "t_max[usec]", "t_typical[usec]", "t_avg[usec]", "t_stdev[usec]", "99%", "99.9%")
    return f" {'#bytes':<8} {'#iterations':<12} " + " ".join(f"{name:<15}" for name in names) + " ratio_to_floor"


def rows(figures: list[Figure], memories: list[str], *, gbits: bool) -> list[str]:
    """Return the lines of one message size: a line for each memory, and how the first compares with the second."""
    lines = [_row(figure, gbits=gbits) for figure in figures]
    if len(figures) == 1:
        return lines
    ours, other = figures
    lines = [f"{line}, {memory}" for line, memory in zip(lines, memories, strict=True)]
    return [*lines, f" ratio_to_{memories[1].replace('-', '_')}: {ratio(ours, other):.2f}{_spread(ours, other)}"]


def _spread(ours: Figure, other: Figure) -> str:
    """Tell between which values the ratio was in the rounds, where those are single values."""
    if not isinstance(ours, BandwidthFigure) or not isinstance(other, BandwidthFigure):
        return ""
    ratios = ratios_of_rounds(ours, other)
    return f" [{min(ratios):.2f} to {max(ratios):.2f}]"


def _row(figure: Figure, *, gbits: bool) -> str:
    if isinstance(figure, BandwidthFigure):
        unit = GBIT_BYTES if gbits else MIB
        return (
            f" {figure.size_bytes:<10} {figure.n_iterations:<12} {figure.peak / unit:<18.2f} "
            f"{figure.average / unit:<18.2f} {figure.messages_per_s / 1e6:<14.6f} {_ratio(figure)}"
        )
    columns = " ".join(f"{value:<15.2f}" for value in figure.columns_us().values())
    return f" {figure.size_bytes:<8} {len(figure.samples_ns):<12} {columns} {_ratio(figure)}"


def _ratio(figure: Figure) -> str:
    if figure.ratio_to_floor is None:
        return "-"
    return f"{figure.ratio_to_floor:.2f} of {figure.floor_name} ({_floor(figure)})"


def _floor(figure: Figure) -> str:
    if isinstance(figure, BandwidthFigure):
        return f"{(figure.floor_bytes_per_s or 0) / MIB:.0f} MiB/s"
    return f"{(figure.floor_ns or 0) / 1000:.1f} usec"


def floor_lines(figures: list[FloorFigure]) -> list[str]:
    """Return the table of `nopin bench floor`."""
    header = f" {'floor':<28} {'median':>10} {'min':>10} {'max':>10}  unit"
    lines = [RULE, f"{'Floor: this machine without RDMA semantics':^95}".rstrip(), RULE, header]
    for figure in figures:
        scale, unit = (1e9, "GB/s") if figure.unit == "bytes_per_s" else (1e3, "usec")
        values = " ".join(f"{value / scale:>10.2f}" for value in (figure.median, figure.min, figure.max))
        lines.append(f" {figure.name:<28} {values}  {unit}")
    return [*lines, RULE]
