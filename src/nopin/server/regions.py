"""Regions of a client: registration, what it hears about them, and publishing."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from nopin.control.messages import Event, Register
from nopin.control.share_book import ShareEntry
from nopin.control.url import TOKEN_BYTES, is_share_name
from nopin.errors import ServerRefused
from nopin.iommu.windows import page_run
from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.subscriber import Invalidation, Subscriber
from nopin.nic.abi import Access, AsyncEventType, Discipline
from nopin.nic.errors import VerbsError
from nopin.nic.mr import Region
from nopin.ranges import Range
from nopin.server.domain import Domain
from nopin.server.objects import ClientRegion, find
from nopin.server.refusal import refuse
from nopin.server.shares import ArrayLayout, Share
from nopin.units import PAGE_BYTES, U64_MAX

if TYPE_CHECKING:
    from nopin.server.session import Session


def register(session: Session, request: Register) -> ClientRegion:
    """Register memory of the client's process.

    Raises:
        ServerRefused: a limit is reached, the domain is unknown, the discipline impossible, or the memory out
            of our reach.
        VerbsError: EINVAL, an impossible range or impossible rights.
    """
    objects = session.objects
    domain = find(objects.domains, request.pd, "protection domain")
    discipline = _discipline(request)
    amounts = _amounts(pinned=discipline is Discipline.PINNED)
    objects.usage.take(**amounts)
    try:
        entry = _register(session, request, domain, discipline)
    except Exception:
        objects.usage.give(**amounts)
        raise
    objects.regions[entry.object_id] = entry
    _watch(session, entry)
    return entry


def deregister(session: Session, entry: ClientRegion) -> None:
    """Destroy a region: no access is under way in it afterwards. Requires: its shares are withdrawn."""
    session.core.nic.deregister(entry.region)
    entry.region.owner = None
    del session.objects.regions[entry.object_id]
    if entry.watch is not None:
        session.memory.unwatch(entry.watch)
    if entry.pinned_pasid is not None:
        session.memory.unpin(entry.pinned_pasid)
    session.objects.usage.give(**_amounts(pinned=entry.pinned_pasid is not None))


def publish(session: Session, entry: ClientRegion, layout: ArrayLayout) -> Share:
    """Let peers attach to an array inside a region.

    Raises:
        ServerRefused: a limit is reached.
        VerbsError: EINVAL, the array does not lie inside the region.
    """
    share = _publish(session, entry, layout, None)
    if session.book is not None:
        try:
            session.book.note(_entry_of(share, entry))
        except ServerRefused:
            withdraw(session, share, "withdrawn")
            raise
    return share


def restore(session: Session, pd: int, left: ShareEntry) -> ClientRegion:
    """Publish again what a killed server had published: the same memory, under the same name and token.

    Args:
        pd: handle of a protection domain.

    Raises:
        ServerRefused, VerbsError: it makes no sense, or the memory is out of our reach; nothing is kept.
    """
    if not is_share_name(left.name) or len(left.token) != TOKEN_BYTES:
        raise refuse("a share book names a share that can have no URL", errno.EINVAL)
    request = Register(
        seq=0,
        pd=pd,
        address=left.address,
        length=left.length,
        iova=left.iova,
        access=left.access,
        discipline=left.discipline,
        ring_fd=left.ring_fd,
    )
    entry = register(session, request)
    layout = ArrayLayout(left.dtype, tuple(left.shape), tuple(left.strides), left.offset)
    try:
        _publish(session, entry, layout, (left.name, left.token))
    except Exception:
        deregister(session, entry)
        raise
    return entry


def reclaimed(entry: ClientRegion) -> int:
    """Count the pages of managed memory in a region that the pager took from the device since it was registered.

    Where its owner moves arenas about meanwhile, this is of where they are now.
    """
    return max(0, _reclaimed_ever(entry.session, entry.region) - entry.reclaimed_before)


def _reclaimed_ever(session: Session, region: Region) -> int:
    n_pages, where = 0, Range(region.start, region.end)
    for window in session.core.iommu.windows(region.pasid):
        hit = where.intersection(Range(window.start, window.end))
        if hit is not None:
            run = PageRun(*page_run(window.at(hit.start), hit.length))
            n_pages += window.arena.mirror.reclaimed.count(run)
    return n_pages


def watch_all(session: Session) -> None:
    """Hear about changes of regions that were registered while the client's userfaultfd was not there."""
    for entry in session.objects.regions.values():
        if entry.watch is None:
            _watch(session, entry)


