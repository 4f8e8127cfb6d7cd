"""An operation under way: ask whether it is done, wait for it, or await it.

There is no helper thread. Whoever waits, for whichever operation, makes all of them progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nopin.pending import Pending
from nopin.verbs.waiting import deadline_after

if TYPE_CHECKING:  # importing asyncio takes as long as all the rest of nopin
    import asyncio

T = TypeVar("T")


class Driver(Protocol):
    """What makes operations progress."""

    def progress(self) -> bool:
        """Take note of what has completed, without waiting; True when an operation ended."""
        ...

    def drive(self, operation: Operation[Any], deadline_ns: int | None) -> None:
        """Make progress until the operation is done or the deadline has passed."""
        ...

    def attend(self, future: asyncio.Future[None]) -> None:
        """Make progress from the running event loop for as long as the future is pending."""
        ...


class Operation(Pending[T]):
    """One transfer or atomic on a remote array.

    Args:
        driver: makes it progress.
        finish: computes the result once all bytes are here.
        describe: says what it is, for error messages: ``READ of 8 bytes from 0x7f.. on``.
    """

    __slots__ = ("_callbacks", "_describe", "_done", "_driver", "_error", "_finish", "_result")

    def __init__(self, driver: Driver, finish: Callable[[], T], describe: Callable[[], str]) -> None:
        self._driver = driver
        self._finish: Callable[[], T] | None = finish
        self._done = False
        self._error: BaseException | None = None
        self._result: T | None = None
        self._callbacks: list[Callable[[], object]] = []
        self._describe = describe

    def __repr__(self) -> str:
        state = "under way" if not self._done else "done" if self._error is None else "failed"
        return f"<{type(self).__name__}: {self.what}, {state}>"

    @property
    def what(self) -> str:
        """What it is, for error messages."""
        return self._describe()

    def done(self) -> bool:
        """Tell whether it has ended, well or not; takes note of completions but does not wait."""
        if not self._done:
            self._driver.progress()
        return self._done

    @property
    def ended(self) -> bool:
        """True once it is known to have ended."""
        return self._done

    def result(self, timeout: float | None = None) -> T:
        """Wait for it and return its result.

        Raises:
            TimeoutError: not within `timeout` seconds; it stays under way and can be waited for again.
            NopinError: it failed; `WorkError` with the completion status, or what ended the connection.
        """
        if not self._done:
            self._driver.drive(self, deadline_after(timeout))
            if not self._done:
                raise TimeoutError(f"{self.what} is not done after {timeout:g} s; it is still under way")
        if self._error is not None:
            raise self._error
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result  # type: ignore[return-value]  # set by now; None may be the result

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call back when it ends, from whichever thread makes progress; at once if it has ended."""
        self._callbacks.append(callback)
        if self._done:
            self._call_back()

    def complete(self) -> None:
        """Say that all its bytes are here. For the driver."""
        self._done = True
        self._call_back()

    def fail(self, error: BaseException) -> None:
        """Say that it failed. For the driver."""
        self._error = error
        self._finish = None
        self.complete()

    def _call_back(self) -> None:
        while self._callbacks:
            self._callbacks.pop()()

    def _future(self) -> asyncio.Future[None]:
        future = super()._future()
        self._driver.attend(future)
        return future
