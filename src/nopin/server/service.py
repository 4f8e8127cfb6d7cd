"""A device server from start to end: put together, run, taken apart."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from nopin.control.paths import registry_path
from nopin.control.readiness import tell_lacking, tell_ready
from nopin.errors import HostLacks, ServerError, UsageError
from nopin.iommu.iommu import Iommu
from nopin.iommu.relay import Relay, relay_in_turn
from nopin.link.base import Link
from nopin.link.middleware import wrap
from nopin.link.raw import RawLink
from nopin.link.udp import bind_link
from nopin.linux.cpus import RunQueue, n_cpus
from nopin.linux.libc import keep_freed_memory
from nopin.linux.pidfd import PidFd
from nopin.linux.process_vm import require_process_vm
from nopin.nic.nic import Nic
from nopin.nic.wire.gid import address_of
from nopin.server.arena import Arena
from nopin.server.arena_maker import ArenaMaker
from nopin.server.arenas import Arenas
from nopin.server.clients import Clients, SocketFile
from nopin.server.config import ServeConfig
from nopin.server.copier import Copier
from nopin.server.core import Core, log
from nopin.server.elbow_room import ElbowRoom
from nopin.server.exchange import Exchange
from nopin.server.loop import Loop
from nopin.server.poller import Poller
from nopin.server.registry import Content, Place, Registry
from nopin.server.state_page import StatePage
from nopin.server.takeover import take_over
from nopin.server.timers import Timers
from nopin.server.workers import Workers
from nopin.units import US_NS

__all__ = ["ServeConfig", "serve"]

_BACKLOG = 128
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _unannounced(_host: str, _port: int) -> None:
    """Nobody waits for it."""


def serve(config: ServeConfig, when_ready: Callable[[str, int], None] = _unannounced) -> None:
    """Run a device server until SIGTERM, SIGINT or, with `parent_pid`, the parent's end.

    A server started by a parent leaves SIGINT to it: Ctrl-C reaches both, and the parent may want to go on.

    Args:
        when_ready: called with the address and TCP port where peers attach, once clients can connect.

    Raises:
        UsageError: an address or the middleware's text makes no sense.
        ServerError: another server has the socket, an address is taken, or the parent is gone already.
        HostLacks: the host forbids something asked for.
    """
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        with _lacks_told(config.ready_fd):
            require_process_vm()
            parent = None if config.parent_pid is None else _hold_parent(config.parent_pid, stack)
            core, exchange_socket, client_socket = _put_together(config, stack)
        core.arenas.on_broken = partial(_note_broken, core)
        core.arenas.on_gone = partial(_arena_gone, core)
        if config.takeover:
            take_over(core, core.registry.left)
        else:
            _refuse_to_leave_behind(core.registry.left, config)
            core.registry.disown()
        exchange = Exchange(core, exchange_socket)
        clients = Clients(core, client_socket)
        loop = _make_loop(core, config, stack)
        stack.enter_context(_stopped_by_signals(core, loop, with_sigint=parent is None))
        if parent is not None:
            core.poller.watch(parent.fileno(), lambda _mask: loop.stop())
        if config.ready_fd is not None:
            tell_ready(config.ready_fd)
        when_ready(core.exchange_host, core.exchange_port)
        log.info("serving %s, exchange %s:%d", config.socket_path, core.exchange_host, core.exchange_port)
        try:
            loop.run()
        finally:
            exchange.close("server stopping")
            clients.close()
            if core.registry.n_arenas:
                text = "%d arenas stay behind; the programs that use them wait for: nopin serve --takeover --socket %s"
                log.warning(text, core.registry.n_arenas, config.socket_path)


@contextlib.contextmanager
def _lacks_told(ready_fd: int | None) -> Iterator[None]:
    """Tell who started us what this host lacks for a server."""
    try:
        yield
    except HostLacks as lacking:
        if ready_fd is not None:
            tell_lacking(ready_fd, lacking)
        raise


def _make_loop(core: Core, config: ServeConfig, stack: contextlib.ExitStack) -> Loop:
    n = n_cpus()
    spin_us = config.spin_us if n > 1 else 0  # on the only CPU it would keep clients from posting what we look for
    run_queue = stack.enter_context(contextlib.closing(RunQueue()))
    return Loop(core, spin_us * US_NS, ElbowRoom(n, run_queue.n_runnable))


def _note_broken(core: Core, arena: Arena, problem: Exception) -> None:
    """A pager's procedure raised: what waits for it waits for ever, all else goes on."""
    log.error("serving arena %d (%s) failed", arena.number, arena.name, exc_info=problem)
    core.counters.internal_errors += 1


def _refuse_to_leave_behind(left: Content, config: ServeConfig) -> None:
    """Check that no program waits for its managed memory.

    Raises:
        ServerError: one does, and nobody asked for a takeover.
    """
    waiting: set[int] = set()
    for record in left.arenas:
        held = record.from_anyone()
        if held is not None:
            waiting.add(held.process.pid)
            held.close()
    if waiting:
        pids = ", ".join(map(str, sorted(waiting)))
        raise ServerError(
            f"a server at {config.socket_path} was killed, and its managed memory waits in process {pids}; "
            "go on with it by --takeover, end those processes, or serve another --socket"
        )


def _arena_gone(core: Core, arena: Arena) -> None:
    core.iommu.detach(arena.parts.device)
    if arena.record is not None:
        core.registry.remove_arena(arena.record)


