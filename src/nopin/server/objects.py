"""The objects of one client, and their end in the order in which they depend on each other."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from nopin.mm.notifier import Subscription
from nopin.nic.cq import Cq
from nopin.nic.mr import Region
from nopin.nic.qp import QueuePair
from nopin.server.domain import Domain
from nopin.server.limits import Limits, Usage
from nopin.server.refusal import refuse
from nopin.server.shares import Share

if TYPE_CHECKING:  # a session has objects, and objects name their session
    from nopin.server.session import Session

K = TypeVar("K", int, str)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class ClientChannel:
    """A completion channel: the end of a pipe that is written when an armed completion queue fires.

    Not an eventfd: both sides of that share its blocking flag, and a client that cleared it and filled the counter
    would stop the server in its next write.
    """

    fd: int
    n_users: int = 0

    def kick(self) -> None:
        """Wake who waits there; where the pipe is full nobody sleeps, and where it is broken nobody is left."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.fd, b"\1")


@dataclass(slots=True, eq=False)
class ClientCq:
    """A completion queue; its ring's bytes count against the client."""

    session: Session
    object_id: int
    cq: Cq
    n_bytes: int
    channel: ClientChannel | None


@dataclass(slots=True, eq=False)
class ClientQp:
    """A queue pair; its rings' bytes count against the client."""

    session: Session
    qp: QueuePair
    n_bytes: int

    @property
    def object_id(self) -> int:
        """The QPN."""
        return self.qp.qpn


@dataclass(slots=True, eq=False)
class ClientRegion:
    """A region and what hangs on it.

    Attributes:
        pinned_pasid: the address space that exists for this pinned region alone; None for others.
        watch: the subscription to changes of its range; None where nothing can be heard.
        watched: all of its range was watched at registration.
        generation: counts the invalidations that hit it.
        ring_fd: of a pinned one, the number of its io_uring in the client.
        reclaimed_before: counted in its range when it was registered; see `regions.reclaimed`.
    """

    session: Session
    object_id: int
    region: Region
    domain: Domain
    pinned_pasid: int | None = None
    watch: Subscription | None = None
    watched: bool = False
    generation: int = 0
    ring_fd: int | None = None
    reclaimed_before: int = 0


@dataclass(slots=True, eq=False)
class ClientObjects:
    """Everything one client has, by the numbers it uses for it."""

    limits: Limits
    usage: Usage = field(init=False)
    domains: dict[int, Domain] = field(default_factory=dict)
    regions: dict[int, ClientRegion] = field(default_factory=dict)
    channels: dict[int, ClientChannel] = field(default_factory=dict)
    cqs: dict[int, ClientCq] = field(default_factory=dict)
    qps: dict[int, ClientQp] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    _last_handle: int = 0

    def __post_init__(self) -> None:
        self.usage = Usage(self.limits)

    def new_handle(self) -> int:
        """Return a number this client has not seen before."""
        self._last_handle += 1
        return self._last_handle


def find(table: dict[K, T], key: K, what: str) -> T:
    """Look an object up by the client's name for it.

    Raises:
        ServerRefused: this client has none of that name (code "handle", EINVAL).
    """
    found = table.get(key)
    if found is None:
        raise refuse(f"no {what} {key} of this client", errno.EINVAL, "handle")
    return found
