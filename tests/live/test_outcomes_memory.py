"""What an access finds when the owner has changed its memory: right bytes, or an exact error and no byte too many.

Every outcome is produced for real, over RoCEv2 and over the direct path, once by verbs (the completion status)
and once by a remote array (the error). Owner and peer are two devices of this process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from own_memory import MADV_HUGEPAGE, PAGE, Pages, anonymous, forked, mapped_file
from owner_process import MADV_DONTNEED, PROT_NONE, PROT_READ, PROT_RW
from verbs_pair import PATHS, Pair, Servers, connected, running_servers

from nopin import (
    AsyncEventType,
    Device,
    QpState,
    RemoteArray,
    SendWr,
    Sge,
    WcStatus,
    WorkError,
    WrOpcode,
    attach,
)

N_PAGES = 8
BAD = 5
"""The page that is spoiled."""
START, END = 2 * PAGE + 100, 8 * PAGE - 50
"""The bytes a message covers: unaligned, pages before and after the bad one."""
MTU = 1024


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("outcomes")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(servers: Servers, path: str) -> Iterator[Pair]:
    with connected(servers, path, path_mtu=MTU) as pair:
        yield pair


@pytest.fixture
def buffer() -> Iterator[Pages]:
    """Memory of the peer."""
    with anonymous(N_PAGES) as pages:
        yield pages


@contextlib.contextmanager
def attached(servers: Servers, path: str, pages: Pages) -> Iterator[RemoteArray]:
    with (
        Device(servers.owner_path()) as ours,
        Device(servers.peer_path(path)) as theirs,
        ours.share(pages.address, pages.length, access="rwa") as share,
        attach(share.url, device=theirs) as remote,
    ):
        yield remote


# --- what succeeds


def untouched(pages: Pages) -> bytes:
    return bytes(pages.length)


def dropped(pages: Pages) -> bytes:
    data = pages.fill(1)
    pages.advise(BAD, MADV_DONTNEED)
    return data[: BAD * PAGE] + bytes(PAGE) + data[(BAD + 1) * PAGE :]


def remapped(pages: Pages) -> bytes:
    data = pages.fill(2)
    pages.unmap(BAD, 2)
    pages.map_fresh(BAD, 2)
    pages.put(BAD * PAGE, b"new mapping")
    return data[: BAD * PAGE] + b"new mapping".ljust(2 * PAGE, b"\0") + data[(BAD + 2) * PAGE :]


def written(pages: Pages) -> bytes:
    return pages.fill(3)


def protected_and_back(pages: Pages) -> bytes:
    data = pages.fill(4)
    pages.protect(BAD, PROT_NONE)
    pages.protect(BAD, PROT_RW)
    return data


@dataclass(frozen=True)
class Kept:
    """A change of memory that an access must follow, and the kind of memory it happens to."""

    name: str
    change: Callable[[Pages], bytes]
    memory: Callable[[Path], contextlib.AbstractContextManager[Pages]] = lambda folder: anonymous(N_PAGES)


@contextlib.contextmanager
def huge(folder: Path) -> Iterator[Pages]:
    """A transparent huge page, which the range lies across the middle of."""
    n_huge = (2 << 20) // PAGE
    with anonymous(2 * n_huge) as area:
        first = -(-area.address // (2 << 20)) * (2 << 20)
        whole = Pages(first, n_huge)
        whole.advise(0, MADV_HUGEPAGE, n_huge)
        whole.fill(5)
        yield Pages(whole.at(n_huge // 2), N_PAGES)


KEPT = (
    Kept("untouched", untouched),
    Kept("after MADV_DONTNEED", dropped),
    Kept("mapped anew at the same address", remapped),
    Kept("PROT_NONE and back", protected_and_back),
    Kept("huge page", written, huge),
    Kept("shared file", written, lambda folder: mapped_file(folder / "file", N_PAGES, shared=True)),
    Kept("private file", written, lambda folder: mapped_file(folder / "file", N_PAGES, shared=False)),
    Kept("untouched private file", untouched, lambda folder: mapped_file(folder / "file", N_PAGES, shared=False)),
)
each_kept = pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.name)


@each_kept
def test_changed_memory_is_accessed_as_it_is_now(pair: Pair, buffer: Pages, kept: Kept, tmp_path: Path) -> None:
    with kept.memory(tmp_path) as pages:
        region = pair.owner.register(pages.address, pages.length)
        expected = kept.change(pages)
        length = END - START
        status = pair.peer.read(pages.address + START, region.rkey, buffer.address, length)
        assert (status, buffer.get(0, length)) == (WcStatus.SUCCESS, expected[START:END])
        fresh = np.random.default_rng(9).bytes(length)
        buffer.put(0, fresh)
        assert pair.peer.write(pages.address + START, region.rkey, buffer.address, length) is WcStatus.SUCCESS
        assert pages.get(0, pages.length) == expected[:START] + fresh + expected[END:]


@each_kept
def test_a_remote_array_follows_changed_memory(servers: Servers, path: str, kept: Kept, tmp_path: Path) -> None:
    with kept.memory(tmp_path) as pages, attached(servers, path, pages) as remote:
        expected = kept.change(pages)
        assert remote[...].tobytes() == expected
        remote[START:END] = np.arange(END - START)
        fresh = np.arange(END - START).astype(np.uint8).tobytes()
        assert pages.get(0, pages.length) == expected[:START] + fresh + expected[END:]


def test_writes_to_a_shared_file_are_in_the_file_and_to_a_private_one_are_not(
    pair: Pair, buffer: Pages, tmp_path: Path
) -> None:
    data = buffer.fill(6)
    for shared in (True, False):
        file = tmp_path / f"{shared}"
        with mapped_file(file, N_PAGES, shared=shared) as pages:
            region = pair.owner.register(pages.address, pages.length)
            status = pair.peer.write(pages.address, region.rkey, buffer.address, pages.length)
            assert status is WcStatus.SUCCESS
            assert pages.get(0, pages.length) == data
            assert file.read_bytes() == (data if shared else bytes(pages.length))


def test_after_a_fork_the_parents_copy_is_accessed_and_the_childs_stays(pair: Pair, buffer: Pages) -> None:
    with anonymous(N_PAGES) as pages:
        pages.put(0, b"common" * PAGE)
        region = pair.owner.register(pages.address, pages.length)
        with forked(lambda: pages.put(0, b"of the child")) as child:
            pages.put(2 * PAGE, b"of the parent")
            buffer.put(0, b"by device")
            for page in range(4):
                status = pair.peer.write(pages.at(page) + 100, region.rkey, buffer.address, 9)
                assert status is WcStatus.SUCCESS
            childs = child.get(pages.address, 4 * PAGE)
            status = pair.peer.read(pages.address, region.rkey, buffer.address, 4 * PAGE)
        parents = bytearray((b"common" * PAGE)[: 4 * PAGE])
        parents[2 * PAGE : 2 * PAGE + 13] = b"of the parent"
        for page in range(4):
            parents[page * PAGE + 100 : page * PAGE + 109] = b"by device"
        assert childs == b"of the child" + (b"common" * PAGE)[12 : 4 * PAGE]
        assert (status, buffer.get(0, 4 * PAGE)) == (WcStatus.SUCCESS, bytes(parents))
        assert pages.get(0, 4 * PAGE) == bytes(parents)


def test_a_remote_array_stays_with_the_parent_across_nested_forks(servers: Servers, path: str) -> None:
    with anonymous(N_PAGES) as pages, attached(servers, path, pages) as remote:
        pages.put(0, b"before")
        with forked() as first:
            remote[:6] = np.frombuffer(b"second", np.uint8)
            with forked() as second:
                remote[:6] = np.frombuffer(b"latest", np.uint8)
                assert first.get(pages.address, 6) == b"before"
                assert second.get(pages.address, 6) == b"second"
                assert remote[:6].tobytes() == pages.get(0, 6) == b"latest"


# --- what fails


def unmapped(pages: Pages) -> None:
    pages.unmap(BAD)


def without_rights(pages: Pages) -> None:
    pages.protect(BAD, PROT_NONE)


def moved_away(pages: Pages) -> None:
    with anonymous(1) as elsewhere:
        pages.move(BAD, elsewhere.address)


def read_only(pages: Pages) -> None:
    pages.protect(BAD, PROT_READ)


def cut_below(pages: Pages) -> None:
    """The file that backs the pages is cut in the middle: touching what lies behind gives SIGBUS."""
    file = next(line for line in Path("/proc/self/maps").read_text().splitlines() if f"{pages.address:x}-" in line)
    with open(file.split()[-1], "r+b") as stream:
        stream.truncate(BAD * PAGE)


@dataclass(frozen=True)
class Spoilt:
    """A change after which page BAD, and perhaps what follows, cannot be accessed."""

    name: str
    spoil: Callable[[Pages], None]
    reads_too: bool = True
    memory: Callable[[Path], contextlib.AbstractContextManager[Pages]] = lambda folder: anonymous(N_PAGES)
    rest_stays: bool = True
    """The pages behind can still be looked at."""


SPOILT = (
    Spoilt("unmapped", unmapped),
    Spoilt("PROT_NONE", without_rights),
    Spoilt("moved away", moved_away),
    Spoilt("read only", read_only, reads_too=False),
    Spoilt(
        "file cut below",
        cut_below,
        memory=lambda folder: mapped_file(folder / "file", N_PAGES, shared=True),
        rest_stays=False,
    ),
)
each_spoilt = pytest.mark.parametrize("spoilt", SPOILT, ids=lambda spoilt: spoilt.name)
GOOD_PACKETS_END = START + (BAD * PAGE - START) // MTU * MTU
"""Where the last packet before the failing one ends."""


@each_spoilt
def test_a_write_into_spoilt_memory_ends_at_the_failing_packet(
    pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path
) -> None:
    with spoilt.memory(tmp_path) as pages:
        before, fresh = pages.fill(11), buffer.fill(12)
        region = pair.owner.register(pages.address, pages.length)
        spoilt.spoil(pages)
        neighbour = pair.peer.write(pages.at(BAD - 1), region.rkey, buffer.address, PAGE)
        assert neighbour is WcStatus.SUCCESS, "the page decides; a hole never hurts its neighbours"
        before = before[: (BAD - 1) * PAGE] + fresh[:PAGE] + before[BAD * PAGE :]
        status = pair.peer.write(pages.address + START, region.rkey, buffer.address, END - START)
        assert status is WcStatus.REM_ACCESS_ERR
        assert pages.get(0, START) == before[:START]
        assert pages.get(START, GOOD_PACKETS_END - START) == fresh[: GOOD_PACKETS_END - START]
        if spoilt.rest_stays:
            behind = (BAD + 1) * PAGE
            assert pages.get(behind, pages.length - behind) == before[behind:]
        (event,) = pair.owner.events_of(AsyncEventType.QP_ACCESS_ERR)
        assert event.target is pair.owner.qp
        assert pair.owner.qp.state is pair.peer.qp.state is QpState.ERR


@pytest.mark.parametrize("spoilt", [s for s in SPOILT if s.reads_too], ids=lambda spoilt: spoilt.name)
def test_a_read_of_spoilt_memory_ends_at_the_failing_packet(
    pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path
) -> None:
    with spoilt.memory(tmp_path) as pages:
        before, local = pages.fill(13), buffer.fill(14)
        region = pair.owner.register(pages.address, pages.length)
        spoilt.spoil(pages)
        assert pair.peer.read(pages.at(BAD - 1), region.rkey, buffer.address, PAGE) is WcStatus.SUCCESS
        buffer.put(0, local)
        status = pair.peer.read(pages.address + START, region.rkey, buffer.address, END - START)
        assert status is WcStatus.REM_ACCESS_ERR
        n_good = GOOD_PACKETS_END - START
        assert buffer.get(0, n_good) in (before[START:GOOD_PACKETS_END], local[:n_good])
        assert buffer.get(n_good, buffer.length - n_good) == local[n_good:]
        (event,) = pair.owner.events_of(AsyncEventType.QP_ACCESS_ERR)
        assert event.target is pair.owner.qp


def test_memory_protected_against_writing_is_still_read(pair: Pair, buffer: Pages) -> None:
    with anonymous(N_PAGES) as pages:
        data = pages.fill(15)
        region = pair.owner.register(pages.address, pages.length)
        pages.protect(0, PROT_READ, N_PAGES)
        assert pair.peer.read(pages.address, region.rkey, buffer.address, pages.length) is WcStatus.SUCCESS
        assert buffer.get(0, buffer.length) == data


@each_spoilt
def test_atomics_on_spoilt_memory_are_access_errors(pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path) -> None:
    with spoilt.memory(tmp_path) as pages:
        pages.fill(16)
        region = pair.owner.register(pages.address, pages.length)
        spoilt.spoil(pages)
        opcode = WrOpcode.ATOMIC_FETCH_AND_ADD
        assert pair.peer.atomic(opcode, pages.at(BAD), region.rkey, buffer.address, 1) is WcStatus.REM_ACCESS_ERR
        assert buffer.get(0, 8) == bytes(8)


@each_spoilt
def test_spoilt_local_memory_is_a_local_protection_error_and_flushes_what_follows(
    pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path
) -> None:
    with spoilt.memory(tmp_path) as pages:
        pages.fill(17)
        target = buffer.fill(18)
        region = pair.owner.register(buffer.address, buffer.length)
        spoilt.spoil(pages)
        opcode = WrOpcode.RDMA_WRITE if spoilt.reads_too else WrOpcode.RDMA_READ
        pair.peer.qp.post_send(
            [
                SendWr(opcode, [pair.peer.sge(at, PAGE)], n, remote_address=buffer.address, rkey=region.rkey)
                for n, at in enumerate((pages.at(BAD), pages.at(0)))
            ]
        )
        first, second = pair.peer.next_completion(), pair.peer.next_completion()
        assert (first.wr_id, first.status) == (0, WcStatus.LOC_PROT_ERR)
        assert (second.wr_id, second.status) == (1, WcStatus.WR_FLUSH_ERR)
        assert buffer.get(0, buffer.length) == target


@pytest.mark.parametrize("spoilt", [s for s in SPOILT if s.reads_too], ids=lambda spoilt: spoilt.name)
def test_a_read_into_spoilt_local_memory_is_a_local_protection_error(
    pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path
) -> None:
    with spoilt.memory(tmp_path) as pages:
        pages.fill(19)
        region = pair.owner.register(buffer.address, buffer.length)
        spoilt.spoil(pages)
        status = pair.peer.read(buffer.address, region.rkey, pages.at(BAD) - 10, 100)
        assert status is WcStatus.LOC_PROT_ERR


@each_spoilt
def test_a_receive_into_spoilt_memory_fails_on_both_sides(
    pair: Pair, buffer: Pages, spoilt: Spoilt, tmp_path: Path
) -> None:
    with spoilt.memory(tmp_path) as pages:
        pages.fill(20)
        spoilt.spoil(pages)
        pair.owner.receive_into(pair.owner.sge(pages.at(BAD) - 10, 100))
        status = pair.peer.run(SendWr(WrOpcode.SEND, [pair.peer.sge(buffer.address, 100)])).status
        assert status is WcStatus.REM_OP_ERR
        assert pair.owner.next_completion().status is WcStatus.LOC_PROT_ERR


@each_spoilt
def test_a_remote_array_names_the_access_error(servers: Servers, path: str, spoilt: Spoilt, tmp_path: Path) -> None:
    with spoilt.memory(tmp_path) as pages, attached(servers, path, pages) as remote:
        before = pages.fill(21)
        spoilt.spoil(pages)
        with pytest.raises(WorkError, match="REM_ACCESS_ERR: the owner unmapped, protected") as caught:
            remote[START:END] = 0
        assert caught.value.status == WcStatus.REM_ACCESS_ERR
        assert pages.get(0, START) == before[:START]


@pytest.mark.parametrize("discipline", ["on-demand", "short-term"])
@pytest.mark.parametrize("n_regions", [1, 2])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.ATOMIC_FETCH_AND_ADD], ids=lambda o: o.name)
def test_several_pieces_in_a_cut_file_are_one_local_protection_error(
    pair: Pair, buffer: Pages, tmp_path: Path, opcode: WrOpcode, n_regions: int, discipline: str
) -> None:
    """Pages of a file may be slow to come; these never do, however often they are asked for."""
    target = buffer.fill(30)
    theirs = pair.owner.register(buffer.address, buffer.length)
    with (
        mapped_file(tmp_path / "one", N_PAGES, shared=True) as one,
        mapped_file(tmp_path / "two", N_PAGES, shared=True) as two,
    ):
        for pages in (one, two):
            cut_below(pages)
        places = (one, one) if n_regions == 1 else (one, two)
        regions = [pair.peer.register(pages.address, pages.length, discipline=discipline) for pages in places]
        sges = [Sge(place.at(BAD + n), 4, regions[n].lkey) for n, place in enumerate(places)]
        status = pair.peer.run(SendWr(opcode, sges, remote_address=buffer.address, rkey=theirs.rkey)).status
        assert status is WcStatus.LOC_PROT_ERR
    assert buffer.get(8, buffer.length - 8) == target[8:]
