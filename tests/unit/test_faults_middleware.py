"""Middleware over links in memory: what it does to packets, what it counts, and that a seed decides all."""

from __future__ import annotations

from pathlib import Path as FilePath

import numpy as np
import pytest

from nopin.errors import UsageError
from nopin.link.base import Link, packets_of, path_mtu_for
from nopin.link.faults import REORDER_NS, FaultyLink
from nopin.link.memory import MemoryLink, MemoryNetwork, memory_pair
from nopin.link.middleware import wrap
from nopin.link.tracer import TracerLink
from nopin.mm.space import Staging
from nopin.nic.wire import icrc
from nopin.nic.wire.aeth import Aeth
from nopin.nic.wire.batch import Endpoint, Path, Segment, TxBatch
from nopin.nic.wire.bth import Bth, emit_bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode

SIZE = 32


def numbered(path: Path, n: int) -> TxBatch:
    """n sealed packets of 32 bytes with PSN 0 to n-1, in segments of eight."""
    staging = Staging.of_size(n * SIZE)
    offsets = np.arange(n) * SIZE
    psn = np.arange(n, dtype=np.uint32)
    emit_bth(staging.array, offsets, opcode=Opcode.SEND_ONLY, qpn=1, psn=psn)
    icrc.seal(staging.array, offsets, np.full(n, SIZE), path)
    segments = [Segment(at * SIZE, min(8, n - at) * SIZE, SIZE) for at in range(0, n, 8)]
    return TxBatch(path, staging, segments)


def arrived(link: Link, now: int = 0) -> tuple[list[int], int]:
    """PSNs in order of arrival, and how many ICRCs were wrong."""
    seen: list[int] = []
    n_bad = 0
    for batch in link.receive(now):
        n_bad += int((~icrc.verify(batch.buffer, batch.offsets, batch.lengths, batch.path)).sum())
        view = batch.buffer.data
        seen += [Bth.parse(view, at).psn for at in batch.offsets.tolist()]
    return seen, n_bad


def pair(**faults: float | int) -> tuple[FaultyLink, MemoryLink, Path]:
    inner, far = memory_pair()
    options = {"seed": 1, **faults}
    return FaultyLink(inner, **options), far, Path(inner.endpoint, far.endpoint)  # type: ignore[arg-type]  # forwarded as given


def test_memory_pair_delivers_both_ways_in_order() -> None:
    near, far = memory_pair()
    near.send(numbered(Path(near.endpoint, far.endpoint), 20), 0)
    far.send(numbered(Path(far.endpoint, near.endpoint), 3), 0)
    assert arrived(far) == (list(range(20)), 0)
    assert arrived(near) == ([0, 1, 2], 0)
    assert arrived(far) == ([], 0)


def test_memory_link_copies_so_that_staging_can_be_reused() -> None:
    near, far = memory_pair()
    batch = numbered(Path(near.endpoint, far.endpoint), 4)
    near.send(batch, 0)
    batch.staging.array[:] = 0
    assert arrived(far) == ([0, 1, 2, 3], 0)


def test_memory_network_counts_what_nobody_takes() -> None:
    network = MemoryNetwork()
    link = network.link(Endpoint(gid_of("192.0.2.1"), 4791))
    link.send(numbered(Path(link.endpoint, Endpoint(gid_of("192.0.2.9"), 4791)), 2), 0)
    assert network.undeliverable == 1


def test_without_faults_everything_passes_at_once() -> None:
    link, far, path = pair()
    link.send(numbered(path, 50), 0)
    assert arrived(far) == (list(range(50)), 0)
    assert link.next_deadline() is None


def test_loss_drops_about_that_many() -> None:
    link, far, path = pair(loss=0.25)
    link.send(numbered(path, 2000), 0)
    seen, n_bad = arrived(far)
    lost = link.statistics()["fault_lost"]
    assert 400 < lost < 600
    assert len(seen) == 2000 - lost
    assert seen == sorted(seen)
    assert n_bad == 0


def test_duplicates_arrive_twice() -> None:
    link, far, path = pair(duplicate=1.0)
    link.send(numbered(path, 5), 0)
    assert arrived(far)[0] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_corruption_flips_exactly_one_bit_and_leaves_the_staging_alone() -> None:
    link, far, path = pair(corrupt=1.0)
    batch = numbered(path, 40)
    sent = batch.staging.array.copy()
    link.send(batch, 0)
    assert (batch.staging.array == sent).all()
    got = np.concatenate([b.buffer for b in far.receive(0)]).reshape(40, SIZE)
    flipped = np.unpackbits(got ^ sent.reshape(40, SIZE), axis=1).sum(axis=1)
    assert flipped.tolist() == [1] * 40
    assert len(np.unique(got ^ sent.reshape(40, SIZE), axis=0)) > 20, "always the same bit"


def test_corruption_is_noticed_by_the_icrc() -> None:
    link, far, path = pair(corrupt=1.0, seed=5)
    link.send(numbered(path, 64), 0)
    _, n_bad = arrived(far)
    assert n_bad >= 58, "only the masked byte, one of 32, may change unnoticed"


def test_delay_holds_packets_until_their_deadline() -> None:
    link, far, path = pair(delay_ns=1000)
    link.send(numbered(path, 3), 500)
    assert link.next_deadline() == 1500
    list(link.receive(1499))
    assert arrived(far) == ([], 0)
    list(link.receive(1500))
    assert arrived(far) == ([0, 1, 2], 0)
    assert link.next_deadline() is None


