"""An owner that changes its memory all the time while it is accessed: no stale, torn or foreign byte, no error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from own_memory import PAGE, Pages, anonymous, forked
from owner_process import MADV_DONTNEED, PROT_NONE, PROT_RW
from verbs_pair import PATHS, Pair, Servers, connected, running_servers

from nopin import SendWr, WcStatus, WrOpcode

N_PAGES = 64
CHURNED = N_PAGES // 2
"""The page that is changed all the time; the others keep still."""
N_ROUNDS = 60


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("churn")) as running:
        yield running


@pytest.fixture(params=PATHS)
def pair(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Pair]:
    with connected(servers, str(request.param), path_mtu=4096) as pair:
        yield pair


@pytest.fixture
def pages() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


@pytest.fixture
def buffer() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


@contextlib.contextmanager
def going_on(change: Callable[[], None]) -> Iterator[None]:
    """Repeat a change in another thread for as long as the block runs; at least once."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def repeat() -> None:
        try:
            change()
            while not stop.is_set():
                change()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not errors


def drop(pages: Pages) -> None:
    pages.advise(CHURNED, MADV_DONTNEED)


def map_anew(pages: Pages) -> None:
    pages.map_fresh(CHURNED)  # over what is mapped: there is never a hole


def fork(pages: Pages) -> None:
    with forked():
        pages.put(CHURNED * PAGE, b"a")


def protect(pages: Pages) -> None:
    pages.protect(CHURNED, PROT_NONE)
    pages.protect(CHURNED, PROT_RW)


each_harmless = pytest.mark.parametrize("change", [drop, map_anew, fork], ids=lambda change: change.__name__)
each_change = pytest.mark.parametrize("change", [drop, map_anew, fork, protect], ids=lambda change: change.__name__)


@each_change
def test_pages_beside_the_changed_one_are_undisturbed(
    pair: Pair, pages: Pages, buffer: Pages, change: Callable[[Pages], None]
) -> None:
    data = pages.fill(1)
    region = pair.owner.register(pages.address, pages.length)
    front, back = CHURNED * PAGE, (N_PAGES - CHURNED - 1) * PAGE
    with going_on(lambda: change(pages)):
        for number in range(N_ROUNDS):
            assert pair.peer.read(pages.address, region.rkey, buffer.address, front) is WcStatus.SUCCESS
            assert buffer.get(0, front) == data[:front]
            fresh = np.random.default_rng(number).bytes(back)
            buffer.put(0, fresh)
            assert pair.peer.write(pages.at(CHURNED + 1), region.rkey, buffer.address, back) is WcStatus.SUCCESS
            assert pages.get(front + PAGE, back) == fresh


@each_harmless
def test_a_page_that_changes_is_read_whole_as_it_was_or_is(
    pair: Pair, pages: Pages, buffer: Pages, change: Callable[[Pages], None]
) -> None:
    """Around it everything is right; in it is nothing that was never there."""
    data = pages.fill(2)
    region = pair.owner.register(pages.address, pages.length)
    page = slice(CHURNED * PAGE, (CHURNED + 1) * PAGE)
    allowed = {data[page], bytes(PAGE), b"a" + data[page][1:]}
    with going_on(lambda: change(pages)):
        for _ in range(N_ROUNDS):
            assert pair.peer.read(pages.address, region.rkey, buffer.address, pages.length) is WcStatus.SUCCESS
            seen = buffer.get(0, pages.length)
            assert seen[: page.start] == data[: page.start]
            assert seen[page.stop :] == data[page.stop :]
            assert seen[page] in allowed


def test_a_child_keeps_the_memory_of_its_moment_while_a_write_goes_on(pair: Pair, pages: Pages, buffer: Pages) -> None:
    region = pair.owner.register(pages.address, pages.length)
    pages.array()[:] = 0
    for number in range(1, 21):
        buffer.array()[:] = number
        sge = pair.peer.sge(buffer.address, buffer.length)
        pair.peer.qp.post_send(SendWr(WrOpcode.RDMA_WRITE, [sge], remote_address=pages.address, rkey=region.rkey))
        with forked() as child:
            at_first = child.get(pages.address, pages.length)
            assert pair.peer.next_completion().status is WcStatus.SUCCESS
            assert child.get(pages.address, pages.length) == at_first
        assert set(at_first) <= {number - 1, number}
        assert (pages.array() == number).all()