def _publish(session: Session, entry: ClientRegion, layout: ArrayLayout, known_as: tuple[str, bytes] | None) -> Share:
    objects = session.objects
    objects.usage.take(shares=1)
    try:
        share = session.core.shares.publish(entry.region, entry.domain, layout, session.pid, known_as)
    except VerbsError:
        objects.usage.give(shares=1)
        raise
    objects.shares[share.name] = share
    return share


def _entry_of(share: Share, entry: ClientRegion) -> ShareEntry:
    region, layout = entry.region, share.layout
    return ShareEntry(
        name=share.name,
        token=share.token,
        address=region.start,
        length=None if region.implicit else region.length,
        iova=region.iova,
        access=region.access,
        discipline=int(region.discipline),
        ring_fd=entry.ring_fd,
        dtype=layout.dtype,
        shape=list(layout.shape),
        strides=list(layout.strides),
        offset=layout.offset,
    )


def withdraw(session: Session, share: Share, cause: str) -> None:
    """Stop publishing: nobody can attach any more, and who is attached gets access errors and is told why."""
    if session.book is not None:
        session.book.strike(share.name)
    session.core.shares.withdraw(share, cause)
    del session.objects.shares[share.name]
    session.objects.usage.give(shares=1)


def withdraw_all(session: Session, cause: str, *, of: ClientRegion | None = None) -> None:
    """Withdraw the shares of one region, or of the whole client."""
    for share in list(session.objects.shares.values()):
        if of is None or share.region is of.region:
            withdraw(session, share, cause)


def _amounts(*, pinned: bool) -> dict[str, int]:
    """Say what a region counts as; a pinned one holds its ring and its window, mapped."""
    return {"regions": 1, "descriptors": 3 if pinned else 0}


def _register(session: Session, request: Register, domain: Domain, discipline: Discipline) -> ClientRegion:
    pinned_pasid = _pin(session, request) if discipline is Discipline.PINNED else None
    try:
        region = session.core.nic.register(
            domain.pd,
            pasid=session.memory.plain_pasid() if pinned_pasid is None else pinned_pasid,
            address=request.address,
            length=request.length,
            iova=request.iova,
            access=Access(request.access),
            discipline=discipline,
        )
    except Exception:
        if pinned_pasid is not None:
            session.memory.unpin(pinned_pasid)
        raise
    entry = ClientRegion(session, session.objects.new_handle(), region, domain, pinned_pasid, ring_fd=request.ring_fd)
    region.owner = entry
    entry.reclaimed_before = _reclaimed_ever(session, region)
    return entry


def _discipline(request: Register) -> Discipline:
    try:
        return Discipline(request.discipline)
    except ValueError:
        raise refuse(f"unknown discipline {request.discipline}", errno.EINVAL) from None


def _pin(session: Session, request: Register) -> int:
    if request.ring_fd is None or request.length is None:
        raise refuse("a pinned region needs a length and the client's io_uring (ring_fd)", errno.EINVAL)
    if not 0 < request.length <= U64_MAX + 1 - request.address or request.address < 0:
        raise refuse(f"range {request.address:#x} + {request.length:#x} is empty or wraps", errno.EINVAL)
    return session.memory.pin(request.ring_fd, request.address, request.length)


def _watch(session: Session, entry: ClientRegion) -> None:
    """Hear about changes of a region's range; a pinned one follows none, and the implicit one is everywhere."""
    region = entry.region
    if region.implicit or region.discipline is Discipline.PINNED or region.end > U64_MAX + 1 - PAGE_BYTES:
        return

    watch = session.memory.watch(Range(region.start, region.end), RegionWatch(entry))
    if watch is not None:
        entry.watch, entry.watched = watch


class RegionWatch(Subscriber):
    """Counts the changes of a region's range and tells the owner. It holds no translation, so it never needs time."""

    def __init__(self, entry: ClientRegion) -> None:
        self._entry = entry

    def invalidate_start(self, event: Invalidation) -> None:
        """Count one change and tell of each part that lies in the region."""
        region = self._entry.region
        region.meter.page_invalidations_handled += 1
        for hit in event.within(Range(region.start, region.end)):
            if event.cause is not Cause.FORK:
                region.meter.page_invalidations += hit.to_pages().length // PAGE_BYTES
            self._tell_owner(hit, event.cause)

    def _tell_owner(self, hit: Range, cause: Cause) -> None:
        entry = self._entry
        entry.generation += 1
        entry.session.emit(
            Event(
                kind=int(AsyncEventType.REGION_INVALIDATED),
                object_id=entry.object_id,
                cause=cause.value,
                start=hit.start,
                end=hit.end,
                generation=entry.generation,
            )
        )
