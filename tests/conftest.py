"""What all tests share: a time limit for each test, and helper processes."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from nopin.lab.child import Child

TEST_TIMEOUT_S = 60.0
LAST_RESORT_S = 15.0
"""After its time limit a test that does not even return to the interpreter gets this long, then all ends."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): time limit of this test instead of the common one")
    config.addinivalue_line("markers", "needs_root: changes the system or needs a privilege; must undo it")
    config.addinivalue_line("markers", "needs_userfaultfd: needs userfaultfd events")
    config.addinivalue_line("markers", "needs_io_uring: needs io_uring registered buffers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that hangs, with a traceback of every thread, instead of hanging the run."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else TEST_TIMEOUT_S

    def expire(signal_number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        pytest.fail(f"{item.nodeid} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + LAST_RESORT_S, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PeerProcess = Callable[..., Child]


@pytest.fixture
def peer_process() -> Iterator[PeerProcess]:
    """Start top-level functions `f(line, *args)` in fresh processes; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(function: Callable[..., None], *args: Any) -> Child:
            return stack.enter_context(Child(function, *args))

        yield start
