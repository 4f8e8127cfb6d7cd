"""The trace of a run: one event a step, folded into a hash that tells whether two runs were the same.

The hash covers time, task and what it did, as text, so it is the same in every process, whatever PYTHONHASHSEED says.
Events themselves are kept only where somebody wants to read them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One step.

    Attributes:
        number: counts from 0. task: whose step. what: what it did.
    """

    number: int
    now_ns: int
    task: str
    what: str


class Trace:
    """See above.

    Args:
        keep: keep the events, too.

    Attributes:
        n_events: noted so far.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.n_events = 0
        self.events: list[Event] = []
        self._keep = keep
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending: list[str] = []

    def note(self, now_ns: int, task: str, what: str) -> None:
        """Add an event."""
        if self._keep:
            self.events.append(Event(self.n_events, now_ns, task, what))
        self.n_events += 1
        self._pending.append(f"{now_ns} {task} {what}\n")
        if len(self._pending) >= 512:
            self._fold()

    def digest(self) -> str:
        """Return the hash of all events so far, in hexadecimal."""
        self._fold()
        return self._hash.hexdigest()

    def _fold(self) -> None:
        self._hash.update("".join(self._pending).encode())
        self._pending.clear()
