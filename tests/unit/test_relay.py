"""Copies from space to space: order, where they end, who waits, and messages that go together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import pytest

from nopin.iommu.access import Span
from nopin.iommu.iommu import Iommu
from nopin.iommu.page_requests import PARKS_MAX, Meter
from nopin.iommu.relay import (
    SLOW_BYTES,
    TURN_BYTES,
    UNTIL_DONE,
    Copy,
    Ends,
    Relayed,
    Turn,
    after,
    are_present,
    relay_in_turn,
    start_of,
)
from nopin.mm.space import Staging
from nopin.model.net.client import SendOptions
from nopin.nic.abi import SendFlags, WcStatus, WrOpcode
from nopin.nic.direct_posted import RUN_BYTES_MIN, RUN_LENGTH_MIN
from nopin.server.copier import TRIES, Speeds, chunk_bytes
from nopin.testing.memory_space import MemorySpace
from nopin.testing.pair import Pair, Side, connect, make_side
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
GRAIN = 1024
N_PAGES = 32
SOURCE, TARGET = 0x10000, 0x900000
LONG = 100_000


class Recorder:
    """A relay that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(
        self, ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn = UNTIL_DONE
    ) -> Relayed:
        self.asked.append([copy.length for copy in copies])
        return relay_in_turn(ends, copies, staging, grain, turn)


class Spaces(NamedTuple):
    source: MemorySpace
    target: MemorySpace

    @property
    def ends(self) -> Ends:
        return Ends(*self)


def spaces(seed: int = 1) -> Spaces:
    """A source of random bytes and an empty target."""
    source, target = MemorySpace(SOURCE, N_PAGES), MemorySpace(TARGET, N_PAGES)
    source.memory[:] = np.random.default_rng(seed).integers(0, 256, len(source.memory), np.uint8)
    return Spaces(source, target)


def copy_of(offset: int, length: int) -> Copy:
    return Copy(SOURCE + offset, TARGET + offset, length)


# --- in turn


