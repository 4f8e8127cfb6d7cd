"""Modelled links: when packets arrive, in which order, and what befalls them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nopin.mm.space import Staging
from nopin.model.choice import Drawn
from nopin.model.net.fates import Fate, chosen, drawn
from nopin.model.net.link import Link, LinkLaw
from nopin.model.net.network import Network
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, Segment, TxBatch
from nopin.nic.wire.gid import gid_of

HERE, THERE = (Endpoint(gid_of(f"10.0.0.{number}"), 4791) for number in (1, 2))


class Far:
    """What arrived, and when."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.packets: list[int] = []
        self.times: list[int] = []
        self.paths: list[Path] = []

    def take(self, batch: PacketBatch) -> None:
        for offset, length in zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True):
            packet = batch.buffer[offset : offset + length]
            assert (packet == packet[0]).all()
            self.packets.append(int(packet[0]))
        self.times.append(self.scheduler.now_ns)
        self.paths.append(batch.path)


def packets_of(numbers: Sequence[int], size: int = 100) -> TxBatch:
    array = np.repeat(np.array(numbers, np.uint8), size)
    return TxBatch(Path(HERE, THERE), Staging(array), [Segment(0, len(array), size)])


def link_to(far: Far, law: LinkLaw, fates: Sequence[Fate] | None = None) -> Link:
    return Link(far.scheduler, "wire", law, far.take, lambda _n: fates)


def test_packets_leave_at_line_rate_and_arrive_after_the_latency() -> None:
    far = Far(Scheduler())
    law = LinkLaw(bits_per_s=8_000_000_000, latency_ns=500, frame_bytes=10, group_packets=2)
    link = link_to(far, law)
    link.send(packets_of([1, 2, 3, 4, 5]).arrived())
    assert link.free_at_ns == 550
    assert far.scheduler.run()
    assert far.packets == [1, 2, 3, 4, 5]
    assert far.times == [720, 940, 1050]


def test_line_time_adds_up_without_rounding() -> None:
    far = Far(Scheduler())
    link = link_to(far, LinkLaw(bits_per_s=3_000_000_000, group_packets=1))
    for _ in range(300):
        link.send(packets_of([1], size=100).arrived())
    assert link.free_at_ns == 300 * 100 * 8 // 3


def test_an_idle_link_begins_anew() -> None:
    far = Far(Scheduler())
    link = link_to(far, LinkLaw(bits_per_s=8_000_000_000))
    link.send(packets_of([1]).arrived())
    far.scheduler.call_at(1000, "later", lambda: link.send(packets_of([2]).arrived()))
    assert far.scheduler.run()
    assert far.times == [100, 1100]


def test_what_does_not_fit_the_queue_is_dropped() -> None:
    far = Far(Scheduler())
    link = link_to(far, LinkLaw(bits_per_s=8_000_000_000, queue_bytes=350, group_packets=64))
    link.send(packets_of([1, 2, 3, 4, 5]).arrived())
    far.scheduler.call_at(200, "later", lambda: link.send(packets_of([6, 7, 8]).arrived()))
    assert far.scheduler.run()
    assert far.packets == [1, 2, 3, 6, 7]
    assert link.statistics.dropped == 3


def test_fates_are_met() -> None:
    far = Far(Scheduler())
    link = link_to(far, LinkLaw(late_ns=50), [Fate.PASS, Fate.LOSE, Fate.LATE, Fate.TWICE])
    link.send(packets_of([1, 2, 3, 4]).arrived())
    assert far.scheduler.run()
    assert far.packets == [1, 4, 4, 3]
    assert (link.statistics.lost, link.statistics.duplicated, link.statistics.overtaken) == (1, 1, 1)


def test_a_group_that_is_lost_whole_is_not_delivered() -> None:
    far = Far(Scheduler())
    link_to(far, LinkLaw(), [Fate.LOSE]).send(packets_of([1]).arrived())
    assert far.scheduler.run()
    assert not far.times


def test_groups_keep_their_order_whatever_timer_is_taken_first() -> None:
    for seed in range(8):
        far = Far(Scheduler(Drawn(Streams(seed)["next"], jumps=True)))
        link = link_to(far, LinkLaw(group_packets=1, latency_ns=5))
        link.send(packets_of(range(9)).arrived())
        assert far.scheduler.run()
        assert far.packets == list(range(9))


def test_drawn_fates_are_those_of_their_stream() -> None:
    fates = drawn(Streams(1)["wire"], loss=0.25, duplicate=0.25, reorder=0.25)(4000)
    assert fates is not None
    for fate in Fate:
        assert 900 < fates.count(fate) < 1100
    assert fates == drawn(Streams(1)["wire"], loss=0.25, duplicate=0.25, reorder=0.25)(4000)
    assert drawn(Streams(1)["wire"])(9) is None


@pytest.mark.parametrize("odd", [{"loss": -0.1}, {"loss": 0.6, "duplicate": 0.6}])
def test_fates_that_are_no_probabilities_are_refused(odd: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not probabilities"):
        drawn(Streams(1)["wire"], **odd)


def test_a_chooser_decides_about_each_packet() -> None:
    class LosesSecond:
        jumps = False
        n_asked = 0

        def choose(self, site: str, options: Sequence[str]) -> int:
            assert (site, list(options)) == ("wire", ["passes", "is lost"])
            self.n_asked += 1
            return int(self.n_asked == 2)

    assert chosen(Scheduler(LosesSecond()), "wire")(3) == [Fate.PASS, Fate.LOSE, Fate.PASS]
    assert chosen(Scheduler(), "wire")(2) == [Fate.PASS, Fate.PASS], "nobody chooses"


def test_a_switch_leads_to_the_host_that_is_meant() -> None:
    far, near = Far(scheduler := Scheduler()), Far(scheduler)
    network = Network(scheduler, LinkLaw(bits_per_s=8_000_000_000, latency_ns=301))
    port = network.attach("here", HERE, near.take)
    network.attach("there", THERE, far.take)
    port.send(packets_of([1, 2]))
    port.send(TxBatch(Path(HERE, Endpoint(gid_of("10.0.0.9"), 4791)), Staging.of_size(9), [Segment(0, 9, 9)]))
    assert scheduler.run()
    assert (far.packets, near.packets, network.undeliverable) == ([1, 2], [], 1)
    assert far.times == [200 + 301], "the switch sends on what comes in, without a second time on the wire"
    assert far.paths == [Path(local=THERE, remote=HERE)]


def test_two_senders_share_the_way_to_one_host() -> None:
    far = Far(scheduler := Scheduler())
    network = Network(scheduler, LinkLaw(bits_per_s=8_000_000_000))
    ports = [
        network.attach(f"sender {number}", Endpoint(gid_of(f"10.0.1.{number}"), 4791), lambda _batch: None)
        for number in range(2)
    ]
    network.attach("there", THERE, far.take)
    for port in ports:
        port.send(packets_of([1, 2]))
    assert scheduler.run()
    assert far.times == [200, 400]
