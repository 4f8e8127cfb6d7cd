"""The real NIC on modelled hosts: data through faults, frames, links; what the network and the MM do meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hosts import PAGE
from nics import Two, two_ends

from nopin.model.choice import Drawn
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Procedure, Work
from nopin.model.host.advice import Advice
from nopin.model.host.fault import lookup
from nopin.model.host.process import Process
from nopin.model.net.client import connect
from nopin.model.net.fates import drawn
from nopin.model.net.link import LinkLaw
from nopin.model.streams import Streams
from nopin.model.trace import Trace
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.units import PAGE_SHIFT

OK = WcStatus.SUCCESS
IB = LinkLaw(bits_per_s=56_000_000_000, latency_ns=600)
BYTES = bytes(range(1, 251)) * 40


def put(two: Two, at: int = 0, data: bytes = BYTES) -> None:
    two.run(two.a.process.store(two.a.va + at, data))


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.SEND, WrOpcode.RDMA_READ])
def test_bytes_move_between_processes_that_have_nothing_pinned(opcode: WrOpcode) -> None:
    two = two_ends(law=IB)
    put(two, 100)
    if opcode is WrOpcode.RDMA_READ:
        two.b.send(opcode, 50, len(BYTES), two.a, 100)
        assert two.statuses() == ([], [OK])
    elif opcode is WrOpcode.SEND:
        two.b.recv(50, len(BYTES))
        two.a.send(opcode, 100, len(BYTES))
        assert two.statuses() == ([OK], [OK])
    else:
        two.a.send(opcode, 100, len(BYTES), two.b, 50)
        assert two.statuses() == ([OK], [])
    assert two.run(two.b.process.load(two.b.va + 50, len(BYTES))) == BYTES
    for end in (two.a, two.b):
        end.host.check()
        end.nic_host.attachment(end.process).mirror.check()


def test_the_peer_of_one_device_is_reached_without_packets() -> None:
    two = two_ends()
    other = two.a.nic_host.client()
    mine = two.a.nic_host.client()
    connect(mine.client, other.client)
    put(two)
    sges = [(two.a.va, len(BYTES), two.a.region.lkey)]
    mine.post_send(WrOpcode.RDMA_WRITE, sges, remote=two.a.va + 4 * PAGE, rkey=two.a.region.rkey)
    assert two.run(mine.completions()) == [(0, OK)]
    assert two.run(two.a.process.load(two.a.va + 4 * PAGE, len(BYTES))) == BYTES


def test_a_hole_and_a_dead_process_give_the_exact_error() -> None:
    for kill in (False, True):
        two = two_ends()
        put(two)
        if kill:
            two.run(two.b.process.exit())
        else:
            two.run(two.b.process.munmap(two.b.va + PAGE, PAGE))
        two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
        assert two.statuses() == ([WcStatus.REM_ACCESS_ERR], [])


def test_a_hole_at_home_is_a_local_error() -> None:
    two = two_ends()
    two.run(two.a.process.munmap(two.a.va, PAGE))
    two.a.send(WrOpcode.RDMA_WRITE, 0, 8, two.b)
    assert two.statuses() == ([WcStatus.LOC_PROT_ERR], [])


@pytest.mark.parametrize("seed", range(6))
def test_a_bad_network_loses_no_byte(seed: int) -> None:
    streams = Streams(seed)
    two = two_ends(
        law=LinkLaw(bits_per_s=8_000_000_000, latency_ns=1000, group_packets=4),
        connection={"timeout": 8, "mtu": 256},
        fates=drawn(streams["net"], loss=0.05, duplicate=0.05, reorder=0.05),
    )
    put(two)
    for number in range(3):
        two.a.send(WrOpcode.RDMA_WRITE, number * 1000, 1000, two.b, number * 1000)
        two.a.send(WrOpcode.RDMA_READ, 4 * PAGE + number * 1000, 1000, two.b, number * 1000)
    assert two.statuses() == ([OK] * 6, [])
    assert two.run(two.b.process.load(two.b.va, 3000)) == BYTES[:3000]
    assert two.run(two.a.process.load(two.a.va + 4 * PAGE, 3000)) == BYTES[:3000]
    assert two.a.nic_host._port.down.statistics.lost + two.b.nic_host._port.down.statistics.lost


class Exact(DeviceObserver):
    """Asserts that a NIC touches what the process has at an address in that very moment: its copies take no time."""

    def __init__(self) -> None:
        self.n_touched = 0

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        entry = lookup(process, va >> PAGE_SHIFT)
        assert entry is not None, f"{device} reads {va:#x}, where nothing is present"
        assert entry.frame == frame, f"{device} reads another frame than the process has"
        self.n_touched += 1

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        self.device_read(device, process, va, frame, data)
        entry = lookup(process, va >> PAGE_SHIFT)
        assert entry is not None
        assert entry.writable, f"{device} writes {va:#x} without the right to"


@pytest.mark.parametrize("seed", range(10))
def test_transfers_go_on_while_pages_are_given_up_in_any_order(seed: int) -> None:
    observer = Exact()
    two = two_ends(chooser=Drawn(Random(seed)), connection={"mtu": 1024}, observer=observer)
    put(two, 0, BYTES[: 2 * PAGE])

    def sends() -> Procedure[None]:
        for _ in range(4):
            two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
            assert (yield from two.a.client.completions()) == [(0, OK)]

    def drops() -> Procedure[None]:
        for _ in range(6):
            yield Work("wait")
            yield from two.b.process.madvise(two.b.va, PAGE, Advice.DONTNEED)

    two.scheduler.spawn("drops", drops())
    two.run(sends())
    two.run(two.b.process.store(two.b.va, bytes(PAGE)))
    two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
    two.run(two.a.client.completions())
    assert two.run(two.b.process.load(two.b.va, 2 * PAGE)) == BYTES[: 2 * PAGE]
    assert observer.n_touched
    figures = two.b.nic_host.attachment(two.b.process).mirror.statistics()
    assert figures.invalidated or figures.retries
    two.b.host.check()


def test_a_message_takes_the_time_that_the_link_takes() -> None:
    two = two_ends(n_pages=64, law=IB, connection={"mtu": 4096}, batch_packets=16)
    put(two)
    two.a.send(WrOpcode.RDMA_WRITE, 0, 64 * PAGE, two.b)
    two.run(two.a.client.completions())  # warms both mirrors
    began_ns = two.scheduler.now_ns
    two.a.send(WrOpcode.RDMA_WRITE, 0, 64 * PAGE, two.b)
    two.run(two.a.client.completions())
    wire_ns = 64 * PAGE * 8 / 56
    assert wire_ns < two.scheduler.now_ns - began_ns < 1.05 * wire_ns + 4 * 600


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from test_nic_host import traced
print(traced())
"""


def traced() -> str:
    trace = Trace()
    two = two_ends(
        law=IB, trace=trace, connection={"timeout": 8, "mtu": 256}, fates=drawn(Streams(3)["net"], loss=0.05)
    )
    put(two)
    for _ in range(4):
        two.a.send(WrOpcode.RDMA_WRITE, 0, 3000, two.b)
    assert two.statuses() == ([OK] * 4, [])
    return f"{trace.n_events} {trace.digest()}"


def test_a_run_is_the_same_in_every_process() -> None:
    here = str(Path(__file__).parent)
    hashes = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, here],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert hashes == {traced() + "\n"}
