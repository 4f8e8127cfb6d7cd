"""The end of a client: everything it had goes, users before what they use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nopin.server import queues, regions

if TYPE_CHECKING:
    from nopin.server.session import Session


def tear_down(session: Session) -> None:
    """Destroy everything a client has.

    Shares go first, so that nobody attaches meanwhile and attached peers get exact errors; then queue pairs,
    completion queues, regions, protection domains, channels; then arenas, the watch, and last the address spaces.
    """
    objects = session.objects
    regions.withdraw_all(session, "owner exited")
    for qp in list(objects.qps.values()):
        queues.destroy_qp(session, qp)
    for cq in list(objects.cqs.values()):
        queues.destroy_cq(session, cq)
    for region in list(objects.regions.values()):
        regions.deregister(session, region)
    for domain in objects.domains.values():
        domain.close()
    for channel in objects.channels.values():
        os.close(channel.fd)
    objects.domains.clear()
    objects.channels.clear()
    if session.book is not None:
        session.book.close()
    session.arenas.end()
    session.memory.close_watch()
    session.memory.close_spaces()
