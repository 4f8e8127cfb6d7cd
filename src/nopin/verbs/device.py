"""The device: a process's access to a device server, and the root of all its objects."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nopin.control.arena_messages import SetBudget
from nopin.control.messages import Event, GetStat, Reclaim, Reclaimed, Stat
from nopin.control.paths import default_socket_path
from nopin.errors import NopinError, ServerGone, ServerRefused, UsageError
from nopin.linux.interpreter import fill_standard_streams
from nopin.nic.abi import Access, AsyncEventType, Discipline
from nopin.pending import checked_timeout
from nopin.verbs.accelerator import DEPTH, Accelerator, introduce_worker
from nopin.verbs.access import AccessLike, parse_access, parse_discipline
from nopin.verbs.arena import CAPACITY_BYTES, Arena, Order, size_of
from nopin.verbs.buffers import Memory, memory_of
from nopin.verbs.channel import CompletionChannel
from nopin.verbs.child_server import connect_or_start
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.events import AsyncEvent
from nopin.verbs.lifeline import RECONNECT_S, Lifeline, patience
from nopin.verbs.objects import DeviceObject
from nopin.verbs.pd import ProtectionDomain
from nopin.verbs.prefetch import Prefetch, start_prefetch
from nopin.verbs.qp import QueuePair
from nopin.verbs.region import MemoryRegion
from nopin.verbs.session import Session
from nopin.verbs.share import Share
from nopin.verbs.waiting import SPIN_US


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the device server says about itself.

    Attributes:
        gid: 16 bytes, its RoCEv2 address; `port` its UDP port.
        mtu: the largest path MTU, bytes.
        limits: the most this client may have, by name.
        watching: munmap, mremap, madvise and fork of registered memory arrive as events.
    """

    gid: bytes
    port: int
    mtu: int
    limits: dict[str, int]
    server_pid: int
    exchange_host: str
    exchange_port: int
    watching: bool


