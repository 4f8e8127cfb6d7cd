"""Where a successor finds the arenas: a file beside the socket that names their owners.

A process number may be used again, so the time at which the process started goes with it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from nopin.linux.pidfd import PidFd
from nopin.linux.proc import start_time


class Record(msgspec.Struct, frozen=True):
    """One arena: its owner, and the numbers of the store's two ends in that process."""

    pid: int
    started: int
    inbox: int
    outbox: int

    def process(self) -> PidFd | None:
        """Return the owner, if it still runs."""
        try:
            process = PidFd.open(self.pid)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            if start_time(self.pid) == self.started and not process.exited():
                return process
        process.close()
        return None


_decode = msgspec.json.Decoder(list[Record]).decode


class Registry:
    """The file at `path`: each change replaces it as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Record, None] = {}

    def orphans(self) -> list[Record]:
        """Return the arenas a predecessor left whose owners still run."""
        try:
            records = _decode(self._path.read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return []
        alive: list[Record] = []
        for record in records:
            process = record.process()
            if process is not None:
                process.close()
                alive.append(record)
        return alive

    def add(self, record: Record) -> None:
        """Note an arena."""
        self._records[record] = None
        self._write()

    def remove(self, record: Record) -> None:
        """An arena has ended. Not noted is fine."""
        if self._records.pop(record, self) is not self:
            self._write()

    def __len__(self) -> int:
        return len(self._records)

    def _write(self) -> None:
        """Replace the file. A full disk costs the successor, not us."""
        fresh = self._path.with_name(self._path.name + ".new")
        with contextlib.suppress(OSError):
            if not self._records:
                self._path.unlink(missing_ok=True)
                return
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(list(self._records)))
            fresh.rename(self._path)
