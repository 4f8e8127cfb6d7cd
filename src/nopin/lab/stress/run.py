"""A stress run: servers, everybody at work, kills, and the result."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nopin.control.paths import log_path
from nopin.errors import PeerError
from nopin.lab.child import Child
from nopin.lab.scratch import scratch_folder
from nopin.lab.servers import LocalServer
from nopin.lab.stress.journal import Journal
from nopin.lab.stress.owner import owner
from nopin.lab.stress.peer import peer
from nopin.lab.stress.spec import LAYOUT, PEERS, StressFigures, StressSpec
from nopin.linux import memfd
from nopin.linux.paging_uffd import require_paging
from nopin.verbs.device import Device

GRACE_S = 60.0
"""Whoever has not ended so long after the end never will."""
_DEAD_S_MAX = 0.2
"""How long nobody serves after a kill, at most, before a successor is started."""


def run_stress(spec: StressSpec, tell: Callable[[str], None]) -> StressFigures:
    """Run it to its end.

    Args:
        tell: is told what happens, a line each.

    Raises:
        HostLacks: this host has no managed memory.
        ServerError: a device server does not start.
    """
    require_paging()
    start = time.monotonic()
    failures: list[str] = []
    pager: dict[str, int] = {}
    resident_bytes_max = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        log_fd = stack.enter_context(_log_memory())
        path = folder / "journal"
        servers = Servers(folder)
        stack.callback(servers.close)

        def child(function: Callable[..., None], socket_path: Path, *args: int | float) -> Child:
            return stack.enter_context(Child(function, str(socket_path), log_fd, str(path), *args, pass_fds=[log_fd]))

        owners = child(owner, servers.owners_path, spec.seed, spec.seconds)
        sockets = {"wire": servers.peers_path, "direct": servers.owners_path}
        peers = [child(peer, sockets[name], at, spec.kills, spec.seed) for at, name in enumerate(PEERS)]
        try:
            url, until = owners.line.receive(GRACE_S)
            for each in peers:
                each.line.send([url, until])
            _kill_servers(servers, spec, until, tell)
            left_s = until - time.monotonic() + GRACE_S
            for each in (*peers, owners):
                each.line.receive(left_s)
            pager = servers.figures_of(owners.pid)
            resident_bytes_max = owners.ask("all have ended", GRACE_S)
            failures += servers.complaints()
        except PeerError as problem:
            failures.append(f"somebody hangs, or has died: {problem}")
        entries = Journal(path).read()
    return StressFigures(
        seed=spec.seed,
        seconds=time.monotonic() - start,
        kills=servers.n_kills,
        n_pages=LAYOUT.n_pages,
        violations=[entry.violation for entry in entries if entry.violation is not None],
        failures=failures + [entry.failure for entry in entries if entry.failure is not None],
        tallies=[entry.tally for entry in entries if entry.tally is not None],
        pager=pager,
        resident_bytes_max=resident_bytes_max,
    )


@contextlib.contextmanager
def _log_memory() -> Iterator[int]:
    fd = memfd.create("stress-log", LAYOUT.log_bytes)
    try:
        yield fd
    finally:
        os.close(fd)


class Servers:
    """The owner's server, which may be killed, and one for the peer on the wire."""

    def __init__(self, folder: Path) -> None:
        self.owners_path, self.peers_path = folder / "owner.sock", folder / "peer.sock"
        self.n_kills = 0
        self._owners = LocalServer(self.owners_path)
        try:
            self._peers = LocalServer(self.peers_path)
        except BaseException:
            self._owners.close()
            raise

    def kill(self, dead_s: float) -> None:
        """Kill the owner's server, and start a successor so much later."""
        self._owners.kill()
        self.n_kills += 1
        time.sleep(dead_s)
        self._owners = LocalServer(self.owners_path, ["--takeover"])

    def figures_of(self, pid: int) -> dict[str, int]:
        """Return the figures of a process's arena; after a kill those of the last successor."""
        with Device(str(self.owners_path)) as device:
            arenas = [row for row in device.stat() if row["kind"] == "arena" and row["pid"] == pid]
        return {name: value for row in arenas[:1] for name, value in row.items() if isinstance(value, int)}

    def complaints(self) -> list[str]:
        """Say which of them came upon a mistake of its own."""
        said = []
        for path in (self.owners_path, self.peers_path):
            with Device(str(path)) as device:
                (row,) = (row for row in device.stat() if row["kind"] == "dev")
            if row["internal_errors"]:
                said.append(f"{row['internal_errors']} internal errors of a server: {log_path(path).read_text()}")
        return said

    def close(self) -> None:
        """End both."""
        self._owners.close()
        self._peers.close()


def _kill_servers(servers: Servers, spec: StressSpec, until: float, tell: Callable[[str], None]) -> None:
    """Kill servers at moments spread over what is left of the run, and none once that has passed."""
    draw = random.Random(f"{spec.seed} kills")
    begin = time.monotonic()
    for n in range(spec.kills):
        part_s = (until - begin) / spec.kills
        moment = begin + part_s * (n + draw.uniform(0.1, 0.7))
        time.sleep(max(0.0, moment - time.monotonic()))
        if time.monotonic() > until:
            return
        servers.kill(draw.uniform(0.0, _DEAD_S_MAX))
        tell(f"{time.monotonic() - begin:6.2f} s: the server was killed, a successor serves")
