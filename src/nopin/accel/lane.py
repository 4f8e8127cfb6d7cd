"""The thread that keeps one worker at work.

A thread, because jobs wait behind one another while their owner does something else: the queue has to be emptied
without it. It sleeps in system calls nearly all the time, so the owner's interpreter lock is free. The lane makes its
worker, and another one when that has died; the kernel ends the worker together with the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nopin.accel.arguments import decode
from nopin.accel.job import Job
from nopin.accel.messages import Failed, Finished, Stopped
from nopin.accel.process import Arena, Introduce, Worker
from nopin.accel.queue import JobQueue
from nopin.accel.tally import Tally
from nopin.errors import AcceleratorError, Closed, JobCancelled, NopinError, WorkerGone

_JOIN_TIMEOUT_S = 10.0


class Lane:
    """One worker and the thread that feeds it.

    Args:
        queue: where its jobs come from; shared with the other lanes.
        arenas: gives the arenas there are now; all are mapped in the worker before a job begins, because its
            pointers may lead into any of them.
        introduce: see `process.Introduce`.
        tally: where it counts.
    """

    def __init__(
        self, queue: JobQueue[Job], arenas: Callable[[], Iterable[Arena]], introduce: Introduce, tally: Tally
    ) -> None:
        self._queue = queue
        self._arenas = arenas
        self._introduce = introduce
        self._tally = tally
        self._worker: Worker | None = None
        self._closing = False
        self._lock = threading.Lock()  # over both: no worker is started once the lane is closing
        self._thread = threading.Thread(target=self._run, name="nopin-accelerator", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process number of its worker, None while there is none."""
        worker = self._worker
        return worker.pid if worker is not None and worker.alive else None

    def close(self) -> None:
        """End the worker and the thread; a job under way fails with `Closed`. Requires: the queue is closed."""
        with self._lock:
            self._closing = True
            if self._worker is not None:
                self._worker.kill()
        if threading.current_thread() is not self._thread:  # it is, when a callback of a job closes the accelerator
            self._thread.join(_JOIN_TIMEOUT_S)

    def abandon(self) -> None:
        """Close descriptors only: for a child after fork, where the thread does not exist."""
        if self._worker is not None:
            self._worker.abandon()

    def _run(self) -> None:
        self._start_early()
        while (job := self._queue.take()) is not None:
            self._serve(job)
            del job  # its arrays would live until the next one
        if self._worker is not None:
            self._worker.close()

    def _start_early(self) -> None:
        """Have a worker ready for the first job; what is in the way of that is told to the job."""
        try:
            self._ready_worker()
        except (NopinError, OSError):
            return

    def _serve(self, job: Job) -> None:
        """Run a job to its end and say how it went. Whatever happens, the lane goes on."""
        result, error = None, None
        with self._tally.running():
            try:
                result = self._outcome(job)
            except Exception as problem:
                error = self._explained(job, problem)
        if error is None:
            self._tally.count("finished")
            job.complete(result)
        else:
            self._tally.count("cancelled" if isinstance(error, JobCancelled) else "failed")
            job.fail(error)

    def _outcome(self, job: Job) -> Any:
        worker = self._ready_worker()
        job.begin(partial(worker.stop, job.number))
        reply = worker.run(job.number, job.kernel, job.arguments)
        job.usage = reply.usage
        self._tally.add(reply.usage)
        if isinstance(reply, Stopped):
            raise JobCancelled(f"{job.kernel} was cancelled while it ran; what it had written until then stays")
        if isinstance(reply, Failed):
            raise _raised(job, reply)
        assert isinstance(reply, Finished)
        try:
            return decode(reply.result, job.resolve)
        except ValueError as problem:
            raise AcceleratorError(f"{job.kernel}: its result cannot be read: {problem}") from problem

    def _ready_worker(self) -> Worker:
        """The worker, a fresh one if there is none, with every arena mapped."""
        while True:
            if self._worker is not None and not self._worker.alive:
                self._forget_worker()
            worker, arenas = self._worker or self._start(), set(self._arenas())
            try:
                worker.map_all(arenas)
            except (NopinError, OSError):
                if arenas <= set(self._arenas()):  # else one was given up while it was being mapped
                    raise
            else:
                return worker

    def _forget_worker(self) -> None:
        assert self._worker is not None
        self._worker.close()
        self._worker = None
        self._tally.count("lost")

    def _start(self) -> Worker:
        with self._lock:
            if self._closing:
                raise Closed("this Accelerator was closed")
            self._worker = Worker(self._introduce)
        self._tally.count("started")
        return self._worker

    def _explained(self, job: Job, problem: Exception) -> Exception:
        if self._closing:
            return Closed(f"the accelerator was closed while {job.kernel} ran; what it had written until then stays")
        if isinstance(problem, WorkerGone):
            self._forget_worker()
            return type(problem)(f"{job.kernel}: {problem}", exit_status=problem.exit_status)
        if isinstance(problem, OSError) and not isinstance(problem, NopinError):  # ServerGone is both
            return AcceleratorError(f"{job.kernel}: no worker can be had: {problem}")
        return problem


def _raised(job: Job, reply: Failed) -> AcceleratorError:
    error = AcceleratorError(
        f"{job.kernel}: {reply.exception}: {reply.message}", exception=reply.exception, traceback=reply.traceback
    )
    if reply.traceback:
        error.add_note(f"In the worker:\n{reply.traceback}")
    return error
