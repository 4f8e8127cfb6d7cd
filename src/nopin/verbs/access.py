"""Rights and disciplines as people write them."""

from __future__ import annotations

from nopin.errors import UsageError
from nopin.nic.abi import Access, Discipline

AccessLike = Access | str
"""Access flags, or letters: r remote read, w remote write, a remote atomic, l local write."""

_LETTERS = {
    "r": Access.REMOTE_READ,
    "w": Access.REMOTE_WRITE | Access.LOCAL_WRITE,
    "a": Access.REMOTE_ATOMIC | Access.LOCAL_WRITE,
    "l": Access.LOCAL_WRITE,
}
"""Verbs grant remote write and atomics only together with local write."""

_DISCIPLINES = {
    "on-demand": Discipline.ON_DEMAND,
    "short-term": Discipline.SHORT_TERM,
    "pinned": Discipline.PINNED,
}

WRITING = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC


def parse_access(text: AccessLike) -> Access:
    """Read rights; flags pass unchanged.

    Raises:
        UsageError: an unknown letter, or neither letters nor flags.
    """
    if isinstance(text, Access):
        return text
    if not isinstance(text, str):
        raise UsageError(f"access {text!r}: give letters, or flags of nopin.Access")
    rights = Access.NONE
    for letter in text:
        if letter not in _LETTERS:
            raise UsageError(f"access {text!r}: write letters of r (read), w (write), a (atomic), l (local write)")
        rights |= _LETTERS[letter]
    return rights


def format_access(access: Access) -> str:
    """Write the remote rights as letters, ``rwa``."""
    pairs = (("r", Access.REMOTE_READ), ("w", Access.REMOTE_WRITE), ("a", Access.REMOTE_ATOMIC))
    return "".join(letter for letter, right in pairs if access & right)


def parse_discipline(text: Discipline | str) -> Discipline:
    """Read a discipline by name.

    Raises:
        UsageError: no such discipline.
    """
    if isinstance(text, Discipline):
        return text
    found = _DISCIPLINES.get(text) if isinstance(text, str) else None
    if found is None:
        raise UsageError(f"discipline {text!r}: there are {', '.join(_DISCIPLINES)}")
    return found
