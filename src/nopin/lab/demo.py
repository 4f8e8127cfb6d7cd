"""The demo: the same work on the same memory, pinned and on demand, between two processes over RoCEv2.

Owner and peer have a server each, so that every byte crosses the loopback network. Of the owner's memory the
peer reads the first half and writes the second; both ends know what every byte should be. Then the hazards:
the owner does to a few pages what any program may do to its memory at any time, and the peer reads again.
"""

from __future__ import annotations

import math
import resource
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np

from nopin.errors import HostLacks
from nopin.lab import demo_owner
from nopin.lab.child import Child
from nopin.lab.demo_managed import ManagedFigures, run_managed
from nopin.lab.demo_owner import HAZARDS, OLD
from nopin.lab.pattern import WORD_BYTES, count_wrong_bytes, pattern
from nopin.lab.scratch import scratch_folder
from nopin.lab.servers import LocalServer
from nopin.linux.paging_uffd import require_paging
from nopin.verbs.attach import attach
from nopin.verbs.device import Device
from nopin.verbs.remote import RemoteArray

WORK_BYTES = 512 << 20
CHUNK_WORDS = 2 << 20
CHUNK_WORDS_MIN = 1 << 12
DISCIPLINES = {"pinned": "pinned", "on_demand": "on-demand"}
"""Name in the figures, and as the library spells it."""
COHERENT, STALE = "coherent", "stale"
OWNER_TIMEOUT_S = 50.0

Progress = Callable[[str, int], None]
"""Called with the discipline and the bytes done since the last call."""


class DisciplineFigures(msgspec.Struct, kw_only=True):
    """One column of the demo.

    Attributes:
        register_s: how long `share` took.
        vm_pin_bytes: pinned memory of the owner (VmPin) after it.
        fork_s: how long fork takes in the owner.
        throughput_bytes_per_s: bytes moved over the time of the transfers alone.
        page_faults: pages the device found absent.
        bytes_moved: read and written.
        bytes_verified: compared with what they should be; `bytes_wrong` of them differed.
        hazards: name to "coherent" (the device sees the process's bytes) or "stale".
    """

    register_s: float
    vm_pin_bytes: int
    fork_s: float
    throughput_bytes_per_s: float
    page_faults: int
    bytes_moved: int
    bytes_verified: int
    bytes_wrong: int
    hazards: dict[str, str]


class DemoFigures(msgspec.Struct, kw_only=True):
    """What the demo shows.

    Attributes:
        managed: the second part; None where the host forbids it.
        left_out: names disciplines, or "managed", that this host forbids, with its reason.
        reduced: names disciplines that moved less than `work_bytes`, with this host's reason.
    """

    work_bytes: int
    seed: int
    seconds: float
    disciplines: dict[str, DisciplineFigures]
    left_out: dict[str, str]
    reduced: dict[str, str] = {}
    managed: ManagedFigures | None = None

    @property
    def as_promised(self) -> bool:
        """Whether no byte was wrong, nothing stale on demand, and managed memory kept to its budget."""
        on_demand = self.disciplines["on_demand"]
        n_wrong = sum(figures.bytes_wrong for figures in self.disciplines.values())
        managed = self.managed is None or self.managed.as_promised
        return n_wrong == 0 and set(on_demand.hazards.values()) == {COHERENT} and managed


def run_demo(progress: Progress, *, work_bytes: int = WORK_BYTES, seed: int | None = None) -> DemoFigures:
    """Run the demo; takes well under a minute and undoes all it did.

    Raises:
        ServerError, PeerError, WorkError: something broke.
    """
    start = time.perf_counter()
    figures = DemoFigures(
        work_bytes=work_bytes,
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
        seconds=0.0,
        disciplines={},
        left_out={},
        reduced={},
    )
    with ExitStack() as held:
        folder = held.enter_context(scratch_folder())
        owner_server = held.enter_context(LocalServer(folder / "owner.sock"))
        peer_server = held.enter_context(LocalServer(folder / "peer.sock"))
        device = held.enter_context(Device(server=str(peer_server.socket_path)))
        for name, discipline in DISCIPLINES.items():
            arguments = str(owner_server.socket_path), discipline, figures.seed
            with Child(demo_owner.child, *arguments) as owner:
                outcome = _one_discipline(device, owner, name, figures, progress)
            if isinstance(outcome, str):
                figures.left_out[name] = outcome
            else:
                figures.disciplines[name] = outcome
        try:
            require_paging()
        except HostLacks as lacking:
            figures.left_out["managed"] = str(lacking)
        else:
            figures.managed = run_managed(device, str(owner_server.socket_path), figures.seed)
    figures.seconds = time.perf_counter() - start
    return figures


