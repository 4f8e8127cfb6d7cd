"""What each request does: one small function per request, found by table.

A handler changes nothing and raises, or does all of it. A client can name only its own objects: every lookup
is in the tables of its own session, and the memory it registers is that of the process that connected.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nopin.control.arena_messages import (
    ArenaCreated,
    CancelPrefetch,
    CreateArena,
    DestroyArena,
    DiscardRange,
    MapArena,
    MapperKind,
    Prefetch,
    PrefetchStarted,
    QueryPrefetch,
    ReclaimArena,
    SetBudget,
)
from nopin.control.messages import (
    PROTOCOL_VERSION,
    AllocPd,
    CreateChannel,
    CreateCq,
    CreateQp,
    DeallocPd,
    Deregister,
    DestroyChannel,
    DestroyCq,
    DestroyQp,
    Done,
    GetStat,
    Handle,
    Hello,
    ModifyQp,
    Publish,
    Published,
    QpAttributes,
    QpCreated,
    QueryQp,
    Reclaim,
    Reclaimed,
    ReclaimedShare,
    Register,
    Registered,
    Reply,
    Request,
    Welcome,
    Withdraw,
)
from nopin.control.packets import close_all
from nopin.server import orphans, queues, regions, stat
from nopin.server.client_book import make_book
from nopin.server.domain import Domain
from nopin.server.objects import ClientChannel, find
from nopin.server.refusal import refuse
from nopin.server.shares import ArrayLayout

if TYPE_CHECKING:  # a session calls its handlers
    from nopin.server.session import Session


class Answer(NamedTuple):
    """What goes back: usually one reply, and descriptors beside the first, which are closed once sent.

    No reply: it comes by `Session.answer`, when the work is done.
    """

    replies: Sequence[Reply]
    fds: Sequence[int] = ()


def handle(session: Session, request: Request, fds: Sequence[int]) -> Answer:
    """Carry out a request; owns the descriptors beside it.

    Raises:
        ServerRefused, VerbsError: refused; nothing was changed.
        OSError: the host is out of something.
    """
    if isinstance(request, Hello):
        return _hello(session, request, fds)
    if isinstance(request, ReclaimArena):
        return _reclaim_arena(session, fds)
    if isinstance(request, MapArena):
        serve = session.arenas.join if request.kind is MapperKind.CHILD else session.arenas.map
        return Answer([Handle(handle=serve(request, list(fds)))])
    return _HANDLERS[type(request)](session, request)


def _hello(session: Session, request: Hello, fds: Sequence[int]) -> Answer:
    """Begin a session, or go on with that of a client whose server was killed: `heir` is the one that is greeted."""
    core = session.core
    with contextlib.ExitStack() as given:
        given.callback(close_all, fds)
        if request.version != PROTOCOL_VERSION:
            text = f"the server speaks protocol {PROTOCOL_VERSION}, the client {request.version}"
            raise refuse(f"{text}; use the same release for both", errno.EPROTO, "version")
        if request.has_book:
            book = fds[-1]
            heir = orphans.heir_of(session, book)
        else:
            book = make_book(core.limits.shares)
            given.callback(os.close, book)
            orphans.begin_book(session, book, fresh=True)
            heir = session
        if request.has_uffd:
            heir.memory.watch_with(os.dup(fds[0]))
        shared = _copies(core.state_page.fd, heir.doorbell, book)
    if heir is not session:
        heir.go_on_with(session)
    heir.greeted = True
    regions.watch_all(heir)
    heir.arenas.find_all()
    welcome = Welcome(
        version=PROTOCOL_VERSION,
        server_pid=os.getpid(),
        gid=core.link.endpoint.gid,
        port=core.link.endpoint.port,
        mtu=core.link.mtu,
        exchange_host=core.exchange_host,
        exchange_port=core.exchange_port,
        limits=core.limits.as_dict(),
        watching=heir.memory.watching,
    )
    heir.answer(request, [welcome], shared)
    return Answer([])


def _reclaim(session: Session, request: Reclaim) -> Answer:
    objects, wanted = session.objects, set(request.shares)
    handles = {domain: handle_ for handle_, domain in objects.domains.items()}
    by_region = {entry.region: entry for entry in objects.regions.values()}
    pd: int | None = None
    kept: list[ReclaimedShare] = []
    for share in list(objects.shares.values()):
        entry = by_region[share.region]
        if share.name not in wanted:
            regions.withdraw(session, share, "withdrawn")
            regions.deregister(session, entry)
            continue
        pd, key = handles[entry.domain], entry.region
        kept.append(ReclaimedShare(share.name, entry.object_id, key.lkey, key.rkey, entry.watched))
    return Answer([Reclaimed(pd=pd, shares=kept)])


def _alloc_pd(session: Session, _request: AllocPd) -> Answer:
    objects = session.objects
    objects.usage.take(pds=1)
    handle_ = objects.new_handle()
    objects.domains[handle_] = Domain(session.core.nic)
    return Answer([Handle(handle=handle_)])


def _dealloc_pd(session: Session, request: DeallocPd) -> Answer:
    objects = session.objects
    find(objects.domains, request.pd, "protection domain").close()
    del objects.domains[request.pd]
    objects.usage.give(pds=1)
    return Answer([Done()])


def _register(session: Session, request: Register) -> Answer:
    region = regions.register(session, request)
    key = region.region
    return Answer([Registered(mr=region.object_id, lkey=key.lkey, rkey=key.rkey, watched=region.watched)])


def _deregister(session: Session, request: Deregister) -> Answer:
    region = find(session.objects.regions, request.mr, "region")
    regions.withdraw_all(session, "withdrawn", of=region)
    regions.deregister(session, region)
    return Answer([Done()])


def _publish(session: Session, request: Publish) -> Answer:
    region = find(session.objects.regions, request.mr, "region")
    layout = ArrayLayout(request.dtype, tuple(request.shape), tuple(request.strides), request.offset)
    share = regions.publish(session, region, layout)
    return Answer([Published(share=share.name, token=share.token)])


def _withdraw(session: Session, request: Withdraw) -> Answer:
    regions.withdraw(session, find(session.objects.shares, request.share, "share"), "withdrawn")
    return Answer([Done()])


def _create_channel(session: Session, _request: CreateChannel) -> Answer:
    objects = session.objects
    objects.usage.take(channels=1, descriptors=1)
    try:
        for_client, ours = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        objects.usage.give(channels=1, descriptors=1)
        raise
    handle_ = objects.new_handle()
    objects.channels[handle_] = ClientChannel(ours)
    return Answer([Handle(handle=handle_)], [for_client])


def _destroy_channel(session: Session, request: DestroyChannel) -> Answer:
    objects = session.objects
    channel = find(objects.channels, request.channel, "completion channel")
    if channel.n_users:
        raise refuse(f"the channel is used by {channel.n_users} completion queues", errno.EBUSY)
    del objects.channels[request.channel]
    os.close(channel.fd)
    objects.usage.give(channels=1, descriptors=1)
    return Answer([Done()])


def _create_cq(session: Session, request: CreateCq) -> Answer:
    cq, fd = queues.create_cq(session, request)
    return Answer([Handle(handle=cq.object_id)], [fd])


def _destroy_cq(session: Session, request: DestroyCq) -> Answer:
    queues.destroy_cq(session, find(session.objects.cqs, request.cq, "completion queue"))
    return Answer([Done()])


def _create_qp(session: Session, request: CreateQp) -> Answer:
    qp, layout, fd = queues.create_qp(session, request)
    created = QpCreated(
        qpn=qp.object_id,
        caps=layout.caps,
        send_stride=layout.send_stride,
        recv_stride=layout.recv_stride,
        recv_offset=layout.recv_offset,
        n_bytes=layout.n_bytes,
    )
    return Answer([created], [fd])


def _modify_qp(session: Session, request: ModifyQp) -> Answer:
    qp = find(session.objects.qps, request.qpn, "queue pair").qp
    session.core.nic.modify_qp(qp, request.attr, session.core.clock())
    return Answer([Done()])


def _query_qp(session: Session, request: QueryQp) -> Answer:
    qp = find(session.objects.qps, request.qpn, "queue pair").qp
    return Answer([QpAttributes(attr=session.core.nic.query_qp(qp), caps=qp.caps)])


def _destroy_qp(session: Session, request: DestroyQp) -> Answer:
    queues.destroy_qp(session, find(session.objects.qps, request.qpn, "queue pair"))
    return Answer([Done()])


def _stat(session: Session, _request: GetStat) -> Answer:
    return Answer(stat.pages(session.core))


def _create_arena(session: Session, request: CreateArena) -> Answer:
    handle_, arena, fds = session.arenas.create(request)
    created = ArenaCreated(arena=handle_, n_pages=arena.n_pages, budget_bytes=arena.budget_bytes)
    return Answer([created], fds)


def _reclaim_arena(session: Session, fds: Sequence[int]) -> Answer:
    try:
        handle_, arena = session.arenas.reclaim(fds[0])
    finally:
        close_all(fds)
    return Answer([ArenaCreated(arena=handle_, n_pages=arena.n_pages, budget_bytes=arena.budget_bytes)])


def _destroy_arena(session: Session, request: DestroyArena) -> Answer:
    session.arenas.destroy(request.arena)
    return Answer([Done()])


def _discard_range(session: Session, request: DiscardRange) -> Answer:
    session.arenas.discard(request, lambda: session.answer(request, [Done()]))
    return Answer([])


def _set_budget(session: Session, request: SetBudget) -> Answer:
    session.arenas.set_budget(request.arena, request.budget_bytes, lambda: session.answer(request, [Done()]))
    return Answer([])


def _prefetch(session: Session, request: Prefetch) -> Answer:
    number, n_bytes = session.arenas.prefetch(request)
    return Answer([PrefetchStarted(prefetch=number, n_bytes=n_bytes)])


def _query_prefetch(session: Session, request: QueryPrefetch) -> Answer:
    return Answer([session.arenas.prefetch_state(request.prefetch, cancel=False)])


def _cancel_prefetch(session: Session, request: CancelPrefetch) -> Answer:
    return Answer([session.arenas.prefetch_state(request.prefetch, cancel=True)])


def _copies(*fds: int) -> list[int]:
    """Duplicate descriptors for the client.

    Raises:
        OSError: out of descriptors; none was duplicated.
    """
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        close_all(copies)
        raise
    return copies


_HANDLERS: dict[type[Request], Callable[[Session, Any], Answer]] = {
    Reclaim: _reclaim,
    AllocPd: _alloc_pd,
    DeallocPd: _dealloc_pd,
    Register: _register,
    Deregister: _deregister,
    Publish: _publish,
    Withdraw: _withdraw,
    CreateChannel: _create_channel,
    DestroyChannel: _destroy_channel,
    CreateCq: _create_cq,
    DestroyCq: _destroy_cq,
    CreateQp: _create_qp,
    ModifyQp: _modify_qp,
    QueryQp: _query_qp,
    DestroyQp: _destroy_qp,
    GetStat: _stat,
    CreateArena: _create_arena,
    DestroyArena: _destroy_arena,
    DiscardRange: _discard_range,
    SetBudget: _set_budget,
    Prefetch: _prefetch,
    QueryPrefetch: _query_prefetch,
    CancelPrefetch: _cancel_prefetch,
}
