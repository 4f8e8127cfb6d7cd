"""A peer: it reads and writes the arena by RDMA, and adds to its counters.

When a server is killed its connection ends, and it attaches again by the same URL: the successor has the share.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nopin.errors import PeerError, ServerError, WorkError
from nopin.lab.line import Line
from nopin.lab.stress.actor import Actor
from nopin.lab.stress.journal import Entry, Journal
from nopin.lab.stress.log import Log, Words
from nopin.lab.stress.owner import end_as_told
from nopin.lab.stress.spec import FIRST_PEER, LAYOUT, N_ACTORS, PEERS
from nopin.linux import memfd
from nopin.nic.abi import WcStatus
from nopin.verbs.attach import attach
from nopin.verbs.device import Device
from nopin.verbs.remote import RemoteArray

BACK_WITHIN_S = 30.0
"""After a kill a successor serves by then."""
_PAUSE_S = 0.05
_LOST = {WcStatus.RETRY_EXC_ERR, WcStatus.WR_FLUSH_ERR}
"""How work ends whose other end is gone, or silent for half a second because the machine has too much to do."""


class ByRdma:
    """A way to memory: READs and WRITEs.

    Attributes:
        remote: the array, as long as it is attached.
    """

    def __init__(self) -> None:
        self.remote: RemoteArray | None = None

    def load(self, pages: slice) -> Words:
        """See `Way`."""
        assert self.remote is not None
        found: Words = self.remote[pages]
        return found

    def store(self, page: int, cell: int, words: Words) -> None:
        """See `Way`."""
        assert self.remote is not None
        self.remote[page, cell] = words


def peer(line: Line[Any], socket_path: str, log_fd: int, journal_path: str, index: int, kills: int, seed: int) -> None:
    """Life of a peer process.

    Args:
        index: in `PEERS`.
        kills: so many servers may be killed; without, nothing may go away.
    """
    log, journal = Log(memfd.map_array(log_fd), LAYOUT), Journal(Path(journal_path))
    url, until = line.receive()
    me = Peer(log, index, seed)
    end_as_told(journal, log, lambda: me.run(socket_path, url, until, may_end=kills > 0), me.actor.tally.who)
    journal.write(Entry(tally=me.actor.tally))
    line.send("done")


class Peer:
    """See `peer`."""

    def __init__(self, log: Log, index: int, seed: int) -> None:
        self._way = ByRdma()
        self.actor = Actor(log, f"{PEERS[index]} peer", FIRST_PEER + index, N_ACTORS, seed, self._way)
        self._adder = index

    def run(self, socket_path: str, url: str, until: float, *, may_end: bool) -> None:
        """Be attached and at work until then.

        Raises:
            NopinError: something went away though nothing may, or could not be had again in time.
        """
        lost_at = time.monotonic()
        while time.monotonic() < until and not self.actor.log.is_stopped:
            try:
                with Device(socket_path) as device, attach(url, device=device) as self._way.remote:
                    self.actor.count("attached")
                    lost_at = until
                    self.actor.run(until, self._step)
            except (PeerError, ServerError, WorkError) as problem:
                is_right = problem.status in _LOST if isinstance(problem, WorkError) else may_end
                lost_at = min(lost_at, time.monotonic())
                if not is_right or time.monotonic() > lost_at + BACK_WITHIN_S:
                    raise
                self.actor.tally.interrupted += 1
                time.sleep(_PAUSE_S)

    def _step(self) -> None:
        remote = self._way.remote
        assert remote is not None
        if self.actor.draw.random() < 0.8:
            self.actor.step()
        else:
            self.actor.add_to_counter(self._adder, lambda at: remote.fetch_add(at, 1))
