"""Worker processes on an arena of the test process: results, addresses, errors, deaths, cancelling, closing.

No device server: a pager in this process resolves the workers' faults.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import weakref
from itertools import pairwise
from typing import Any

import kernels_of_users
import numpy as np
import pytest
from serving import eventually
from worker_arena import Bench, PlainArena, bench

from nopin.errors import AcceleratorError, Closed, JobCancelled, PageLost, QueueFull, UsageError, WorkerGone
from nopin.units import PAGE_BYTES

USERS = kernels_of_users.__name__
WAIT_S = 20

pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture(scope="module")
def shared() -> Any:
    """One accelerator for all tests that leave it as it was."""
    with bench() as made:
        yield made


def running(rig: Bench, offset: int = 1 << 20) -> Any:
    """A job that counts until it is stopped, and has begun."""
    counter = rig.array(offset, 1, np.int64)
    counter[0] = 0
    job = rig.launch(f"{USERS}.count_up", counter)
    assert eventually(lambda: counter[0] > 0)
    return job


def test_every_kernel_computes_in_place(shared: Bench) -> None:
    a, b, c = (shared.array(n << 20, 5000) for n in range(3))
    shared.launch("fill", a, 3).result(WAIT_S)
    assert (a == 3).all()
    shared.launch("copy", b, a).result(WAIT_S)
    shared.launch("scale", b, 0.5).result(WAIT_S)
    shared.launch("add", a, b, c).result(WAIT_S)
    assert (c == 4.5).all()
    assert shared.launch("sum", c[::2]).result(WAIT_S) == 4.5 * 2500
    where = shared.array(3 << 20, 10, np.int64)
    where[:] = np.arange(10) * 7
    a[:] = np.arange(5000)
    shared.launch("gather", a, where, b[:10]).result(WAIT_S)
    assert b[:10].tolist() == [float(n * 7) for n in range(10)]


def test_numpy_and_modules_of_the_user_are_called_by_import_path(shared: Bench) -> None:
    a, b = shared.array(0, (30, 20)), shared.array(1 << 20, (30, 20))
    a[:] = np.arange(600).reshape(30, 20)
    assert shared.launch("numpy.sqrt", a, out=b).result(WAIT_S) is b
    np.testing.assert_array_equal(b, np.sqrt(a))
    assert shared.launch("numpy.linalg.norm", a.T).result(WAIT_S) == pytest.approx(np.linalg.norm(a))
    column = shared.array(2 << 20, 20)
    shared.launch("numpy.sum", a, axis=(0,), dtype=np.float64, out=column).result(WAIT_S)
    np.testing.assert_array_equal(column, a.sum(axis=0))
    assert shared.launch(f"{USERS}.pair", a).result(WAIT_S) == (0.0, 599.0, "float64")


def test_addresses_mean_the_same_on_both_sides(shared: Bench) -> None:
    a = shared.array(5 * PAGE_BYTES + 24, 100, np.uint8)
    a[:] = 2
    address = kernels_of_users.address_of(a)
    assert shared.launch(f"{USERS}.address_of", a).result(WAIT_S) == address
    assert shared.launch(f"{USERS}.through_ctypes", address, 100).result(WAIT_S) == 200


def test_chase_follows_real_pointers_across_arenas(shared: Bench) -> None:
    other = PlainArena(1 << 20)
    shared.arenas.append(other)
    try:
        here, there = shared.array(0, (50, 2), np.int64), other.array(0, (50, 2), np.int64)
        nodes = [side[n] for n in range(50) for side in (here, there)]
        for node, following in pairwise(nodes):
            node[:] = kernels_of_users.address_of(following), 1
        nodes[-1][:] = 0, 1
        assert shared.launch("chase", nodes[0]).result(WAIT_S) == (100, 100)
        nodes[-1][0] = address_outside = kernels_of_users.address_of(np.zeros(4))
        with pytest.raises(AcceleratorError, match=f"{address_outside:#x}.*outside every arena"):
            shared.launch("chase", nodes[0]).result(WAIT_S)
    finally:
        shared.arenas.remove(other)
        other.close()
    assert shared.launch("sum", here).result(WAIT_S) == here.sum()


def test_faults_of_a_worker_are_its_own_one_for_each_page() -> None:
    with bench() as rig:
        n_pages = 16
        a = rig.array(0, n_pages * 512)
        a[:] = 1
        assert rig.launch("sum", a).result(WAIT_S) == n_pages * 512
        assert len(set(rig.pager.faults)) == n_pages
        before = len(rig.pager.faults)
        job = rig.launch("sum", a)
        assert job.result(WAIT_S) == n_pages * 512
        assert len(rig.pager.faults) == before
        assert rig.accelerator.statistics().n_faults >= n_pages


def test_a_returned_part_of_an_argument_is_a_view_that_keeps_it_alive(shared: Bench) -> None:
    a = shared.array(0, 10)
    a[:] = np.arange(10)
    gone = weakref.ref(a)
    part = shared.launch(f"{USERS}.part", a).result(WAIT_S)
    assert part.tolist() == [2, 3]
    a[2] = 9
    assert part[0] == 9
    del a
    assert gone() is not None
    del part
    assert eventually(lambda: gone() is None)


def test_a_returned_array_of_its_own_is_refused_with_what_to_do(shared: Bench) -> None:
    a = shared.array(0, (3, 4), np.float32)
    with pytest.raises(AcceleratorError, match=r"returned an array of float32, shape \(3, 4\).*give out=dev.empty"):
        shared.launch("numpy.sqrt", a).result(WAIT_S)


def test_an_array_in_ordinary_memory_is_refused_at_launch_with_what_to_do(shared: Bench) -> None:
    with pytest.raises(UsageError, match=r"sum: the array of float64, shape \(3,\).*dev\.asarray\(x\)"):
        shared.launch("sum", np.zeros(3))
    with pytest.raises(UsageError, match=r"dev\.asarray"):
        shared.launch("numpy.concatenate", [shared.array(0, 3), np.zeros(3)], out=shared.array(0, 6))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("summ", "no kernel 'summ'; there are fill copy sum"), ("__main__.f", "move f into a module"), (len, "by text")],
)
def test_a_kernel_that_cannot_be_is_refused_at_launch(shared: Bench, kernel: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared.launch(kernel)


def test_arguments_too_long_for_a_message_are_refused_at_launch(shared: Bench) -> None:
    with pytest.raises(UsageError, match="put what is long into an array"):
        shared.launch("sum", list(range(100_000)))


@pytest.mark.parametrize(
    ("kernel", "arguments", "exception", "message"),
    [
        ("no_such_module.f", (), "ModuleNotFoundError", "no_such_module"),
        ("numpy.no_such_function", (), "AttributeError", "no_such_function"),
        ("numpy.linalg.inv", (np.float64(1),), "LinAlgError", "0-dimensional"),
        (f"{USERS}.system_exit", (), "SystemExit", "must not end"),
        (f"{USERS}.long_text", (100_000,), "UsageError", "put what is long into an array"),
        (f"{USERS}.sleep", ("long",), "TypeError", "str"),
    ],
)
def test_what_a_kernel_raises_comes_back(
    shared: Bench, kernel: str, arguments: Any, exception: str, message: str
) -> None:
    pids = shared.accelerator.pids
    with pytest.raises(AcceleratorError, match=message) as caught:
        shared.launch(kernel, *arguments).result(WAIT_S)
    assert caught.value.exception == exception
    assert str(caught.value).startswith(f"{kernel}: {exception}: ")
    assert shared.launch(f"{USERS}.pid").result(WAIT_S) == pids[0]


def test_an_error_brings_its_place_in_the_users_code_and_nothing_of_ours(shared: Bench) -> None:
    with pytest.raises(AcceleratorError, match=r"LookupError: no such thing in \(3,\)") as caught:
        shared.launch(f"{USERS}.complain", shared.array(0, 3)).result(WAIT_S)
    assert "in complain" in caught.value.traceback
    assert "in _deeper" in caught.value.traceback
    assert "worker.py" not in caught.value.traceback
    assert caught.value.traceback in "".join(caught.value.__notes__)


def test_a_read_only_array_is_read_only_for_the_worker(shared: Bench) -> None:
    a = shared.array(0, 3)
    a.flags.writeable = False
    with pytest.raises(AcceleratorError, match="read-only"):
        shared.launch("fill", a, 1).result(WAIT_S)


def test_jobs_of_one_worker_run_in_the_order_they_were_launched(shared: Bench) -> None:
    log = shared.array(0, 3, np.int64)
    jobs = [shared.launch("fill", log[n:], n) for n in range(3)]
    for job in reversed(jobs):
        job.result(WAIT_S)
    assert log.tolist() == [0, 1, 2]


def test_workers_run_jobs_side_by_side() -> None:
    with bench(workers=2) as rig:
        first, second = running(rig, 0), running(rig, PAGE_BYTES)
        assert len(set(rig.accelerator.pids)) == 2
        assert rig.accelerator.statistics().n_running == 2
        for job in (first, second):
            job.cancel()
            assert isinstance(job.exception(WAIT_S), JobCancelled)


def test_jobs_are_awaited_together(shared: Bench) -> None:
    a = shared.array(0, 100)
    a[:] = 1

    async def main() -> Any:
        return await asyncio.gather(*(shared.launch("sum", a[:n]) for n in (10, 20, 30)))

    assert asyncio.run(main()) == [10, 20, 30]


def test_a_running_job_stops_at_its_next_chunk_and_the_worker_stays(shared: Bench) -> None:
    pids = shared.accelerator.pids
    job = running(shared)
    assert job.cancel() is False
    with pytest.raises(JobCancelled, match="while it ran"):
        job.result(WAIT_S)
    assert shared.launch(f"{USERS}.pid").result(WAIT_S) == pids[0]


def test_the_accelerators_own_kernels_can_be_stopped(shared: Bench) -> None:
    head = shared.array(0, 2, np.int64)
    head[:] = kernels_of_users.address_of(head), 1
    job = shared.launch("chase", head)
    with pytest.raises(TimeoutError):
        job.result(0.1)
    job.cancel()
    assert isinstance(job.exception(WAIT_S), JobCancelled)


def test_a_waiting_job_is_cancelled_without_running(shared: Bench) -> None:
    target = shared.array(0, 1, np.int64)
    target[0] = 7
    before = running(shared)
    waiting = shared.launch("fill", target, 8)
    assert waiting.cancel() is True
    before.cancel()
    assert isinstance(before.exception(WAIT_S), JobCancelled)
    shared.launch(f"{USERS}.pid").result(WAIT_S)
    assert target[0] == 7


def test_a_job_is_stopped_although_the_worker_is_not_ready_for_it_yet() -> None:
    with bench() as rig:
        job = rig.launch(f"{USERS}.count_up", rig.array(0, 1, np.int64))
        assert eventually(lambda: rig.accelerator.statistics().n_running == 1)
        job.cancel()
        assert isinstance(job.exception(WAIT_S), JobCancelled)


def test_a_full_queue_refuses_and_takes_again() -> None:
    with bench(depth=1) as rig:
        job = running(rig)
        waiting = rig.launch(f"{USERS}.pid")
        with pytest.raises(QueueFull, match="1 jobs wait"):
            rig.launch(f"{USERS}.pid")
        job.cancel()
        assert waiting.result(WAIT_S) == rig.accelerator.pids[0]


def test_a_worker_killed_in_a_job_fails_that_job_alone() -> None:
    with bench(workers=2) as rig:
        other = running(rig, 0)
        killed = running(rig, PAGE_BYTES)
        others, victims = _pids_by_job(rig, other)
        os.kill(victims, signal.SIGKILL)
        with pytest.raises(
            WorkerGone, match=rf"count_up: worker {victims} was killed by SIGKILL; the next job"
        ) as caught:
            killed.result(WAIT_S)
        assert caught.value.exit_status == -signal.SIGKILL
        assert not other.done()
        fresh = rig.launch(f"{USERS}.pid").result(WAIT_S)
        assert fresh not in (others, victims)
        other.cancel()
        assert isinstance(other.exception(WAIT_S), JobCancelled)
        statistics = rig.accelerator.statistics()
        assert (statistics.n_workers_started, statistics.n_workers_lost) == (3, 1)
        assert (statistics.n_finished, statistics.n_failed, statistics.n_cancelled) == (1, 1, 1)


def _pids_by_job(rig: Bench, first: Any) -> tuple[int, int]:
    """The worker of `first`, found by stopping it for a moment, and the other one."""
    counter = rig.array(0, 1, np.int64)
    for pid in rig.accelerator.pids:
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(0.05)
            before = int(counter[0])
            time.sleep(0.05)
            if counter[0] == before:
                return pid, next(other for other in rig.accelerator.pids if other != pid)
        finally:
            os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"{first} does not run in any of {rig.accelerator.pids}")


def test_a_worker_killed_between_jobs_is_replaced_unnoticed() -> None:
    with bench() as rig:
        pid = rig.launch(f"{USERS}.pid").result(WAIT_S)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: rig.accelerator.pids == [])
        assert rig.launch(f"{USERS}.pid").result(WAIT_S) != pid


def test_a_worker_that_leaves_by_itself_is_reported_with_its_status() -> None:
    with bench() as rig:
        with pytest.raises(WorkerGone, match="exited with status 3"):
            rig.launch(f"{USERS}.leave", 3).result(WAIT_S)
        assert rig.launch(f"{USERS}.pid").result(WAIT_S) in rig.accelerator.pids


def test_a_page_that_is_lost_fails_the_job_with_that_reason() -> None:
    with bench() as rig:
        rig.pager.all_lost = True
        with pytest.raises(PageLost, match=r"sum: .*SIGBUS: a page it touched is lost"):
            rig.launch("sum", rig.array(0, 10)).result(WAIT_S)
        rig.pager.all_lost = False
        assert rig.launch("sum", rig.array(0, 10)).result(WAIT_S) == 0


def test_a_worker_that_waits_for_a_page_can_be_closed_and_its_job_says_so() -> None:
    with bench() as rig:
        rig.pager.held.clear()
        job, waiting = rig.launch("sum", rig.array(0, 10)), rig.launch("sum", rig.array(0, 10))
        assert eventually(lambda: bool(rig.pager.faults))
        with pytest.raises(TimeoutError, match="still under way"):
            job.result(0.05)
        rig.accelerator.close()
        with pytest.raises(Closed, match="while sum ran"):
            job.result(0)
        with pytest.raises(Closed, match="before sum began"):
            waiting.result(0)
        with pytest.raises(Closed, match="was closed"):
            rig.launch("sum", rig.array(0, 10))


def test_closing_ends_a_worker_that_hears_nothing() -> None:
    with bench() as rig:
        job = rig.launch(f"{USERS}.sleep", 1000)
        assert eventually(lambda: rig.accelerator.statistics().n_running == 1)
        pids = rig.accelerator.pids
        rig.accelerator.close()
        assert isinstance(job.exception(0), Closed)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert rig.accelerator.pids == []


def test_an_arena_made_later_is_mapped_before_the_next_job_and_unmapped_when_gone() -> None:
    with bench() as rig:
        rig.launch(f"{USERS}.pid").result(WAIT_S)
        later = PlainArena(1 << 20)
        rig.arenas.append(later)
        later.bytes[:] = 1
        assert rig.launch("sum", later.bytes).result(WAIT_S) == 1 << 20
        assert rig.pager.introduced == 2
        rig.arenas.remove(later)
        with pytest.raises(UsageError, match="ordinary memory"):
            rig.launch("sum", later.bytes)
        pid = rig.launch(f"{USERS}.pid").result(WAIT_S)
        with open(f"/proc/{pid}/maps") as maps:
            assert f"{later.where.start:x}-" not in maps.read()
        later.close()


def test_an_arena_the_device_refuses_fails_the_job_and_no_worker_is_left_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bench() as rig:
        pid = rig.launch(f"{USERS}.pid").result(WAIT_S)
        later = PlainArena(1 << 20)
        rig.arenas.append(later)
        refusing = AcceleratorError("the device server refused")

        def refuse(*_: object) -> None:
            raise refusing

        monkeypatch.setattr(rig.accelerator._lanes[0], "_introduce", refuse)
        monkeypatch.setattr(rig.accelerator._lanes[0]._worker, "_introduce", refuse)
        assert rig.launch("sum", later.bytes).exception(WAIT_S) is refusing
        monkeypatch.undo()
        assert rig.launch(f"{USERS}.pid").result(WAIT_S) != pid
        rig.arenas.remove(later)
        later.close()


def test_a_forked_child_is_told_and_the_parent_goes_on(shared: Bench) -> None:
    job = running(shared)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            shared.accelerator._abandon()  # as the device does after fork
            told = 0
            for attempt in (lambda: shared.launch("sum", shared.array(0, 3)), job.result, job.cancel):
                try:
                    attempt()
                except Closed as problem:
                    told += "forked" in str(problem)
            status = 0 if told == 3 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not job.done()
    job.cancel()
    assert isinstance(job.exception(WAIT_S), JobCancelled)


def test_a_dropped_accelerator_lives_until_its_jobs_have_ended() -> None:
    with bench() as rig:
        a = rig.array(0, 10)
        a[:] = 1
        rig.pager.held.clear()
        job = rig.launch("sum", a)
        with rig.dropped_accelerator() as gone:
            assert eventually(lambda: bool(rig.pager.faults))
            assert not gone()
            rig.pager.held.set()
            assert job.result(WAIT_S) == 10
            assert eventually(gone)
