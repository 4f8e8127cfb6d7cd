"""Trouble with managed memory: the swap file, the budget. Who is concerned hears of it; nobody else loses a byte."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nopin
from nopin.lab.servers import LocalServer
from nopin.linux.arena_file import resident_bytes
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
pytestmark = pytest.mark.needs_userfaultfd
N_PAGES = 64


@pytest.fixture
def small_swap(tmp_path: Path) -> Iterator[LocalServer]:
    options = ["--swap-limit", "32KiB", "--no-swap-compress", "--swap-dir", str(tmp_path)]
    with LocalServer(tmp_path / "small.sock", options) as server:
        yield server


@pytest.fixture
def raw_swap(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(tmp_path / "raw.sock", ["--no-swap-compress", "--swap-dir", str(tmp_path)]) as server:
        yield server


def swap_files(pid: int) -> list[Path]:
    """The nameless swap files of a server."""
    found = [each for each in Path(f"/proc/{pid}/fd").iterdir() if "(deleted)" in os.readlink(each)]
    return [each for each in found if not os.readlink(each).startswith("/memfd:")]


def row(device: nopin.Device) -> dict[str, int]:
    (found,) = [each for each in device.stat() if each["kind"] == "arena"]
    return found


def touched(array: np.ndarray, page: int, *, store: bool = False) -> int:
    """Load from or store to a page in a child, and return its exit status: minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if store:
            array[page] = 1
        os._exit(0 if array[page, 0] >= 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def random_pages(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, PAGE), np.uint8)


def test_a_full_swap_is_sigbus_for_who_needs_room_and_costs_nobody_a_byte(small_swap: LocalServer) -> None:
    with nopin.Device(str(small_swap.socket_path), budget=8 * PAGE) as device:
        array = device.zeros((N_PAGES, PAGE), np.uint8)
        written = random_pages(15, 1)
        array[:15] = written
        statuses = [touched(array, page, store=True) for page in range(20, 40)]
        assert -signal.SIGBUS in statuses
        assert row(device)["swap_full"] > 0
        device.set_budget(32 * PAGE)
        assert np.array_equal(array[:15], written)
        assert any(event.kind is nopin.AsyncEventType.ARENA_SWAP_FULL for event in device.events(1.0))
        with nopin.Device(str(small_swap.socket_path), budget=8 * PAGE) as other:
            undisturbed = other.zeros((12, PAGE), np.uint8)
            undisturbed[:] = 7
            assert (undisturbed == 7).all()


def test_a_full_swap_has_room_again_when_arrays_die(small_swap: LocalServer) -> None:
    with nopin.Device(str(small_swap.socket_path), budget=8 * PAGE) as device:
        first = device.zeros((15, PAGE), np.uint8)
        first[:] = random_pages(15, 2)
        del first
        device.default_arena.trim()
        second = device.zeros((15, PAGE), np.uint8)
        written = random_pages(15, 3)
        second[:] = written
        assert np.array_equal(second, written)


def test_a_flipped_bit_is_sigbus_and_the_page_beside_it_is_right(raw_swap: LocalServer) -> None:
    with nopin.Device(str(raw_swap.socket_path), budget=8 * PAGE) as device:
        array = device.zeros((N_PAGES, PAGE), np.uint8)
        written = random_pages(N_PAGES, 4)
        array[:] = written
        needle = written[5].tobytes()
        (file,) = swap_files(raw_swap.pid)
        at = file.read_bytes().index(needle)
        with file.open("r+b") as opened:
            opened.seek(at + 100)
            opened.write(bytes([written[5, 100] ^ 0x10]))
        assert touched(array, 5) == -signal.SIGBUS
        assert touched(array, 5) == -signal.SIGBUS, "it stays lost"
        others = [page for page in range(N_PAGES) if page != 5]
        assert np.array_equal(array[others], written[others])
        with device.share(array) as share:
            with nopin.attach(share.url, device=device) as unlucky, pytest.raises(nopin.WorkError, match="is lost"):
                unlucky[5]
            remote = nopin.attach(share.url, device=device)
            assert np.array_equal(remote[4], written[4])
        assert row(device)["lost"] == 1


def test_a_swap_file_cut_short_loses_what_was_in_it_and_no_more(raw_swap: LocalServer) -> None:
    with nopin.Device(str(raw_swap.socket_path), budget=8 * PAGE) as device:
        array = device.zeros((16, PAGE), np.uint8)
        written = random_pages(16, 5)
        array[:] = written
        (file,) = swap_files(raw_swap.pid)
        with file.open("r+b") as opened:
            opened.truncate(0)
        statuses = [touched(array, page) for page in range(16)]
        n_lost = statuses.count(-signal.SIGBUS)
        assert 8 <= n_lost < 16
        kept = [page for page, status in enumerate(statuses) if status == 0]
        assert np.array_equal(array[kept], written[kept])
        fresh = device.zeros((8, PAGE), np.uint8)
        fresh[:] = 3
        assert (fresh == 3).all(), "the server goes on"
        assert row(device)["lost"] == n_lost


def test_swap_that_ends_in_a_short_write_keeps_the_page_in_memory(raw_swap: LocalServer) -> None:
    with nopin.Device(str(raw_swap.socket_path), budget=8 * PAGE) as device:
        array = device.zeros((N_PAGES, PAGE), np.uint8)
        array[0] = 1
        limit_file_size(raw_swap.pid, 6 * PAGE + 1000)
        written = random_pages(12, 6)
        array[:12] = written
        statuses = [touched(array, page, store=True) for page in range(20, 24)]
        assert -signal.SIGBUS in statuses
        assert row(device)["swap_errors"] > 0
        limit_file_size(raw_swap.pid, -1)
        array[30:40] = 9
        assert (array[30:40] == 9).all(), "it writes again"
        assert np.array_equal(array[:12], written)


def limit_file_size(pid: int, n_bytes: int) -> None:
    """Have a process write no file beyond a size: what is left of a write that crosses it is refused."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (n_bytes, -1))


def test_a_budget_of_one_page_is_slow_and_right(raw_swap: LocalServer) -> None:
    with nopin.Device(str(raw_swap.socket_path), budget=PAGE) as device:
        array = device.zeros((16, PAGE), np.uint8)
        written = random_pages(16, 7)
        array[:] = written
        assert np.array_equal(array, written)
        array[1:] = array[:-1].copy()
        assert np.array_equal(array[1:], written[:-1])
        assert resident_bytes(device.default_arena.memory_fd) <= 2 * PAGE


def test_a_transfer_larger_than_the_budget_concerns_its_peer_alone(raw_swap: LocalServer) -> None:
    with nopin.Device(str(raw_swap.socket_path), budget=4 * PAGE) as device:
        array = device.zeros((N_PAGES, PAGE), np.uint8)
        written = random_pages(N_PAGES, 8)
        array[:] = written
        with (
            device.share(array) as share,
            nopin.attach(share.url, device=device) as remote,
            pytest.raises(nopin.WorkError, match="its budget is smaller"),
        ):
            remote[:]
        assert np.array_equal(array, written)
        with device.share(array) as share, nopin.attach(share.url, device=device) as remote:
            assert np.array_equal(remote[3], written[3])
