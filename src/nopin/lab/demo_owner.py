"""The owner's side of the demo: a process with ordinary memory, shared under one discipline."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import numpy as np

from nopin.errors import HostLacks, ServerRefused
from nopin.lab.line import Line
from nopin.lab.mapping import Mapping
from nopin.lab.pattern import WORD_BYTES, Words, count_wrong_bytes, pattern
from nopin.linux.proc import pinned_bytes
from nopin.verbs.device import Device
from nopin.verbs.share import Share

BLOCK_WORDS = 1 << 19
N_FORKS = 3
HAZARD_BYTES = 16 * 4096
HAZARDS = ("madvise_dontneed", "remap", "mremap_away_and_back", "fork_write")
"""Things a process may do to its own memory at any time, each followed by a store of its own."""
OLD, NEW = 0x11, 0x22


class Owner:
    """Does what the demo asks, one request at a time; every public method is one request."""

    def __init__(self, server: str, discipline: str, seed: int) -> None:
        self._device = Device(server=server)
        self._discipline = discipline
        self._seed = seed
        self._share: Share | None = None
        self._words: Words = np.empty(0, np.uint64)
        self._hazard: tuple[Mapping, Share] | None = None

    def share(self, n_bytes: int) -> dict[str, Any]:
        """Share memory whose first half holds the pattern and whose second half was never touched."""
        self._words = np.empty(n_bytes // WORD_BYTES, np.uint64)
        for first in range(0, len(self._words) // 2, BLOCK_WORDS):
            n_words = min(BLOCK_WORDS, len(self._words) // 2 - first)
            self._words[first : first + n_words] = pattern(first, n_words, self._seed)
        start = time.perf_counter()
        try:
            self._share = self._device.share(self._words, access="rw", discipline=self._discipline)
        except (HostLacks, ServerRefused, OSError) as refused:
            return {"refused": str(refused)}
        return {
            "url": self._share.url,
            "register_s": time.perf_counter() - start,
            "vm_pin_bytes": pinned_bytes(os.getpid()),
        }

    def count_wrong(self) -> int:
        """Count the wrong bytes of the second half, which the peer wrote."""
        half = len(self._words) // 2
        firsts = range(half, len(self._words), BLOCK_WORDS)
        return sum(count_wrong_bytes(self._words[f : f + BLOCK_WORDS], f, self._seed) for f in firsts)

    def fork_s(self) -> float:
        """Fork a few times and return the median time the call takes here."""
        samples = []
        for _ in range(N_FORKS):
            start = time.perf_counter()
            child = os.fork()
            if child == 0:
                os._exit(0)
            samples.append(time.perf_counter() - start)
            os.waitpid(child, 0)
        return median(samples)

    def page_faults(self) -> int:
        """Return how many pages the device found absent in the shared memory."""
        assert self._share is not None
        rkey = self._share.region.rkey
        rows = [row for row in self._device.stat() if row["kind"] == "mr" and row["rkey"] == rkey]
        return sum(int(row["page_faults"]) for row in rows)

    def hazard_begin(self) -> str:
        """Share a few fresh pages of old bytes; return the URL."""
        mapping = Mapping(HAZARD_BYTES)
        mapping.array[:] = OLD
        share = self._device.share(mapping.address, mapping.length, access="rw", discipline=self._discipline)
        self._hazard = mapping, share
        return share.url

    def hazard_read(self, name: str) -> bytes:
        """Do one thing to the pages, store new bytes, and return what this process itself then sees.

        With `fork_write` the child is gone again when this returns; what the store did to the pages stays.
        """
        assert self._hazard is not None
        mapping, _ = self._hazard
        if name == "fork_write":
            with mapping.forked():
                mapping.array[:] = NEW
        else:
            _ACTIONS[name](mapping)
            mapping.array[:] = NEW
        return mapping.array.tobytes()

    def hazard_end(self) -> None:
        """Let the pages go."""
        assert self._hazard is not None
        mapping, share = self._hazard
        share.close()
        mapping.close()
        self._hazard = None

    def close(self) -> None:
        """End sharing."""
        self._device.close()


_ACTIONS = {
    "madvise_dontneed": Mapping.drop,
    "remap": Mapping.replace,
    "mremap_away_and_back": Mapping.move_away_and_back,
}
_REQUESTS = ("share", "count_wrong", "fork_s", "page_faults", "hazard_begin", "hazard_read", "hazard_end")


def child(line: Line[Any], server: str, discipline: str, seed: int) -> None:
    """Be the owner's process: answer requests, each a list of a name and its arguments, until the line ends."""
    owner = Owner(server, discipline, seed)
    try:
        while True:
            name, *arguments = line.receive()
            assert name in _REQUESTS, name
            line.send(getattr(owner, name)(*arguments))
    finally:
        owner.close()
