"""What commands have in common: options, sizes, and how examples stand in their help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from nopin.units import parse_bytes

json_option = click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")

socket_option = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    help="The server's Unix socket; default: this user's own, under XDG_RUNTIME_DIR or /tmp.",
)


class Seconds(click.FloatRange):
    """A duration: a number, and none that never ends."""

    name = "duration"

    def __init__(self, least: float, most: float = 86400.0) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it; nan lies in every range for click."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes bytes as 4096, 64k, 1m or 256MiB; what is no size is a usage error."""
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as wrong:
        raise click.BadParameter(str(wrong)) from None


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines as they are typed, never wrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
