"""One job of an accelerator, as its owner sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from nopin.accel.arguments import Resolve
from nopin.accel.memory import ArrayRef
from nopin.accel.messages import Usage
from nopin.errors import Closed, JobCancelled
from nopin.pending import Pending, checked_timeout


class Job(Pending[Any]):
    """A kernel under way. Ask whether it is done, wait for it, await it, or cancel it. Any thread may.

    Args:
        number: unique in its accelerator.
        kernel: its name or import path.
        arguments: as `arguments.encode` writes them.
        resolve: finds an array of the result among the arguments, which it holds.
        withdraw: takes it out of the queue; False when it is not there any more.
            Both are held until the job has ended, and with them its arrays and its accelerator.

    Attributes:
        usage: time and faults it took, once it has ended; None before, and when its worker died.
    """

    def __init__(
        self,
        number: int,
        kernel: str,
        arguments: bytes,
        resolve: Resolve,
        withdraw: Callable[[Job], bool],
    ) -> None:
        self.number = number
        self.kernel = kernel
        self.arguments = arguments
        self.resolve = resolve
        self.usage: Usage | None = None
        self._withdraw: Callable[[Job], bool] = withdraw
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], object]] = []
        self._stop: Callable[[], None] | None = None
        self._stop_wanted = False

    def __repr__(self) -> str:
        return f"<Job {self.number}: {self.kernel}, {'done' if self._done else 'under way'}>"

    def done(self) -> bool:
        """Tell whether it has ended, well or not."""
        return self._done

    def result(self, timeout: float | None = None) -> Any:
        """Wait for it and return what the kernel returned.

        Raises:
            TimeoutError: not within `timeout` seconds; it stays under way and can be waited for again.
            AcceleratorError: the kernel raised.
            WorkerGone: its worker died; `PageLost` when that was because bytes of an arena are lost.
            JobCancelled: it was cancelled.
            Closed: the accelerator was closed, or this process was forked from the one that launched it.
        """
        self._require_own()
        timeout = checked_timeout(timeout)
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(f"{self.kernel} is not done after {timeout:g} s; it is still under way")
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> bool:
        """Cancel it.

        Returns:
            True when it had not begun and never will. False when it has: it is asked to stop and does so at its next
            chunk, if its kernel has chunks; `result` tells how it ended.
        """
        self._require_own()
        if self._withdraw(self):
            self.fail(JobCancelled(f"{self.kernel} was cancelled before it began"))
            return True
        with self._changed:
            self._stop_wanted = True
            stop = self._stop
        if stop is not None:
            stop()
        return False

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call back once it has ended, from the thread that noticed; at once if it has ended already."""
        with self._changed:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def begin(self, stop: Callable[[], None]) -> None:
        """Say that a worker runs it now, and how to ask that to stop. For the lane."""
        with self._changed:
            self._stop = stop
            wanted = self._stop_wanted
        if wanted:
            stop()

    def complete(self, result: object) -> None:
        """Say that it went well. For the lane."""
        self._end(result, None)

    def fail(self, error: BaseException) -> None:
        """Say that it failed. For the lane."""
        self._end(None, error)

    def _end(self, result: object, error: BaseException | None) -> None:
        with self._changed:
            assert not self._done, f"{self!r} ends twice"
            self._result, self._error, self._done = result, error, True
            self._stop = None
            self._withdraw, self.resolve = _not_waiting, _no_arrays
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            try:
                callback()
            except Exception as problem:  # it must not end the lane
                where = (type(problem), problem, problem.__traceback__, threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(where))

    def _require_own(self) -> None:
        """Locks may be held for ever in a forked child, and nobody would end the job there."""
        if os.getpid() != self._pid:
            raise Closed(f"{self!r} belongs to the process this one was forked from; launch from a Device made here")


def _not_waiting(_job: Job) -> bool:
    return False


def _no_arrays(ref: ArrayRef) -> NDArray[Any]:
    raise ValueError(f"{ref} is no argument of a job that has ended")
