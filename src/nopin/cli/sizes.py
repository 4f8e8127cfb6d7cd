"""Byte sizes on the command line: 4096, 64k, 1m, 256MiB."""

from __future__ import annotations

import click

from nopin.units import parse_bytes


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size; wrong ones are usage errors."""
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as wrong:
        raise click.BadParameter(str(wrong)) from None