@pytest.mark.parametrize("ahead", [0, 1, SLOW_BYTES - 1, SLOW_BYTES, PAGE // 2, PAGE // 2 + 1, PAGE - 1])
@pytest.mark.parametrize("buffer_address", [0, 16, PAGE - 8])
def test_a_copy_waits_where_neither_way_is_slow(ahead: int, buffer_address: int) -> None:
    source, target = SOURCE + 100, TARGET + 100 + ahead
    start = start_of(source, target, buffer_address)
    assert 0 <= start < PAGE
    waits_at = buffer_address + start
    for where_from, where_to in ((source, waits_at), (waits_at, target)):
        assert not 0 < (where_to - where_from) % PAGE < SLOW_BYTES


@pytest.mark.parametrize("staging_bytes", [PAGE, 3 * PAGE + 70, 64 * PAGE])
def test_copies_longer_than_the_staging_buffer_arrive_whole(staging_bytes: int) -> None:
    both = spaces()
    copies = [copy_of(5, 6 * PAGE + 7), copy_of(9 * PAGE, PAGE)]
    total = 7 * PAGE + 7
    assert relay_in_turn(both.ends, copies, Staging.of_size(staging_bytes), GRAIN) == Relayed(total, total)
    expected = np.zeros_like(both.target.memory)
    for start, length in ((5, 6 * PAGE + 7), (9 * PAGE, PAGE)):
        expected[start : start + length] = both.source.memory[start : start + length]
    assert np.array_equal(both.target.memory, expected)


@pytest.mark.parametrize("staging_bytes", [PAGE, 2 * PAGE + 70, 64 * PAGE])
def test_a_source_that_ends_early_is_written_in_whole_packets_and_nothing_after_it(staging_bytes: int) -> None:
    both = spaces()
    both.source.hole.add(3)
    copies = [copy_of(100, 5 * PAGE), copy_of(8 * PAGE, PAGE)]
    n_read = 3 * PAGE - 100
    assert relay_in_turn(both.ends, copies, Staging.of_size(staging_bytes), GRAIN) == Relayed(
        n_read, n_read - n_read % GRAIN
    )
    assert not both.target.memory[100 + n_read - n_read % GRAIN :].any()


def test_a_target_that_refuses_is_told_from_a_source_that_ends() -> None:
    both = spaces()
    both.target.read_only.add(2)
    outcome = relay_in_turn(both.ends, [copy_of(0, 4 * PAGE)], Staging.of_size(64 * PAGE), GRAIN)
    assert outcome == Relayed(n_read=4 * PAGE, n_written=2 * PAGE)


def test_what_is_left_of_copies_begins_where_they_stopped() -> None:
    copies = [copy_of(0, 100), copy_of(200, 50)]
    assert list(after(copies, 0)) == copies
    assert list(after(copies, 30)) == [copy_of(30, 70), copies[1]]
    assert list(after(copies, 100)) == [copies[1]]
    assert list(after(copies, 120)) == [copy_of(220, 30)]
    assert list(after(copies, 150)) == []


@pytest.mark.parametrize("page", range(8))
@pytest.mark.parametrize("side", [0, 1])
def test_copies_looked_up_together_are_present_if_each_is(page: int, side: int) -> None:
    """Copies that touch, overlap, lie apart, and go back."""
    both = spaces()
    pieces = [(0, PAGE), (PAGE, 2 * PAGE), (PAGE, PAGE), (5 * PAGE, PAGE), (4 * PAGE, 100)]
    copies = [copy_of(offset, length) for offset, length in pieces]
    assert are_present(both.ends, copies)
    both[side].slow.add(page)
    assert are_present(both.ends, copies) == (page not in {0, 1, 2, 4, 5})


@pytest.mark.parametrize("others", [True, False])
def test_many_copies_end_between_two_after_a_turn_if_others_wait(others: bool) -> None:
    both = spaces()
    n_turn = -(-TURN_BYTES // LONG)
    copies = [copy_of(0, LONG)] * (2 * n_turn)
    looks = iter([others] * 2)
    turn = Turn(lambda: next(looks))
    n_done = n_turn if others else 2 * n_turn
    relayed = relay_in_turn(both.ends, copies, Staging.of_size(64 * PAGE), GRAIN, turn)
    assert relayed == Relayed(n_done * LONG, n_done * LONG)
    assert turn.over == others
    assert len(list(looks)) == others, "it looks once a turn, and no more once others wait"


# --- through the iommu


class Bound:
    """Two spaces behind an iommu, and the spans of a copy between them."""

    def __init__(self) -> None:
        self.relay = Recorder()
        self.iommu = Iommu(relay=self.relay)
        self.source, self.target = spaces()
        self._staging = Staging.of_size(64 * PAGE)
        self.pasids = self.iommu.bind(self.source), self.iommu.bind(self.target)
        self.meters = Meter(), Meter()

    def spans(self, *, waiting: bool = True) -> tuple[Span, Span]:
        ours = Span(self.pasids[0], SOURCE, self.meters[0], "source" if waiting else None)
        return ours, Span(self.pasids[1], TARGET, self.meters[1], "target" if waiting else None)

    def copy(self, *, waiting: bool = True) -> Relayed | None:
        return self.iommu.relay(*self.spans(waiting=waiting), 4 * PAGE, self._staging, GRAIN)

    def run(self, *lengths: int) -> int:
        run = [copy_of(0, length) for length in lengths]
        return self.iommu.relay_run(*self.pasids, run, self._staging, GRAIN, UNTIL_DONE)

    def answer(self) -> list[object]:
        for request in self.iommu.take_requests():
            space = self.iommu.space(request.pasid)
            assert isinstance(space, MemorySpace)
            self.iommu.respond(request, space.fault(request.start, request.end, write=request.write))
        return list(self.iommu.take_wakeups())


def test_both_sides_are_waited_for_before_anything_moves() -> None:
    ends = Bound()
    ends.source.slow.add(1)
    ends.target.slow.add(2)
    assert ends.copy() is None
    assert ends.relay.asked == []
    assert not ends.target.memory.any()
    assert sorted(map(str, ends.answer())) == ["source", "target"]
    assert ends.copy() == Relayed(4 * PAGE, 4 * PAGE)
    assert [meter.page_faults for meter in ends.meters] == [1, 1]


def test_two_sides_that_never_stay_still_get_their_copy() -> None:
    ends = Bound()
    ends.source.fleeting.add(1)
    ends.target.fleeting.add(2)
    for _ in range(PARKS_MAX):
        assert ends.copy() is None
        assert ends.relay.asked == []
        assert ends.answer() == ["source", "target"]
    assert ends.copy() == Relayed(4 * PAGE, 4 * PAGE)
    assert ends.relay.asked == [], "what may be slow is no work for two"


def test_who_waits_for_nothing_copies_at_once() -> None:
    ends = Bound()
    ends.source.slow.add(1)
    assert ends.copy(waiting=False) == Relayed(4 * PAGE, 4 * PAGE)


def test_a_space_that_was_unbound_reads_and_takes_nothing() -> None:
    ends = Bound()
    ends.iommu.unbind(ends.pasids[1])
    assert ends.copy() == Relayed(4 * PAGE, 0)
    ends.iommu.unbind(ends.pasids[0])
    assert ends.copy() == Relayed(0, 0)
    assert ends.run(PAGE) == 0


def test_a_run_ends_before_the_first_copy_that_would_wait() -> None:
    ends = Bound()
    ends.source.slow.add(3)
    assert ends.run(PAGE, 2 * PAGE, 4 * PAGE, PAGE) == 3 * PAGE
    assert ends.relay.asked == [[PAGE, 2 * PAGE]]
    assert ends.iommu.take_requests() == []


# --- long messages that follow each other on the direct path


def device() -> tuple[Pair, Recorder]:
    """Two clients of one device, connected; and what their copies are asked of."""
    relay = Recorder()
    iommu = Iommu(relay=relay)
    a = make_side("10.0.0.1", seed=1, iommu=iommu)
    b = make_side("10.0.0.1", seed=2, iommu=iommu, nic=a.nic)
    connect(a, b)
    rng = np.random.default_rng(5)
    for side in (a, b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), np.uint8)
    return Pair(a, b), relay


def post(pair: Pair, opcode: WrOpcode, n: int, **more: Unpack[SendOptions]) -> None:
    options: SendOptions = {"wr_id": n}
    options.update(more)
    pair.a.post(opcode, n * LONG, LONG, to=pair.b.region, at=(20 + n) * LONG, **options)


def part(side: Side, start: int, n: int = 1) -> bytes:
    return side.space.memory[start * LONG : (start + n) * LONG].tobytes()


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
def test_long_messages_of_one_kind_are_copied_together(opcode: WrOpcode) -> None:
    pair, relay = device()
    expected = part(pair.b, 20, 5) if opcode is WrOpcode.RDMA_READ else part(pair.a, 0, 5)
    for n in range(5):
        post(pair, opcode, n)
    pair.run()
    assert relay.asked == [[LONG] * 5]
    assert pair.a.poll() == [(n, WcStatus.SUCCESS) for n in range(5)]
    assert part(pair.a, 0, 5) == part(pair.b, 20, 5) == expected
    assert pair.a.nic.counters.direct_messages == 5
    assert pair.a.nic.counters.direct_bytes == 5 * LONG


@pytest.mark.parametrize("n_works", [RUN_BYTES_MIN // RUN_LENGTH_MIN - 1, RUN_BYTES_MIN // RUN_LENGTH_MIN])
def test_messages_that_are_not_long_are_copied_together_if_they_are_many(n_works: int) -> None:
    pair, relay = device()
    for n in range(n_works):
        pair.a.post(WrOpcode.RDMA_READ, n * RUN_LENGTH_MIN, RUN_LENGTH_MIN, to=pair.b.region, wr_id=n)
    pair.run()
    together = [[RUN_LENGTH_MIN] * n_works] if n_works * RUN_LENGTH_MIN >= RUN_BYTES_MIN else []
    assert relay.asked == together
    assert pair.a.poll() == [(n, WcStatus.SUCCESS) for n in range(n_works)]
    first = pair.b.space.memory[:RUN_LENGTH_MIN].tobytes()
    assert pair.a.space.memory[: n_works * RUN_LENGTH_MIN].tobytes() == first * n_works


def test_other_messages_and_fences_end_a_run() -> None:
    pair, relay = device()
    for n, opcode in enumerate([WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.RDMA_READ]):
        post(pair, opcode, n)
    post(pair, WrOpcode.RDMA_READ, 4, flags=SendFlags.SIGNALED | SendFlags.FENCE)
    pair.run()
    assert relay.asked == [[LONG, LONG], [LONG, LONG], [LONG]]
    assert [status for _, status in pair.a.poll()] == [WcStatus.SUCCESS] * 5


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_message_that_fails_in_a_run_fails_as_it_would_alone(opcode: WrOpcode, side: str) -> None:
    pair, _ = device()
    read = opcode is WrOpcode.RDMA_READ
    sink, first = (pair.a, 0) if read else (pair.b, 20)
    untouched = part(sink, first + 2)
    space, start = (pair.a.space, 0) if side == "ours" else (pair.b.space, 20)
    space.hole.add((start + 1) * LONG // PAGE + 3)
    for n in range(3):
        post(pair, opcode, n)
    pair.run()
    status = WcStatus.LOC_PROT_ERR if side == "ours" else WcStatus.REM_ACCESS_ERR
    assert pair.a.poll() == [(0, WcStatus.SUCCESS), (1, status), (2, WcStatus.WR_FLUSH_ERR)]
    assert part(pair.a, 0) == part(pair.b, 20)
    assert part(sink, first + 2) == untouched


def test_a_key_that_opens_nothing_ends_the_run_before_it() -> None:
    pair, relay = device()
    for n in range(2):
        post(pair, WrOpcode.RDMA_WRITE, n)
    post(pair, WrOpcode.RDMA_WRITE, 2, rkey=pair.b.region.rkey ^ 1)
    post(pair, WrOpcode.RDMA_WRITE, 3)
    pair.run()
    assert relay.asked == [[LONG, LONG]]
    statuses = [status for _, status in pair.a.poll()]
    assert statuses == [WcStatus.SUCCESS] * 2 + [WcStatus.REM_ACCESS_ERR, WcStatus.WR_FLUSH_ERR]


def test_a_slow_page_in_a_run_is_waited_for_by_its_message() -> None:
    pair, _ = device()
    expected = part(pair.b, 20, 4)
    pair.b.space.slow.add(22 * LONG // PAGE + 1)
    for n in range(4):
        post(pair, WrOpcode.RDMA_READ, n)
    pair.run()
    assert pair.a.poll() == [(n, WcStatus.SUCCESS) for n in range(4)]
    assert part(pair.a, 0, 4) == expected
    assert pair.a.nic.counters.parked == 1


@pytest.mark.parametrize("others", [True, False])
def test_a_stream_of_long_messages_goes_on_past_its_turn_only_while_nobody_else_waits(others: bool) -> None:
    pair, relay = device()
    a, b = pair.a, pair.b
    c = make_side("10.0.0.1", seed=3, iommu=a.nic.iommu, nic=a.nic)
    d = make_side("10.0.0.1", seed=4, iommu=a.nic.iommu, nic=a.nic)
    connect(c, d)
    pair.run()
    for _ in range(100):
        a.post(WrOpcode.RDMA_READ, 0, LONG, to=b.region)
    if others:
        c.post(WrOpcode.RDMA_READ, 0, LONG, to=d.region)
    a.nic.poll_rings(0)
    n_turn = -(-TURN_BYTES // LONG)
    assert len(a.poll()) == (n_turn if others else 100)
    assert len(c.poll()) == others
    pair.run()
    assert a.sends.free == 256
    assert len(relay.asked) == (3 if others else 1)


# --- when help is worth it


def share_of_help(speeds: Speeds, cost: Callable[[int], int], n: int = 5000) -> float:
    """Copy n times, alone for 150 ns, with help for what `cost` says of a help that comes so often in a row."""
    n_helped = in_a_row = 0
    for _ in range(n):
        helped = speeds.prefer_help()
        in_a_row = in_a_row + 1 if helped else 0
        n_helped += helped
        speeds.learn(cost(in_a_row) if helped else 150, 1, helped=helped)
    return n_helped / n


def test_the_quicker_way_is_taken_and_the_other_tried_now_and_then() -> None:
    others = 1 - share_of_help(Speeds(), lambda _: 100), share_of_help(Speeds(), lambda _: 200)
    for share in others:
        assert 10 * TRIES <= share * 5000 <= 40 * TRIES


def test_help_that_is_slow_only_at_first_is_taken() -> None:
    assert share_of_help(Speeds(), lambda in_a_row: 100 if in_a_row > 1 else 450) > 0.95


def test_a_hiccup_changes_nothing() -> None:
    rng = random.Random(1)
    assert share_of_help(Speeds(), lambda _: 5000 if rng.random() < 0.02 else 100) > 0.95


def test_help_that_became_slow_is_dropped_at_once_and_taken_again_when_it_is_quick() -> None:
    speeds = Speeds()
    assert share_of_help(speeds, lambda _: 100) > 0.9
    assert share_of_help(speeds, lambda _: 1000, 100) < 0.15
    assert share_of_help(speeds, lambda _: 1000) < 0.1
    assert share_of_help(speeds, lambda _: 100) > 0.9


@pytest.mark.parametrize("total", [1, PAGE, 1 << 19, (1 << 20) + 1, 4 << 20, 1 << 31])
def test_chunks_are_whole_pages_and_fit_the_copiers_buffer(total: int) -> None:
    assert chunk_bytes(total) % PAGE == 0
    assert 64 << 10 <= chunk_bytes(total) <= 512 << 10
