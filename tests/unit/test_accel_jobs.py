"""Jobs and their queue, without a worker."""

from __future__ import annotations

import asyncio
import threading
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest

from nopin.accel.job import Job
from nopin.accel.queue import JobQueue
from nopin.errors import Closed, JobCancelled, QueueFull


def no_arrays(*what: Any) -> Any:
    raise AssertionError(f"no array was given, but {what}")


def job_in(queue: JobQueue[Job], number: int = 1, resolve: Any = no_arrays) -> Job:
    job = Job(number, "sum", b"", resolve, queue.withdraw)
    queue.put(job)
    return job


def test_jobs_are_taken_in_the_order_they_came() -> None:
    queue: JobQueue[Job] = JobQueue(3)
    jobs = [job_in(queue, n) for n in range(3)]
    assert [queue.take() for _ in jobs] == jobs


def test_a_full_queue_refuses_and_says_what_to_do() -> None:
    queue: JobQueue[Job] = JobQueue(1)
    job_in(queue)
    with pytest.raises(QueueFull, match=r"1 jobs wait.*depth="):
        job_in(queue)
    assert len(queue) == 1


def test_closing_wakes_who_waits_and_hands_back_what_nobody_took() -> None:
    queue: JobQueue[Job] = JobQueue(2)
    taken: list[Job | None] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()))
    taker.start()
    assert queue.close() == []
    taker.join()
    assert taken == [None]
    waiting: JobQueue[Job] = JobQueue(2)
    job = job_in(waiting)
    assert waiting.close() == [job]
    assert waiting.take() is None
    with pytest.raises(Closed):
        job_in(waiting)


def test_a_waiting_job_is_cancelled_and_never_taken() -> None:
    queue: JobQueue[Job] = JobQueue(2)
    first, second = job_in(queue, 1), job_in(queue, 2)
    assert first.cancel() is True
    assert queue.take() is second
    with pytest.raises(JobCancelled, match="before it began"):
        first.result()
    assert isinstance(first.exception(), JobCancelled)
    assert first.cancel() is False


def test_a_running_job_is_asked_to_stop_even_when_asked_before_it_is_known_where() -> None:
    queue: JobQueue[Job] = JobQueue(2)
    asked: list[str] = []
    early, late = job_in(queue), job_in(queue)
    queue.take()
    assert early.cancel() is False
    early.begin(lambda: asked.append("early"))
    queue.take()
    late.begin(lambda: asked.append("late"))
    assert asked == ["early"]
    late.cancel()
    assert asked == ["early", "late"]


def test_waiting_has_a_limit_and_can_go_on() -> None:
    job = job_in(JobQueue(1))
    with pytest.raises(TimeoutError, match="still under way"):
        job.result(timeout=0.01)
    assert not job.done()
    job.complete(5)
    assert job.result() == 5
    assert job.exception() is None


def test_a_job_that_has_ended_keeps_nothing_alive() -> None:
    array = np.zeros(3)
    gone = weakref.ref(array)
    queue: JobQueue[Job] = JobQueue(1)
    job = job_in(queue, resolve=partial(no_arrays, array))
    queue.take()
    del array
    assert gone() is not None
    job.complete(None)
    assert gone() is None


def test_jobs_can_be_awaited_and_fail_there() -> None:
    queue: JobQueue[Job] = JobQueue(3)
    good, bad, ended = job_in(queue, 1), job_in(queue, 2), job_in(queue, 3)
    ended.complete("at once")

    async def main() -> Any:
        threading.Timer(0.01, good.complete, ["later"]).start()
        threading.Timer(0.01, bad.fail, [JobCancelled("gone")]).start()
        return await asyncio.gather(good, bad, ended, return_exceptions=True)

    results = asyncio.run(main())
    assert results[0] == "later"
    assert isinstance(results[1], JobCancelled)
    assert results[2] == "at once"


def test_a_job_whose_event_loop_has_gone_still_ends() -> None:
    job = job_in(JobQueue(1))

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_wait(job), 0.01)

    asyncio.run(give_up())
    job.complete(1)
    assert job.result() == 1


async def _wait(job: Job) -> Any:
    return await job
