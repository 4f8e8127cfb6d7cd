"""Something under way: what transfers, prefetches and an accelerator's jobs can all be asked, and how it is awaited."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nopin.errors import UsageError

if TYPE_CHECKING:  # importing asyncio takes as long as all the rest of nopin
    import asyncio

T = TypeVar("T")

FOREVER_S = 1e9
"""Longer is as good as for ever, and more than system calls take."""


def checked_timeout(timeout: float | None) -> float | None:
    """Return seconds to wait at most; None for ever, whether that is given as None, infinity or a thousand years.

    Raises:
        UsageError: it is no number.
    """
    if timeout is None:
        return None
    with contextlib.suppress(TypeError):
        if timeout >= FOREVER_S:
            return None
        if timeout < FOREVER_S:  # as nan is not
            return float(max(timeout, 0.0))
    raise UsageError(f"a timeout is a number of seconds, or None for ever, not {timeout!r}")


class Pending(ABC, Generic[T]):
    """Under way, or ended with a result or an error. Dropping it does not stop it."""

    __slots__ = ()

    _error: BaseException | None
    """Why it failed, once it has."""

    @abstractmethod
    def done(self) -> bool:
        """Tell whether it has ended, well or not, without waiting."""

    @abstractmethod
    def result(self, timeout: float | None = None) -> T:
        """Wait for it and return its result, or raise its error.

        Raises:
            TimeoutError: not within `timeout` seconds; it stays under way and can be waited for again.
            UsageError: `timeout` is no number.
        """

    @abstractmethod
    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call back once it has ended, from the thread that noticed; at once if it has ended already."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for it and return its error, None if it went well. Raises TimeoutError as `result`."""
        try:
            self.result(timeout)
        except BaseException as error:
            if error is self._error:
                return error
            raise
        return None

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            yield from self._future().__await__()
        return self.result()

    def _future(self) -> asyncio.Future[None]:
        """Return a future of the running loop that ends when this does."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(settle)

        self.add_done_callback(wake)
        return future
