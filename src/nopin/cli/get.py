"""``nopin get``: read a share, or a part of it, with RDMA READs of just those bytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from nopin.cli.output import put, put_json, say
from nopin.cli.slices import parse_index
from nopin.units import format_bytes
from nopin.verbs.attach import attach


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("url")
@click.argument("selection", metavar="[SLICE]", default="...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help=".npy for an array, else raw bytes.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON: the figures, and data without -o.")
def command(url: str, selection: str, output: Path | None, as_json: bool) -> None:
    """Read URL, or the part that SLICE names in numpy's index syntax: 5, 10:20, ::2, 0:4,...,-1.

    Only the selected bytes travel. Without -o the values are printed.
    """
    index = parse_index(selection)
    with attach(url) as remote:
        start = time.perf_counter()
        values = np.asarray(remote[index])
        seconds = time.perf_counter() - start
    figures: dict[str, Any] = {
        "dtype": values.dtype.str,
        "shape": list(values.shape),
        "bytes": values.nbytes,
        "seconds": seconds,
        "output": str(output) if output else None,
    }
    if output is not None:
        _save(values, output)
    if as_json:
        put_json(figures if output else figures | {"data": values.tolist()})
    elif output is None:
        put(np.array2string(values))
    rate = values.nbytes / seconds
    say(f"{format_bytes(values.nbytes)} in {seconds * 1e3:.3g} ms ({format_bytes(rate)}/s), shape {values.shape}")


def _save(values: NDArray[Any], output: Path) -> None:
    if output.suffix == ".npy":
        np.save(output, values, allow_pickle=False)
    else:
        output.write_bytes(np.ascontiguousarray(values).tobytes())
