"""Arrays in managed memory as a program uses them, against a real server."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import damage_swap, eventually

import nopin
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux.arena_file import present, resident_bytes
from nopin.linux.libc import LIBC
from nopin.units import PAGE_BYTES
from nopin.verbs.arena import Arena

PAGE = PAGE_BYTES
MIB = 1 << 20
pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture
def device(server: LocalServer) -> Iterator[nopin.Device]:
    with nopin.Device(str(server.socket_path), budget="1MiB") as opened:
        yield opened


def test_an_array_of_eight_times_the_budget_is_an_ordinary_array(device: nopin.Device) -> None:
    array = device.zeros((1024, 1024), np.float64)
    assert type(array) is np.ndarray
    assert array.flags.owndata
    assert array.flags.c_contiguous
    assert not array.any()
    array[:] = np.arange(1024.0)
    array[::2] += 1
    assert array.sum() == 1024 * 1024 * 1023 / 2 + 512 * 1024
    assert resident_bytes(device.default_arena.memory_fd) <= MIB + PAGE


def test_bytes_of_an_array_are_free_when_its_last_view_dies(device: nopin.Device) -> None:
    arena = device.default_arena
    array = device.zeros(16 * PAGE, np.uint8)
    array[:] = 7
    first = (array.ctypes.data - arena.where.start) // PAGE
    view = array[PAGE:].reshape(15, PAGE)[:, 5]
    del array
    assert arena.n_arrays == 1
    assert view.tolist() == [7] * 15
    del view
    assert arena.n_arrays == 0
    assert present(arena.memory_fd, first, 16).any(), "kept for reuse"
    arena.trim()
    assert not present(arena.memory_fd, first, 16).any()


def test_freed_bytes_are_reused_and_zeros_are_zeros(device: nopin.Device) -> None:
    arena = device.arena("1MiB", "1MiB")
    for n_bytes in (100, 5000, 3 * PAGE, 200 * PAGE, 64, 200 * PAGE, 255 * PAGE):
        array = arena.zeros(n_bytes, np.uint8)
        assert not array.any(), n_bytes
        array[:] = 0xFF
        del array
    assert arena.n_arrays == 0


def test_hundred_thousand_small_arrays_need_no_mapping_and_little_memory(device: nopin.Device) -> None:
    n_mappings = len(Path("/proc/self/maps").read_text().splitlines())
    device.set_budget("16MiB")
    arrays = [device.zeros(8, np.int64) for _ in range(100_000)]
    for index in range(0, 100_000, 997):
        arrays[index][:] = index
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= n_mappings + 10
    assert all(array[7] == (index if index % 997 == 0 else 0) for index, array in enumerate(arrays[:10_000]))
    assert device.default_arena.n_arrays == 100_000
    arrays.clear()
    assert device.default_arena.n_arrays == 0


def test_asarray_copies_once_and_leaves_managed_arrays_alone(device: nopin.Device) -> None:
    plain = np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4))
    managed = device.asarray(plain)
    assert device.default_arena.contains(managed)
    assert np.array_equal(managed, plain)
    assert managed.dtype == plain.dtype
    assert managed.flags.f_contiguous
    assert device.asarray(managed) is managed
    assert device.asarray([1, 2, 3], np.float32).dtype == np.float32
    with pytest.raises(nopin.UsageError, match="Python objects"):
        device.asarray(np.array([None]))


def test_a_full_arena_says_so_and_has_room_again_later(device: nopin.Device) -> None:
    arena = device.arena(capacity=64 * PAGE)
    first = arena.zeros(40 * PAGE, np.uint8)
    with pytest.raises(nopin.ArenaFull, match="no room for an array of uint8"):
        arena.zeros(40 * PAGE, np.uint8)
    del first
    assert arena.zeros(64 * PAGE, np.uint8).size == 64 * PAGE


def test_what_numpy_makes_inside_the_block_lies_in_the_arena_and_outlives_the_block(device: nopin.Device) -> None:
    arena = device.default_arena
    before = np.arange(1000.0)
    with nopin.numpy_memory(device):
        made = before * 2
        grown = np.array([1, 2, 3])
        grown.resize(50_000, refcheck=False)
        other: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: other.append(np.zeros(1000)))
        thread.start()
        thread.join()
    after = np.zeros(1000)
    assert arena.contains(made)
    assert arena.contains(grown)
    assert not arena.contains(after)
    assert not arena.contains(other[0])
    assert made.sum() == 999_000
    assert grown[:3].tolist() == [1, 2, 3]
    assert not grown[3:].any()
    assert arena.n_arrays == 2
    del made, grown
    assert arena.n_arrays == 0


def test_an_arena_with_arrays_is_not_closed(device: nopin.Device) -> None:
    arena = device.arena(MIB)
    array = arena.zeros(10)
    with pytest.raises(nopin.UsageError, match="1 arrays live"):
        arena.close()
    array[:] = 1
    del array
    arena.close()
    arena.close()
    assert arena not in device.arenas
    with pytest.raises(nopin.Closed):
        arena.zeros(10)


def test_arrays_outlive_their_device_and_end_with_their_last_view(server: LocalServer) -> None:
    n_descriptors = len(os.listdir("/proc/self/fd"))
    device = nopin.Device(str(server.socket_path), budget="1MiB")
    served = f"/proc/{server.pid}/fd"
    n_served = len(os.listdir(served))
    array = device.zeros(4 * MIB, np.uint8)
    array[::PAGE] = np.arange(1024) & 0xFF
    device.close()
    assert np.array_equal(array[::PAGE], np.arange(1024) & 0xFF)
    with pytest.raises(nopin.Closed):
        device.zeros(1)
    del array
    assert len(os.listdir("/proc/self/fd")) == n_descriptors
    assert eventually(lambda: len(os.listdir(served)) < n_served)


def test_arrays_that_die_in_a_cycle_inside_a_request_are_freed(device: nopin.Device) -> None:
    arena = device.default_arena
    for _ in range(50):
        cycle: list[object] = [device.zeros(100 * PAGE, np.uint8)]
        cycle.append(cycle)
        device.stat()
    del cycle
    gc.collect()
    assert arena.n_arrays == 0


def test_many_threads_make_and_drop_arrays(device: nopin.Device) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        kept: list[tuple[int, np.ndarray]] = []
        for step in range(300):
            array = device.zeros(int(draw.integers(1, 20_000)), np.uint8)
            if array.any():
                wrong.append(f"thread {seed} step {step}: zeros are not zero")
            value = int(draw.integers(1, 256))
            array[:] = value
            kept.append((value, array))
            if len(kept) > 20:
                expected, old = kept.pop(int(draw.integers(len(kept))))
                if not (old == expected).all():
                    wrong.append(f"thread {seed} step {step}: an array changed")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert device.default_arena.n_arrays == 0


def test_a_child_uses_arrays_but_makes_none(device: nopin.Device) -> None:
    array = device.zeros(4 * MIB, np.uint8)
    array[:] = 3
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert array[:MIB].min() == 3
            array[MIB] = 9
            try:
                device.default_arena.zeros(10)
            except nopin.Closed as error:
                assert "its arrays can be used here" in str(error)  # noqa: PT017 - pytest does not run in this process
                status = 0
            del array
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert array[MIB] == 9
    assert device.default_arena.n_arrays == 1


def test_bytes_in_swap_that_a_child_gives_up_with_madvise_are_zeros_for_all(device: nopin.Device) -> None:
    array = device.zeros((256, PAGE), np.uint8)
    array[:] = 3
    device.set_budget("64KiB")
    for first, advice in ((0, 9), (64, 4)):  # MADV_REMOVE, MADV_DONTNEED
        pid = os.fork()
        if pid == 0:
            os._exit(LIBC.madvise(array[first:].ctypes.data, 64 * PAGE, advice))
        assert os.waitpid(pid, 0)[1] == 0
    assert not array[:64].any()
    assert (array[64:] == 3).all()


def test_a_mapping_that_mremap_makes_grow_is_known_by_its_first_fault(device: nopin.Device) -> None:
    array = device.zeros((64, PAGE), np.uint8)
    array[:] = np.arange(64, dtype=np.uint8)[:, np.newaxis]
    LIBC.mremap.restype = ctypes.c_void_p
    start, n_bytes = array[8:].ctypes.data, 16 * PAGE
    sizes = ctypes.c_size_t(n_bytes), ctypes.c_size_t(2 * n_bytes)
    grown = LIBC.mremap(ctypes.c_void_p(start), *sizes, ctypes.c_int(1 | 2), ctypes.c_void_p(start + (1 << 40)))
    assert grown == start + (1 << 40)
    there = np.ctypeslib.as_array((ctypes.c_uint8 * (2 * n_bytes)).from_address(grown)).reshape(32, PAGE)
    assert np.array_equal(there[:, 5], np.arange(8, 40))
    device.set_budget(PAGE)
    assert np.array_equal(there[:, 7], np.arange(8, 40))
    assert np.array_equal(array[:8, 0], np.arange(8))
    assert np.array_equal(array[24:, 0], np.arange(24, 64))
    there[20] = 99
    assert (array[28] == 99).all(), "the pages behind are at both places"
    assert LIBC.munmap(grown, 2 * n_bytes) == 0


def test_a_mapping_cut_in_pieces_by_mprotect_is_read_ahead_up_to_its_borders(device: nopin.Device) -> None:
    array = device.zeros((256, PAGE), np.uint8)
    array[:] = 3
    for first, n in ((7, 9), (40, 1), (100, 50)):
        piece = array[first : first + n]
        assert LIBC.mprotect(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(piece.nbytes), 1) == 0
    assert LIBC.madvise(array.ctypes.data, array.nbytes, 4) == 0  # MADV_DONTNEED: all is in memory, nothing mapped
    assert (array == 3).all()
    device.set_budget("64KiB")
    device.set_budget("2MiB")
    assert (array == 3).all()
    fresh = device.zeros((256, PAGE), np.uint8)
    piece = fresh[9:19]
    assert LIBC.mprotect(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(piece.nbytes), 1) == 0
    assert not fresh.any()


def test_a_smaller_budget_holds_at_once(device: nopin.Device) -> None:
    array = device.zeros(MIB, np.uint8)
    array[:] = 1
    device.set_budget("64KiB")
    assert resident_bytes(device.default_arena.memory_fd) <= 64 << 10
    assert array.min() == 1
    for wrong in ("many", 0, -5):
        with pytest.raises(nopin.UsageError):
            device.set_budget(wrong)


def test_an_arena_is_made_by_its_device_only(device: nopin.Device) -> None:
    assert isinstance(device.default_arena, Arena)
    assert device.arenas == [device.default_arena]


def test_a_prefetch_brings_back_what_was_evicted(device: nopin.Device) -> None:
    array = device.zeros((256, PAGE), np.uint8)
    array[:] = 5
    device.set_budget("64KiB")
    device.set_budget("2MiB")
    arena = device.default_arena
    first = (array.ctypes.data - arena.where.start) // PAGE
    assert present(arena.memory_fd, first, 256).sum() <= 16
    prefetch = device.prefetch(array, slice(10, 110))
    assert prefetch.result(10) == 100 * PAGE
    assert prefetch.exception() is None
    assert present(arena.memory_fd, first + 10, 100).all()
    assert device.prefetch(array[:0]).result(10) == 0
    assert (array == 5).all()


def test_a_share_and_its_region_prefetch_what_a_key_selects(device: nopin.Device) -> None:
    array = device.zeros((64, PAGE // 8))
    with device.share(array) as share:
        assert share.prefetch().result(10) == 64 * PAGE
        assert share.prefetch(slice(0, 10)).result(10) == 10 * PAGE
        assert share.prefetch((slice(None, None, -4), 5), write=True).result(10) == 16 * PAGE
        assert share.region.prefetch(slice(PAGE + 1, 2 * PAGE + 1)).result(10) == 2 * PAGE
        with pytest.raises(IndexError):
            share.prefetch(64)


def test_a_prefetch_can_be_awaited_while_others_are(device: nopin.Device) -> None:
    array = device.zeros((64, PAGE), np.uint8)

    async def run() -> list[int]:
        return await asyncio.gather(*(as_coroutine(device.prefetch(array, slice(i, i + 8))) for i in range(0, 64, 8)))

    async def as_coroutine(prefetch: nopin.Prefetch) -> int:
        return await prefetch

    assert asyncio.run(run()) == [8 * PAGE] * 8


def test_a_cancelled_prefetch_ends_with_what_it_did(device: nopin.Device) -> None:
    device.set_budget("64MiB")
    array = device.zeros(256 * MIB, np.uint8)
    prefetch = device.prefetch(array)
    prefetch.cancel()
    assert prefetch.result(10) <= 256 * MIB
    assert prefetch.cancelled
    assert not device.prefetch(array[:0]).cancelled


def test_ordinary_memory_is_not_prefetched(device: nopin.Device) -> None:
    with pytest.raises(nopin.UsageError, match="ordinary memory"):
        device.prefetch(np.zeros(10))
    with pytest.raises(nopin.UsageError, match="ordinary memory"):
        device.share(np.zeros(10)).prefetch()
    with pytest.raises(nopin.UsageError, match="not list"):
        device.prefetch([1, 2])  # type: ignore[arg-type]  # the wrong move


def test_a_prefetch_of_many_pieces_joins_those_that_are_close(device: nopin.Device) -> None:
    array = device.zeros((3000, 2, PAGE), np.uint8)
    device.set_budget("64MiB")
    assert 3000 * PAGE <= device.prefetch(array, (slice(None), 0)).result(10) <= 6000 * PAGE


def test_an_accelerator_computes_on_managed_arrays(device: nopin.Device) -> None:
    array = device.zeros((4 * MIB) // 8)
    array[:] = np.arange(array.size)
    with device.accelerator() as accelerator:
        assert accelerator.launch("sum", array).result(30) == array.size * (array.size - 1) / 2
        out = device.empty(array.shape)
        accelerator.launch("numpy.add", array, 1.0, out=out).result(30)
    assert np.array_equal(out, array + 1)


def test_a_device_budget_below_an_arenas_own_starves_nobody(device: nopin.Device) -> None:
    arena = device.arena(64 * MIB, "32MiB")
    array = arena.zeros(MIB, np.uint8)
    for n_pages in (1, 3, 16):
        device.set_budget(n_pages * PAGE)
        for value in (1, 2):
            array[:] = value
            assert (array == value).all()
        assert resident_bytes(arena.memory_fd) <= n_pages * PAGE
    device.set_budget("16MiB")
    array[:] = 3
    assert resident_bytes(arena.memory_fd) >= MIB


def test_a_lost_page_is_an_event_with_its_address_and_a_failed_prefetch(
    server: LocalServer, device: nopin.Device
) -> None:
    array = device.zeros((16, PAGE), np.uint8)
    array[:] = np.random.default_rng(3).integers(0, 256, array.shape, np.uint8)
    device.set_budget(2 * PAGE)
    damage_swap(server.pid)
    problems = [problem for row in range(16) if (problem := device.prefetch(array, row).exception(10))]
    assert len(problems) >= 14
    for problem in problems:
        assert isinstance(problem, nopin.PrefetchFailed)
        assert (problem.reason, problem.bytes_done) == ("lost", 0)
        assert "a page is lost" in str(problem)
    events = [event for event in device.events(1.0) if event.kind is nopin.AsyncEventType.ARENA_PAGES_LOST]
    assert len(events) == len(problems)
    for event in events:
        assert event.target is device.default_arena
        assert array.ctypes.data <= event.start < event.end <= array.ctypes.data + array.nbytes
        assert event.end - event.start == PAGE


def stripe(line: Line[Any], server: str, url: str) -> None:
    """Be a peer: read everything, then write every other row."""
    with nopin.Device(server) as device:
        remote = nopin.attach(url, device=device)
        total = 0
        for row in range(0, 1024, 32):
            data = remote[row : row + 32]
            remote[row : row + 32 : 2] = data[::2] + 1
            total += int(data.sum())
        line.send(total)


def test_a_peer_reads_and_writes_an_overcommitted_array(
    server: LocalServer, device: nopin.Device, peer_process: Callable[..., Child]
) -> None:
    array = device.zeros((1024, 512), np.int64)
    array[:] = np.arange(1024)[:, None]
    with device.share(array) as share:
        peer = peer_process(stripe, str(server.socket_path), share.url)
        assert peer.line.receive(30) == array.shape[1] * 1023 * 512
    assert np.array_equal(array[::2, 7], np.arange(0, 1024, 2) + 1)
    assert np.array_equal(array[1::2, 511], np.arange(1, 1024, 2))
    assert resident_bytes(device.default_arena.memory_fd) <= MIB + 512 * PAGE


_ENDING = """
import builtins, sys
import numpy as np, nopin

