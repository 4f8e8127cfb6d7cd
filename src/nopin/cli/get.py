"""``nopin get``: read a share, or a part of it, with RDMA READs of just those bytes."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from nopin.cli.options import examples, json_option, socket_option
from nopin.cli.output import put, put_json, say, talk
from nopin.cli.slices import Index, parse_index, piece_by_piece
from nopin.control.url import ShareUrl
from nopin.errors import UsageError
from nopin.units import format_bytes, format_ns
from nopin.verbs.attach import attach
from nopin.verbs.device import Device
from nopin.verbs.remote import RemoteArray
from nopin.verbs.selection import Selection, select

PIECE_BYTES = 32 << 20
"""A file is written so many bytes at a time, while the next are read: what is read may be larger than memory."""
SHOWN_BYTES_MAX = 64 << 20


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples("nopin get URL", "nopin get URL 0:10", "nopin get URL ::2,-1 -o part.npy", "nopin get URL 0 -j"),
)
@click.argument("url")
@click.argument("selection", metavar="[SLICE]", default="...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write there: .npy an array, else raw bytes.")
@socket_option
@json_option
def command(url: str, selection: str, output: Path | None, socket_path: Path | None, as_json: bool) -> None:
    """Read a share, or the part of it that SLICE names.

    Only that travels. SLICE is numpy's index syntax: 5, 10:20, ::2, 0:4,...,-1. Without -o the values are printed. The
    URL goes in quotes where the shell gives # a meaning.
    """
    index = parse_index(selection)
    ShareUrl.parse(url)  # before a server is started for nothing
    with Device(server=socket_path) as device, attach(url, device=device) as remote:
        chosen = select(index, remote.shape, remote.strides, remote.dtype.itemsize)
        start = time.perf_counter()
        if output is None:
            values = _read_to_show(remote, index, chosen)
        else:
            _save(remote, index, chosen, output)
        seconds = time.perf_counter() - start
    figures: dict[str, Any] = {
        "dtype": np.lib.format.dtype_to_descr(remote.dtype),
        "shape": list(chosen.shape),
        "bytes": chosen.n_bytes,
        "seconds": seconds,
        "output": str(output) if output else None,
    }
    if as_json:
        put_json(figures if output else figures | {"data": values.tolist()})
    elif output is None:
        put(np.array2string(values))
    rate = format_bytes(chosen.n_bytes / seconds)
    say(f"{format_bytes(chosen.n_bytes)} in {format_ns(seconds * 1e9)} ({rate}/s), shape {chosen.shape}")


def _read_to_show(remote: RemoteArray, index: tuple[Index, ...], chosen: Selection) -> NDArray[Any]:
    """Read all of it.

    Raises:
        UsageError: it is more than anybody would look at.
    """
    if chosen.n_bytes > SHOWN_BYTES_MAX:
        raise UsageError(
            f"{format_bytes(chosen.n_bytes)} are too many to print: name a part, as in nopin get URL 0:10, or a file "
            "by -o"
        )
    return np.asarray(remote[index])


def _save(remote: RemoteArray, index: tuple[Index, ...], chosen: Selection, output: Path) -> None:
    """Write it to a file, which is removed again if not all of it comes or fits."""
    with output.open("wb", buffering=0) as file, _bar(chosen.n_bytes) as advance:
        try:
            if output.suffix == ".npy":
                _write(file, _npy_header(remote.dtype, chosen.shape))
            for values in _pieces(remote, index):
                _write(file, values.tobytes())
                advance(values.nbytes)
        except BaseException:
            if stat.S_ISREG(output.stat().st_mode):  # not a device that was given
                output.unlink()
            raise


def _pieces(remote: RemoteArray, index: tuple[Index, ...]) -> Iterator[NDArray[Any]]:
    """Read piece after piece, the next one while the caller is at the last."""
    under_way = None
    for piece in piece_by_piece(index, remote.shape, PIECE_BYTES // remote.dtype.itemsize):
        last, under_way = under_way, remote.read_async(piece)
        if last is not None:
            yield np.asarray(last.result())
    if under_way is not None:
        yield np.asarray(under_way.result())


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what stands before the elements in a .npy file."""
    header = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _write(file: FileIO, data: bytes) -> None:
    """Write all bytes.

    Raises:
        OSError: with the name of the file, which the kernel does not give.
    """
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, file.name) from problem


@contextmanager
def _bar(n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show progress on a terminal; yields what is to be told of it."""
    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(*columns, console=talk(), transient=True, disable=not talk().is_terminal) as bar:
        task = bar.add_task("", total=n_bytes)
        yield lambda n_bytes: bar.advance(task, n_bytes)