def _put_together(config: ServeConfig, stack: contextlib.ExitStack) -> tuple[Core, socket.socket, socket.socket]:
    """Make everything the server consists of; the stack closes it.

    Returns:
        The core, the listening exchange socket and the listening client socket, to be owned by listeners.
    """
    _raise_descriptor_limit()
    socket_file = stack.enter_context(contextlib.closing(SocketFile(config.socket_path)))
    registry = Registry(registry_path(config.socket_path))
    before = registry.left.place if config.takeover else None
    link = stack.enter_context(contextlib.closing(_make_link(config, before)))
    exchange_socket = _listen_for_peers(config, before, link)
    exchange_host, exchange_port = exchange_socket.getsockname()[:2]
    registry.place = Place(address_of(link.endpoint.gid), exchange_host, exchange_port)
    clock = time.monotonic_ns
    timers, poller = Timers(), stack.enter_context(contextlib.closing(Poller()))
    iommu = Iommu(relay=_make_relay(clock, stack))
    core = Core(
        nic=Nic(
            iommu=iommu,
            endpoint=link.endpoint,
            mtu=link.mtu,
            draw=secrets.randbelow,
            runner_waits=poller.has_ready,
        ),
        iommu=iommu,
        link=link,
        poller=poller,
        timers=timers,
        workers=stack.enter_context(contextlib.closing(Workers(config.n_workers, timers, clock))),
        limits=config.limits,
        state_page=stack.enter_context(contextlib.closing(StatePage())),
        exchange_host=exchange_host,
        exchange_port=exchange_port,
        clock=clock,
        arenas=stack.enter_context(contextlib.closing(Arenas(poller, timers, clock))),
        arena_maker=ArenaMaker.of(config),
        registry=registry,
    )
    return core, exchange_socket, socket_file.socket


def _make_relay(clock: Callable[[], int], stack: contextlib.ExitStack) -> Relay:
    """Choose how the direct path copies: with a process that helps, where that has a CPU."""
    if n_cpus() < 2:
        return relay_in_turn
    copier = Copier(clock)
    stack.callback(copier.close)
    return copier


def _make_link(config: ServeConfig, before: Place | None) -> Link:
    """Open the link that was asked for, middleware included; where nothing else is said, at the predecessor's address.

    Raises:
        UsageError: the address is not one of this host, or the middleware's text has no meaning.
        HostLacks: a raw socket is not allowed.
        ServerError: the address is taken, or a file of the middleware cannot be made.
    """
    try:
        link: Link = RawLink(config.bind or "127.0.0.1") if config.raw else _bind(config.bind, before)
    except OSError as problem:
        raise ServerError(f"cannot open the RoCE port: {problem.strerror or problem}") from problem
    if not config.chaos:
        return link
    try:
        return wrap(link, config.chaos, clock_offset_ns=time.time_ns() - time.monotonic_ns())
    except OSError as problem:
        link.close()
        raise ServerError(f"cannot set up {config.chaos!r}: {problem.strerror or problem}") from problem
    except UsageError:
        link.close()
        raise


def _bind(address: str | None, before: Place | None) -> Link:
    if address is None and before is not None:
        with contextlib.suppress(OSError, UsageError):
            return bind_link(before.roce_host)
    return bind_link(address)


def _listen_for_peers(config: ServeConfig, before: Place | None, link: Link) -> socket.socket:
    """Listen where peers of a predecessor look for it, if that can be had; shares keep their URL then.

    Raises:
        ServerError: the address or port cannot be had.
    """
    host, port = config.bind or address_of(link.endpoint.gid), config.exchange_port
    if before is not None and not port and config.bind in (None, before.exchange_host):
        try:
            return _listen_tcp(before.exchange_host, before.exchange_port)
        except ServerError as problem:
            log.warning("the shares that are taken over get another URL: %s", problem)
    return _listen_tcp(host, port)


def _listen_tcp(host: str, port: int) -> socket.socket:
    """Listen for peers.

    Raises:
        ServerError: the address or port cannot be had.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as problem:
        text = f"cannot listen for peers on {host} port {port}: {problem.strerror}"
        raise ServerError(text) from problem
    return sock


def _raise_descriptor_limit() -> None:
    """Use as many descriptors as the host allows: every ring of every client takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _stopped_by_signals(core: Core, loop: Loop, *, with_sigint: bool) -> Iterator[None]:
    """Let signals end the loop; only Python's main thread can have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A byte in the pipe ends epoll_wait even where the signal came just before it.
    receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def drain(_mask: int) -> None:
        os.read(receiver, 64)

    core.poller.watch(receiver, drain)
    old_wakeup = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    stop_on = _SIGNALS if with_sigint else (signal.SIGTERM,)
    old = {number: signal.signal(number, lambda _number, _frame: loop.stop()) for number in stop_on}
    if not with_sigint:
        old[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        core.poller.forget(receiver)
        os.close(receiver)
        os.close(sender)


def _hold_parent(parent_pid: int, stack: contextlib.ExitStack) -> PidFd:
    """Return the process that we end with; asked first of all, so that for one that is gone nothing is made.

    Raises:
        ServerError: it has ended already.
    """
    try:
        parent = PidFd.open(parent_pid)
    except OSError as problem:
        raise ServerError(f"the parent, pid {parent_pid}, is gone") from problem
    stack.callback(parent.close)
    return parent