class Device(DeviceObject):
    """A connection to a device server.

    It stays open until closed or until the process ends: dropping it does not end what it shares.

    Args:
        server: path of the server's socket; None for the user's default one, started as a child of this
            process when there is none.
        budget: how many bytes of its arenas together may be resident, a number or text such as "256MiB"; None for
            what the server has.
        reconnect: seconds to look for another server at the same path, when this one was killed; None for ever. The
            device goes on with it, and so do its arenas, its shares and what is attached; queue pairs, completion
            queues and regions do not: they raise `ServerGone`, and `events` tells of it once, by SERVER_REPLACED.

    Attributes:
        lifeline: its connection.
        arenas: its arenas, all of which its accelerators map.

    Raises:
        UsageError: the budget is no size, or `reconnect` no time.
        ServerGone: nobody listens at `server`.
        ServerRefused: the server does not want us; it has as many clients as it takes, for instance.
        ServerError: the default server does not start.
        HostLacks: it does not for want of a feature; `nopin doctor` tells all.
    """

    def __init__(
        self,
        server: str | Path | None = None,
        *,
        budget: int | str | None = None,
        reconnect: float | None = RECONNECT_S,
    ) -> None:
        budget_bytes = None if budget is None else size_of(budget)
        patience_s = patience(reconnect)
        fill_standard_streams()
        session = connect_or_start(default_socket_path()) if server is None else Session(Path(server))
        self.lifeline = Lifeline(session, patience_s, self._resume)
        super().__init__(retired=session.retired)
        self._budget_bytes: int | None = None
        self._news: list[AsyncEvent] = []
        self._held: set[DeviceObject] = set()
        self.arenas: list[Arena] = []
        self._default_arena: Arena | None = None
        self._making_arena = threading.Lock()
        _open.add(self)
        if budget_bytes is not None:
            self.set_budget(budget_bytes)

    def _described(self) -> str:
        return f"at {self.lifeline.current.control.path}"

    @property
    def session(self) -> Session:
        """The connection to the server, or to the one that came after it.

        Raises:
            ServerGone: there is none, and none came in time.
        """
        return self.lifeline.session

    def share(
        self,
        what: object = None,
        length: int | None = None,
        *,
        access: AccessLike = "rw",
        discipline: Discipline | str = "on-demand",
    ) -> Share:
        """Let peers reach memory of this process in place; nothing is copied, touched or (on demand) pinned.

        Args:
            what: a numpy array or anything with the buffer protocol; an address, with `length`; nothing for
                the whole process, each mapping with its own permissions.
            length: bytes, for an address.
            access: letters of r (read), w (write), a (atomic). "rw" includes atomics, which do nothing to memory
                that a read and a write could not; a verbs registration names each right.
            discipline: "on-demand", "short-term" or "pinned".

        Raises:
            UsageError: no such memory, no right for peers, or writing asked for a read-only buffer.
            ServerRefused: the server refused, or the memory cannot be pinned.
        """
        self._require_open()
        memory = memory_of(what, length)
        rights, how = _with_atomics(parse_access(access)), parse_discipline(discipline)
        if not rights & (Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC):
            raise UsageError(
                f"access {access!r} grants peers nothing; write letters of r (read), w (write), a (atomic)"
            )
        return self.lifeline.make(lambda _: self._share(memory, rights, how))

    def _share(self, memory: Memory, rights: Access, how: Discipline) -> Share:
        region = MemoryRegion(self.default_pd, memory, rights, how, None)
        try:
            return Share(self, region, memory)
        except BaseException:
            region.close()
            raise

    def alloc_pd(self) -> ProtectionDomain:
        """Make a protection domain."""
        return ProtectionDomain(self)

    def create_channel(self) -> CompletionChannel:
        """Make a completion channel."""
        self._require_open()
        return CompletionChannel(self)

    def create_cq(
        self, depth: int = 256, channel: CompletionChannel | None = None, *, spin_us: int = SPIN_US
    ) -> CompletionQueue:
        """Make a completion queue for `depth` completions; `wait` looks for `spin_us` before it sleeps."""
        self._require_open()
        return CompletionQueue(self, depth, channel, spin_us=spin_us)

    def accelerator(self, workers: int = 1, *, depth: int = DEPTH) -> Accelerator:
        """Make an accelerator: `workers` processes that compute on this device's arenas, at the same addresses.

        Args:
            workers: jobs that can run at once, from 1 to 64.
            depth: jobs that may wait.

        Raises:
            UsageError: one of the numbers makes no sense.
        """
        introduce = functools.partial(introduce_worker, self.lifeline)
        return Accelerator(self, lambda: tuple(self.arenas), introduce, workers=workers, depth=depth)

    def arena(self, capacity: int | str = CAPACITY_BYTES, budget: int | str | None = None, *, name: str = "") -> Arena:
        """Make an arena: memory whose pages come and go as they are needed, of this process and its devices.

        Args:
            capacity: bytes of addresses; they cost nothing until touched.
            budget: bytes that may be resident; None for whatever the device's budget leaves.
            name: for figures.

        Raises:
            UsageError: one of the sizes is none.
            ServerRefused: over a limit, or the server has no managed memory.
            HostLacks: no userfaultfd for this user.
        """
        self._require_open()
        n_bytes, n_budget_bytes = size_of(capacity), None if budget is None else size_of(budget)
        return self.lifeline.make(lambda _: Arena(self, n_bytes, n_budget_bytes, name))

    @property
    def default_arena(self) -> Arena:
        """The arena of `zeros`, `empty`, `asarray` and `numpy_memory`, made when it is first needed."""
        found = self._default_arena
        if found is not None and (not found.closed or self.closed):
            return found
        with self._making_arena:
            if self._default_arena is found:  # nobody else has made one meanwhile
                self._default_arena = self.arena()
            assert self._default_arena is not None
            return self._default_arena

    def zeros(self, shape: Any, dtype: DTypeLike = np.float64, order: Order = "C") -> NDArray[Any]:
        """Return an array of zeros in managed memory: a plain numpy array, whose pages the server brings when touched.

        It may be larger than the budget, and than memory. Its bytes are free once it and all its views are gone.

        Raises:
            ArenaFull: the arena has no room left.
            UsageError: an array of Python objects.
            ServerRefused, HostLacks: as `arena`.
        """
        return self.default_arena.zeros(shape, dtype, order)

    def empty(self, shape: Any, dtype: DTypeLike = np.float64, order: Order = "C") -> NDArray[Any]:
        """Return an array of arbitrary bytes in managed memory. Raises as `zeros`."""
        return self.default_arena.empty(shape, dtype, order)

    def asarray(self, what: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return an array in managed memory with these values: itself if it is in an arena already, else a copy.

        Raises as `zeros`.
        """
        plain = np.asarray(what, dtype)
        if any(arena.contains(plain) for arena in self.arenas):
            return plain
        return self.default_arena.asarray(plain)

    def prefetch(self, array: NDArray[Any], key: object = ..., *, write: bool = False) -> Prefetch:
        """Start making what `key` selects of an array in managed memory resident; returns at once.

        Args:
            key: as for numpy's basic indexing.
            write: it is going to be written.

        Returns:
            An operation to wait for, await or cancel; its result is the number of bytes made resident.

        Raises:
            UsageError: the array is in ordinary memory, or the key does not fit it.
            ServerRefused: too many prefetches are under way.
        """
        if not isinstance(array, np.ndarray):
            raise UsageError(
                f"prefetch is for arrays made with dev.zeros, dev.empty or dev.asarray, not {type(array).__name__}"
            )
        address: int = array.__array_interface__["data"][0]
        return start_prefetch(self, key, address, array.shape, array.strides, array.itemsize, write=write)

    def set_budget(self, budget: int | str) -> None:
        """Change how many bytes of all arenas together may be resident; no more are when this returns.

        Raises:
            UsageError: it is no size.
            ServerRefused: it is less than a page.
        """
        self._require_open()
        self._budget_bytes = n_bytes = size_of(budget)
        self.lifeline.through(lambda session: session.tell(SetBudget(seq=0, budget_bytes=n_bytes)))

    def close(self) -> None:
        """Close it, all its objects first. Arrays in its arenas live on, and are served, until they die."""
        for arena in list(self.arenas):
            arena._retire()
        super().close()

    def stat(self) -> list[dict[str, Any]]:
        """Return one row of figures for each object of this user, keys as the `rdma` tool prints them."""
        self._require_open()
        return self.lifeline.through(lambda session: session.request(GetStat(seq=0), Stat)[0].rows)

    def events(self, timeout: float | None = 0.0) -> list[AsyncEvent]:
        """Return the asynchronous events that came; wait up to `timeout` seconds for the first, None for ever.

        Raises:
            ServerGone: the server went away, and no other came in time.
            UsageError: `timeout` is no number.
        """
        self._require_open()
        timeout = checked_timeout(timeout)
        session = self.session
        news, self._news = self._news, []
        try:
            told = session.control.take_events(0.0 if news else timeout)
        except ServerGone:
            told = []
            if not news and self.session is not session:
                news, self._news = self._news, []
        return news + [self._event(each, session) for each in told]

    @property
    def info(self) -> DeviceInfo:
        """What the server said when we connected."""
        welcome = self.lifeline.current.welcome
        return DeviceInfo(
            gid=welcome.gid,
            port=welcome.port,
            mtu=welcome.mtu,
            limits=welcome.limits,
            server_pid=welcome.server_pid,
            exchange_host=welcome.exchange_host,
            exchange_port=welcome.exchange_port,
            watching=welcome.watching,
        )

    @functools.cached_property
    def default_pd(self) -> ProtectionDomain:
        """The protection domain of shares and remote arrays."""
        return ProtectionDomain(self)

    @functools.cached_property
    def whole_process(self) -> MemoryRegion:
        """The whole process as a region for local use: nothing needs registering for a transfer."""
        return self.default_pd.register(access=Access.LOCAL_WRITE)

    def _resume(self, session: Session, before: Session) -> None:
        """Claim what goes on with a new server: arenas and shares. All else is of the dead one, and stays dead.

        Raises:
            ServerGone: the new one was killed as well; to be called again with the next.
        """
        self._news += [self._event(each, before) for each in before.control.left_over()]
        lost: list[str] = []
        for arena in list(self.arenas):
            try:
                arena._resume(session)
            except ServerRefused as problem:
                lost.append(f"{arena!r}: {problem}")
        if self._budget_bytes is not None:
            session.tell(SetBudget(seq=0, budget_bytes=self._budget_bytes))
        shares = {each.name: each for each in list(self._held) if isinstance(each, Share) and not each.closed}
        reclaimed, _ = session.request(Reclaim(seq=0, shares=list(shares)), Reclaimed)
        self.__dict__.pop("whole_process", None)
        self.__dict__.pop("default_pd", None)
        if reclaimed.pd is not None:
            self.__dict__["default_pd"] = pd = ProtectionDomain.known(self, session, reclaimed.pd)
            for told in reclaimed.shares:
                shares.pop(told.share)._resume(session, pd, told)
        for each in shares.values():
            lost.append(repr(each))
            each._lose()
        server_pid = session.welcome.server_pid
        self._news.append(AsyncEvent(AsyncEventType.SERVER_REPLACED, None, server_pid, "; ".join(lost)))

    def _event(self, told: Event, session: Session) -> AsyncEvent:
        kind = AsyncEventType(told.kind)
        wanted = _ABOUT.get(kind, QueuePair)
        alike = (found for found in _descendants(self) if type(found) is wanted)
        target = next((found for found in alike if _number_of(found, session) == told.object_id), None)
        base = target.where.start if isinstance(target, Arena) else 0  # the server speaks of places in the arena
        return AsyncEvent(kind, target, told.object_id, told.cause, base + told.start, base + told.end, told.generation)

    def _has_server(self) -> bool:
        try:
            return not self.session.control.gone
        except ServerGone:
            return False

    def _hold(self, held: DeviceObject) -> None:
        """Keep an object alive until it is closed."""
        self._held.add(held)

    def _release(self, held: DeviceObject) -> None:
        self._held.discard(held)

    def _end(self) -> None:
        self.lifeline.close()

    def _let_go(self) -> None:
        self._held.clear()
        _open.discard(self)

    def _abandon(self) -> None:
        super()._abandon()
        self.lifeline.abandon()


_open: set[Device] = set()
_default: list[Device] = []
_making_default = threading.RLock()


def default_device() -> Device:
    """Return the process's own device for `attach`, made at first use."""
    with _making_default:
        if _default and (_default[0].closed or not _default[0]._has_server()):
            _default.pop().close()
        if not _default:
            _default.append(Device())
        return _default[0]


_ABOUT: dict[AsyncEventType, type[DeviceObject] | None] = {
    AsyncEventType.REGION_INVALIDATED: MemoryRegion,
    AsyncEventType.CQ_ERR: CompletionQueue,
    AsyncEventType.PREFETCH_DONE: None,
    AsyncEventType.ARENA_PAGES_LOST: Arena,
    AsyncEventType.ARENA_SWAP_FULL: Arena,
}
"""What events are about that are not about a queue pair."""


def _number_of(found: DeviceObject, session: Session) -> int | None:
    """What that server calls an object that events can be about; None for an object of another."""
    if isinstance(found, QueuePair):
        return found.qpn if found.session is session else None
    if isinstance(found, MemoryRegion | CompletionQueue | Arena):
        return found.handle if found.session is session else None
    return None


def _descendants(root: DeviceObject) -> set[DeviceObject]:
    found: set[DeviceObject] = set()
    fresh = {root}
    while fresh:
        found |= fresh
        fresh = {child for known in fresh for child in known._children} - found
    return found


def _close_all() -> None:
    """Let the server finish with our memory before the interpreter frees it."""
    for device in list(_open):
        try:
            device.close()
        except NopinError:
            continue  # the process ends; its server notices that as well


def _abandon_all() -> None:
    global _making_default
    _making_default = threading.RLock()  # it may be held by nobody
    for device in list(_open):
        device._abandon()
    _default.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)


@contextlib.contextmanager
def numpy_memory(where: Device | Arena) -> Iterator[None]:
    """Have every array that NumPy makes inside, in this thread or task, lie in managed memory.

    The arrays outlive the block, and are freed as any others. In a child process forked inside, new arrays are in
    ordinary memory.

    Args:
        where: an arena, or a device for its default one.

    Raises as `Device.zeros`; inside, NumPy raises MemoryError when the arena is full.
    """
    arena = where.default_arena if isinstance(where, Device) else where
    with arena.numpy_memory():
        yield


def _with_atomics(rights: Access) -> Access:
    """Grant atomics to whom reads and writes are granted."""
    both = Access.REMOTE_READ | Access.REMOTE_WRITE
    return rights | Access.REMOTE_ATOMIC if rights & both == both else rights
