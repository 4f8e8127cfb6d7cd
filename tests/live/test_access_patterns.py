"""Every shape of access against a model in plain bytes: unaligned, across pages and packets, scattered, huge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from own_memory import PAGE, Pages, anonymous
from verbs_pair import CAPS, DIRECT, PATHS, WIRE, Pair, Servers, connected, running_servers

from nopin import Device, MemoryRegion, RecvWr, SendFlags, SendWr, Sge, WcStatus, WrOpcode, attach

N_PAGES = 96
MTUS = (256, 512, 1024, 2048, 4096)
N_RANDOM = 40
GIB = 1 << 30


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("patterns")) as running:
        yield running


@pytest.fixture
def target() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


@pytest.fixture
def local() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


class Model:
    """The owner's and the peer's memory, and what both ought to hold."""

    def __init__(self, pair: Pair, target: Pages, local: Pages, region: MemoryRegion, seed: int) -> None:
        self.pair = pair
        self.region = region
        self.draw = np.random.default_rng(seed)
        self._pages = (target, local)
        self.target_address, self.local_address = target.address, local.address
        self.target, self.local = (np.frombuffer(p.fill(seed + n), np.uint8).copy() for n, p in enumerate(self._pages))

    def check(self) -> None:
        for pages, expected in zip(self._pages, (self.target, self.local), strict=True):
            wrong = np.flatnonzero(pages.array() != expected)
            assert not len(wrong), f"{len(wrong)} wrong bytes, the first at {wrong[0]:#x} of {len(expected):#x}"

    def scattered(self, length: int, n_pieces: int) -> list[Sge]:
        """Pieces of local memory that do not overlap, of that length together; some may be empty."""
        lane = len(self.local) // n_pieces
        cuts = np.sort(self.draw.integers(0, length + 1, n_pieces - 1))
        lengths = np.diff(np.concatenate([[0], cuts, [length]])).tolist()
        starts = [n * lane + int(self.draw.integers(0, lane - size + 1)) for n, size in enumerate(lengths)]
        return [
            Sge(self.local_address + start, size, self.pair.peer.lkey)
            for start, size in zip(starts, lengths, strict=True)
        ]

    def transfer(self, opcode: WrOpcode, at: int, sges: list[Sge]) -> None:
        """Move bytes by device and in the model."""
        wr = SendWr(opcode, sges, remote_address=self.region.iova + at, rkey=self.region.rkey)
        assert self.pair.peer.run(wr).status is WcStatus.SUCCESS
        for address, length, _ in sges:
            here = slice(address - self.local_address, address - self.local_address + length)
            if opcode is WrOpcode.RDMA_READ:
                self.local[here] = self.target[at : at + length]
            else:
                self.target[at : at + length] = self.local[here]
            at += length


@dataclass(frozen=True)
class Way:
    path: str
    path_mtu: int


WAYS = [Way(WIRE, mtu) for mtu in MTUS] + [Way(DIRECT, 1024)]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.path}-{way.path_mtu}")
def model(request: pytest.FixtureRequest, servers: Servers, target: Pages, local: Pages) -> Iterator[Model]:
    way: Way = request.param
    with connected(servers, way.path, path_mtu=way.path_mtu) as pair:
        iova = 0x7700_0000_0000_0000 + way.path_mtu + 13  # not congruent to the address in any way
        region = pair.owner.register(target.address, target.length, iova=iova)
        yield Model(pair, target, local, region, way.path_mtu)


def test_every_length_about_a_packet_and_a_page_arrives(model: Model) -> None:
    mtu = model.pair.peer.qp.query().path_mtu or 0
    lengths = {1, 2, 3, 4, 5, *(n + d for n in (mtu, 2 * mtu, PAGE, 3 * PAGE) for d in (-1, 0, 1))}
    for number, length in enumerate(sorted(lengths)):
        opcode = (WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ)[number % 2]
        model.transfer(opcode, PAGE - 1 - number % 4, model.scattered(length, 1))
    model.check()


def test_random_scattered_transfers_match_the_model(model: Model) -> None:
    draw = model.draw
    for _ in range(N_RANDOM):
        n_pieces = int(draw.integers(1, CAPS.max_send_sge + 1))
        longest = len(model.local) // n_pieces
        length = int(draw.integers(0, min(longest, 4 * PAGE if draw.random() < 0.8 else longest)))
        at = int(draw.integers(0, len(model.target) - length + 1))
        opcode = WrOpcode.RDMA_READ if draw.random() < 0.5 else WrOpcode.RDMA_WRITE
        model.transfer(opcode, at, model.scattered(length, n_pieces))
    model.check()


def test_many_requests_under_way_at_once_are_carried_out_in_order(model: Model) -> None:
    """Overlapping WRITEs and READs posted together; each sees those before it.

    A WRITE may overtake the answer of a READ before it (IBTA 10.8.3.3), so WRITEs are fenced.
    """
    peer, draw = model.pair.peer, model.draw
    n, size = 64, 3000
    wrs = []
    for number in range(n):
        at, here = (int(draw.integers(0, 8 * PAGE)) for _ in range(2))
        there = 16 * PAGE + number * size  # what READs bring lies apart from what WRITEs send
        sge = Sge(model.local_address + (here if number % 2 else there), size, peer.lkey)
        opcode = WrOpcode.RDMA_WRITE if number % 2 else WrOpcode.RDMA_READ
        remote = model.region.iova + at
        flags = SendFlags.SIGNALED | (SendFlags.FENCE if number % 2 else SendFlags.NONE)
        wrs.append(SendWr(opcode, [sge], number, flags, remote, model.region.rkey))
        if number % 2:
            model.target[at : at + size] = model.local[here : here + size]
        else:
            model.local[there : there + size] = model.target[at : at + size]
    peer.qp.post_send(wrs)
    completions = [peer.next_completion() for _ in wrs]
    assert [(wc.wr_id, wc.status) for wc in completions] == [(number, WcStatus.SUCCESS) for number in range(n)]
    model.check()


def test_sends_fill_scattered_receives(model: Model) -> None:
    owner, peer, draw = model.pair.owner, model.pair.peer, model.draw
    for _ in range(12):
        length = int(draw.integers(0, 5 * PAGE))
        cut = int(draw.integers(0, length + 1))
        pieces = [Sge(model.target_address + 7, cut, owner.lkey)]
        pieces.append(Sge(model.target_address + 40 * PAGE + 5, length - cut + 9, owner.lkey))
        owner.qp.post_recv(RecvWr(pieces))
        sges = model.scattered(length, 3)
        assert peer.run(SendWr(WrOpcode.SEND, sges)).status is WcStatus.SUCCESS
        received = owner.next_completion()
        assert (received.status, received.byte_len) == (WcStatus.SUCCESS, length)
        base = model.local_address
        sent = np.concatenate([model.local[s.address - base : s.address - base + s.length] for s in sges])
        model.target[7 : 7 + cut] = sent[:cut]
        model.target[40 * PAGE + 5 : 40 * PAGE + 5 + length - cut] = sent[cut:]
    model.check()


@pytest.mark.parametrize("path", PATHS)
def test_zero_bytes_need_no_key_and_touch_nothing(servers: Servers, path: str) -> None:
    with connected(servers, path) as pair:
        for opcode in (WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ):
            assert pair.peer.run(SendWr(opcode, remote_address=0, rkey=0)).status is WcStatus.SUCCESS
        pair.owner.receive_into()
        assert pair.peer.run(SendWr(WrOpcode.SEND)).status is WcStatus.SUCCESS
        received = pair.owner.next_completion()
        assert (received.status, received.byte_len) == (WcStatus.SUCCESS, 0)


@pytest.mark.parametrize("path", PATHS)
def test_messages_of_several_mebibytes_arrive_whole(servers: Servers, path: str) -> None:
    n_pages = 2048 + 3
    with connected(servers, path) as pair, anonymous(n_pages) as target, anonymous(n_pages) as local:
        data = local.fill(1)
        region = pair.owner.register(target.address, target.length)
        length = target.length - 1001
        assert pair.peer.write(target.address + 1001, region.rkey, local.address, length) is WcStatus.SUCCESS
        assert target.get(0, target.length) == bytes(1001) + data[:length]
        assert pair.peer.read(target.address + 1000, region.rkey, local.address, length) is WcStatus.SUCCESS
        assert local.get(0, length) == b"\0" + data[: length - 1]


@pytest.mark.parametrize("path", PATHS)
def test_a_message_longer_than_a_gibibyte_arrives_whole(servers: Servers, path: str) -> None:
    """READ of a sparse mapping: only the marks in it take memory on the owner's side."""
    needed = GIB + (1 << 29)
    if free_bytes() < needed + GIB:
        pytest.skip(f"needs {needed >> 20} MiB of free memory")
    length = GIB + 12345
    marks = [0, 1, PAGE, (1 << 29) + 77, GIB - 1, GIB, length - 1]
    n_pages = -(-length // PAGE) + 1
    with connected(servers, path) as pair, anonymous(n_pages) as target, anonymous(n_pages) as local:
        region = pair.owner.register(target.address, target.length)
        for number, mark in enumerate(marks):
            target.put(3 + mark, bytes([number + 1]))
        target.put(3 + length, b"\xff")
        assert pair.peer.read(target.address + 3, region.rkey, local.address, length) is WcStatus.SUCCESS
        found = local.array()
        places = np.flatnonzero(found)
        assert places.tolist() == marks
        assert found[places].tolist() == list(range(1, len(marks) + 1))


def free_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize("path", PATHS)
def test_remote_arrays_agree_with_numpy_on_random_selections(servers: Servers, path: str) -> None:
    draw = np.random.default_rng(7)
    array = draw.integers(0, 1000, (13, 17, 19), np.int32)
    with (
        Device(servers.owner_path()) as ours,
        Device(servers.peer_path(path)) as theirs,
        ours.share(array) as share,
        attach(share.url, device=theirs) as remote,
    ):
        for _ in range(60):
            key = tuple(random_index(draw, n) for n in array.shape[: draw.integers(0, 4)])
            assert np.array_equal(remote[key], array[key]), key
            expected = array.copy()
            value = draw.integers(0, 1000, array[key].shape, np.int32)
            expected[key] = value
            remote[key] = value
            assert np.array_equal(array, expected), key


def random_index(draw: np.random.Generator, n: int) -> int | slice:
    if draw.random() < 0.3:
        return int(draw.integers(-n, n))
    start, stop = (int(draw.integers(-n - 2, n + 3)) for _ in range(2))
    return slice(start, stop, int(draw.choice([1, 1, 2, 3, -1, -2])))