device = nopin.Device(sys.argv[1], budget="1MiB")
kept = [device.zeros(10) for _ in range(1000)]
cycle = [device.zeros(300_000)]
cycle.append(cycle)
builtins.late = np.late = device.zeros(100)

class Late:
    def __init__(self, array):
        self.array = array
    def __del__(self):
        print("late", self.array.sum(), flush=True)

last = Late(device.zeros(100) + 1)
block = nopin.numpy_memory(device)
block.__enter__()
inside = np.ones(1000)
print("end", inside.sum(), flush=True)
"""


def test_a_program_ends_with_arrays_everywhere(server: LocalServer) -> None:
    command = [sys.executable, "-c", _ENDING, str(server.socket_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["end 1000.0", "late 100.0"]
    with nopin.Device(str(server.socket_path)) as device:
        assert eventually(lambda: not [row for row in device.stat() if row["kind"] == "arena"]), "its arena is gone"


def test_a_child_forked_inside_a_block_gets_ordinary_memory(device: nopin.Device) -> None:
    with nopin.numpy_memory(device):
        inherited = np.full(100_000, 2.0)
        pid = os.fork()
        if pid == 0:
            try:
                made = np.ones(100_000) * inherited
                inside = device.default_arena.contains(made)
                made.resize(200_000, refcheck=False)
                os._exit(int(inside or made[:100_000].sum() != 200_000 or made[100_000:].any()))
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert device.default_arena.contains(inherited)
    assert inherited.sum() == 200_000


def test_a_budget_too_small_for_one_step_of_a_transfer_is_a_clear_error(device: nopin.Device) -> None:
    array = device.zeros((8 * MIB) // 8)
    array[:] = np.arange(array.size)
    device.set_budget("64KiB")
    with device.share(array) as share, nopin.attach(share.url, device=device) as remote:
        assert np.array_equal(remote[1000:3000], array[1000:3000])
        with pytest.raises(nopin.WorkError, match="its budget is smaller than one step"):
            remote[:]
    assert array.sum() == array.size * (array.size - 1) / 2, "nothing was lost"


def test_pages_that_a_device_has_just_used_leave_when_the_budget_wants_it(device: nopin.Device) -> None:
    device.set_budget("16MiB")
    array = device.zeros((2048, PAGE), np.uint8)
    array[:] = 3
    with device.share(array) as share, nopin.attach(share.url, device=device) as remote:
        for n_pages in (2000, 300, 16):
            assert (remote[:] == 3).all()
            device.set_budget(n_pages * PAGE)
            assert resident_bytes(device.default_arena.memory_fd) <= n_pages * PAGE
            device.set_budget("16MiB")


@pytest.mark.parametrize("pushes", [False, True])
def test_devices_need_no_fault_for_what_the_owner_touched_where_mappings_are_pushed(
    tmp_path: Path, pushes: bool
) -> None:
    with (
        LocalServer(tmp_path / "server.sock", ["--push-mappings"] if pushes else []) as server,
        nopin.Device(str(server.socket_path), budget="1MiB") as device,
    ):
        array = device.zeros(16 * PAGE, np.uint8)
        array[:] = 7
        with device.share(array) as shared, nopin.attach(shared.url, device=device) as remote:
            assert (remote[:] == 7).all()
            (region,) = [row for row in device.stat() if row["kind"] == "mr" and row["page_faults"] >= 0][:1]
            assert region["page_faults"] == (0 if pushes else 16 + (array.ctypes.data % PAGE != 0))
            remote[0] = 9  # a device's first store is heard all the same
            assert array[0] == 9


def test_pages_that_the_pager_takes_from_a_device_are_counted_by_region(device: nopin.Device) -> None:
    array = device.zeros((256, PAGE), np.uint8)
    array[:] = 7

    def invalidations() -> dict[int, int]:
        return {row["mrlen"]: row["page_invalidations"] for row in device.stat() if row["kind"] == "mr"}

    with (
        device.share(array[:100]) as shared,
        device.share(array[50:240]),
        nopin.attach(shared.url, device=device) as remote,
    ):
        assert (remote[:] == 7).all()
        device.set_budget(4 * PAGE)
        found = invalidations()
        assert 90 <= found[100 * PAGE] <= 100, "what the device had has left, but for what may stay"
        assert found[100 * PAGE] - 50 <= found[190 * PAGE] <= 50, "it is of both"
        device.set_budget("16MiB")
        array[200:] = 8
        assert invalidations() == found, "nobody took anything since"
    with device.share(array):
        assert invalidations()[256 * PAGE] == 0, "it was registered since"
