"""The machine room: what a preset prices, what is drawn, and that it is the same for everybody."""

from __future__ import annotations

import pytest

from nopin.model import Machine
from nopin.model.machine import link_of, timers_of
from nopin.model.net.client import connect
from nopin.model.net.link import LinkLaw
from nopin.model.presets import preset_named
from nopin.model.scheduler import Scheduler
from nopin.model.trace import Trace
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.nic.timers import NOMINAL
from nopin.units import MS_NS, PAGE_BYTES


def test_without_a_preset_nothing_costs_anything() -> None:
    machine = Machine()
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(4))
    assert machine.run(machine.device("gpu").write(process, va, b"bytes")) is None
    assert machine.run(process.load(va, 5)) == b"bytes"
    assert machine.now_us == 0


def test_a_preset_prices_faults() -> None:
    machine = Machine(preset="connectib56")
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(4))
    machine.run(machine.device("nic").write(process, va, b"bytes"))
    assert machine.now_us == 219.4


def run_two(preset: str, seed: int) -> tuple[int, str]:
    trace = Trace()
    machine = Machine(seed=seed, preset=preset, tail=True, scheduler=Scheduler(None, trace))
    clients, places = [], []
    for name in ("a", "b"):
        process = machine.host(name).spawn_process()
        va = machine.run(process.mmap(4))
        nic = machine.nic(f"nic {name}")
        region = nic.register(process, va, 4 * PAGE_BYTES)
        clients.append(nic.client())
        places.append((va, region))
    connect(clients[0].client, clients[1].client, mtu=machine.mtu)
    (here, local), (there, remote) = places
    clients[0].post_send(WrOpcode.RDMA_WRITE, [(here, 8192, local.lkey)], remote=there, rkey=remote.rkey)
    assert machine.run(clients[0].completions()) == [(0, WcStatus.SUCCESS)]
    return machine.scheduler.now_ns, trace.digest()


@pytest.mark.parametrize("preset", ["connectib56", "connectx6+slow_quiesce", "ideal_silicon"])
def test_a_seed_gives_one_run(preset: str) -> None:
    assert run_two(preset, 1) == run_two(preset, 1)
    assert run_two(preset, 1) != run_two(preset, 2)


def test_laws_come_from_the_costs() -> None:
    floor_on, floor_off = (preset_named(name).costs() for name in ("connectx6", "connectx6_no_floor"))
    assert timers_of(floor_on).rnr_ns[12] == 2_112_000
    assert timers_of(floor_on).ack_ns[14] == 2 * (4096 << 16)
    assert timers_of(floor_on).n_retries(7) == 5
    assert timers_of(floor_off).ack_ns[8] == 4096 << 8
    assert timers_of(floor_off).n_retries(7) == 8
    software = timers_of(preset_named("softroce").costs())
    assert (software.rnr_ns, software.ack_ns, software.first_ack_ns) == (
        NOMINAL.rnr_ns,
        NOMINAL.ack_ns,
        NOMINAL.first_ack_ns,
    )
    assert software.n_retries(7) == 7


def test_a_link_carries_the_payload_rate_of_its_machine() -> None:
    costs = preset_named("connectib56").costs()
    law = link_of(costs, 2048)
    assert isinstance(law, LinkLaw)
    assert law.bits_per_s * 2048 // (2048 + 16) == pytest.approx(costs.line_rate_bits_per_s, rel=1e-6)


def test_a_procedure_that_waits_for_ever_is_told() -> None:
    machine = Machine()
    client = machine.nic("nic").client()
    with pytest.raises(AssertionError, match="main waits for"):
        machine.run(client.completions())


def test_a_slow_device_is_waited_for() -> None:
    machine = Machine(seed=3, preset="connectib56+slow_quiesce")
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(4))
    machine.run(machine.device("gpu").write(process, va, b"bytes"))
    began_ns = machine.scheduler.now_ns
    machine.run(process.munmap(va, 4 * PAGE_BYTES))
    assert 10 * MS_NS <= machine.scheduler.now_ns - began_ns <= 50 * MS_NS + 100_000
