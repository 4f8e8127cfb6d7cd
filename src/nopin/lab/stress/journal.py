"""Where everybody in a stress run writes what it found: a file of lines, one JSON value each.

Lines are appended by one write each, so those of many processes do not mix.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from nopin.lab.stress.actor import Tally
from nopin.lab.stress.log import Violation


class Entry(msgspec.Struct, omit_defaults=True):
    """A line: one of these.

    Attributes:
        failure: somebody ended by an error that nothing explains.
    """

    violation: Violation | None = None
    tally: Tally | None = None
    failure: str | None = None


class Journal:
    """See above. Anybody may open it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, entry: Entry) -> None:
        """Append a line."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, msgspec.json.encode(entry) + b"\n")
        finally:
            os.close(fd)

    def read(self) -> list[Entry]:
        """Return all lines so far."""
        if not self._path.exists():
            return []
        return [msgspec.json.decode(line, type=Entry) for line in self._path.read_bytes().splitlines()]
