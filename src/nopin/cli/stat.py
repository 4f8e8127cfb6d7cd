"""``nopin stat``: the figures of a running server, one object a line, in the style of ``rdma stat``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nopin.cli.histogram import quantile_ns
from nopin.cli.options import examples, json_option, socket_option
from nopin.cli.output import put, put_json, say
from nopin.control.paths import default_socket_path
from nopin.errors import UsageError
from nopin.verbs.device import Device

KINDS = ("dev", "arena", "mr", "qp", "cq", "link", "client")
KIND_KEY = "kind"
LATENCY_KEY = "latency_ns"


@click.command(epilog=examples("nopin stat", "nopin stat mr pid 4711", "nopin stat arena -j"))
@click.argument("filters", nargs=-1, metavar="[KIND] [KEY VALUE]...")
@socket_option
@json_option
def command(filters: tuple[str, ...], socket_path: Path | None, as_json: bool) -> None:
    """Show objects of a running server: all, or those that match.

    KIND is dev, arena, mr, qp, cq, link or client; KEY VALUE pairs select by value. What has happened since the
    server started is counted in events, lengths are in bytes, times in nanoseconds (keys that end in _ns).
    """
    kind, wanted = parse_filters(filters)
    with Device(server=socket_path or default_socket_path()) as device:
        rows = [row for row in device.stat() if matches(row, kind, wanted)]
    if as_json:
        put_json(rows)
        return
    for row in rows:
        put(line_of(row))
    if not rows:
        say(f"no object matches {' '.join(filters)!r}")


def parse_filters(filters: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """Split the filter words into a kind and key-value pairs.

    Raises:
        UsageError: a key has no value.
    """
    words = list(filters)
    kind = words.pop(0) if words and words[0] in KINDS else None
    if len(words) % 2:
        wrong = f"{words[-1]!r} is no kind" if len(words) == 1 and kind is None else f"{words[-1]!r} has no value"
        raise UsageError(f"{wrong}; filters are [KIND] [KEY VALUE]..., KIND one of {', '.join(KINDS)}")
    return kind, dict(zip(words[::2], words[1::2], strict=True))


def matches(row: dict[str, Any], kind: str | None, wanted: dict[str, str]) -> bool:
    """Tell whether a row is of the kind and has every wanted value; numbers compare as they print."""
    if kind is not None and row[KIND_KEY] != kind:
        return False
    return all(key in row and str(row[key]) == value for key, value in wanted.items())


def line_of(row: dict[str, Any]) -> str:
    """Write a row as `rdma stat` does: its kind, then keys and values; of histograms the median and 99th percentile."""
    pairs = [f"{key} {value}" for key, value in _flat(row) if key != KIND_KEY]
    return " ".join([str(row[KIND_KEY]), *pairs])


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if key != LATENCY_KEY:
            yield key, value
            continue
        for kind, counts in value.items():
            for name, share in (("p50", 0.5), ("p99", 0.99)):
                bound = quantile_ns(counts, share)
                if bound is not None:
                    yield f"{kind}_{name}_ns", bound
