"""How a request is refused: an error with the errno a verbs provider would return, turned into a reply."""

from __future__ import annotations

import errno as codes

from nopin.control.messages import Refused
from nopin.errors import ServerRefused, words_of
from nopin.nic.errors import VerbsError


def refuse(message: str, errno: int, code: str | None = None) -> ServerRefused:
    """Make the error that refuses a request; the code is the errno's name unless given."""
    return ServerRefused(message, code=code or name_of(errno), errno=errno)


def refuse_limit(message: str, errno: int) -> ServerRefused:
    """Make the error for a limit that is reached."""
    return refuse(message, errno, "limit")


def refused(error: ServerRefused | VerbsError | OSError, seq: int) -> Refused:
    """Turn an error into the reply that tells it."""
    errno = error.errno or codes.EIO
    code = error.code if isinstance(error, ServerRefused) else name_of(errno)
    message = f"the device server: {words_of(error)}" if isinstance(error, OSError) else str(error)
    return Refused(seq=seq, code=code, errno=errno, message=message)


def name_of(errno: int) -> str:
    """Return an errno's name in small letters."""
    return codes.errorcode.get(errno, "error").lower()
