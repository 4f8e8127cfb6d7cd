"""Messages about managed memory: arenas, who maps them, budgets, prefetches.

An arena is a number of one client. Places in it are byte offsets from its first byte, so that they mean the same in
every process that maps it, wherever it maps it.
"""

from __future__ import annotations

from enum import StrEnum

from nopin.control.messages import Event, Reply, Request


class MapperKind(StrEnum):
    """Which process maps an arena."""

    OWNER = "owner"
    """The client itself."""
    WORKER = "worker"
    """An accelerator worker: it maps the arena at the owner's addresses, and its faults are device faults."""
    CHILD = "child"
    """The client itself, a forked child of a process that maps the arena (`accel.forked`). It owns nothing, and need
    not say Hello; the arena is named by its file."""


class CreateArena(Request, tag="create_arena"):
    """Make an arena. Answered by ArenaCreated; beside it the memfd of its bytes, that of its page table,
    and the two ends of a store of descriptors.

    The client keeps all of them open, mapped or not, for as long as it wants the arena: they are what a new server
    starts from when this one dies.

    Attributes:
        capacity_bytes: whole pages; costs nothing until touched.
        budget_bytes: resident at most; None: whatever the device's budget leaves.
        name: for figures.
    """

    capacity_bytes: int
    budget_bytes: int | None = None
    name: str = ""


class ArenaCreated(Reply, tag="arena_created"):
    """A new arena.

    Attributes:
        budget_bytes: as granted.
    """

    arena: int
    n_pages: int
    budget_bytes: int


class ReclaimArena(Request, tag="reclaim_arena"):
    """Claim an arena that a new server has taken over; beside it the memfd of its bytes. Answered by ArenaCreated,
    without descriptors. The client has it mapped.
    """


class MapArena(Request, tag="map_arena"):
    """A process has mapped an arena and registered it; have its faults served. Answered by Handle: the mapper.
    A CHILD that is served already, because it asked a server that was killed before it could answer, is told so again.

    Beside it: the userfaultfd of that process, with `[base, base + length)` registered for missing, minor and
    write-protect faults; for a WORKER then a pidfd of that process, for a CHILD the arena's memfd. The process keeps a
    copy of its userfaultfd: without one, a server that dies would let it read zeros where its bytes are not.

    Attributes:
        base: where `offset` lies in the process.
        offset: first byte of the arena that is mapped, whole pages.
        length: bytes mapped, whole pages.
        uffd_features: bits of the userfaultfd's handshake.
    """

    arena: int
    base: int
    offset: int
    length: int
    uffd_features: int
    kind: MapperKind = MapperKind.OWNER


class DestroyArena(Request, tag="destroy_arena"):
    """Give an arena up: bytes, swap and all. Refused (EBUSY) while the client itself maps some of it.

    Where a forked child still maps it, it lives on until that has ended.
    """

    arena: int


class DiscardRange(Request, tag="discard_range"):
    """Bytes are not wanted any more: they read as zeros afterwards, frames and swap are free.

    Attributes:
        offset: first byte, whole pages; `length` in bytes, whole pages.
    """

    arena: int
    offset: int
    length: int


class SetBudget(Request, tag="set_budget"):
    """Change how many bytes may be resident, of one arena or (None) of all of this client's together."""

    budget_bytes: int
    arena: int | None = None


class Prefetch(Request, tag="prefetch"):
    """Make bytes resident in the background. Answered by PrefetchStarted; at its end PrefetchDone is told.

    Attributes:
        ranges: (offset, length) in bytes, in the order wanted; pages they touch are brought once.
        write: they are going to be written.
    """

    arena: int
    ranges: list[tuple[int, int]]
    write: bool = False


class PrefetchStarted(Reply, tag="prefetch_started"):
    """A prefetch runs; `n_bytes` is what it will make resident, whole pages."""

    prefetch: int
    n_bytes: int


class QueryPrefetch(Request, tag="query_prefetch"):
    """Ask how far a prefetch is. Answered by PrefetchState; one that has ended is forgotten with the answer."""

    prefetch: int


class CancelPrefetch(Request, tag="cancel_prefetch"):
    """Start no further part of a prefetch. Answered by PrefetchState; PrefetchDone follows if it still ran."""

    prefetch: int


class PrefetchState(Reply, tag="prefetch_state"):
    """How far a prefetch is.

    Attributes:
        bytes_done: bytes it has made resident, whole pages; the pager may have taken some back since.
        ended: it does nothing any more.
        reason: why it ended early: a name of `mm.space.Reason` in small letters, or "cancelled"; else empty.
    """

    prefetch: int
    bytes_done: int
    ended: bool
    reason: str = ""


class PrefetchDone(Event, tag="prefetch_done"):
    """A prefetch has ended; `object_id` is its number, `cause` the reason as in PrefetchState."""

    bytes_done: int = 0


ArenaRequest = (
    CreateArena
    | ReclaimArena
    | MapArena
    | DestroyArena
    | DiscardRange
    | SetBudget
    | Prefetch
    | QueryPrefetch
    | CancelPrefetch
)
ArenaReply = ArenaCreated | PrefetchStarted | PrefetchState | PrefetchDone
