"""``nopin share``: let peers read, or write, a file's mapping one-sidedly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from nopin.cli.options import examples, socket_option
from nopin.cli.output import put, say
from nopin.errors import ServerGone, UsageError
from nopin.units import format_bytes
from nopin.verbs.device import Device

EVENT_WAIT_S = 3600.0
ENDED = "the device server has ended; one that a program started ends with that, so run nopin serve for one that stays"


@click.command(epilog=examples("nopin share table.npy", "nopin share --access rw data.bin"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--access", type=click.Choice(["r", "rw"]), default="r", show_default=True, help="Peers' rights.")
@socket_option
def command(file: Path, access: str, socket_path: Path | None) -> None:
    """Share a file in place until Ctrl-C; prints the URL to reach it.

    A .npy FILE is shared as its array, anything else as bytes. The URL on standard output is all a peer needs, and
    whoever has it may use the share. Nothing is read ahead: pages come from the file when a peer asks for them.
    With rw, what peers write goes into the file.
    """
    array = _mapped(file, access)
    with Device(server=socket_path) as device, device.share(array, access=access) as share:
        put(share.url)
        say(
            f"sharing {file.name} ({array.dtype}, shape {array.shape}, {format_bytes(array.nbytes)}, {access}); "
            f"stop with Ctrl-C\nthere: nopin get '{share.url}'"
        )
        while True:
            for event in device.events(timeout=EVENT_WAIT_S):
                say(str(event))
            if share.closed:
                raise ServerGone(f"{file.name} is no longer shared: {ENDED}")


def _mapped(file: Path, access: str) -> NDArray[Any]:
    """Map the file; nothing is read yet.

    Raises:
        UsageError: it is empty, or no array of plain elements.
    """
    mode: Any = "r" if access == "r" else "r+"
    if not file.stat().st_size:
        raise UsageError(f"{file} is empty: there is nothing to share")
    if file.suffix != ".npy":
        return np.memmap(file, np.uint8, mode)
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(file, mode=mode)
    except ValueError as wrong:
        raise UsageError(f"{file} is no .npy file of plain elements ({wrong}); another name shares its bytes") from None
    if array.nbytes == 0:
        raise UsageError(f"{file} has no elements: there is nothing to share")
    return array
