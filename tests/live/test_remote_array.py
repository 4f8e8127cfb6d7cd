"""Remote arrays behave as numpy arrays do, by direct copies (one server) and over UDP (two servers)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nopin
from nopin.lab.servers import LocalServer
from nopin.verbs.selection import SelectionError

Array = NDArray[Any]
Attach = Callable[..., nopin.RemoteArray]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalServer, LocalServer]]:
    folder = tmp_path_factory.mktemp("servers")
    with LocalServer(folder / "one.sock") as one, LocalServer(folder / "two.sock") as two:
        yield one, two


@pytest.fixture(scope="module", params=["direct", "udp"])
def attach(servers: tuple[LocalServer, LocalServer], request: pytest.FixtureRequest) -> Iterator[Attach]:
    """Share an array and attach to it; all is closed with the module."""
    one, two = servers
    with (
        nopin.Device(str(one.socket_path)) as owner,
        nopin.Device(str((one if request.param == "direct" else two).socket_path)) as user,
    ):

        def share_and_attach(array: object, access: str = "rwa") -> nopin.RemoteArray:
            return nopin.attach(owner.share(array, access=access).url, device=user)

        yield share_and_attach


def numbers(*shape: int, dtype: str = "<i4") -> Array:
    return np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)


KEYS: list[Any] = [
    ...,
    slice(None),
    3,
    -1,
    slice(2, 5),
    slice(None, None, -1),
    slice(5, 1, -2),
    slice(4, 4),
    (slice(None), 2),
    (slice(1, 6, 2), slice(None, None, -3)),
    (..., 0),
    (None, 2, ..., None),
    (1, 2, 3),
    np.int16(2),
]
SOURCES = {
    "c": numbers(7, 6, 5),
    "fortran": np.asfortranarray(numbers(7, 6, 5)),
    "part": numbers(10, 9, 8)[2:9, ::-1, 1:6][:, :6],
    "big-endian": numbers(7, 6, 5, dtype=">f8"),
    "bytes": numbers(7, 6, 5, dtype="u1"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_reading_equals_numpy(attach: Attach, source: str) -> None:
    owned = SOURCES[source].copy(order="K") if source != "part" else SOURCES[source]
    with attach(owned) as remote:
        assert (remote.shape, remote.dtype, remote.ndim) == (owned.shape, owned.dtype, owned.ndim)
        assert (remote.size, remote.nbytes, len(remote)) == (owned.size, owned.nbytes, len(owned))
        for key in KEYS:
            expected, found = owned[key], remote[key]
            assert type(found) is type(expected)
            assert np.shape(found) == np.shape(expected), key
            assert np.array_equal(found, expected), key


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_writing_equals_numpy(attach: Attach, key: Any) -> None:
    owned, expected = numbers(7, 6, 5), numbers(7, 6, 5)
    value = -1 - np.arange(expected[key].size).reshape(np.shape(expected[key]))
    expected[key] = value
    with attach(owned) as remote:
        remote[key] = value
    assert np.array_equal(owned, expected)


def test_values_are_converted_and_broadcast(attach: Attach) -> None:
    owned = np.zeros((4, 3), np.float32)
    with attach(owned) as remote:
        remote[1:3] = [1, 2, 3]
        remote[0] = 7.5
        remote[:, 2] = np.arange(4)[::-1]
        remote[3, :2] = np.array([[5, 6]])  # one more dimension, of size 1: numpy takes it
    assert owned.tolist() == [[7.5, 7.5, 3], [1, 2, 2], [1, 2, 1], [5, 6, 0]]


def test_a_value_that_does_not_fit_changes_nothing(attach: Attach) -> None:
    owned = numbers(4, 3)
    with attach(owned) as remote:
        for value in ([1, 2], "text", np.zeros((2, 4, 3))):
            with pytest.raises(nopin.UsageError):
                remote[...] = value
    assert np.array_equal(owned, numbers(4, 3))


def test_the_given_array_may_be_changed_at_once(attach: Attach) -> None:
    owned = np.zeros(1 << 20, np.uint8)
    with attach(owned) as remote:
        value = np.ones(1 << 20, np.uint8)
        operation = remote.write_async(..., value)
        value[:] = 2
        operation.result(10)
    assert (owned == 1).all()


def test_bytes_can_go_where_the_caller_says(attach: Attach) -> None:
    owned, mine = numbers(40, 30), np.zeros((10, 30), np.int32)
    with attach(owned) as remote:
        assert remote.read_async(slice(10, 20), out=mine).result() is mine
        assert np.array_equal(mine, owned[10:20])
        for key, out in (
            (slice(0, 9), mine),
            (slice(0, 10), mine.astype(np.int64)),
            (slice(0, 10), np.zeros((30, 10), np.int32).T),
            (slice(9, None, -1), mine),
        ):
            with pytest.raises(nopin.UsageError, match="out"):
                remote.read_async(key, out=out)


def test_arrays_without_dimensions_work(attach: Attach) -> None:
    owned = np.array(5.5)
    with attach(owned) as remote:
        assert remote[()] == 5.5
        assert remote[...].shape == ()
        remote[()] = -1
        with pytest.raises(TypeError):
            len(remote)
    assert owned == -1


def test_records_keep_their_fields(attach: Attach) -> None:
    kind = np.dtype([("id", "<i4"), ("where", "<f8", (3,)), ("name", "S5")], align=True)
    owned = np.zeros(10, kind)
    with attach(owned) as remote:
        assert remote.dtype == kind
        remote[3] = (7, (1.0, 2.0, 3.0), b"seven")
        remote[4:6] = np.array([(8, 0.5, b"8"), (9, 1.5, b"9")], kind)
        assert owned["id"].tolist() == [0, 0, 0, 7, 8, 9, 0, 0, 0, 0]
        assert (remote[3:6] == owned[3:6]).all()
        assert remote[3]["name"] == b"seven"
        with pytest.raises(nopin.UsageError, match="read a slice, then index"):
            remote["id"]


def test_numpy_reads_all_of_it(attach: Attach) -> None:
    owned = numbers(50, 20)
    with attach(owned) as remote:
        assert np.array_equal(np.asarray(remote), owned)
        assert np.asarray(remote, np.float64).dtype == np.float64
        assert int(np.sum(remote)) == int(owned.sum())
        with pytest.raises(ValueError, match="copy=False"):
            np.asarray(remote, copy=False)


def test_bad_indices_are_refused_without_a_transfer(attach: Attach) -> None:
    with attach(numbers(4, 3)) as remote:
        for key in (4, (0, 3), (0, 0, 0), -5):
            with pytest.raises(IndexError):
                remote[key]
        with pytest.raises(SelectionError, match="advanced"):
            remote[True]
        assert remote[3, 2] == 11


def test_many_runs_go_through_one_queue_pair(attach: Attach) -> None:
    owned = numbers(3000, 4)
    with attach(owned) as remote:
        assert np.array_equal(remote[:, 1], owned[:, 1])
        remote[::2, 3] = -7
    assert (owned[::2, 3] == -7).all()
    assert np.array_equal(owned[1::2], numbers(3000, 4)[1::2])


def test_large_transfers_are_cut_and_complete(attach: Attach) -> None:
    owned = np.arange(1 << 24, dtype=np.int64)  # 128 MiB: two pieces
    with attach(owned) as remote:
        found = remote[...]
        assert np.array_equal(found, owned)
        remote[...] = np.negative(found, out=found)
    assert np.array_equal(owned, found)


def test_operations_can_be_waited_for_in_any_order(attach: Attach) -> None:
    owned = numbers(5000, 7)
    with attach(owned) as remote:
        operations = [remote.read_async(i) for i in range(5000)]
        assert np.array_equal(operations[4999].result(20), owned[4999])
        assert all(operation.done() for operation in operations)
        assert all(np.array_equal(operations[i].result(), owned[i]) for i in (0, 17, 2500))


def test_a_timeout_leaves_the_operation_under_way(attach: Attach) -> None:
    owned = np.arange(1 << 23)
    with attach(owned) as remote:
        operation = remote.read_async(...)
        with pytest.raises(TimeoutError, match="still under way"):
            operation.result(timeout=0)
        assert np.array_equal(operation.result(timeout=20), owned)


def test_operations_are_awaitable(attach: Attach) -> None:
    owned = numbers(300, 40)

    async def read_all(remote: nopin.RemoteArray) -> list[Any]:
        async def row(i: int) -> Any:
            await remote.write_async((i, 0), -i)
            return await remote.read_async(i)

        return await asyncio.gather(*(row(i) for i in range(300)))

    with attach(owned) as remote:
        rows = asyncio.run(read_all(remote))
        assert np.array_equal(remote[7], rows[7]), "synchronous use goes on after the event loop"
    assert np.array_equal(np.stack(rows), owned)
    assert owned[299, 0] == -299


def test_threads_share_a_remote_array(attach: Attach) -> None:
    owned = numbers(8, 100)
    failures: list[object] = []

    def work(remote: nopin.RemoteArray, row: int) -> None:
        for i in range(100):
            if remote[row, i] != owned[row, i]:
                failures.append((row, i))
            remote[row, i] = 1000 * row + i

    with attach(owned) as remote:
        threads = [threading.Thread(target=work, args=(remote, row)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert np.array_equal(owned, np.arange(8)[:, None] * 1000 + np.arange(100))


def test_an_event_loop_and_a_thread_wait_at_once(attach: Attach) -> None:
    owned = numbers(400)
    found: list[int] = []

    async def in_loop(remote: nopin.RemoteArray) -> list[int]:
        return [int(await remote.read_async(i)) for i in range(200)]

    with attach(owned) as remote:
        thread = threading.Thread(target=lambda: found.extend(int(remote[i]) for i in range(200, 400)))
        thread.start()
        assert asyncio.run(in_loop(remote)) == list(range(200))
        thread.join(30)
    assert found == list(range(200, 400))


def test_closing_wakes_a_thread_that_waits(attach: Attach) -> None:
    for _ in range(10):
        remote = attach(np.zeros(1 << 22))
        operations = [remote.read_async(...) for _ in range(20)]
        threading.Timer(0.005, remote.close).start()
        error = operations[-1].exception(timeout=20)
        assert error is None or isinstance(error, nopin.Closed)


def test_closing_wakes_an_event_loop_that_waits(attach: Attach) -> None:
    async def last(remote: nopin.RemoteArray) -> BaseException | None:
        operations = [remote.read_async(...) for _ in range(20)]
        threading.Timer(0.005, remote.close).start()
        try:
            await operations[-1]
        except nopin.NopinError as error:
            return error
        return None

    for _ in range(5):
        error = asyncio.run(last(attach(np.zeros(1 << 22))))
        assert error is None or isinstance(error, nopin.Closed)


def test_atomics_return_what_was_there(attach: Attach) -> None:
    owned = np.array([5, -3, 2**63 - 1], np.int64)
    with attach(owned) as remote:
        assert remote.fetch_add(0, 10) == 5
        assert remote.fetch_add(1, -4) == -3
        assert remote.fetch_add(2, 1) == 2**63 - 1
        assert remote.compare_swap(0, 15, -1) == 15
        assert remote.compare_swap(0, 15, 99) == -1
    assert owned.tolist() == [-1, -7, -(2**63)]


def test_unsigned_atomics_use_all_64_bits(attach: Attach) -> None:
    owned = np.array([2**64 - 1], np.uint64)
    with attach(owned) as remote:
        assert remote.fetch_add(0, 2) == 2**64 - 1
        assert remote.compare_swap(0, 1, 2**63) == 1
    assert owned.tolist() == [2**63]


def test_atomics_of_many_threads_lose_nothing(attach: Attach) -> None:
    owned = np.zeros(1, np.int64)
    with attach(owned) as remote:
        threads = [threading.Thread(target=lambda: [remote.fetch_add(0, 1) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert owned[0] == 200


@pytest.mark.parametrize("dtype", ["f8", "i4", ">i8", "M8[s]"])
def test_atomics_on_other_types_are_refused(attach: Attach, dtype: str) -> None:
    with attach(np.zeros(4, dtype)) as remote, pytest.raises(nopin.UsageError, match="8-byte integers"):
        remote.fetch_add(0, 1)


def test_atomic_operands_and_indices_are_checked(attach: Attach) -> None:
    with attach(np.zeros(4, np.int64)) as remote:
        with pytest.raises(nopin.UsageError, match="does not fit"):
            remote.fetch_add(0, 2**63)
        with pytest.raises(nopin.UsageError, match="integers, not float"):
            remote.fetch_add(0, 1.5)  # type: ignore[arg-type]  # the wrong move
        with pytest.raises(nopin.UsageError, match="one element"):
            remote.fetch_add(slice(0, 2), 1)


def test_rights_of_the_share_are_known_before_a_transfer(attach: Attach) -> None:
    with attach(np.zeros(4, np.int64), access="r") as remote:
        assert remote[0] == 0
        with pytest.raises(nopin.UsageError, match="may not write"):
            remote[0] = 1
        with pytest.raises(nopin.UsageError, match="atomics"):
            remote.fetch_add(0, 1)


def test_read_and_write_rights_together_include_atomics(attach: Attach) -> None:
    numbers = np.zeros(4, np.int64)
    with attach(numbers, access="rw") as remote:
        assert remote.fetch_add(1, 5) == 0
    assert numbers.tolist() == [0, 5, 0, 0]


def test_after_close_nothing_works(attach: Attach) -> None:
    remote = attach(numbers(1 << 20))
    late = remote.read_async(...)
    remote.close()
    remote.close()
    with pytest.raises(nopin.Closed, match="was closed"):
        remote[0]
    if late.exception() is not None:
        with pytest.raises(nopin.Closed):
            late.result()
