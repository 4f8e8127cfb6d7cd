"""Asynchronous events of the NIC, brought to the client that owns the object."""

from __future__ import annotations

from collections.abc import Iterable

from nopin.control.messages import Event
from nopin.nic.cq import Cq
from nopin.nic.events import AsyncEvent
from nopin.nic.qp import QueuePair
from nopin.server.objects import ClientCq, ClientQp


def deliver(events: Iterable[AsyncEvent]) -> None:
    """Send each event to its owner. Queue pairs that answer attached peers have none: the peer is told."""
    for event in events:
        owner = owner_of(event.target)
        if owner is not None:
            owner.session.emit(Event(kind=int(event.kind), object_id=owner.object_id))


def owner_of(target: object) -> ClientCq | ClientQp | None:
    """Return the client's record of an object of the NIC."""
    if isinstance(target, QueuePair | Cq) and isinstance(target.owner, ClientCq | ClientQp):
        return target.owner
    return None
