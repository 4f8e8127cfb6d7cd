"""Standard output is data, standard error is talk; both vanish politely when nobody looks."""

from __future__ import annotations

import io
import sys
from typing import Any

import msgspec
from rich.console import Console, RenderableType

_JSON = msgspec.json.Encoder(enc_hook=str)
_WIDE = 10_000
"""Columns: more than anything has that is shown."""


class ReaderGone(Exception):
    """Nobody reads our output any more. Not an OSError: of those click makes an exit code of its own."""


def talk() -> Console:
    """Return the console for everything that is not data; colours only on a terminal."""
    return Console(stderr=True, highlight=False)


def data() -> Console:
    """Return the console for data, for who draws on a terminal."""
    return Console(highlight=False)


def say(message: str) -> None:
    """Write one line of talk."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def put(line: str) -> None:
    """Write one line of data, at once: a reader may wait for it.

    Raises:
        ReaderGone: nobody does.
    """
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def show(what: RenderableType) -> None:
    """Write a table or a text as data: on a terminal in its width and with colours, else as wide as it is."""
    if sys.stdout.isatty():
        data().print(what)
        return
    page = io.StringIO()
    Console(file=page, width=_WIDE, highlight=False).print(what)
    for line in page.getvalue().splitlines():
        put(line.rstrip())


def put_json(figures: Any) -> None:
    """Write figures as indented JSON."""
    put(msgspec.json.format(_JSON.encode(figures), indent=2).decode())
