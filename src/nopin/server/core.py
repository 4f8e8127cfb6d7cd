"""What the parts of the server share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from nopin.iommu.iommu import Iommu
from nopin.link.base import Link
from nopin.nic.nic import Nic
from nopin.server.arena_maker import ArenaMaker
from nopin.server.arenas import Arenas
from nopin.server.limits import Limits
from nopin.server.poller import Poller
from nopin.server.registry import Record, Registry
from nopin.server.shares import ShareTable
from nopin.server.state_page import StatePage
from nopin.server.timers import Timers
from nopin.server.workers import Workers

if TYPE_CHECKING:  # both use the core
    from nopin.server.responder import Responder
    from nopin.server.session import Session

"""Raises OSError or HostLacks."""

log = logging.getLogger("nopin.server")


@dataclass(slots=True)
class ServerCounters:
    """Counts of the control plane since the server started."""

    clients_accepted: int = 0
    clients_refused: int = 0
    clients_ended: int = 0
    clients_misbehaved: int = 0
    """Disconnected for malformed messages or nonsense in a ring."""
    internal_errors: int = 0
    """Sessions ended by an exception nobody expected: bugs; the log has them."""
    requests: int = 0
    requests_refused: int = 0
    events_dropped: int = 0
    """Events a client did not read in time."""
    peers_accepted: int = 0
    peers_over_limit: int = 0
    peers_timed_out: int = 0
    """Connections that did not come to an attach request in time."""
    attached: int = 0
    attach_refused: int = 0
    """Unknown share, wrong token or replayed proof."""
    attach_malformed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return every count by name."""
        return asdict(self)


@dataclass(slots=True)
class Core:
    """The machinery every session and connection uses.

    Attributes:
        sessions: the clients.
        orphans: those of a killed predecessor's clients that have not come back yet, by the records of their books.
        responders: the queue pairs that answer attached peers.
        exchange_host: address of the exchange; `exchange_port` its TCP port.
        clock: monotonic nanoseconds.
        arenas: managed memory.
        arena_maker: makes what an arena consists of.
        registry: where a successor finds the arenas.
    """

    nic: Nic
    iommu: Iommu
    link: Link
    poller: Poller
    timers: Timers
    workers: Workers
    limits: Limits
    state_page: StatePage
    exchange_host: str
    exchange_port: int
    clock: Callable[[], int]
    arenas: Arenas
    arena_maker: ArenaMaker
    registry: Registry
    shares: ShareTable = field(default_factory=ShareTable)
    sessions: set[Session] = field(default_factory=set)
    orphans: dict[Record, Session] = field(default_factory=dict)
    responders: set[Responder] = field(default_factory=set)
    counters: ServerCounters = field(default_factory=ServerCounters)
