"""Keys, ranges and rights: what an access may reach at all, whatever the memory behind it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from own_memory import PAGE, Pages, anonymous
from verbs_pair import ALL_RIGHTS, PATHS, Pair, Servers, connected, running_servers

from nopin import Access, AsyncEventType, Device, SendWr, UsageError, WcStatus, WrOpcode, attach
from nopin.nic.attributes import QpAttr
from nopin.units import U64_MAX

N_PAGES = 8


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("rights")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(servers: Servers, path: str) -> Iterator[Pair]:
    with connected(servers, path) as pair:
        yield pair


@pytest.fixture
def buffer() -> Iterator[Pages]:
    """Memory of the peer."""
    with anonymous(N_PAGES) as pages:
        yield pages


def overflowing(region_end: int) -> list[tuple[int, int]]:
    return [(region_end - 8, 16), (region_end, 1), (U64_MAX - 7, 16), (U64_MAX, 1), (0, 8)]


@pytest.mark.parametrize("case", range(5))
def test_a_range_that_leaves_the_region_is_an_access_error(pair: Pair, buffer: Pages, case: int) -> None:
    with anonymous(N_PAGES) as pages:
        data = pages.fill(22)
        region = pair.owner.register(pages.address, 4 * PAGE)
        remote, length = overflowing(pages.at(4))[case]
        assert pair.peer.write(remote, region.rkey, buffer.address, length) is WcStatus.REM_ACCESS_ERR
        assert pages.get(0, pages.length) == data


@pytest.mark.parametrize("beyond", [1, 8, PAGE])
def test_an_iova_at_the_top_does_not_wrap_around(pair: Pair, buffer: Pages, beyond: int) -> None:
    with anonymous(N_PAGES) as pages:
        data = pages.fill(23)
        iova = U64_MAX + 1 - 4 * PAGE
        region = pair.owner.register(pages.at(2), 4 * PAGE, iova=iova)
        good = pair.peer.read(iova + 3 * PAGE, region.rkey, buffer.address, PAGE)
        assert (good, buffer.get(0, PAGE)) == (WcStatus.SUCCESS, data[5 * PAGE : 6 * PAGE])
        status = pair.peer.write(U64_MAX + 1 - 16, region.rkey, buffer.address, 16 + beyond)
        assert status is WcStatus.REM_ACCESS_ERR
        assert pages.get(0, pages.length) == data


@pytest.mark.parametrize(
    ("missing", "opcode"),
    [
        (Access.REMOTE_WRITE, WrOpcode.RDMA_WRITE),
        (Access.REMOTE_READ, WrOpcode.RDMA_READ),
        (Access.REMOTE_ATOMIC, WrOpcode.ATOMIC_FETCH_AND_ADD),
        (Access.REMOTE_ATOMIC, WrOpcode.ATOMIC_CMP_AND_SWP),
    ],
)
@pytest.mark.parametrize("where", ["region", "queue pair"])
def test_a_missing_right_is_an_access_error(
    pair: Pair, buffer: Pages, missing: Access, opcode: WrOpcode, where: str
) -> None:
    with anonymous(1) as pages:
        data = pages.fill(24)
        granted = ALL_RIGHTS & ~missing
        region = pair.owner.register(pages.address, PAGE, granted if where == "region" else ALL_RIGHTS)
        if where == "queue pair":
            pair.owner.qp.modify(QpAttr(access=int(granted)))
        buffer.fill(25)
        local = buffer.get(0, 8)
        wr = SendWr(opcode, [pair.peer.sge(buffer.address, 8)], remote_address=pages.address, rkey=region.rkey)
        assert pair.peer.run(wr).status is WcStatus.REM_ACCESS_ERR
        assert (pages.get(0, PAGE), buffer.get(0, 8)) == (data, local)


def test_keys_of_nothing_or_of_another_domain_open_nothing(servers: Servers, path: str, buffer: Pages) -> None:
    with anonymous(1) as pages:
        data = pages.fill(26)
        for which in ("unknown", "another domain's", "closed"):
            with connected(servers, path) as pair:
                region = pair.owner.register(pages.address, PAGE)
                other = pair.owner.device.alloc_pd().register(pages.address, PAGE, access=ALL_RIGHTS)
                rkey = {"unknown": region.rkey ^ 1, "another domain's": other.rkey, "closed": region.rkey}[which]
                if which == "closed":
                    region.close()
                assert pair.peer.write(pages.address, rkey, buffer.address, 8) is WcStatus.REM_ACCESS_ERR, which
        assert pages.get(0, PAGE) == data


def test_a_local_key_must_cover_the_range_and_allow_storing(servers: Servers, path: str, buffer: Pages) -> None:
    with anonymous(2) as pages:
        data = pages.fill(27)
        for access, length in (("r", PAGE), ("l", PAGE + 1)):
            with connected(servers, path) as pair:
                remote = pair.owner.register(buffer.address, buffer.length)
                local = pair.peer.pd.register(pages.address, PAGE, access=access)
                sge = pair.peer.sge(pages.address, length)._replace(lkey=local.lkey)
                wr = SendWr(WrOpcode.RDMA_READ, [sge], remote_address=buffer.address, rkey=remote.rkey)
                assert pair.peer.run(wr).status is WcStatus.LOC_PROT_ERR
        assert pages.get(0, pages.length) == data


@pytest.mark.parametrize("opcode", [WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.ATOMIC_CMP_AND_SWP])
def test_a_misaligned_atomic_is_an_invalid_request(pair: Pair, buffer: Pages, opcode: WrOpcode) -> None:
    with anonymous(1) as pages:
        data = pages.fill(28)
        region = pair.owner.register(pages.address, PAGE)
        status = pair.peer.atomic(opcode, pages.address + 4, region.rkey, buffer.address, 1, 2)
        assert status is WcStatus.REM_INV_REQ_ERR
        assert pages.get(0, PAGE) == data
        (event,) = pair.owner.events_of(AsyncEventType.QP_REQ_ERR)
        assert event.target is pair.owner.qp


def test_an_atomic_over_a_page_boundary_cannot_be_aligned_by_an_iova(pair: Pair, buffer: Pages) -> None:
    """The iova is a multiple of 8, the memory behind it is not: the atomic is carried out all the same."""
    with anonymous(2) as pages:
        region = pair.owner.register(pages.address + PAGE - 4, 16, iova=0x1000)
        pages.put(PAGE - 4, (41).to_bytes(8, "little"))
        status = pair.peer.atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, 0x1000, region.rkey, buffer.address, 1)
        assert status is WcStatus.SUCCESS
        assert int.from_bytes(buffer.get(0, 8), "little") == 41
        assert int.from_bytes(pages.get(PAGE - 4, 8), "little") == 42


def test_remote_arrays_refuse_what_the_share_does_not_grant(servers: Servers, path: str) -> None:
    with anonymous(1) as pages, Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
        data = pages.fill(29)
        with ours.share(pages.address, PAGE, access="r") as share, attach(share.url, device=theirs) as remote:
            assert remote[...].tobytes() == data
            with pytest.raises(UsageError, match="may not write"):
                remote[0] = 1
            with pytest.raises(UsageError, match="atomics"):
                remote.fetch_add(0, 1)
            with pytest.raises(IndexError):
                remote[PAGE]
        assert pages.get(0, PAGE) == data
