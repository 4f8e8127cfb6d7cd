"""Violations: a property that did not hold, by name."""

from __future__ import annotations

from typing import NoReturn

PROPERTIES: dict[str, str] = {
    "stale_access": "a device used a frame after the invalidation of its page had returned",
    "wrong_bytes": "somebody read bytes that cannot be there",
    "lost_write": "bytes that were stored last are not there any more",
    "write_after_protect": "a device wrote a page after the right to had been taken away",
    "unanswered_fault": "somebody waits at a page, and nobody will ever answer",
    "no_progress": "work goes on for ever without an end in sight",
    "released_twice": "something was given back that had been given back already",
    "unbalanced": "at the end something is still held, charged or mapped that should not be, or the other way round",
    "completion_without_bytes": "work was reported done before its bytes were where they belong",
    "transient_as_permanent": "what would have passed was reported as an error for good",
    "assertion": "the code under test found its own invariant broken",
    "crash": "the code under test raised what nobody expects",
}
"""What is checked, and what a breach means."""


class Violation(AssertionError):
    """A property does not hold.

    Attributes:
        which: one of `PROPERTIES`.
        detail: what was seen, of which object.
    """

    def __init__(self, which: str, detail: str) -> None:
        assert which in PROPERTIES, which
        super().__init__(f"{which}: {detail}")
        self.which = which
        self.detail = detail


def violate(which: str, detail: str) -> NoReturn:
    """Raise a `Violation`."""
    raise Violation(which, detail)
