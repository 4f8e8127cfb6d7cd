"""Pages that have to come from a medium: they delay what needs them, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from own_memory import PAGE, Pages, anonymous, mapped_file
from slow_page import held_back_pages, slow_pages
from verbs_pair import (
    ALL_RIGHTS,
    PATHS,
    PATIENCE_S,
    End,
    Pair,
    Servers,
    connect,
    connected,
    count,
    figures,
    running_servers,
)
from zram_swap import zram_swap

from nopin import Device, MemoryRegion, RecvWr, SendWr, WcStatus, WrOpcode, attach

N_PAGES = 4
TIMEOUT, LONGER_THAN_ALL_RETRIES_S = 13, 0.35
"""Eight acknowledge timeouts of 34 ms, and more: an operation that could time out would have failed."""
SWAPPED_PAGES = 4096
SWAPPED_BYTES = SWAPPED_PAGES * PAGE


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("swap")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(servers: Servers, path: str) -> Iterator[Pair]:
    with connected(servers, path, path_mtu=1024, timeout=TIMEOUT) as pair:
        yield pair


@pytest.fixture
def pages() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


def n_timeouts(pair: Pair) -> int:
    return sum(count(end.device, "ack_timeout") for end in (pair.owner, pair.peer))


class Quick:
    """Another connection between the same two devices, to memory that is present."""

    def __init__(self, pair: Pair, word: Pages) -> None:
        self._asks, self._answers = End(pair.peer.device), End(pair.owner.device)
        connect(self._asks.qp, self._answers.qp)
        word.put(0, b"present")
        self._word = word
        self._region = self._answers.register(word.address, PAGE)

    def read(self) -> None:
        """One round trip."""
        remote = self._word.address
        assert self._asks.read(remote, self._region.rkey, remote + 100, 8) is WcStatus.SUCCESS


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
@pytest.mark.parametrize("side", ["owner's", "peer's"])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.SEND], ids=lambda o: o.name)
@pytest.mark.parametrize("discipline", ["on-demand", "short-term"])
def test_a_slow_page_parks_one_queue_pair_and_never_times_out(
    pair: Pair, pages: Pages, opcode: WrOpcode, side: str, discipline: str
) -> None:
    before = n_timeouts(pair)
    slow_data, quick_data = (np.random.default_rng(seed).bytes(N_PAGES * PAGE) for seed in (1, 2))
    pages.put(0, quick_data)
    length = N_PAGES * PAGE - 100
    with slow_pages(slow_data) as slow, anonymous(1) as word:
        quick = Quick(pair, word)
        target, local = (slow, pages) if side == "owner's" else (pages, slow)
        theirs = pair.owner.register(target.address, target.length, discipline=discipline)
        mine = pair.peer.register(local.address, local.length, discipline=discipline)
        if opcode is WrOpcode.SEND:
            pair.owner.qp.post_recv(RecvWr([pair.owner.sge(target.address, length)._replace(lkey=theirs.lkey)]))
        sge = pair.peer.sge(local.address, length)._replace(lkey=mine.lkey)
        pair.peer.qp.post_send(SendWr(opcode, [sge], remote_address=target.address, rkey=theirs.rkey))
        ends = time.monotonic() + LONGER_THAN_ALL_RETRIES_S
        while time.monotonic() < ends:
            quick.read()
        assert pair.peer.cq.poll() == []
        slow.release()
        assert pair.peer.next_completion().status is WcStatus.SUCCESS
        source, sink = (target, local) if opcode is WrOpcode.RDMA_READ else (local, target)
        expected = slow_data if source is slow else quick_data
        assert sink.get(0, length) == source.get(0, length) == expected[:length]
    assert n_timeouts(pair) == before


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
@pytest.mark.parametrize("by", ["region", "whole process"])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE], ids=lambda o: o.name)
def test_untouched_memory_that_its_owner_holds_back_stops_nobody_else(
    pair: Pair, pages: Pages, opcode: WrOpcode, by: str
) -> None:
    pages.put(0, b"written")
    with held_back_pages(N_PAGES) as held, anonymous(1) as word:
        quick = Quick(pair, word)
        where = (held.address, held.length) if by == "region" else ()
        region = pair.owner.pd.register(*where, access=ALL_RIGHTS)
        sge = pair.peer.sge(pages.address, 7)
        pair.peer.qp.post_send(SendWr(opcode, [sge], remote_address=held.at(1), rkey=region.rkey))
        for _ in range(50):
            quick.read()
        assert pair.peer.cq.poll() == []
        held.release()
        assert pair.peer.next_completion().status is WcStatus.SUCCESS
        seen = bytes(7) if opcode is WrOpcode.RDMA_READ else b"written"
        assert held.get(PAGE, 7) == pages.get(0, 7) == seen


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
def test_clients_whose_pages_never_come_do_not_keep_back_the_slow_pages_of_others(
    servers: Servers, pair: Pair, pages: Pages, tmp_path: Path
) -> None:
    """Two of them can take every thread that waits for pages; a page of a file needs one."""
    n_each = 8
    with contextlib.ExitStack() as stack:
        helds = [stack.enter_context(held_back_pages(2 * n_each)) for _ in range(2)]
        for held in helds:
            device = stack.enter_context(Device(servers.owner_path()))
            for n in range(n_each):
                one, other = End(device), End(device)
                connect(one.qp, other.qp)
                region = other.register(held.at(2 * n), PAGE)
                sge = one.sge(pages.address, 8)
                one.qp.post_send(SendWr(WrOpcode.RDMA_READ, [sge], remote_address=held.at(2 * n), rkey=region.rkey))
        (tmp_path / "file").write_bytes(b"of the file")
        file = stack.enter_context(mapped_file(tmp_path / "file", 1, shared=True))
        region = pair.owner.register(file.address, PAGE)
        assert pair.peer.read(file.address, region.rkey, pages.address, 11) is WcStatus.SUCCESS
        assert pages.get(0, 11) == b"of the file"
        for held in helds:
            held.release()


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
def test_an_atomic_on_a_slow_page_is_carried_out_once(pair: Pair, pages: Pages) -> None:
    with slow_pages((41).to_bytes(PAGE, "little")) as slow:
        region = pair.owner.register(slow.address, PAGE)
        sge = pair.peer.sge(pages.address, 8)
        wr = SendWr(WrOpcode.ATOMIC_FETCH_AND_ADD, [sge], remote_address=slow.address, rkey=region.rkey, compare_add=1)
        pair.peer.qp.post_send([wr, wr, wr])
        assert pair.peer.cq.wait(1, 0.1) == []
        slow.release()
        assert {wc.status for wc in pair.peer.cq.wait(3, PATIENCE_S)} == {WcStatus.SUCCESS}
        assert int.from_bytes(slow.get(0, 8), "little") == 44


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
def test_what_follows_a_read_of_a_slow_page_is_carried_out_once_and_in_order(pair: Pair, pages: Pages) -> None:
    slow_data = np.random.default_rng(3).bytes(PAGE)
    with slow_pages(slow_data) as slow, anonymous(N_PAGES) as target:
        slow_region = pair.owner.register(slow.address, PAGE)
        region = pair.owner.register(target.address, target.length)

        def wr(opcode: WrOpcode, remote: int, rkey: int, local: int, length: int) -> SendWr:
            sge = pair.peer.sge(pages.address + local, length)
            return SendWr(opcode, [sge], remote_address=remote, rkey=rkey, compare_add=1)

        pages.put(PAGE, b"written")
        pair.peer.qp.post_send(
            [
                wr(WrOpcode.ATOMIC_FETCH_AND_ADD, target.at(1), region.rkey, PAGE + 16, 8),
                wr(WrOpcode.RDMA_READ, slow.address, slow_region.rkey, 0, PAGE),
                wr(WrOpcode.RDMA_WRITE, target.address, region.rkey, PAGE, 7),
                wr(WrOpcode.ATOMIC_FETCH_AND_ADD, target.at(1), region.rkey, PAGE + 24, 8),
                wr(WrOpcode.RDMA_READ, target.address, region.rkey, 2 * PAGE, 7),
            ]
        )
        (first,) = pair.peer.cq.wait(2, 0.1)
        slow.release()
        others = pair.peer.cq.wait(4, PATIENCE_S)
        assert {wc.status for wc in [first, *others]} == {WcStatus.SUCCESS}
        assert pages.get(0, PAGE) == slow_data
        assert pages.get(2 * PAGE, 7) == target.get(0, 7) == b"written"
        assert int.from_bytes(target.get(PAGE, 8), "little") == 2
        assert int.from_bytes(pages.get(PAGE + 24, 8), "little") == 1


# --- swap


@pytest.fixture
def swapped() -> Iterator[Pages]:
    """Memory of this process in swap, random bytes that do not compress; `swap_data` is what it holds."""
    with zram_swap(), anonymous(SWAPPED_PAGES) as pages:
        pages.put(0, swap_data())
        pages.page_out(0, SWAPPED_PAGES)
        yield pages


def swap_data() -> bytes:
    return np.random.default_rng(4).bytes(SWAPPED_BYTES)


def row_of(pair: Pair, region: MemoryRegion) -> dict[str, object]:
    return next(row for row in figures(pair.owner.device, "mr") if row["rkey"] == region.rkey)


@pytest.mark.needs_root
@pytest.mark.parametrize("discipline", ["on-demand", "short-term"])
def test_memory_in_swap_comes_back_while_others_go_on(pair: Pair, swapped: Pages, discipline: str) -> None:
    before = n_timeouts(pair)
    with anonymous(SWAPPED_PAGES) as sink, anonymous(1) as word:
        quick = Quick(pair, word)
        region = pair.owner.register(swapped.address, SWAPPED_BYTES, discipline=discipline)
        sge = pair.peer.sge(sink.address, SWAPPED_BYTES)
        pair.peer.qp.post_send(SendWr(WrOpcode.RDMA_READ, [sge], remote_address=swapped.address, rkey=region.rkey))
        n_quick = 0
        while not (completions := pair.peer.cq.poll(1)):
            quick.read()
            n_quick += 1
        assert completions[0].status is WcStatus.SUCCESS
        assert sink.get(0, SWAPPED_BYTES) == swap_data()
        assert n_quick > 1, "the other queue pair did not proceed"
        faults = row_of(pair, region)["page_faults"]
        assert isinstance(faults, int)
        assert faults > SWAPPED_PAGES // 2  # the kernel brings neighbours along
    assert n_timeouts(pair) == before


@pytest.mark.needs_root
def test_writes_into_swapped_memory_keep_what_is_beside_them(pair: Pair, swapped: Pages, pages: Pages) -> None:
    expected = bytearray(swap_data())
    region = pair.owner.register(swapped.address, SWAPPED_BYTES)
    pages.put(0, b"written into swap")
    for page in range(0, SWAPPED_PAGES, 64):
        at = page * PAGE + PAGE - 8
        assert pair.peer.write(swapped.address + at, region.rkey, pages.address, 17) is WcStatus.SUCCESS
        expected[at : at + 17] = b"written into swap"
    assert swapped.get(0, SWAPPED_BYTES) == expected


@pytest.mark.needs_root
def test_a_remote_array_reads_and_writes_swapped_memory(servers: Servers, path: str, swapped: Pages) -> None:
    with (
        Device(servers.owner_path()) as ours,
        Device(servers.peer_path(path)) as theirs,
        ours.share(swapped.address, SWAPPED_BYTES) as share,
        attach(share.url, device=theirs) as remote,
    ):
        remote[5 : 5 + PAGE] = 1
        expected = np.frombuffer(swap_data(), np.uint8).copy()
        expected[5 : 5 + PAGE] = 1
        assert (remote[...] == expected).all()
