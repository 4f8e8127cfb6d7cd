"""What the NIC's control calls raise."""

from __future__ import annotations

import errno as codes

from nopin.errors import NopinError


class VerbsError(NopinError):
    """A verb was refused; nothing was changed.

    Attributes:
        errno: as a verbs provider would return it (EINVAL, EBUSY, ENOMEM, ...).
    """

    def __init__(self, message: str, errno: int = codes.EINVAL) -> None:
        super().__init__(message)
        self.errno = errno


class RingCorrupt(NopinError):
    """A client wrote an impossible index into a ring it shares with the device."""
