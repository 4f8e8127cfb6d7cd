"""The demo's second part: an array four times the memory it may take; its owner, a peer and an accelerator at work.

The owner fills it, the peer reads all of it over RoCEv2 and writes its second half, the accelerator adds up the first;
every byte is checked by whoever reads it, and between the steps what is resident is compared with the budget.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np

from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.pattern import WORD_BYTES, count_wrong_bytes, pattern
from nopin.verbs.attach import attach
from nopin.verbs.device import Device

BUDGET_BYTES = 16 << 20
ARRAY_BYTES = 4 * BUDGET_BYTES
BATCH_BYTES = 2 << 20
"""Pages that are brought while as many leave."""
_CHUNK_WORDS = 1 << 18
_TIMEOUT_S = 50.0
_FAULTS = "faults_zero", "faults_swap", "faults_minor", "faults_protect", "faults_device"


class ManagedFigures(msgspec.Struct, kw_only=True):
    """What the second part shows.

    Attributes:
        resident_bytes_max: the most that was seen resident.
        page_faults: of CPUs, workers and devices; `evicted_pages` left to make room.
        bytes_verified: by owner, peer and accelerator together; `bytes_wrong` of them differed.
    """

    array_bytes: int
    budget_bytes: int
    resident_bytes_max: int
    page_faults: int
    evicted_pages: int
    bytes_verified: int
    bytes_wrong: int
    seconds: float

    @property
    def as_promised(self) -> bool:
        """Whether no byte was wrong, and the budget was kept."""
        return self.bytes_wrong == 0 and self.resident_bytes_max <= self.budget_bytes + BATCH_BYTES


def run_managed(device: Device, owner_socket: str, seed: int) -> ManagedFigures:
    """Run it: the peer is this process, with `device` at a server of its own.

    Raises:
        ServerError, PeerError, WorkError: something broke.
    """
    start = time.perf_counter()
    n_wrong, n_words = 0, ARRAY_BYTES // WORD_BYTES
    with Child(owner, owner_socket, seed) as child:
        url = child.line.receive(_TIMEOUT_S)
        with attach(url, device=device) as remote:
            for first in range(0, n_words, _CHUNK_WORDS):
                n_wrong += count_wrong_bytes(remote[first : first + _CHUNK_WORDS], first, seed)
                if first >= n_words // 2:
                    remote[first : first + _CHUNK_WORDS] = pattern(first, _CHUNK_WORDS, seed + 1)
        end: dict[str, int] = child.ask("written", _TIMEOUT_S)
    return ManagedFigures(
        array_bytes=ARRAY_BYTES,
        budget_bytes=BUDGET_BYTES,
        resident_bytes_max=end["resident_bytes_max"],
        page_faults=end["page_faults"],
        evicted_pages=end["evicted_pages"],
        bytes_verified=2 * ARRAY_BYTES,
        bytes_wrong=n_wrong + end["bytes_wrong"],
        seconds=time.perf_counter() - start,
    )


def owner(line: Line[Any], socket_path: str, seed: int) -> None:
    """Life of the owner: fill, share, let the accelerator compute, look at what the peer wrote."""
    device = Device(server=socket_path, budget=BUDGET_BYTES)
    words = device.empty(ARRAY_BYTES // WORD_BYTES, np.uint64)
    half, most = len(words) // 2, 0
    for first in range(0, len(words), _CHUNK_WORDS):
        words[first : first + _CHUNK_WORDS] = pattern(first, _CHUNK_WORDS, seed)
        most = max(most, _row(device)["resident"])
    line.send(device.share(words).url)
    line.receive(_TIMEOUT_S)
    most = max(most, _row(device)["resident"])
    expected = sum(
        int(pattern(first, _CHUNK_WORDS, seed).sum(dtype=np.uint64)) for first in range(0, half, _CHUNK_WORDS)
    )
    computed = int(device.accelerator().launch("sum", words[:half]).result(_TIMEOUT_S))
    n_wrong = 0 if computed == expected % (1 << 64) else ARRAY_BYTES // 2
    for first in range(half, len(words), _CHUNK_WORDS):
        n_wrong += count_wrong_bytes(words[first : first + _CHUNK_WORDS], first, seed + 1)
        most = max(most, _row(device)["resident"])
    row = _row(device)
    line.send(
        {
            "resident_bytes_max": most,
            "page_faults": sum(row[name] for name in _FAULTS),
            "evicted_pages": row["evicted"],
            "bytes_wrong": n_wrong,
        }
    )


def _row(device: Device) -> dict[str, Any]:
    return next(row for row in device.stat() if row["kind"] == "arena")
