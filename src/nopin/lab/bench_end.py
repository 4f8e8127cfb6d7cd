"""One end of a benchmark: a device, a buffer of the chosen kind of memory, connected queue pairs."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nopin.errors import UsageError, WorkError
from nopin.lab.bench_spec import MANAGED
from nopin.lab.floor_memory import ordinary_memory
from nopin.lab.rendezvous import Coordinates
from nopin.nic.abi import WcStatus
from nopin.nic.attributes import QpCaps
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.device import Device
from nopin.verbs.qp import QpEndpoint, QueuePair
from nopin.verbs.wr import Wc

_SPARE_BYTES = 64 << 20
"""So that nothing is evicted while it is measured, and the allocator has room for its own shape of things."""


class BenchEnd:
    """Everything one side has, in the shape both sides need.

    Attributes:
        memory: twice size_bytes_max: what the partner reads and writes lies in the first half, what we send
            from in the second, so that a ping-pong never sends what it just received.
        rx_depth: receive entries of each queue pair.
        send_cq, recv_cq: shared by all queue pairs.
    """

    def __init__(self, device: Device, *, memory: str, size_bytes_max: int, tx_depth: int, n_queue_pairs: int) -> None:
        self._held = ExitStack()
        try:
            self._build(device, memory, size_bytes_max, tx_depth, n_queue_pairs)
        except BaseException:
            self._held.close()
            raise

    def _build(self, device: Device, kind: str, size: int, tx_depth: int, n_queue_pairs: int) -> None:
        self.rx_depth = 2 * tx_depth
        cq_depth = max(16, self.rx_depth * n_queue_pairs)
        most = device.info.limits
        if cq_depth > most["cq_depth"] or self.rx_depth > most["qp_depth"] or n_queue_pairs > most["qps"]:
            raise UsageError(
                f"{n_queue_pairs} queue pairs with {tx_depth} messages under way are more than a client may have: "
                f"-q is {most['qps']} at most, -t {most['qp_depth'] // 2}, and -t times -q {most['cq_depth'] // 2}"
            )
        enter = self._held.enter_context
        self.device = device
        self.size_bytes_max = size
        self.memory = managed_memory(device, 2 * size) if kind == MANAGED else ordinary_memory(2 * size)
        domain = enter(device.alloc_pd())
        discipline = "on-demand" if kind == MANAGED else kind
        self.region = enter(domain.register(self.memory, access="rwa", discipline=discipline))
        self.send_cq: CompletionQueue = enter(device.create_cq(cq_depth))
        self.recv_cq: CompletionQueue = enter(device.create_cq(cq_depth))
        caps = QpCaps(max_send_wr=tx_depth, max_recv_wr=self.rx_depth)
        self.queue_pairs: list[QueuePair] = [
            enter(domain.create_qp(self.send_cq, self.recv_cq, caps=caps)) for _ in range(n_queue_pairs)
        ]

    @property
    def target_address(self) -> int:
        """Where the partner reads and writes."""
        return self.region.address

    @property
    def source_address(self) -> int:
        """Where we send from and read to."""
        return self.region.address + self.size_bytes_max

    def coordinates(self) -> list[Coordinates]:
        """Return what the partner must know of each queue pair."""
        endpoints = [queue_pair.endpoint for queue_pair in self.queue_pairs]
        return [Coordinates(gid=e.gid, port=e.port, qpn=e.qpn, psn=e.psn) for e in endpoints]

    def connect(self, partners: list[Coordinates], path_mtu: int) -> None:
        """Bring every queue pair to RTS with its partner."""
        for queue_pair, partner in zip(self.queue_pairs, partners, strict=True):
            endpoint = QpEndpoint(gid=partner.gid, port=partner.port, qpn=partner.qpn, psn=partner.psn)
            queue_pair.connect(endpoint, path_mtu=path_mtu)

    def close(self) -> None:
        """Destroy everything; twice is fine."""
        self._held.close()

    def __enter__(self) -> BenchEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def managed_memory(device: Device, length_bytes: int) -> NDArray[np.uint8]:
    """Allocate managed memory that all has room, every page touched; it lives as long as the array."""
    n_bytes = 2 * length_bytes + _SPARE_BYTES
    memory = device.arena(n_bytes, n_bytes, name="bench").zeros(length_bytes, np.uint8)
    memory[:] = 0x5A
    return memory


def succeeded(completions: list[Wc]) -> list[Wc]:
    """Return completions, all of which must be successes.

    Raises:
        WorkError: one is not.
    """
    for completion in completions:
        if completion.status != WcStatus.SUCCESS:
            status = WcStatus(completion.status)
            raise WorkError(f"a benchmark's work request ended with {status.name}", status=status)
    return completions