def test_reordered_packets_are_passed_by_later_ones_and_still_arrive() -> None:
    link, far, path = pair(reorder=0.2)
    link.send(numbered(path, 100), 0)
    list(link.receive(REORDER_NS))
    seen, n_bad = arrived(far)
    assert sorted(seen) == list(range(100))
    assert seen != sorted(seen)
    assert n_bad == 0


def test_closing_drops_held_packets() -> None:
    link, far, path = pair(delay_ns=1000)
    link.send(numbered(path, 3), 0)
    link.close()
    assert link.next_deadline() is None
    assert arrived(far) == ([], 0)


def run_with(seed: int) -> tuple[list[bytes], dict[str, int]]:
    link, far, path = pair(loss=0.1, duplicate=0.1, reorder=0.1, corrupt=0.1, delay_ns=10, seed=seed)
    for now in range(0, 2_000_000, 100_000):
        link.send(numbered(path, 20), now)
    list(link.receive(10_000_000))
    return [batch.buffer.tobytes() for batch in far.receive(0)], link.statistics()


def test_same_seed_same_faults_to_the_last_bit() -> None:
    assert run_with(7) == run_with(7)
    assert run_with(7) != run_with(8)


@pytest.mark.parametrize("name", ["loss", "duplicate", "reorder", "corrupt"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        pair(**{name: value})


def test_wrap_builds_what_the_text_says(tmp_path: FilePath) -> None:
    near, far = memory_pair()
    trace = tmp_path / "trace.txt"
    spec = f"loss=0.5, dup=0.1,delay=5us,seed=3,pcap={tmp_path / 'x.pcapng'},trace={trace}"
    link = wrap(near, spec)
    path = Path(near.endpoint, far.endpoint)
    link.send(numbered(path, 100), 0)
    assert link.next_deadline() == 5000
    list(link.receive(5000))
    statistics = link.statistics()
    seen, _ = arrived(far)
    assert len(seen) == statistics["captured"] == statistics["packets_sent"]
    assert statistics["fault_lost"] > 20
    link.close()
    lines = trace.read_text().splitlines()
    assert len(lines) == len(seen), "the trace shows what passed below the faults"


def test_wrap_of_nothing_is_the_link_itself() -> None:
    near, _ = memory_pair()
    assert wrap(near, "") is near


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("los=0.1", "known are loss, dup"),
        ("loss", "each with a value"),
        ("loss=", "each with a value"),
        ("loss=2", "probability between 0 and 1"),
        ("loss=x", "probability between 0 and 1"),
        ("loss=nan", "probability between 0 and 1"),
        ("loss=0.1,loss=0.2", "given twice"),
        ("delay=5", "time with its unit"),
        ("delay=-5us", "time with its unit"),
        ("seed=x", "whole number"),
    ],
)
def test_wrap_explains_what_it_does_not_understand(spec: str, message: str) -> None:
    near, _ = memory_pair()
    with pytest.raises(UsageError, match=message):
        wrap(near, spec)


def test_tracer_writes_one_line_per_packet_and_marks_bad_ones() -> None:
    inner, far = memory_pair()
    lines: list[str] = []
    near, there = TracerLink(inner, lines.append), TracerLink(far, lines.append)
    batch = numbered(Path(near.endpoint, there.endpoint), 2)
    batch.staging.array[SIZE + 20] ^= 1
    near.send(batch, 1_500_000_000)
    assert arrived(there, 1_500_001_000)[0] == [0, 1]
    assert lines == [
        "1.500000 > 192.0.2.2:4791 SEND_ONLY qpn 0x1 psn 0x0 payload 16",
        "1.500000 > 192.0.2.2:4791 SEND_ONLY qpn 0x1 psn 0x1 payload 16 bad-icrc",
        "1.500001 < 192.0.2.1:4791 SEND_ONLY qpn 0x1 psn 0x0 payload 16",
        "1.500001 < 192.0.2.1:4791 SEND_ONLY qpn 0x1 psn 0x1 payload 16 bad-icrc",
    ]


def test_tracer_explains_a_negative_acknowledgement() -> None:
    inner, far = memory_pair()
    lines: list[str] = []
    link = TracerLink(inner, lines.append)
    staging = Staging.of_size(20)
    Bth(Opcode.ACKNOWLEDGE, 0x12, 0x34, becn=True).emit(staging.view)
    path = Path(link.endpoint, far.endpoint)
    for syndrome in (0x1F, 0x2C, 0x62, 0x7F):
        Aeth(syndrome, 5).emit(staging.view, 12)
        icrc.seal(staging.array, np.array([0]), np.array([20]), path)
        link.send(TxBatch(path, staging, [Segment(0, 20, 20)]), 0)
    head = "0.000000 > 192.0.2.2:4791 ACKNOWLEDGE qpn 0x12 psn 0x34 becn "
    assert lines == [
        head + "ack msn 5",
        head + "rnr-nak wait 640 us msn 5",
        head + "nak remote-access-error msn 5",
        head + "syndrome 0x7f msn 5",
    ]


def test_segments_are_cut_into_packets() -> None:
    segments = [Segment(0, 25, 10), Segment(100, 10, 10), Segment(200, 5, 10)]
    assert list(packets_of(segments)) == [(0, 10), (10, 10), (20, 5), (100, 10), (200, 5)]


@pytest.mark.parametrize(
    ("interface_mtu", "path_mtu"), [(65536, 4096), (9000, 4096), (4176, 4096), (4175, 2048), (1500, 1024), (68, 256)]
)
def test_path_mtu_is_the_largest_that_fits(interface_mtu: int, path_mtu: int) -> None:
    assert path_mtu_for(interface_mtu) == path_mtu
