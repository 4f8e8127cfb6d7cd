"""What all tests share: what the host offers, a time limit for each test, servers and helper processes.

Tests that need root, userfaultfd or io_uring carry a marker and are skipped, with the reason, where it is
missing. The report header tells what there is; the summary tells which privileged tests really ran.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nopin import Device
from nopin.lab.child import Child
from nopin.lab.servers import LocalServer
from nopin.linux.probe import Feature, probe_all

TEST_TIMEOUT_S = 60.0
LAST_RESORT_S = 15.0
"""After its time limit a test that does not even return to the interpreter gets this long, then all ends."""

PRIVILEGED_MARKERS = ("needs_root", "needs_userfaultfd", "needs_io_uring")
_ran: dict[str, list[str]] = {marker: [] for marker in PRIVILEGED_MARKERS}
_features: dict[str, Feature] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): time limit of this test instead of the common one")
    config.addinivalue_line("markers", "needs_root: changes the system or needs a privilege; must undo it")
    config.addinivalue_line("markers", "needs_userfaultfd: needs userfaultfd events")
    config.addinivalue_line("markers", "needs_io_uring: needs io_uring registered buffers")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it, and children inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _features.update({feature.name: feature for feature in probe_all()})


def pytest_report_header(config: pytest.Config) -> list[str]:
    missing = [f"{feature.name} ({feature.detail})" for feature in _features.values() if not feature.available]
    return [
        f"host: uid {os.getuid()}, Linux {platform.release()}, {os.cpu_count()} cpus",
        f"host lacks: {', '.join(missing) or 'nothing'}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{len(names)} {marker}" for marker, names in _ran.items())
    terminalreporter.write_line(f"privileged tests that ran as uid {os.getuid()}: {counts}")


def _why_not(marker: str) -> str | None:
    """Say why tests with this marker cannot run here; None if they can."""
    if marker == "needs_root":
        return None if os.getuid() == 0 else "needs root"
    feature = _features[marker.removeprefix("needs_")]
    return None if feature.available else f"{feature.name}: {feature.detail}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in PRIVILEGED_MARKERS:
        if item.get_closest_marker(marker) is None:
            continue
        if reason := _why_not(marker):
            pytest.skip(reason)
        _ran[marker].append(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Free what the functions of a failure hold once it is written down: arrays that are kept make later forks wait."""
    report = yield
    if call.excinfo is not None and not item.config.getoption("usepdb"):
        traceback.clear_frames(call.excinfo.tb)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Free arrays that hang in a cycle, of a caught error for instance, before fixtures end their server.

    A process that has managed memory whose server is gone waits in fork for the next one, which no test starts.
    """
    if item.get_closest_marker("needs_userfaultfd") is not None:
        gc.collect()
    return (yield)


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


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment of programs that find what we find, and a default server of their own."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    path = os.pathsep.join(filter(None, sys.path))
    return os.environ | {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": path}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    """A device server process of its own, on a temporary socket and its own loopback address."""
    with LocalServer(tmp_path / "server.sock") as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the servers of a test are found, one after the other."""
    return tmp_path / "server.sock"


@pytest.fixture
def servers(path: Path) -> Iterator[list[LocalServer]]:
    """The first server there; a test that kills it appends its successor. All are ended."""
    started = [LocalServer(path)]
    yield started
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            each.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Device]:
    """A device of this process at a server of its own, which lives through the test."""
    with LocalServer(tmp_path / "peer.sock") as running, Device(server=str(running.socket_path)) as opened:
        yield opened


@pytest.fixture
def two_servers(tmp_path: Path) -> Iterator[tuple[LocalServer, LocalServer]]:
    """Two device servers: their clients reach each other only by RoCEv2 over loopback."""
    with LocalServer(tmp_path / "one.sock") as one, LocalServer(tmp_path / "two.sock") as two:
        yield one, two


@pytest.fixture
def device(server: LocalServer) -> Iterator[Device]:
    """A device of this process at the `server` fixture's server."""
    with Device(server=str(server.socket_path)) as opened:
        yield opened


PeerProcess = Callable[..., Child]


@pytest.fixture
def peer_process() -> Iterator[PeerProcess]:
    """Start top-level functions `f(line, *args)` in fresh processes; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(function: Callable[..., None], *args: Any) -> Child:
            return stack.enter_context(Child(function, *args))

        yield start
