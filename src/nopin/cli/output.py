"""Standard output is data, standard error is talk; both vanish politely when nobody looks."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console

_JSON = msgspec.json.Encoder(enc_hook=str)


class _Data(Console):
    """A console for data: a reader that went away is the caller's to handle, as it is with `put`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def talk() -> Console:
    """Return the console for everything that is not data; colours only on a terminal."""
    return Console(stderr=True, highlight=False)


def data() -> Console:
    """Return the console for tables; never wraps when the output is not a terminal."""
    if sys.stdout.isatty():
        return _Data(highlight=False)
    return _Data(highlight=False, width=200)


def say(message: str) -> None:
    """Write one line of talk."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def put(line: str) -> None:
    """Write one line of data, at once: a reader may wait for it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def put_json(figures: Any) -> None:
    """Write figures as indented JSON."""
    put(msgspec.json.format(_JSON.encode(figures), indent=2).decode())
