"""Accelerators on managed memory, against a real server: overcommitted arrays, eviction under stores, deaths.

What concerns workers alone is in test_accelerator_workers.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernels_of_users
import numpy as np
import pytest
from programs import said
from serving import damage_swap, eventually

import nopin
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux.arena_file import resident_bytes
from nopin.units import PAGE_BYTES

ROOT = Path(__file__).parents[2]
PAGE = PAGE_BYTES
MIB = 1 << 20
BUDGET = 2 * MIB
N_ROUNDS = 8
USERS = kernels_of_users.__name__
WAIT_S = 40

pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture
def device(server: LocalServer) -> Iterator[nopin.Device]:
    with nopin.Device(str(server.socket_path), budget=BUDGET) as opened:
        yield opened


@pytest.fixture
def accelerator(device: nopin.Device) -> nopin.Accelerator:
    return device.accelerator()


def row(device: nopin.Device) -> dict[str, Any]:
    """Figures of the device's one arena."""
    return next(row for row in device.stat() if row["kind"] == "arena")


def thrash(array: Any) -> None:
    """Store to every page, which turns others out."""
    array[::512] += 1


def test_an_overcommitted_array_is_summed_right_while_its_owner_stores_elsewhere(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    array = device.zeros((2, 8 * MIB // 8), np.int64)
    summed, stored = array
    summed[:] = np.arange(summed.size)
    jobs = [accelerator.launch("sum", summed) for _ in range(3)]
    n_rounds = 0
    while not all(job.done() for job in jobs):
        stored += 1
        n_rounds += 1
    assert [job.result(WAIT_S) for job in jobs] == [summed.size * (summed.size - 1) // 2] * 3
    assert accelerator.launch("sum", stored).result(WAIT_S) == n_rounds * stored.size
    assert (stored == n_rounds).all()
    assert resident_bytes(device.default_arena.memory_fd) <= BUDGET + 512 * PAGE


def test_what_a_worker_stores_is_what_its_owner_and_peers_read(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    device.set_budget("8MiB")  # a peer's read of 4 MiB is one step
    array = device.empty(16 * MIB // 8)
    with device.share(array) as share, nopin.attach(share.url, device=device) as remote:
        accelerator.launch("fill", array, 2.5).result(WAIT_S)
        assert (remote[:] == 2.5).all()
        remote[::1024] = 7.0
        assert accelerator.launch("sum", array[::1024]).result(WAIT_S) == 7.0 * len(array[::1024])
        accelerator.launch("scale", array, 2).result(WAIT_S)
    assert (array[::1024] == 14).all()
    assert (array[1::1024] == 5).all()


def test_a_list_of_pointers_over_eight_times_the_budget_is_followed(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    n = 16 * MIB // PAGE
    nodes = device.zeros((n, PAGE // 8), np.int64)
    order = np.random.default_rng(1).permutation(n)
    start = kernels_of_users.address_of(nodes)
    following = np.append(start + order[1:] * PAGE, 0)
    for at, after, value in zip(order, following, range(n), strict=True):
        nodes[at, :2] = after, value
    assert accelerator.launch("chase", nodes[order[0]]).result(WAIT_S) == (n, n * (n - 1) // 2)
    nodes[order[n // 2], 0] = outside = kernels_of_users.address_of(np.zeros(4))
    with pytest.raises(nopin.AcceleratorError, match=f"node {n // 2 + 1}: {outside:#x}.*outside every arena"):
        accelerator.launch("chase", nodes[order[0]]).result(WAIT_S)


def test_faults_of_a_worker_are_counted_and_pages_it_has_need_none(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    array = device.zeros(MIB // 8)
    array[:] = 1
    assert accelerator.launch("sum", array).result(WAIT_S) == array.size
    faults = row(device)["faults_worker"]
    assert 1 <= faults <= MIB // PAGE
    assert row(device)["mappers"] == 2
    assert accelerator.launch("sum", array).result(WAIT_S) == array.size
    assert row(device)["faults_worker"] == faults
    accelerator.close()
    assert eventually(lambda: row(device)["mappers"] == 1)


def test_stores_of_workers_while_pages_are_evicted_are_kept(device: nopin.Device) -> None:
    counters = device.zeros((3, 2 * MIB // 8), np.int64)
    others = device.zeros(4 * MIB // 8)
    accelerator = device.accelerator(workers=2)
    n_rounds = 6
    who = device.zeros((2, 1), np.int64)
    jobs = [accelerator.launch(f"{USERS}.add_one", counters[n], n_rounds, who[n]) for n in range(2)]
    mine = 0
    while not all(job.done() for job in jobs):
        thrash(others)
        counters[2] += 1
        mine += 1
        device.set_budget(BUDGET if mine % 2 else BUDGET // 2)
    for job in jobs:
        job.result(WAIT_S)
    assert [np.unique(each).tolist() for each in counters] == [[n_rounds], [n_rounds], [mine]]
    assert row(device)["evicted"] > 4 * MIB // PAGE
    assert np.unique(others[::512]).tolist() == [mine]


def test_a_worker_killed_in_mid_job_disturbs_nobody(device: nopin.Device) -> None:
    arrays = device.zeros((2, 4 * MIB // 8), np.int64)
    accelerator = device.accelerator(workers=2)
    who = device.zeros((2, 1), np.int64)
    busy, killed = (accelerator.launch(f"{USERS}.add_one", arrays[n], 10_000, who[n]) for n in range(2))
    assert eventually(lambda: bool(arrays[:, -1].all()))
    os.kill(who[1, 0], signal.SIGKILL)
    with pytest.raises(nopin.WorkerGone, match="SIGKILL"):
        killed.result(WAIT_S)
    assert eventually(lambda: row(device)["mappers"] == 2)
    reached = int(arrays[1].max())
    assert set(np.unique(arrays[1])) <= {reached - 1, reached}
    before = int(arrays[0, 0])
    assert eventually(lambda: arrays[0, 0] > before)
    assert accelerator.launch("sum", arrays[1]).result(WAIT_S) == arrays[1].sum()
    busy.cancel()
    with pytest.raises(nopin.JobCancelled):
        busy.result(WAIT_S)
    assert np.ptp(arrays[0]) == 0


def test_a_long_sum_is_cancelled_between_its_chunks(device: nopin.Device, accelerator: nopin.Accelerator) -> None:
    array = device.zeros(64 * MIB // 8)
    job = accelerator.launch("sum", array)
    assert eventually(lambda: accelerator.statistics().n_running == 1)
    job.cancel()
    with pytest.raises(nopin.JobCancelled):
        job.result(WAIT_S)
    assert accelerator.launch("sum", array[:10]).result(WAIT_S) == 0


def test_a_lost_page_ends_the_job_that_touches_it_and_no_other(
    server: LocalServer, device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    array = device.zeros((16, PAGE), np.uint8)
    array[:] = np.random.default_rng(3).integers(0, 256, array.shape, np.uint8)
    device.set_budget(2 * PAGE)
    damage_swap(server.pid)
    with pytest.raises(nopin.PageLost, match="a page it touched is lost"):
        accelerator.launch("sum", array).result(WAIT_S)
    sound = device.zeros(PAGE, np.uint8)
    accelerator.launch("fill", sound, 3).result(WAIT_S)
    assert (sound == 3).all()


def test_a_worker_that_forks_shares_its_arena_with_the_child(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    array = device.zeros(4 * MIB // 8, np.int64)
    assert accelerator.launch(f"{USERS}.add_one_in_a_child", array).result(WAIT_S) == 0
    assert (array == 2).all()
    assert eventually(lambda: row(device)["mappers"] == 2)


def test_an_arena_is_used_as_soon_as_it_is_made_and_given_back_although_workers_map_it(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    stays = device.zeros(1000)
    accelerator.launch("fill", stays, 1).result(WAIT_S)
    for _ in range(3):
        with device.arena("16MiB") as arena:
            array = arena.zeros(8 * MIB // 8)
            accelerator.launch("add", 1.0, stays[:1], array).result(WAIT_S)
            assert (array == 2).all()
            del array
        assert accelerator.launch("sum", stays).result(WAIT_S) == 1000
    assert accelerator.statistics().n_workers_lost == 0
    assert len([each for each in device.stat() if each["kind"] == "arena"]) == 1


def test_a_worker_that_hears_nothing_does_not_hold_up_eviction_or_closing(
    device: nopin.Device, accelerator: nopin.Accelerator
) -> None:
    array, others = device.zeros(MIB // 8, np.int64), device.zeros(8 * MIB // 8, np.int64)
    job = accelerator.launch(f"{USERS}.hold", array)
    assert eventually(lambda: bool(array[-1]))
    os.kill(accelerator.pids[0], signal.SIGSTOP)
    others += 1
    assert (array == 1).all()
    with pytest.raises(TimeoutError):
        job.result(0.01)
    device.close()
    assert isinstance(job.exception(0), nopin.Closed)
    assert (others == 1).all()


def compute_while_servers_die(line: Line[Any], server: str) -> None:
    """An owner whose worker stores for a while; both may wait at a page fault until there is a server again."""
    device = nopin.Device(server, budget=BUDGET)
    counters, who = device.zeros((2, 2 * MIB // 8), np.int64), device.zeros((1, 1), np.int64)
    accelerator = device.accelerator()
    job = accelerator.launch(f"{USERS}.add_one", counters[0], N_ROUNDS, who[0])
    while not who[0, 0]:
        time.sleep(0.01)
    line.send("begun")
    mine = 0
    while not job.done():
        counters[1] += 1
        mine += 1
    job.result()
    total = accelerator.launch("sum", counters).result()  # the same worker: nothing is asked of the lost connection
    line.send([np.unique(counters[0]).tolist(), np.unique(counters[1]).tolist() == [mine]])
    line.send(int(total) == (N_ROUNDS + mine) * counters.shape[1])
    line.receive()


@pytest.mark.timeout(90)
def test_a_worker_waits_for_the_successor_of_a_killed_server_and_loses_no_store(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer(path))
        owner = stack.enter_context(Child(compute_while_servers_die, str(path)))
        assert owner.line.receive() == "begun"
        for _ in range(2):
            time.sleep(0.5)
            server.kill()
            server = stack.enter_context(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == [[N_ROUNDS], True]
        assert owner.line.receive() is True
        with nopin.Device(str(path)) as watcher:
            assert next(each for each in watcher.stat() if each["kind"] == "dev")["internal_errors"] == 0
        owner.line.send("end")


def test_the_page_about_accelerators_runs(environment: dict[str, str]) -> None:
    page = re.search(r"^```python\n(.*?)^```$", (ROOT / "docs" / "accelerator.md").read_text(), re.M | re.S)
    assert page is not None
    assert "16777216.0\n[1.41421356 1.41421356]" in said(environment, "-c", page[1])
