"""The passive end of a benchmark: offers its buffer, and takes its part in two-sided tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nopin.errors import NopinError
from nopin.lab.bench_end import BenchEnd
from nopin.lab.bench_flow import OPCODES, Receiver, SendPingPong, Work, WritePingPong, follow
from nopin.lab.line import Line, PartnerGone
from nopin.lab.rendezvous import (
    RENDEZVOUS_VERSION,
    AnyWord,
    BenchLine,
    Finished,
    Go,
    Going,
    Ready,
    Refusal,
    Setup,
)
from nopin.nic.abi import WrOpcode
from nopin.verbs.device import Device


def child(line: Line[Any], server: str) -> None:
    """Be the passive end in a process of its own, as a client of a given server."""
    attend(line.of_type(AnyWord), server)


def attend(line: BenchLine, server: str | None) -> None:
    """Serve one active end until it closes the line; what cannot be done is told to it."""
    setup = line.receive()
    try:
        if not isinstance(setup, Setup) or setup.version != RENDEZVOUS_VERSION:
            raise NopinError(f"a Setup of version {RENDEZVOUS_VERSION} was due")
        with Device(server=server) as device, _end(device, setup) as end:
            _connected(line, end, setup)
    except PartnerGone:
        return
    except NopinError as refused:
        line.send(Refusal(message=str(refused)))


def _end(device: Device, setup: Setup) -> BenchEnd:
    return BenchEnd(
        device,
        memory=setup.memory,
        size_bytes_max=setup.size_bytes_max,
        tx_depth=setup.tx_depth,
        n_queue_pairs=len(setup.queue_pairs),
    )


def _connected(line: BenchLine, end: BenchEnd, setup: Setup) -> None:
    path_mtu = min(setup.path_mtu, end.device.info.mtu)
    end.connect(setup.queue_pairs, path_mtu)
    line.send(
        Ready(
            queue_pairs=end.coordinates(),
            address=end.target_address,
            rkey=end.region.rkey,
            path_mtu=path_mtu,
        )
    )
    while True:
        go = line.receive()
        if not isinstance(go, Go):
            raise NopinError(f"Go was due, {type(go).__name__} came")
        round_of = _prepare(end, setup, go)
        line.send(Going())
        if round_of is not None:
            round_of()
            line.send(Finished())


def _prepare(end: BenchEnd, setup: Setup, go: Go) -> Callable[[], None] | None:
    """Prepare a round and return our part in it; None where we have none."""
    if setup.test == "send_bw":
        receiver = Receiver(end, go.size_bytes, end.rx_depth)
        receiver.begin(go.n_messages)
        return lambda: receiver.take_all(go.n_messages)
    if setup.test == "write_lat":
        work = Work(end, WrOpcode.RDMA_WRITE, go.size_bytes, setup.address, setup.rkey)
        written = WritePingPong(end, work, go.size_bytes)
        return lambda: follow(written, go.n_messages)
    if setup.test == "send_lat":
        work = Work(end, OPCODES["send"], go.size_bytes, 0, 0)
        sent = SendPingPong(end, work, go.size_bytes, go.n_messages)
        return lambda: follow(sent, go.n_messages)
    return None
