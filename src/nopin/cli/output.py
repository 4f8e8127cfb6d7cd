"""Standard output is data, standard error is talk; both vanish politely when nobody looks."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:  # most commands need none of it, and a server should start fast
    from rich.console import Console, RenderableType

_JSON = msgspec.json.Encoder(enc_hook=str)
_WIDE = 10_000
"""Columns: more than anything has that is shown."""


class ReaderGone(Exception):
    """Nobody reads our output any more. Not an OSError: of those click makes an exit code of its own."""


def talk() -> Console:
    """Return the console for everything that is not data; colours only on a terminal."""
    return _console(stderr=True)


def data() -> Console:
    """Return the console for data, for who draws on a terminal."""
    return _console()


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
    _console(file=page, width=_WIDE).print(what)
    for line in page.getvalue().splitlines():
        put(line.rstrip())


def put_json(figures: Any) -> None:
    """Write figures as indented JSON."""
    put(msgspec.json.format(_JSON.encode(figures), indent=2).decode())


def _console(**how: Any) -> Console:
    from rich.console import Console

    return Console(highlight=False, **how)
