"""What one client may have at most, and the count of what it has."""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass

from nopin.server.refusal import refuse_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most one client may have of each thing; `clients` and the exchange's are for the whole server.

    Every ring and every channel holds a descriptor of the server, a pinned region three; so `descriptors`
    bounds them together. The depths, `sge` and `inline` are per queue.
    """

    pds: int = 256
    regions: int = 16384
    cqs: int = 1024
    qps: int = 1024
    channels: int = 256
    shares: int = 1024
    arenas: int = 64
    arena_bytes: int = 16 << 40
    descriptors: int = 2560
    ring_bytes: int = 256 << 20
    cq_depth: int = 1 << 16
    qp_depth: int = 1 << 14
    sge: int = 32
    inline_bytes: int = 1024
    clients: int = 256
    exchange_connections: int = 1024
    exchange_handshakes: int = 64

    def as_dict(self) -> dict[str, int]:
        """Return every limit by name."""
        return asdict(self)


_ERRNO = {"ring_bytes": errno.ENOMEM, "arena_bytes": errno.ENOMEM, "descriptors": errno.EMFILE}
"""What a provider would return; ENOSPC, a full table, where nothing is said here."""


class Usage:
    """Counts what one client has against its limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits.as_dict()
        self._used: dict[str, int] = {}

    def take(self, **amounts: int) -> None:
        """Count more of the named things: of all of them, or of none.

        Raises:
            ServerRefused: one of them would pass its limit (code "limit").
        """
        for name, amount in amounts.items():
            used, most = self._used.get(name, 0), self._limits[name]
            if used + amount > most:
                text = f"{amount} more {name} refused: this client has {used} of {most}"
                raise refuse_limit(text, _ERRNO.get(name, errno.ENOSPC))
        for name, amount in amounts.items():
            self._used[name] = self._used.get(name, 0) + amount

    def give(self, **amounts: int) -> None:
        """Count less of the named things."""
        for name, amount in amounts.items():
            self._used[name] -= amount
            assert self._used[name] >= 0

    def check(self, name: str, amount: int) -> None:
        """Check one size against its limit; nothing is counted.

        Raises:
            ServerRefused: it is over (code "limit", EINVAL as a verbs provider does).
        """
        if amount > self._limits[name]:
            raise refuse_limit(f"{name} {amount} is over the limit of {self._limits[name]}", errno.EINVAL)

    def as_dict(self) -> dict[str, int]:
        """Return what is used, by name."""
        return dict(self._used)
