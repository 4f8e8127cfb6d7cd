"""The arenas of one client: requests about them, and what becomes of them when it ends.

An arena outlives its client's connection as long as a process maps it: its bytes are a program's data, and a closed
connection is no reason to lose them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nopin.control.arena_messages import (
    CreateArena,
    DiscardRange,
    MapArena,
    MapperKind,
    PrefetchDone,
    PrefetchState,
)
from nopin.control.arena_messages import Prefetch as PrefetchRequest
from nopin.control.messages import Event
from nopin.control.packets import close_all
from nopin.errors import HostLacks, UsageError
from nopin.linux.fd_identity import identity_of
from nopin.linux.paging_uffd import NEEDED, PagingUffd
from nopin.linux.pidfd import PidFd, pid_of
from nopin.linux.uffd_handshake import Feature
from nopin.mm.effects import PageRun
from nopin.nic.abi import AsyncEventType
from nopin.server.arena import Arena
from nopin.server.client_memory import ClientMemory
from nopin.server.core import Core
from nopin.server.limits import Usage
from nopin.server.mapper import Mapper, Placed
from nopin.server.objects import find
from nopin.server.owner_view import OwnerView
from nopin.server.prefetches import Prefetch, pages_of
from nopin.server.refusal import refuse
from nopin.server.registry import Record
from nopin.units import PAGE_BYTES, PAGE_MASK

_ARENA_DESCRIPTORS = 5
_MAPPER_DESCRIPTORS = 3
_NAME_MAX = 200
PREFETCHES_KEPT = 256


@dataclass(slots=True)
class _Owned:
    arena: Arena
    n_descriptors: int


class ClientArenas:
    """What one client has of managed memory.

    Args:
        process: the client's.
        usage: counts against its limits.
        new_handle: numbers for its objects.
        emit: sends it an event.
        memory: its address space, where devices are to find its arenas.
    """

    def __init__(
        self,
        core: Core,
        process: PidFd,
        usage: Usage,
        new_handle: Callable[[], int],
        emit: Callable[[Event], None],
        memory: ClientMemory,
    ) -> None:
        self._core = core
        self._process = process
        self._usage = usage
        self._new_handle = new_handle
        self._emit = emit
        self._memory = memory
        self._owned: dict[int, _Owned] = {}
        self._prefetches: dict[int, Prefetch] = {}
        self._family = core.arena_maker.new_family()

    def rows(self) -> list[tuple[int, Arena]]:
        """Every arena by the client's number for it."""
        return [(handle, owned.arena) for handle, owned in self._owned.items()]

    def arena(self, handle: int) -> Arena:
        """Return an arena by the client's number for it.

        Raises:
            ServerRefused: there is none.
        """
        return find(self._owned, handle, "arena").arena

    def create(self, request: CreateArena) -> tuple[int, Arena, list[int]]:
        """Make an arena; returns its number, itself, and copies of its two files for the client.

        Raises:
            ServerRefused: over a limit, or the host lacks what it takes.
        """
        if request.capacity_bytes <= 0 or request.capacity_bytes & PAGE_MASK:
            raise refuse(f"a capacity of {request.capacity_bytes} bytes is not a number of pages", errno.EINVAL)
        if request.budget_bytes is not None and request.budget_bytes < PAGE_BYTES:
            raise refuse(f"a budget of {request.budget_bytes} bytes is less than a page", errno.EINVAL)
        if len(request.name) > _NAME_MAX:
            raise refuse(f"an arena's name of {len(request.name)} characters, over {_NAME_MAX}", errno.EINVAL)
        taken = {"arenas": 1, "arena_bytes": request.capacity_bytes, "descriptors": _ARENA_DESCRIPTORS}
        self._usage.take(**taken)
        try:
            own = None if request.budget_bytes is None else request.budget_bytes // PAGE_BYTES
            name = request.name or f"pid {self._process.pid}"
            parts = self._core.arena_maker.make(name, request.capacity_bytes // PAGE_BYTES, own, self._family)
        except HostLacks as problem:
            self._usage.give(**taken)
            raise refuse(str(problem), errno.EOPNOTSUPP, "host") from problem
        except OSError:
            self._usage.give(**taken)
            raise
        arena = self._core.arenas.create(name, parts)
        self._core.iommu.attach(parts.device)
        handle = self._own(arena, _ARENA_DESCRIPTORS)
        copies: list[int] = []
        try:
            for fd in (parts.frames.fd, parts.table_fd, *parts.store.ends):
                copies.append(os.dup(fd))
        except OSError:  # out of descriptors
            close_all(copies)
            self._forget(handle)
            raise
        return handle, arena, copies

    def reclaim(self, memory_fd: int) -> tuple[int, Arena]:
        """Own an arena that was taken over, and that this process has mapped; returns its number and itself.

        Args:
            memory_fd: the file of its bytes; stays the caller's.

        Raises:
            ServerRefused: there is no such arena, or it has an owner; or over a limit.
        """
        arena = self._of_file(memory_fd)
        if arena is None or arena.wanted or not self._maps(arena):
            raise refuse("this is no arena that was taken over and is waiting for this process", errno.ENOENT)
        n_descriptors = _ARENA_DESCRIPTORS + _MAPPER_DESCRIPTORS * len(arena.mappers)
        self._usage.take(arenas=1, arena_bytes=arena.n_pages * PAGE_BYTES, descriptors=n_descriptors)
        arena.wanted = True
        if not self._owned:
            self._family = arena.parts.family
        arena.parts.join(self._family)
        return self._own(arena, n_descriptors), arena

    def join(self, request: MapArena, fds: list[int]) -> int:
        """Serve this process, a forked child; owns the descriptors. Returns the mapper's number.

        Raises:
            ServerRefused: there is no such arena, the place is none, or the descriptors are something else.
            OSError: the arena's store is full.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(close_all, fds)
            arena = self._of_file(fds[-1])
            if arena is None:
                raise refuse("this is no arena", errno.ENOENT)
            place = _place(request, arena.n_pages)
            for mapper in arena.mappers:
                if mapper.places == [place] and _is_of(mapper, self._process.pid) and not mapper.uffd.gone():
                    return mapper.number  # taken over from a server that was killed before it could answer
            process = PidFd(self._process.pid, os.dup(self._process.fileno()))
            stack.callback(process.close)
            uffd = _uffd_of(request, fds)
            stack.callback(uffd.close)
            mapper = arena.map(uffd, place, process, worker=False)
            stack.pop_all()
            close_all(fds)
            return mapper.number

    def _of_file(self, memory_fd: int) -> Arena | None:
        wanted = identity_of(memory_fd)
        arenas = self._core.arenas.all.values()
        return next((each for each in arenas if identity_of(each.parts.frames.fd) == wanted), None)

    def _maps(self, arena: Arena) -> bool:
        return any(_is_of(mapper, self._process.pid) for mapper in arena.mappers)

    def _own(self, arena: Arena, n_descriptors: int) -> int:
        handle = self._new_handle()
        arena.parts.news.pages_lost = partial(self._lost, handle)
        arena.parts.news.swap_full = partial(self._swap_full, handle)
        self._owned[handle] = _Owned(arena, n_descriptors)
        return handle

    def map(self, request: MapArena, fds: list[int]) -> int:
        """Serve a process that maps part of an arena; owns the descriptors. Returns the mapper's number.

        Raises:
            ServerRefused: the place is none, or the descriptors are something else.
            OSError: the arena's store is full.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(close_all, fds)
            owned = find(self._owned, request.arena, "arena")
            place = _place(request, owned.arena.n_pages)
            worker = request.kind is MapperKind.WORKER
            process = _process_of(fds) if worker else PidFd(self._process.pid, os.dup(self._process.fileno()))
            stack.callback(process.close)
            uffd = _uffd_of(request, fds)
            stack.callback(uffd.close)
            self._usage.take(descriptors=_MAPPER_DESCRIPTORS)
            stack.callback(self._usage.give, descriptors=_MAPPER_DESCRIPTORS)
            view = None if worker else self._view(owned.arena)
            if not worker:
                self._note(owned.arena)
            mapper = owned.arena.map(uffd, place, process, worker=worker, view=view)
            stack.pop_all()
            owned.n_descriptors += _MAPPER_DESCRIPTORS
            return mapper.number

    def find_all(self) -> None:
        """Show devices the arenas that this process has mapped already, by another connection or a dead server."""
        for arena in self._core.arenas.all.values():
            for mapper in arena.mappers:
                if _is_of(mapper, self._process.pid):
                    arena.show(mapper, self._view(arena))

    def _note(self, arena: Arena) -> None:
        """Note where a successor finds an arena; of a process that is gone there is nothing to note."""
        with contextlib.suppress(OSError):
            arena.record = Record.of(self._process.pid, list(arena.parts.store.ends))
            self._core.registry.add_arena(arena.record)

    def _view(self, arena: Arena) -> OwnerView:
        """Return how the arena shows in the client's own address space.

        Raises:
            ServerRefused: that address space cannot be reached.
        """
        memory = self._memory
        return OwnerView(self._core.iommu, memory.plain_pasid(), arena.parts.device, memory.tell)

    def destroy(self, handle: int) -> None:
        """Give an arena up.

        Raises:
            ServerRefused: there is none, or the client still maps it.
        """
        owned = find(self._owned, handle, "arena")
        if self._maps(owned.arena):
            raise refuse("the arena is still mapped: unmap it first", errno.EBUSY)
        self._forget(handle)

    def discard(self, request: DiscardRange, done: Callable[[], None]) -> None:
        """Make bytes read as zeros; `done` once they do.

        Raises:
            ServerRefused: not whole pages of an arena.
        """
        arena = self.arena(request.arena)
        end = request.offset + request.length
        if (request.offset | request.length) & PAGE_MASK or not 0 <= request.offset < end <= arena.n_pages * PAGE_BYTES:
            raise refuse(f"[{request.offset}, {end}) is not whole pages of the arena", errno.EINVAL)
        run = PageRun(request.offset // PAGE_BYTES, request.length // PAGE_BYTES)
        arena.runner.start(arena.pager.discard(run), lambda _: done())

    def prefetch(self, request: PrefetchRequest) -> tuple[int, int]:
        """Start a prefetch; returns its number and the bytes it is about.

        Raises:
            ServerRefused: a range outside the arena, or too many prefetches at once.
        """
        arena = self.arena(request.arena)
        n_bytes = arena.n_pages * PAGE_BYTES
        for offset, length in request.ranges:
            if offset < 0 or length < 0 or offset + length > n_bytes:
                raise refuse(f"[{offset}, {offset + length}) is not in the arena of {n_bytes} bytes", errno.EINVAL)
        self._make_room_for_prefetch()
        number = self._new_handle()

        def ended(prefetch: Prefetch) -> None:
            self._emit(
                PrefetchDone(
                    kind=int(AsyncEventType.PREFETCH_DONE),
                    object_id=number,
                    cause=prefetch.reason,
                    bytes_done=prefetch.bytes_done,
                )
            )

        made = Prefetch(arena, pages_of(request.ranges), write=request.write, soon=self._core.arenas.soon, ended=ended)
        self._prefetches[number] = made
        return number, made.n_bytes

    def prefetch_state(self, number: int, *, cancel: bool) -> PrefetchState:
        """Say how far a prefetch is, and forget it if it has ended; `cancel` it first if asked to.

        Raises:
            ServerRefused: there is none of that number.
        """
        prefetch = find(self._prefetches, number, "prefetch")
        if cancel:
            prefetch.cancel()
        if not prefetch.running:
            del self._prefetches[number]
        return PrefetchState(
            prefetch=number, bytes_done=prefetch.bytes_done, ended=not prefetch.running, reason=prefetch.reason
        )

    def set_budget(self, handle: int | None, budget_bytes: int, done: Callable[[], None]) -> None:
        """Change how much may be resident, of one arena or (None) of all together; `done` once no more is.

        Raises:
            ServerRefused: there is no such arena, or the budget is less than a page.
        """
        if budget_bytes < PAGE_BYTES:
            raise refuse(f"a budget of {budget_bytes} bytes is less than a page", errno.EINVAL)
        n_pages = budget_bytes // PAGE_BYTES
        if handle is not None:
            arenas = {self.arena(handle): n_pages}
            self.arena(handle).parts.remember_budgets(n_pages)
        else:
            self._family.budget.n_pages = n_pages
            arenas = {owned.arena: owned.arena.parts.budget.n_pages for owned in self._owned.values()}
            for arena in arenas:
                arena.parts.remember_budgets(arena.parts.entry.budget_pages)
        left = set(arenas)
        if not left:
            done()

        def one_done(arena: Arena) -> None:
            left.discard(arena)
            if not left:
                done()

        for arena, n in arenas.items():  # each gives back until its own and the common budget are kept
            arena.set_budget(n * PAGE_BYTES, partial(one_done, arena))

    def end(self) -> None:
        """The client is gone, or its connection is."""
        for prefetch in self._prefetches.values():
            prefetch.cancel()
        for handle in list(self._owned):
            self._forget(handle)

    def _forget(self, handle: int) -> None:
        owned = self._owned.pop(handle)
        for prefetch in self._prefetches.values():
            if prefetch.arena is owned.arena:
                prefetch.cancel()
        n_bytes = owned.arena.n_pages * PAGE_BYTES
        self._usage.give(arenas=1, arena_bytes=n_bytes, descriptors=owned.n_descriptors)
        owned.arena.give_up()

    def _lost(self, handle: int, page: int) -> None:
        start = page * PAGE_BYTES
        kind = int(AsyncEventType.ARENA_PAGES_LOST)
        self._emit(Event(kind=kind, object_id=handle, cause="lost", start=start, end=start + PAGE_BYTES))

    def _swap_full(self, handle: int) -> None:
        self._emit(Event(kind=int(AsyncEventType.ARENA_SWAP_FULL), object_id=handle, cause="swap_full"))

    def _make_room_for_prefetch(self) -> None:
        """Forget prefetches that ended long ago and were never asked about."""
        if len(self._prefetches) < PREFETCHES_KEPT:
            return
        ended = [number for number, prefetch in self._prefetches.items() if not prefetch.running]
        if not ended:
            raise refuse(f"{PREFETCHES_KEPT} prefetches are under way", errno.EAGAIN, "limit")
        del self._prefetches[ended[0]]


def _is_of(mapper: Mapper, pid: int) -> bool:
    return not mapper.worker and mapper.process.pid == pid


def _place(request: MapArena, n_pages: int) -> Placed:
    """Check where an arena is said to be mapped.

    Raises:
        ServerRefused: not whole pages of the arena at user addresses.
    """
    base, offset, length = request.base, request.offset, request.length
    aligned = not (base | offset | length) & PAGE_MASK
    if not aligned or length <= 0 or offset < 0 or base <= 0 or base + length >= 1 << 47:
        raise refuse(f"{length} bytes at {base:#x} are no place for an arena", errno.EINVAL)
    if offset + length > n_pages * PAGE_BYTES:
        raise refuse(f"[{offset}, {offset + length}) is not in the arena", errno.EINVAL)
    return Placed(offset // PAGE_BYTES, length // PAGE_BYTES, base)


def _uffd_of(request: MapArena, fds: list[int]) -> PagingUffd:
    """Return the userfaultfd beside a request, the first descriptor, which is taken out of the list.

    Raises:
        ServerRefused: it is none, or lacks features.
    """
    if Feature(request.uffd_features) & NEEDED != NEEDED:
        raise refuse("the userfaultfd was opened without features that paging needs", errno.EINVAL)
    try:
        uffd = PagingUffd(fds[0])
    except UsageError as problem:
        raise refuse(f"the descriptor beside MapArena: {problem}", errno.EINVAL) from problem
    del fds[0]
    return uffd


def _process_of(fds: list[int]) -> PidFd:
    """Return the process of a pidfd, the last descriptor, which is taken out of the list.

    Raises:
        ServerRefused: it is none, or of a process that has ended.
    """
    pid = pid_of(fds[-1])
    if pid is None or pid <= 0:
        raise refuse("the second descriptor beside MapArena is no pidfd of a running process", errno.EINVAL)
    return PidFd(pid, fds.pop())
