"""Two NICs in this process, on the host's own clock: what shows that timer laws are kept in real time, too."""

from __future__ import annotations

import time
from random import Random

from nopin.iommu.iommu import Iommu
from nopin.link.memory import MemoryLink, memory_pair
from nopin.model.net.client import Client, connect, make_client
from nopin.nic.abi import WrOpcode
from nopin.nic.nic import Nic
from nopin.nic.timers import Timers


def time_on_the_clock_ns(
    timers: Timers, *, answers: bool, timeout: int, retry_cnt: int, rnr_retry: int, min_rnr_timer: int
) -> int:
    """Return how long a send without a receive takes to fail, spinning meanwhile.

    Args:
        answers: the peer answers with RNR NAKs; otherwise nothing reaches it.
    """
    links = memory_pair()
    ours, theirs = (_client_on(link, timers, seed) for seed, link in enumerate(links))
    connect(
        ours,
        theirs,
        now=time.monotonic_ns(),
        timeout=timeout,
        retry_cnt=retry_cnt,
        rnr_retry=rnr_retry,
        min_rnr_timer=min_rnr_timer,
    )
    began_ns = time.monotonic_ns()
    ours.post_send(WrOpcode.SEND, [])
    while not ours.completions.ready:
        _turn(ours.nic, links[0])
        if answers:
            _turn(theirs.nic, links[1])
        links[1].arrived.clear()
    return time.monotonic_ns() - began_ns


def _client_on(link: MemoryLink, timers: Timers, seed: int) -> Client:
    draw = Random(seed).randrange
    nic = Nic(iommu=Iommu(), endpoint=link.endpoint, mtu=link.mtu, draw=draw, timers=timers)
    return make_client(nic, nic.alloc_pd(), depth=16)


def _turn(nic: Nic, link: MemoryLink) -> None:
    now = time.monotonic_ns()
    for batch in link.receive(now):
        nic.receive(batch, now)
    nic.poll_rings(now)
    if nic.is_due(now):
        nic.on_deadline(now)
    for sent in nic.transmit(now):
        link.send(sent, now)
