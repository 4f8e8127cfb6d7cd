"""What a device server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nopin.server.limits import Limits

SWAP_LIMIT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of one server.

    Attributes:
        socket_path: the Unix socket clients connect to.
        bind: the address for RoCEv2 and the exchange; None takes a free loopback address.
        exchange_port: TCP port of the exchange; 0 takes a free one.
        parent_pid: end when this process ends.
        ready_fd: told once the server listens, or for want of which feature it ends (`control.readiness`); then closed.
        chaos: middleware around the link, as `link.middleware.wrap` reads it.
        raw: receive by raw socket, which checks the ICRC of foreign senders too (needs root).
        spin_us: the longest the loop looks for work before it sleeps, microseconds; 0 never spins.
        n_workers: threads that resolve page requests.
        limits: what one client, and all together, may have.
        swap_dir: where pages of managed memory go that may not stay; a directory on a disk.
        swap_limit_bytes: the most of it that one arena may take.
        swap_compress: store pages compressed where that saves space.
        push_mappings: give devices every page of managed memory as it becomes present, before they ask.
        takeover: go on with the managed memory and the shares of a server that was killed, where peers look for them.
        memory_bytes: what all arenas together may keep resident; None: half of the machine's memory.
    """

    socket_path: Path
    bind: str | None = None
    exchange_port: int = 0
    parent_pid: int | None = None
    ready_fd: int | None = None
    chaos: str | None = None
    raw: bool = False
    spin_us: int = 50
    n_workers: int = 8
    limits: Limits = field(default_factory=Limits)
    swap_dir: Path = Path("/var/tmp")
    swap_limit_bytes: int = SWAP_LIMIT_BYTES
    swap_compress: bool = True
    push_mappings: bool = False
    memory_bytes: int | None = None
    takeover: bool = False