def _one_discipline(
    device: Device, owner: Child, name: str, figures: DemoFigures, progress: Progress
) -> DisciplineFigures | str:
    """Do the work and the hazards under one discipline; a text says why the host forbids it."""
    work_bytes = figures.work_bytes
    shared: dict[str, Any] = owner.ask(["share", work_bytes], OWNER_TIMEOUT_S)
    if "refused" in shared and _fewer_bytes(work_bytes):
        figures.reduced[name] = shared["refused"]
        work_bytes = _fewer_bytes(work_bytes)
        shared = owner.ask(["share", work_bytes], OWNER_TIMEOUT_S)
    if "refused" in shared:
        figures.reduced.pop(name, None)
        return str(shared["refused"])
    with attach(shared["url"], device=device) as remote:
        n_wrong, seconds = _transfer(remote, figures.seed, lambda n_bytes: progress(name, n_bytes))
    n_wrong += owner.ask(["count_wrong"], OWNER_TIMEOUT_S)
    return DisciplineFigures(
        register_s=shared["register_s"],
        vm_pin_bytes=shared["vm_pin_bytes"],
        fork_s=owner.ask(["fork_s"], OWNER_TIMEOUT_S),
        throughput_bytes_per_s=work_bytes / seconds,
        page_faults=owner.ask(["page_faults"]),
        bytes_moved=work_bytes,
        bytes_verified=work_bytes,
        bytes_wrong=n_wrong,
        hazards={hazard: _hazard(device, owner, hazard) for hazard in HAZARDS},
    )


def _fewer_bytes(work_bytes: int) -> int:
    """Return how much may be pinned where all of the work is over RLIMIT_MEMLOCK, and half is left for the hazards."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft // 2 >= work_bytes:
        return 0
    return 1 << (soft // 2).bit_length() - 1 if soft // 2 >= CHUNK_WORDS_MIN * WORD_BYTES else 0


def _transfer(remote: RemoteArray, seed: int, progress: Callable[[int], None]) -> tuple[int, float]:
    """Read and verify the first half, write the second; return wrong bytes read, and seconds in transfers."""
    n_words = remote.size
    n_wrong, seconds = 0, 0.0
    chunk = math.gcd(CHUNK_WORDS, n_words // 2)  # so that none is read and written
    for first in range(0, n_words, chunk):
        last = min(first + chunk, n_words)
        if first < n_words // 2:
            start = time.perf_counter()
            words = remote[first:last]
            seconds += time.perf_counter() - start
            n_wrong += count_wrong_bytes(words, first, seed)
        else:
            words = pattern(first, last - first, seed)
            start = time.perf_counter()
            remote[first:last] = words
            seconds += time.perf_counter() - start
        progress((last - first) * WORD_BYTES)
    return n_wrong, seconds


def _hazard(device: Device, owner: Child, name: str) -> str:
    """Run one hazard; tell whether the device still sees what the owner sees."""
    url = owner.ask(["hazard_begin"])
    with attach(url, device=device) as remote:
        before = np.asarray(remote[...])
        assert (before == OLD).all(), "the device saw something else before anything was done"
        owner_sees = owner.ask(["hazard_read", name])
        device_sees = np.asarray(remote[...]).tobytes()
    owner.ask(["hazard_end"])
    return COHERENT if device_sees == owner_sees else STALE
