"""Figures of the server's objects: one row each, keys as in ``rdma resource show`` and ``rdma stat show``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from nopin.control.messages import MESSAGE_BYTES_MAX, Stat
from nopin.nic.abi import QpState
from nopin.nic.qp import QueuePair
from nopin.server.arena import Arena
from nopin.server.core import Core
from nopin.server.objects import ClientRegion
from nopin.server.orphans import name_of
from nopin.server.regions import reclaimed
from nopin.units import PAGE_BYTES, U64_MAX

if TYPE_CHECKING:
    from nopin.server.session import Session

Row = dict[str, Any]

DEVICE = "nopin0"
_ENVELOPE_BYTES = 256


def rows(core: Core) -> Iterator[Row]:
    """Yield every row: the device, its link, client by client, arenas of none, then what serves attached peers."""
    yield {"kind": "dev", "dev": DEVICE, **core.counters.as_dict(), **core.nic.counters.as_dict()}
    yield {"kind": "link", "dev": DEVICE, "mtu": core.link.mtu, **core.link.statistics()}
    for session in sorted(core.sessions, key=lambda session: session.pid):
        yield from _client(session)
    yield from _left_alone(core)
    for responder in core.responders:
        yield _queue_pair(responder.qp, responder.share.owner_pid, "peer")


def pages(core: Core) -> list[Stat]:
    """Return the rows as messages, each short enough to be sent."""
    found = [Stat(rows=[])]
    room = MESSAGE_BYTES_MAX - _ENVELOPE_BYTES
    for row in rows(core):
        n_bytes = len(msgspec.msgpack.encode(row))
        if n_bytes > room:
            found[-1].more = True
            found.append(Stat(rows=[]))
            room = MESSAGE_BYTES_MAX - _ENVELOPE_BYTES
        found[-1].rows.append(row)
        room -= n_bytes
    return found


def _client(session: Session) -> Iterator[Row]:
    """Yield the client's own row and those of all it has."""
    objects = session.objects
    owner = {"pid": session.pid, "comm": session.name}
    yield {
        "kind": "client",
        **owner,
        "connected": session.connected,
        "watching": session.memory.watching,
        "events_dropped": session.n_events_dropped,
        **objects.usage.as_dict(),
    }
    yield from (_region(entry, owner) for entry in objects.regions.values())
    yield from (_arena(number, arena, owner) for number, arena in session.arenas.rows())
    for cq in objects.cqs.values():
        ring = cq.cq.ring
        yield {"kind": "cq", "dev": DEVICE, "cqn": cq.object_id, "cqe": ring.depth, "users": cq.cq.n_users, **owner}
    for qp in objects.qps.values():
        yield _queue_pair(qp.qp, session.pid, session.name)


def _left_alone(core: Core) -> Iterator[Row]:
    """Yield arenas that no connection is behind: their servers were killed. They go under a process that maps them."""
    owned = {arena for session in core.sessions for _, arena in session.arenas.rows()}
    for number, arena in core.arenas.all.items():
        if arena not in owned:
            pid = next((mapper.process.pid for mapper in arena.mappers if not mapper.worker), 0)
            yield _arena(number, arena, {"pid": pid, "comm": name_of(pid)})


def _region(entry: ClientRegion, owner: Row) -> Row:
    region = entry.region
    meter = region.meter
    return {
        "kind": "mr",
        "dev": DEVICE,
        "mrn": entry.object_id,
        "rkey": region.rkey,
        "lkey": region.lkey,
        "iova": region.iova,
        "mrlen": min(region.length, U64_MAX),
        **owner,
        "discipline": region.discipline.name.lower(),
        "watched": entry.watched,
        "page_faults": meter.page_faults,
        "page_faults_handled": meter.page_faults_handled,
        "page_invalidations": meter.page_invalidations + reclaimed(entry),
        "page_invalidations_handled": meter.page_invalidations_handled,
    }


def _arena(number: int, arena: Arena, owner: Row) -> Row:
    counts = asdict(arena.pager.statistics())
    del counts["resident"]  # in pages, and by the pager's books; the row's is in bytes, by the kernel's
    return {
        "kind": "arena",
        "dev": DEVICE,
        "arena": number,
        "name": arena.name,
        "capacity": arena.n_pages * PAGE_BYTES,
        "budget": arena.budget_bytes,
        "resident": arena.file_bytes,
        "mappers": len(arena.mappers),
        **owner,
        "latency_ns": arena.latency,
        **counts,
        "faults_worker": arena.faults_worker,
        **{f"madvise_{name}": n for name, n in asdict(arena.madvices).items()},
        "store_refused": arena.parts.store.n_refused,
    }


def _queue_pair(qp: QueuePair, pid: int, comm: str) -> Row:
    return {
        "kind": "qp",
        "dev": DEVICE,
        "lqpn": qp.qpn,
        "rqpn": qp.attr.dest_qpn or 0,
        "type": "RC",
        "state": QpState(qp.state).name,
        "rq-psn": qp.recv.epsn,
        "sq-psn": qp.send.next_psn,
        "direct": qp.direct,
        "pid": pid,
        "comm": comm,
    }
